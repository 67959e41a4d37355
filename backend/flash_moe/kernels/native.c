/* Mixture-of-Experts products on the CPU, straight from MLX's affine codes, everything in float32.
 *
 * A weight is scale * code + bias. With AVX-512 the values that a group can take are one register,
 * so a weight costs a shift and a lookup (native_simd.h). A token's result depends neither on the
 * others of its batch nor on the number of threads (native_product.h).
 *
 * This file owns its threads and its scratch memory; the caller owns all else.
 */
#define _GNU_SOURCE
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../native/pool.h"
#include "native_product.h"

struct expert {
    struct matrix gate, up, down;
};

struct spec { /* of a record in two planes: its first one, and both */
    struct expert first, full;
    uint64_t parts; /* addresses of an expert: PLANE_PARTS, and where there are two planes PLANE_PARTS more */
};

enum { PLANE_PARTS = 9 }; /* gate, up and down: weight, scales and biases of each */

enum { BLOCK = 40 }; /* rows a piece of work: a multiple of the 2, 4, 5 and 8 of a tile */

static inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
static inline size_t at_least_1(size_t n) { return n ? n : 1; }
static inline size_t blocks(size_t rows) { return (rows + BLOCK - 1) / BLOCK; }

/* Scratch is kept for the next call; what needs more than this goes in chunks of tokens. */
enum { SCRATCH = 32 << 20 };

/* MLX gives memory that is 8 past a border of 16. A vector across two lines costs two loads: with
 * 4 tokens a tile, 0.09 ms instead of 0.05 for 1024 x 4096. So x is copied, 1 us a token. */
static inline size_t padded(size_t columns) { return (columns + 15) / 16 * 16; }

static void align_rows(float *to, const float *from, size_t rows, size_t columns) {
    for (size_t r = 0; r < rows; r++)
        memcpy(to + r * padded(columns), from + r * columns, 4 * columns);
}

/* -- resident matrix ------------------------------------------------------------------------ */

struct matmul {
    const struct matrix *m;
    const float *x;
    float *out;
    size_t tokens;
};

static void matmul_piece(void *context, size_t i, int thread) {
    (void)thread;
    const struct matmul *job = context;
    const size_t row = i * BLOCK, end = smaller(row + BLOCK, job->m->rows);
    for (size_t t = 0; t < job->tokens; t += TOKENS) {
        const size_t n = smaller(TOKENS, job->tokens - t);
        const float *x[TOKENS];
        float *out[TOKENS];
        for (size_t j = 0; j < n; j++) {
            x[j] = job->x + (t + j) * padded(job->m->columns);
            out[j] = job->out + (t + j) * job->m->rows + row;
        }
        product(job->m, row, end, (int)n, x, out);
    }
}

int flash_matmul(const struct matrix *m, const float *x, float *out, uint64_t tokens) {
    const size_t most = at_least_1(SCRATCH / (4 * padded(m->columns)));
    pool_enter();
    for (size_t t = 0; t < tokens; t += most) {
        struct matmul job = {m, NULL, out + t * m->rows, smaller(most, tokens - t)};
        float *copy = pool_scratch(4 * job.tokens * padded(m->columns));
        if (!copy) {
            pool_leave();
            return 1;
        }
        align_rows(copy, x + t * m->columns, job.tokens, m->columns);
        job.x = copy;
        pool_run(matmul_piece, &job, blocks(m->rows));
    }
    pool_leave();
    return 0;
}

/* -- experts -------------------------------------------------------------------------------- */

struct experts {
    const struct spec *s;
    const uint64_t *parts;      /* of each slot, spec.parts */
    const struct expert *found; /* the expert of each run, its parts at their addresses */
    const float *x, *weights;
    float *out, *h, *d; /* h [pairs, intermediate]; d [threads, pairs, BLOCK] */
    const uint64_t *order; /* slot << 33 | full << 32 | pair, sorted */
    const size_t *starts;  /* of each run of one slot and choice in order, and the end */
    size_t tokens, k, runs;
};

/* Up to TOKENS pairs of one run from order[i] on, their numbers in `pairs`. */
static int next_pairs(const struct experts *job, size_t i, size_t end, size_t *pairs) {
    const int n = (int)smaller(TOKENS, end - i);
    for (int j = 0; j < n; j++) pairs[j] = (uint32_t)job->order[i + (size_t)j];
    return n;
}

