/* softmax(scale * q k) v. A query's result depends neither on the queries of its batch, nor on keys
 * that it does not see, nor on the number of threads.
 *
 * Keys go in blocks. A block gives every query its largest score, the sum of the exponentials and
 * the weighted sum of the values; then a query's blocks are merged in order. MLX multiplies with a
 * reference BLAS on one core: 20 ms for a query of 32 heads at 4096 keys, where this takes 2.
 */
enum { KEYS = 256, QUERIES = 4, WIDEST = 256, PARTS = 4 << 20 /* bytes of blocks' results */ };

struct attention {
    const float *q, *k, *v; /* q [heads, rows, columns]; k, v [kv heads, keys, columns] */
    float *out, *parts;     /* parts [heads, rows at hand, blocks, columns + 2] */
    size_t heads, kv_heads, rows, keys, columns, k_stride, v_stride, blocks;
    size_t first, count; /* of the rows at hand */
    float scale;
    int causal;
};

/* How many keys from `start` on a row sees, at most n. */
static size_t seen(const struct attention *a, size_t row, size_t start, size_t n) {
    if (!a->causal) return n;
    const size_t all = a->keys - a->rows + row + 1;
    return all <= start ? 0 : smaller(all - start, n);
}

static void scores(const struct attention *a, const float *const *q, const float *k, size_t n,
                   float (*to)[KEYS]) {
    for (size_t j = 0; j < n; j += 4) {
        vf sums[QUERIES][4];
        const float *key[4];
        UNROLL for (int u = 0; u < 4; u++) key[u] = k + smaller(j + (size_t)u, n - 1) * a->columns;
        UNROLL for (int t = 0; t < QUERIES; t++)
            UNROLL for (int u = 0; u < 4; u++) sums[t][u] = v_set(0);
        for (size_t c = 0; c < a->columns; c += LANES) {
            vf keys[4];
            UNROLL for (int u = 0; u < 4; u++) keys[u] = v_load(key[u] + c);
            UNROLL for (int t = 0; t < QUERIES; t++) {
                const vf query = v_load(q[t] + c);
                UNROLL for (int u = 0; u < 4; u++) sums[t][u] = v_fma(query, keys[u], sums[t][u]);
            }
        }
        UNROLL for (int t = 0; t < QUERIES; t++)
            UNROLL for (int u = 0; u < 4; u++)
                if (j + (size_t)u < n) to[t][j + (size_t)u] = a->scale * v_sum(sums[t][u]);
    }
}

/* Scores to exponentials; those beyond `n` to 0. The part gets the largest score and the sum. */
static void exponentials(float *s, size_t n, size_t most, float *part) {
    float largest = -INFINITY, sum = 0;
    for (size_t j = 0; j < n; j++) largest = s[j] > largest ? s[j] : largest;
    for (size_t j = 0; j < n; j++) sum += s[j] = expf(s[j] - largest);
    for (size_t j = n; j < most; j++) s[j] = 0;
    part[0] = largest;
    part[1] = sum;
}

static void attention_piece(void *context, size_t i, int thread) {
    (void)thread;
    const struct attention *a = context;
    const size_t head = i / a->blocks, block = i % a->blocks, start = block * KEYS;
    const size_t n = smaller(KEYS, a->keys - start), group = a->heads / a->kv_heads;
    const size_t width = a->columns + 2, queries = group * a->count;
    const float *k = a->k + head * a->k_stride + start * a->columns;
    const float *v = a->v + head * a->v_stride + start * a->columns;
    for (size_t first = 0; first < queries; first += QUERIES) {
        float s[QUERIES][KEYS], *part[QUERIES];
        const float *q[QUERIES];
        size_t see[QUERIES], most = 0;
        for (size_t t = 0; t < QUERIES; t++) { /* past the end, the last one again */
            const size_t at = smaller(first + t, queries - 1);
            const size_t h = head * group + at / a->count, row = at % a->count;
            q[t] = a->q + (h * a->rows + a->first + row) * a->columns;
            part[t] = a->parts + ((h * a->count + row) * a->blocks + block) * width;
            see[t] = seen(a, a->first + row, start, n);
            most = see[t] > most ? see[t] : most;
        }
        const size_t unlike = smaller(QUERIES, queries - first);
        if (!most) {
            for (size_t t = 0; t < unlike; t++) part[t][1] = 0;
            continue;
        }
        scores(a, q, k, most, s);
        for (size_t t = 0; t < unlike; t++) exponentials(s[t], see[t], most, part[t]);
        for (size_t t = unlike; t < QUERIES; t++) memcpy(s[t], s[unlike - 1], 4 * most);
        for (size_t c = 0; c < a->columns; c += 2 * LANES) {
            vf sums[QUERIES][2];
            UNROLL for (int t = 0; t < QUERIES; t++) sums[t][0] = sums[t][1] = v_set(0);
            for (size_t j = 0; j < most; j++) {
                const float *value = v + j * a->columns + c;
                const vf left = v_load(value), right = v_load(value + LANES);
                UNROLL for (int t = 0; t < QUERIES; t++) {
                    const vf weight = v_set(s[t][j]);
                    sums[t][0] = v_fma(weight, left, sums[t][0]);
                    sums[t][1] = v_fma(weight, right, sums[t][1]);
                }
            }
            UNROLL for (int t = 0; t < QUERIES; t++)
                if ((size_t)t < unlike) memcpy(part[t] + 2 + c, sums[t], 2 * sizeof(vf));
        }
    }
}

static void merge_piece(void *context, size_t head, int thread) {
    (void)thread;
    const struct attention *a = context;
    for (size_t row = 0; row < a->count; row++) {
        const float *part = a->parts + (head * a->count + row) * a->blocks * (a->columns + 2);
        float *out = a->out + (head * a->rows + a->first + row) * a->columns;
        float largest = -INFINITY, sum = 0;
        memset(out, 0, 4 * a->columns);
        for (size_t b = 0; b < a->blocks; b++, part += a->columns + 2) {
            if (part[1] == 0) continue;
            const float most = part[0] > largest ? part[0] : largest;
            const float old = expf(largest - most), new = expf(part[0] - most);
            for (size_t c = 0; c < a->columns; c++) out[c] = out[c] * old + part[2 + c] * new;
            sum = sum * old + part[1] * new;
            largest = most;
        }
        for (size_t c = 0; c < a->columns; c++) out[c] /= sum;
    }
}

int flash_attention(const float *q, const float *k, const float *v, float *out, uint64_t heads,
                    uint64_t kv_heads, uint64_t rows, uint64_t keys, uint64_t columns,
                    uint64_t k_stride, uint64_t v_stride, float scale, int causal) {
    struct attention a = {q, k, v, out, NULL, heads, kv_heads, rows, keys, columns,
                          k_stride, v_stride, (keys + KEYS - 1) / KEYS, 0, 0, scale, causal};
    const size_t row = 4 * heads * a.blocks * (columns + 2);
    const size_t most = smaller(rows, at_least_1(PARTS / row));
    pool_enter();
    a.parts = pool_scratch(row * most);
    for (; a.parts && a.first < rows; a.first += a.count) {
        a.count = smaller(most, rows - a.first);
        pool_run(attention_piece, &a, kv_heads * a.blocks);
        pool_run(merge_piece, &a, heads);
    }
    pool_leave();
    return !a.parts;
}
