/* The gated delta rule, token after token: a state [value columns, key columns] a head, of which
 * every row goes its own way. With s a row, v its value and k, q the head's key and query:
 *
 *     s = g s;  s = s + beta (v - s·k) k;  y = s·q
 *
 * MLX takes a dozen operations for each token of a prompt, each over all of the state. */
enum { STATE_ROWS = 16 }; /* of a piece: 8 KB of state, which stay in the nearest cache */

struct delta {
    const float *q, *k, *v, *g, *beta; /* [tokens, heads, ...]; q and k have key_heads */
    float *state, *y;
    size_t tokens, key_heads, heads, keys, values;
};

static float delta_step(float *s, const float *k, const float *q, size_t n, float g, float beta,
                        float value) {
    vf sums = v_set(0), out = v_set(0);
    const vf decay = v_set(g), zero = v_set(0);
    for (size_t c = 0; c < n; c += LANES) {
        const vf kept = v_fma(v_load(s + c), decay, zero);
        memcpy(s + c, &kept, sizeof kept);
        sums = v_fma(kept, v_load(k + c), sums);
    }
    const vf delta = v_set((value - v_sum(sums)) * beta);
    for (size_t c = 0; c < n; c += LANES) {
        const vf moved = v_fma(delta, v_load(k + c), v_load(s + c));
        memcpy(s + c, &moved, sizeof moved);
        out = v_fma(moved, v_load(q + c), out);
    }
    return v_sum(out);
}

static void delta_piece(void *context, size_t i, int thread) {
    (void)thread;
    const struct delta *d = context;
    const size_t per = (d->values + STATE_ROWS - 1) / STATE_ROWS, head = i / per;
    const size_t first = i % per * STATE_ROWS, end = smaller(first + STATE_ROWS, d->values);
    const size_t key_head = head / (d->heads / d->key_heads);
    for (size_t t = 0; t < d->tokens; t++) {
        const size_t at = t * d->heads + head, key = (t * d->key_heads + key_head) * d->keys;
        for (size_t row = first; row < end; row++)
            d->y[at * d->values + row] = delta_step(
                d->state + (head * d->values + row) * d->keys, d->k + key, d->q + key, d->keys,
                d->g[at], d->beta[at], d->v[at * d->values + row]);
    }
}

void flash_gated_delta(const float *q, const float *k, const float *v, const float *g,
                       const float *beta, float *state, float *y, uint64_t tokens,
                       uint64_t key_heads, uint64_t heads, uint64_t keys, uint64_t values) {
    struct delta d = {q, k, v, g, beta, state, y, tokens, key_heads, heads, keys, values};
    pool_enter();
    pool_run(delta_piece, &d, heads * ((values + STATE_ROWS - 1) / STATE_ROWS));
    pool_leave();
}
