/* Least squares for affine codes: for every group, the scale and bias that minimise the (weighted)
 * squared error of `scale · code + bias`, and the codes.
 *
 * Groups lie side by side, one in each lane. A lane's result depends on its own group alone, so it
 * is the same wherever a range of groups is cut. The caller owns all memory and the threads.
 *
 * A group that comes as codes of up to 4 bits is a few points (a code, and how often it occurs), 16
 * for each group of the source in it; any other group is its values. Points are sorted into bins,
 * and a table says which cuts of the bins into levels are tried: from sums over bins, the best
 * scale and bias of a cut are a formula. Where a bin is one point and the table holds every cut
 * that can be best (cuts.py), the best of them is the global optimum. Otherwise alternating steps
 * go on from it: nearest codes, then the best scale and bias.
 *
 * Sums are in double: in float, weights that differ by 1e7 would leave nothing of the light ones,
 * and the sums over a histogram would not be exact. Products and sums must not be contracted:
 * native/build.py compiles without.
 */
#include "fit_numbers.h"

enum { MOST_POINTS = 128, CODES = 16, MOST_PARTS = 4, MOST_BINS = 64, MOST_ROUNDS = 12 };

/* Mirrored in fit.py. */
struct fit {
    const void *source; /* packed codes, or float32 where parts is 0 */
    const void *source_scales, *source_biases;
    const float *importance; /* one a column, or NULL */
    const uint8_t *table;    /* [cuts, levels - 1]: the bin that each level begins with */
    void *codes, *scales, *biases; /* results */
    uint64_t groups_per_row;
    uint32_t group, parts; /* groups of the source in one: 1, 2 or 4 */
    uint32_t source_bits, bits, type, bins, cuts; /* cuts: an even number */
};

struct block {
    lanes x[MOST_POINTS], w[MOST_POINTS]; /* mean 0 and sum 1: a formula is shorter then */
    lanes a, center;                      /* a weight is a · x + center */
    lanes low, high;                      /* of x, weights of 0 included */
    uint8_t point[LANES][MOST_POINTS];    /* that each weight is, where there are codes */
    uint8_t seen[LANES][MOST_PARTS * CODES]; /* how many each point is */
    int points;
};

struct line {
    lanes scale, bias;
};

/* -- the points of a group ---------------------------------------------------------------------- */

/* A histogram as a sum of vectors with a single 1. Counters in memory wait for each other: with
 * them, gathering took 80 ns a group, not 47 (Zen 5). */
typedef uint8_t counts __attribute__((vector_size(CODES)));

static inline counts one(uint8_t code) {
    static const uint8_t ones[CODES][CODES] = {
        [0][0] = 1, [1][1] = 1, [2][2] = 1,   [3][3] = 1,   [4][4] = 1,   [5][5] = 1,
        [6][6] = 1, [7][7] = 1, [8][8] = 1,   [9][9] = 1,   [10][10] = 1, [11][11] = 1,
        [12][12] = 1, [13][13] = 1, [14][14] = 1, [15][15] = 1};
    counts c;
    memcpy(&c, ones[code], CODES);
    return c;
}

static void take_codes(const struct fit *f, size_t g, int l, struct block *b) {
    const int n = f->group / f->parts;
    for (uint32_t p = 0; p < f->parts; p++) {
        const size_t of = g * f->parts + p;
        const uint8_t *from = (const uint8_t *)f->source + of * n * f->source_bits / 8;
        const double scale = get(f->source_scales, of, f->type);
        const double bias = get(f->source_biases, of, f->type);
        uint8_t *point = b->point[l] + p * n;
        if (f->source_bits == 4) unpack(from, point, n, 4);
        else unpack(from, point, n, 3);
        counts even = {0}, odd = {0};
        for (int i = 0; i < n; i += 2) even += one(point[i]), odd += one(point[i + 1]);
        even += odd;
        memcpy(b->seen[l] + p * CODES, &even, CODES);
        if (f->parts == 1) {
            b->a[l] = scale, b->center[l] = bias;
        } else {
            for (int k = 0; k < CODES; k++) b->x[p * CODES + k][l] = scale * k + bias;
            for (int i = 0; i < n; i++) point[i] += p * CODES;
        }
    }
}

static void weigh_codes(const struct fit *f, const float *importance, int l, struct block *b) {
    const uint8_t *point = b->point[l];
    double weights[4][MOST_PARTS * CODES] = {{0}}; /* four: equal ones wait for each other */
    for (uint32_t i = 0; i < f->group; i += 4)
        for (int k = 0; k < 4; k++) weights[k][point[i + k]] += importance[i + k];
    for (int k = 0; k < b->points; k++)
        b->w[k][l] = weights[0][k] + weights[1][k] + weights[2][k] + weights[3][k];
}