static void place(struct matrix *m, const uint64_t *part, int full) {
    m->weight = part[0];
    m->scales = part[full ? PLANE_PARTS + 1 : 1];
    m->biases = part[full ? PLANE_PARTS + 2 : 2];
    m->low = full ? part[PLANE_PARTS] : 0;
}

static struct expert place_expert(const struct experts *job, uint64_t key) {
    const int full = key & 1 && job->s->parts > PLANE_PARTS;
    const uint64_t *parts = job->parts + (key >> 1) * job->s->parts;
    struct expert e = full ? job->s->full : job->s->first;
    place(&e.gate, parts, full);
    place(&e.up, parts + 3, full);
    place(&e.down, parts + 6, full);
    return e;
}

/* h = silu(gate x) * up x, a block of rows of one run for all its tokens. */
static void hidden_piece(void *context, size_t i, int thread) {
    (void)thread;
    const struct experts *job = context;
    const size_t rows = job->s->first.gate.rows, per = blocks(rows), run = i / per;
    const size_t row = i % per * BLOCK, end = smaller(row + BLOCK, rows);
    const size_t last = job->starts[run + 1];
    const struct expert *s = job->found + run;
    float gate[TOKENS][BLOCK], up[TOKENS][BLOCK];
    float *const gates[TOKENS] = {gate[0], gate[1], gate[2], gate[3]};
    float *const ups[TOKENS] = {up[0], up[1], up[2], up[3]};
    for (size_t p = job->starts[run]; p < last; p += TOKENS) {
        size_t pairs[TOKENS];
        const float *x[TOKENS];
        const int n = next_pairs(job, p, last, pairs);
        for (int j = 0; j < n; j++) x[j] = job->x + pairs[j] / job->k * padded(s->gate.columns);
        product(&s->gate, row, end, n, x, gates);
        product(&s->up, row, end, n, x, ups);
        for (int j = 0; j < n; j++) {
            float *h = job->h + pairs[j] * padded(rows);
            for (size_t r = row; r < end; r++) {
                const float g = gate[j][r - row];
                h[r] = g / (1 + expf(-g)) * up[j][r - row];
            }
        }
    }
}

/* down h, a block of rows for all pairs; where there are weights, summed in the order of k. Only a
 * block of every pair's output exists at a time: 32 of 4096 rows. */
static void down_piece(void *context, size_t i, int thread) {
    const struct experts *job = context;
    const size_t rows = job->s->first.down.rows, columns = job->s->first.down.columns;
    const size_t row = i * BLOCK, end = smaller(row + BLOCK, rows);
    float *d = job->weights ? job->d + (size_t)thread * job->tokens * job->k * BLOCK : NULL;
    for (size_t run = 0; run < job->runs; run++) {
        const struct matrix *down = &job->found[run].down;
        const size_t last = job->starts[run + 1];
        for (size_t p = job->starts[run]; p < last; p += TOKENS) {
            size_t pairs[TOKENS];
            const float *h[TOKENS];
            float *out[TOKENS];
            const int n = next_pairs(job, p, last, pairs);
            for (int j = 0; j < n; j++) {
                h[j] = job->h + pairs[j] * padded(columns);
                out[j] = d ? d + pairs[j] * BLOCK : job->out + pairs[j] * rows + row;
            }
            product(down, row, end, n, h, out);
        }
    }
    for (size_t t = 0; d && t < job->tokens; t++) {
        float *y = job->out + t * rows;
        for (size_t r = row; r < end; r++) y[r] = 0;
        for (size_t j = t * job->k; j < (t + 1) * job->k; j++)
            for (size_t r = row; r < end; r++) y[r] += job->weights[j] * d[j * BLOCK + r - row];
    }
}

