/* What differs between processors: a vector of floats, and the weights of 16 codes.
 *
 * 16 codes are `bits` 16-bit words. Up to 4 bits, the first and the last 8 codes each lie within
 * 32 bits that begin on a byte of theirs, so two loads that stay inside, a shift by lane and a
 * table (or a mask and a product) give the weights. 5 and 6 bits are rare: a plain loop.
 */
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE static inline __attribute__((always_inline))

enum { UNIT = 16 };

INLINE uint32_t load32(const uint8_t *p) {
    uint32_t word;
    memcpy(&word, p, 4);
    return word;
}

/* Bit of code i within its own 32 bits; where those of the last 8 begin is SECOND bytes on. */
#define SHIFT(bits, i) ((bits) * (i) - ((i) < 8 ? 0 : 8 * SECOND(bits)))
#define SECOND(bits) ((bits) == 2 ? 0 : (bits) == 3 ? 2 : 4)

/* 8 codes of 5, 6 or 8 bits, the first or last of a unit, as 8 bytes: read within the unit. */
INLINE uint64_t bytes_of(const int bits, const uint8_t *p, const int half) {
    uint64_t word;
    memcpy(&word, half ? p + 2 * bits - 8 : p, 8);
    if (half) word >>= 64 - 8 * bits;
    if (bits == 8) return word;
#if defined(__BMI2__)
    return _pdep_u64(word, 0x0101010101010101u * ((1u << bits) - 1));
#else
    uint64_t bytes = 0;
    UNROLL for (int i = 0; i < 8; i++) bytes |= (word >> bits * i & ((1u << bits) - 1)) << 8 * i;
    return bytes;
#endif
}

typedef struct table table;

#if defined(__AVX512F__)
#define SIMD "AVX-512"
enum { LANES = 16, ROWS_1 = 8, ROWS_2 = 8, ROWS_4 = 5 };
typedef __m512 vf;
#define v_set _mm512_set1_ps
#define v_load _mm512_loadu_ps
#define v_fma _mm512_fmadd_ps
#define v_sum _mm512_reduce_add_ps

struct table {
    vf a, b;
};

INLINE table make_table(const int bits, float scale, float bias) {
    table t = {v_set(scale), v_set(bias)};
    if (bits <= 4) {
        const int top = (1 << bits) - 1;
        const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4 & top, 5 & top, 6 & top, 7 & top, 8 & top,
            9 & top, 10 & top, 11 & top, 12 & top, 13 & top, 14 & top, 15 & top);
        t.a = v_fma(t.a, codes, t.b);
    }
    return t;
}

INLINE void unit_weights(vf *w, const int bits, const uint8_t *p, const table *t) {
    if (bits <= 4) {
#define S(i) SHIFT(bits, i)
        const __m512i shifts = _mm512_setr_epi32(S(0), S(1), S(2), S(3), S(4), S(5), S(6), S(7),
            S(8), S(9), S(10), S(11), S(12), S(13), S(14), S(15));
#undef S
        __m512i words = _mm512_set1_epi32((int)load32(p));
        if (bits > 2) words = _mm512_mask_set1_epi32(words, 0xff00, (int)load32(p + SECOND(bits)));
        words = _mm512_srlv_epi32(words, shifts);
        /* The lookups take the lowest 2 or 4 bits of a lane and ignore the rest. */
        w[0] = bits == 2 ? _mm512_permutevar_ps(t->a, words) : _mm512_permutexvar_ps(words, t->a);
        return;
    }
    const __m128i codes = bits == 8
        ? _mm_loadu_si128((const void *)p)
        : _mm_set_epi64x((long long)bytes_of(bits, p, 1), (long long)bytes_of(bits, p, 0));
    w[0] = v_fma(t->a, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)), t->b);
}

#elif defined(__AVX2__) && defined(__FMA__)
#define SIMD "AVX2"
enum { LANES = 8, ROWS_1 = 5, ROWS_2 = 4, ROWS_4 = 2 };
typedef __m256 vf;
#define v_set _mm256_set1_ps
#define v_load _mm256_loadu_ps
#define v_fma _mm256_fmadd_ps