static void take_values(const struct fit *f, size_t g, const float *importance, int l,
                        struct block *b) {
    const float *from = (const float *)f->source + g * f->group;
    for (uint32_t i = 0; i < f->group; i++) b->x[i][l] = from[i];
    for (uint32_t i = 0; importance && i < f->group; i++) b->w[i][l] = importance[i];
}

/* Lanes beyond the last group have it again. False where a number is not finite. */
static int gather(const struct fit *f, size_t first, size_t last, struct block *b) {
    const int codes = f->parts != 0, n = codes ? f->parts * CODES : f->group;
    lanes plain[MOST_POINTS], sum = {0}, mean = {0};
    b->points = n, b->a = all(1), b->center = all(0);
    b->low = all(INFINITY), b->high = all(-INFINITY);
    for (int l = 0; l < LANES; l++) {
        const size_t g = first + l < last ? first + l : last - 1;
        const size_t column = g % f->groups_per_row * f->group;
        const float *importance = f->importance ? f->importance + column : NULL;
        if (!codes) take_values(f, g, importance, l, b);
        else take_codes(f, g, l, b);
        if (codes && importance) weigh_codes(f, importance, l, b);
    }
    for (int i = 0; i < n; i++) {
        plain[i] = all(1);
        if (f->parts == 1) b->x[i] = all(i);
        for (int l = 0; codes && l < LANES; l++) plain[i][l] = b->seen[l][i];
        b->low = pick(plain[i] > 0, lesser(b->x[i], b->low), b->low);
        b->high = pick(plain[i] > 0, greater(b->x[i], b->high), b->high);
        if (f->importance) sum += b->w[i];
        b->center += b->x[i] * 0; /* NaN where a value is not finite */
    }
    const mask weighted = sum > 0; /* a group without any weight is fitted as if all were equal */
    sum = all(0);
    for (int i = 0; i < n; i++) {
        b->w[i] = pick(weighted, b->w[i], plain[i]);
        sum += b->w[i], mean += b->w[i] * b->x[i];
    }
    mean /= sum;
    for (int i = 0; i < n; i++) b->x[i] -= mean, b->w[i] /= sum;
    b->low -= mean, b->high -= mean, b->center += b->a * mean;
    return !any((b->a * 0 != 0) | (b->center * 0 != 0));
}

/* -- scale and bias ----------------------------------------------------------------------------- */

/* The best cut of the table. r and m are sums of w and of w · x over all bins from one on, so that
 * q = Σ w·code is the sum of r over a cut's levels, and v = Σ w·x·code that of m. As the mean of x
 * is 0, the best scale is v / den with den = Σ w·code² - q², the bias -scale · q, and v² / den is
 * the share of the variance that they explain: compared crosswise, without a division.
 *
 * A comparison waits for the one before it, so the halves of the table are searched side by side:
 * the fit takes 198 ns a group then, not 264, and 194 with quarters (Zen 5). */
static inline struct line search(const struct fit *f, const lanes *r, const lanes *m,
                                 const int steps) {
    const size_t half = (size_t)(f->cuts / 2) * steps;
    lanes best[2], best_den[2], best_q[2];
    for (int p = 0; p < 2; p++) best[p] = best_q[p] = all(0), best_den[p] = all(1);
    for (const uint8_t *cut = f->table; cut < f->table + half; cut += steps) {
        for (int p = 0; p < 2; p++) {
            lanes q = {0}, sums = {0}, v = {0}; /* Σ w·code² = Σ (2k - 1)·r = 2 Σ k·r - Σ r */
            for (int k = steps - 1; k >= 0; k--) {
                const uint8_t bin = cut[p * half + k];
                q += r[bin], sums += q, v += m[bin];
            }
            const lanes den = 2 * sums - q - q * q, gain = v * v;
            const mask better = (gain * best_den[p] > best[p] * den) & (den > 0);
            best[p] = pick(better, gain, best[p]), best_q[p] = pick(better, q, best_q[p]);
            best_den[p] = pick(better, den, best_den[p]);
        }
    }
    const mask second = best[1] * best_den[0] > best[0] * best_den[1];
    const lanes gain = pick(second, best[1], best[0]), q = pick(second, best_q[1], best_q[0]);
    lanes v = {0}; /* never below 0: from any bin on, x is above the mean of all */
    for (int l = 0; l < LANES; l++) v[l] = sqrt(gain[l]);
    const lanes scale = v / pick(second, best_den[1], best_den[0]);
    return (struct line){scale, -scale * q};
}

