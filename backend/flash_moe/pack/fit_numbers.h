/* The numbers of fit.c: vectors of doubles, the types of scales, codes in packed bytes. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* As wide as the hardware's: gcc 12 splits wider ones into scalars, 6 times as slow. */
#if defined __AVX512F__
enum { LANES = 8 };
#elif defined __AVX__
enum { LANES = 4 };
#else
enum { LANES = 2 };
#endif

typedef double lanes __attribute__((vector_size(8 * LANES)));
typedef int64_t mask __attribute__((vector_size(8 * LANES)));

static inline lanes all(double v) { return (lanes){0} + v; }
static inline lanes pick(mask m, lanes yes, lanes no) {
    return (lanes)((m & (mask)yes) | (~m & (mask)no));
}
static inline lanes lesser(lanes a, lanes b) { return pick(a < b, a, b); }
static inline lanes greater(lanes a, lanes b) { return pick(a > b, a, b); }
/* 0 where b is. */
static inline lanes over(lanes a, lanes b) {
    return pick(b != 0, a / pick(b != 0, b, all(1)), all(0));
}
static inline int any(mask m) {
    int64_t bits = 0;
    for (int l = 0; l < LANES; l++) bits |= m[l];
    return bits != 0;
}

/* -- types of scales ---------------------------------------------------------------------------- */

/* In the order of kernels.spec.SCALE_TYPES. */
enum { BFLOAT16, FLOAT16, FLOAT32 };

/* To the nearest multiple of a power of two, ties to even. */
static inline lanes nearest(lanes x, lanes unit) {
    const lanes magic = unit * 0x1.8p52;
    return (x + magic) - magic;
}

/* To the nearest number that the type has; too large ones to its largest, never to infinity. */
static lanes to_type(lanes x, uint32_t type) {
    static const double digit[] = {0x1p-7, 0x1p-10, 0x1p-23};
    static const double least[] = {0x1p-133, 0x1p-24, 0x1p-149};
    static const double most[] = {0x1.fep127, 65504, 0x1.fffffep127};
    const lanes power = (lanes)((mask)x & (mask)all(INFINITY)); /* 2^exponent */
    const lanes y = nearest(x, greater(power * digit[type], all(least[type])));
    return greater(lesser(y, all(most[type])), all(-most[type]));
}

static double get(const void *from, size_t i, uint32_t type) {
    if (type == FLOAT32) return ((const float *)from)[i];
    const uint16_t h = ((const uint16_t *)from)[i];
    if (type == FLOAT16) {
        const int e = h >> 10 & 31, m = h & 1023;
        const double v = e == 31 ? (m ? NAN : INFINITY) : ldexp(e ? m + 1024 : m, (e ? e : 1) - 25);
        return h >> 15 ? -v : v;
    }
    const uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/* For numbers that the type has. */
static void put(void *to, size_t i, uint32_t type, double v) {
    const float f = (float)v;
    uint32_t u;
    memcpy(&u, &f, 4);
    if (type == FLOAT32) ((float *)to)[i] = f;
    else if (type == BFLOAT16) ((uint16_t *)to)[i] = (uint16_t)(u >> 16);
    else {
        const float size = fabsf(f);
        const uint32_t h = size < 0x1p-14f ? (uint32_t)(size * 0x1p24f)
                                           : ((u & 0x7fffffff) >> 13) - (112 << 10);
        ((uint16_t *)to)[i] = (uint16_t)(u >> 31 << 15 | h);
    }
}

/* -- codes -------------------------------------------------------------------------------------- */

/* Eight codes of `bits` lie in as many bytes, the first lowest. For little-endian machines. */
static inline uint64_t repeated(int width, int every) {
    uint64_t m = 0;
    for (int at = 0; at < 64; at += every) m |= ((1ull << width) - 1) << at;
    return m;
}

static inline void unpack(const uint8_t *from, uint8_t *codes, int count, const int bits) {
    const int rest = 8 - bits;
    for (int i = 0; i < count; i += 8, from += bits) {
        uint64_t x = 0;
        memcpy(&x, from, bits);
        x = (x | x << 4 * rest) & repeated(4 * bits, 32);
        x = (x | x << 2 * rest) & repeated(2 * bits, 16);
        x = (x | x << rest) & repeated(bits, 8);
        memcpy(codes + i, &x, 8);
    }
}

static inline void pack(const uint8_t *codes, uint8_t *to, int count, const int bits) {
    const int rest = 8 - bits;
    for (int i = 0; i < count; i += 8, to += bits) {
        uint64_t x;
        memcpy(&x, codes + i, 8);
        x = (x | x >> rest) & repeated(2 * bits, 16);
        x = (x | x >> 2 * rest) & repeated(4 * bits, 32);
        x = x | x >> 4 * rest;
        memcpy(to, &x, bits);
    }
}