INLINE float v_sum(vf v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

struct table {
    vf a, b;
};

INLINE table make_table(const int bits, float scale, float bias) {
    table t = {v_set(scale), v_set(bias)};
    if (bits <= 3) {
        const int top = (1 << bits) - 1;
        const vf codes = _mm256_setr_ps(0, 1, 2, 3, 4 & top, 5 & top, 6 & top, 7 & top);
        t.a = v_fma(t.a, codes, t.b);
    }
    return t;
}

INLINE void unit_weights(vf *w, const int bits, const uint8_t *p, const table *t) {
    UNROLL for (int half = 0; half < 2; half++) {
        if (bits > 4) {
            const __m128i codes = _mm_cvtsi64_si128((long long)bytes_of(bits, p, half));
            w[half] = v_fma(t->a, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)), t->b);
            continue;
        }
#define S(i) SHIFT(bits, 8 * half + i)
        const __m256i shifts = _mm256_setr_epi32(S(0), S(1), S(2), S(3), S(4), S(5), S(6), S(7));
#undef S
        __m256i words = _mm256_set1_epi32((int)load32(p + half * SECOND(bits)));
        words = _mm256_srlv_epi32(words, shifts);
        if (bits == 2)
            w[half] = _mm256_permutevar_ps(t->a, words);
        else if (bits == 3)
            w[half] = _mm256_permutevar8x32_ps(t->a, words);
        else
            w[half] = v_fma(t->a,
                _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(15))), t->b);
    }
}

#else /* 4 lanes, which any compiler makes of whatever there is */
#if defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define SIMD "NEON"
#define v_fma(a, b, c) vfmaq_f32(c, a, b)
typedef float32x4_t vf;
#else
#define SIMD "scalar"
#define v_fma(a, b, c) ((a) * (b) + (c)) /* fmaf would be a call of a library */
typedef float vf __attribute__((vector_size(16)));
#endif
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
typedef uint8_t vb __attribute__((vector_size(4)));
typedef float vg __attribute__((vector_size(16)));
enum { LANES = 4, ROWS_1 = 4, ROWS_2 = 4, ROWS_4 = 2 };

INLINE vf v_set(float s) { return (vf){s, s, s, s}; }
INLINE vf v_load(const float *p) {
    vf v;
    memcpy(&v, p, 16);
    return v;
}
INLINE float v_sum(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }

struct table {
    vf a, b;
};

INLINE table make_table(const int bits, float scale, float bias) {
    (void)bits;
    return (table){v_set(scale), v_set(bias)};
}

INLINE void unit_weights(vf *w, const int bits, const uint8_t *p, const table *t) {
    UNROLL for (int v = 0; v < UNIT / LANES; v++) {
        const int i = v * LANES;
        vf codes;
        if (bits > 4) {
            const uint64_t eight = bits == 8 ? 0 : bytes_of(bits, p, i / 8) >> i % 8 * 8;
            const uint32_t four = bits == 8 ? load32(p + i) : (uint32_t)eight;
            vb bytes;
            memcpy(&bytes, &four, 4);
            codes = (vf)__builtin_convertvector(__builtin_convertvector(bytes, vi), vg);
        } else {
            const uint32_t word = load32(p + (i < 8 ? 0 : SECOND(bits))), mask = (1u << bits) - 1;
#if defined(__ARM_NEON) && defined(__aarch64__)
            const vu shifts = {SHIFT(bits, i), SHIFT(bits, i + 1), SHIFT(bits, i + 2),
                               SHIFT(bits, i + 3)};
            const vu words = (vu){word, word, word, word} >> shifts & mask;
            codes = (vf)__builtin_convertvector((vi)words, vg);
#else /* SSE2 shifts all lanes alike: leave the codes where they are, and divide, which is exact */
            const uint32_t w4 = word >> SHIFT(bits, i);
            const vu masks = {mask, mask << bits, mask << 2 * bits, mask << 3 * bits};
            const float d = 1.0f / (float)(1 << bits);
            const vg parts = {1, d, d * d, d * d * d};
            codes = __builtin_convertvector((vi)((vu){w4, w4, w4, w4} & masks), vg) * parts;
#endif
        }
        w[v] = v_fma(t->a, codes, t->b);
    }
}
#endif