static struct line cut(const struct fit *f, const struct block *b) {
    lanes r[MOST_BINS + 1], m[MOST_BINS + 1];
    memset(r, 0, (f->bins + 1) * sizeof *r), memset(m, 0, (f->bins + 1) * sizeof *m);
    const lanes to_bin = over(all(f->bins), b->high - b->low);
    for (int i = 0; i < b->points; i++) {
        const lanes above = greater((b->x[i] - b->low) * to_bin, all(0));
        const lanes place = lesser(above, all(f->bins - 1)), wx = b->w[i] * b->x[i];
        for (int l = 0; l < LANES; l++) {
            const int bin = f->parts == 1 ? i : (int)place[l];
            r[bin][l] += b->w[i][l], m[bin][l] += wx[l];
        }
    }
    for (int k = f->bins - 1; k >= 0; k--) r[k] += r[k + 1], m[k] += m[k + 1];
    if (f->bits == 2) return search(f, r, m, 3);
    return f->bits == 3 ? search(f, r, m, 7) : search(f, r, m, 15);
}

static inline lanes code(lanes x, struct line s, lanes inverse, lanes largest) {
    return nearest(greater(lesser((x - s.bias) * inverse, largest), all(0)), all(1));
}

/* Alternating steps from there, until a lane gains nothing more: then it stays as it is. */
static struct line refine(const struct block *b, struct line s, int largest) {
    lanes best = {0};
    mask open = all(1) > 0;
    for (int round = 0; round < MOST_ROUNDS && any(open); round++) {
        lanes q = {0}, squares = {0}, v = {0};
        const lanes inverse = over(all(1), s.scale);
        for (int i = 0; i < b->points; i++) {
            const lanes c = code(b->x[i], s, inverse, all(largest)), wc = b->w[i] * c;
            q += wc, squares += wc * c, v += wc * b->x[i];
        }
        const lanes den = squares - q * q, gain = pick(den > 0, over(v * v, den), all(0));
        open &= gain > best * (1 + 1e-12);
        best = pick(open, gain, best);
        s.scale = pick(open, over(v, den), s.scale);
        s.bias = pick(open, -s.scale * q, s.bias);
    }
    return s;
}

/* For a scale that is of the type already: nearest codes, the bias that fits them best, rounded,
 * and nearest codes again. No step makes the error larger, which is returned. */
static lanes settle(const struct fit *f, const struct block *b, struct line *s) {
    const lanes largest = all((1 << f->bits) - 1), inverse = over(all(1), s->scale);
    lanes error = {0};
    for (int round = 0; round < 2; round++) {
        lanes q = {0};
        error = all(0);
        for (int i = 0; i < b->points; i++) {
            const lanes ax = b->a * b->x[i], c = code(ax, *s, inverse, largest);
            const lanes off = ax - s->scale * c - s->bias;
            q += b->w[i] * c, error += b->w[i] * off * off;
        }
        if (!round) s->bias = to_type(b->center - s->scale * q, f->type) - b->center;
    }
    return error;
}

static void emit(const struct fit *f, const struct block *b, struct line s, size_t first,
                 size_t last) {
    const lanes largest = all((1 << f->bits) - 1), inverse = over(all(1), s.scale);
    uint8_t of_points[LANES][MOST_POINTS], codes[MOST_POINTS];
    for (int i = 0; i < b->points; i++) {
        const lanes c = code(b->a * b->x[i], s, inverse, largest);
        for (int l = 0; l < LANES; l++) of_points[l][i] = (uint8_t)c[l];
    }
    for (size_t g = first; g < last; g++) {
        const int l = (int)(g - first), n = f->group;
        uint8_t *to = (uint8_t *)f->codes + g * n * f->bits / 8;
        for (int i = 0; i < n; i++) codes[i] = of_points[l][f->parts ? b->point[l][i] : i];
        if (f->bits == 2) pack(codes, to, n, 2);
        else if (f->bits == 3) pack(codes, to, n, 3);
        else pack(codes, to, n, 4);
        put(f->scales, g, f->type, s.scale[l]);
        put(f->biases, g, f->type, s.bias[l] + b->center[l]);
    }
}

/* Groups first to last, last excluded. Returns 1 where a weight is not finite. */
int flash_fit(const struct fit *f, uint64_t first, uint64_t last) {
    struct block b;
    const int largest = (1 << f->bits) - 1;
    for (; first < last; first += LANES) {
        const size_t end = last - first < LANES ? last : first + LANES;
        if (!gather(f, first, end, &b)) return 1;
        const struct line fitted = refine(&b, cut(f, &b), largest);
        struct line s = {to_type(fitted.scale * b.a, f->type), fitted.bias * b.a};
        /* The extremes as outermost codes: once in a while better, after rounding. */
        const lanes one_end = b.a * b.low, other_end = b.a * b.high;
        const lanes low = lesser(one_end, other_end), high = greater(one_end, other_end);
        struct line wide = {to_type((high - low) / largest, f->type),
                            to_type(low + b.center, f->type) - b.center};
        const lanes error = settle(f, &b, &s), wide_error = settle(f, &b, &wide);
        s.scale = pick(wide_error < error, wide.scale, s.scale);
        s.bias = pick(wide_error < error, wide.bias, s.bias);
        emit(f, &b, s, first, end);
    }
    return 0;
}