static int by_slot(const void *a, const void *b) {
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static int experts_chunk(struct experts *job, const uint32_t *slots) {
    const struct expert *s = &job->s->first;
    const size_t pairs = job->tokens * job->k, hidden = s->gate.columns;
    const size_t x = job->tokens * padded(hidden), h = pairs * padded(s->gate.rows);
    const size_t d = job->weights ? (size_t)pool_threads() * pairs * BLOCK : 0;
    const size_t lists = pairs * 8 + (pairs + 1) * sizeof(size_t) + pairs * sizeof *job->found;
    float *scratch = pool_scratch(4 * (x + h + d) + lists);
    if (!scratch) return 1;
    align_rows(scratch, job->x, job->tokens, hidden);
    job->x = scratch;
    job->h = scratch + x;
    job->d = job->h + h;
    uint64_t *order = (uint64_t *)(job->d + d);
    size_t *starts = (size_t *)(order + pairs);
    struct expert *found = (struct expert *)(starts + pairs + 1);
    /* The choice goes from the top to the bottom: both kinds of a slot's pairs share its cache. */
    for (size_t i = 0; i < pairs; i++)
        order[i] = (uint64_t)(slots[i] << 1 | slots[i] >> 31) << 32 | i;
    qsort(order, pairs, 8, by_slot);
    job->runs = 0;
    for (size_t i = 0; i < pairs; i++)
        if (i == 0 || order[i] >> 32 != order[i - 1] >> 32) {
            found[job->runs] = place_expert(job, order[i] >> 32);
            starts[job->runs++] = i;
        }
    starts[job->runs] = pairs;
    job->order = order;
    job->starts = starts;
    job->found = found;
    pool_run(hidden_piece, job, job->runs * blocks(s->gate.rows));
    pool_run(down_piece, job, blocks(s->down.rows));
    return 0;
}

int flash_experts(const struct spec *s, const uint64_t *parts, const float *x, const uint32_t *slots,
                  const float *weights, float *out, uint64_t tokens, uint64_t k) {
    const size_t most = at_least_1(SCRATCH / (4 * k * padded(s->first.gate.rows)));
    const size_t hidden = s->first.down.rows;
    int failed = 0;
    pool_enter();
    for (size_t t = 0; t < tokens && !failed; t += most) {
        struct experts job = {.s = s, .parts = parts, .x = x + t * hidden, .k = k};
        job.tokens = smaller(most, tokens - t);
        job.weights = weights ? weights + t * k : NULL;
        job.out = out + t * hidden * (weights ? 1 : k);
        failed = experts_chunk(&job, slots + t * k);
    }
    pool_leave();
    return failed;
}

/* -- router ---------------------------------------------------------------------------------- */

struct router {
    const float *logits;
    uint32_t *ids;
    float *weights;
    size_t n, k;
    int renormalise;
};

/* Not a number ranks with minus infinity: ids stay in range, and the weights show it. */
static float rank(float logit) { return logit == logit ? logit : -INFINITY; }

static void router_piece(void *context, size_t t, int thread) {
    (void)thread;
    const struct router *job = context;
    const float *logits = job->logits + t * job->n;
    uint32_t *ids = job->ids + t * job->k;
    float *weights = job->weights + t * job->k, sum = 0, chosen = 0;
    size_t have = 0;
    for (size_t i = 0; i < job->n; i++) {
        const float value = rank(logits[i]);
        if (have == job->k && !(value > rank(logits[ids[have - 1]]))) continue;
        size_t at = have < job->k ? have++ : have - 1;
        for (; at > 0 && value > rank(logits[ids[at - 1]]); at--) ids[at] = ids[at - 1];
        ids[at] = (uint32_t)i;
    }
    const float most = rank(logits[ids[0]]);
    for (size_t i = 0; !job->renormalise && i < job->n; i++) sum += expf(logits[i] - most);
    for (size_t j = 0; j < job->k; j++) chosen += weights[j] = expf(logits[ids[j]] - most);
    for (size_t j = 0; j < job->k; j++) weights[j] /= job->renormalise ? chosen : sum;
}

void flash_router(const float *logits, uint32_t *ids, float *weights, uint64_t tokens, uint64_t n,
                  uint64_t k, int renormalise) {
    struct router job = {logits, ids, weights, n, k, renormalise};
    if (tokens < 16) { /* 2 us a token of 512 experts: less than waking a thread */
        for (size_t t = 0; t < tokens; t++) router_piece(&job, t, 0);
        return;
    }
    pool_enter();
    pool_run(router_piece, &job, tokens);
    pool_leave();
}

#include "native_attention.h"
#include "native_delta.h"

const char *flash_simd(void) { return SIMD; }
