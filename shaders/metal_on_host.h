// The Metal names that our kernels use, for clang on a host: a stand-in for <metal_stdlib>. Goes
// before the text of a kernel as MLX generates it, which then compiles unchanged as C++17.
//
// Address spaces are real here: clang keeps pointers of different spaces apart, and on x86-64 and
// arm64 they all mean plain memory, so the text that is checked is the text that runs. Only
// sanitizer builds (METAL_FLAT) do without: ASan and TSan skip what lies in another space.
//
// No standard C++ header: parsing <cmath>, <limits> and <type_traits> took 0.09 s a kernel, and
// without them everything takes 0.03 s.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>  // uint and ushort, where the system has them

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __bf16 bfloat;
typedef bfloat bfloat16_t;
typedef _Float16 half;
typedef half float16_t;

#define METAL_VECTORS(T)                             \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
METAL_VECTORS(float)
METAL_VECTORS(half)
METAL_VECTORS(int)
METAL_VECTORS(uint)
METAL_VECTORS(short)
METAL_VECTORS(ushort)
METAL_VECTORS(uchar)
#undef METAL_VECTORS

#ifndef INFINITY
#define INFINITY __builtin_inff()
#endif
#ifndef NAN
#define NAN __builtin_nanf("")
#endif

// What the host that runs the kernel provides. `site` is the line of the call.
extern "C" {
// Meets the other lanes of the simdgroup: their values, `size` bytes each, and who takes part.
const void* metal_host_exchange(const void* value, size_t size, int site, uint* active);
void metal_host_barrier(int whole_threadgroup, int orders_memory, int site);
uint metal_host_lane(void);

// The rounding that clang calls for; libgcc has it from version 13.
__attribute__((weak)) __bf16 __truncsfbf2(float value) {
  const uint bits = __builtin_bit_cast(uint, value);
  const uint rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return __builtin_bit_cast(__bf16, ushort(is_nan ? (bits >> 16) | 64u : rounded));
}
}

template <class To, class From>
inline To as_type(From value) {
  return __builtin_bit_cast(To, value);
}

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };

// As a default argument this is the caller's line.
#define METAL_SITE int site = __builtin_LINE()

namespace metal {
inline float exp(float a) { return __builtin_expf(a); }
inline float exp2(float a) { return __builtin_exp2f(a); }
inline float log(float a) { return __builtin_logf(a); }
inline float tanh(float a) { return __builtin_tanhf(a); }
inline float sqrt(float a) { return __builtin_sqrtf(a); }
inline float rsqrt(float a) { return 1.0f / __builtin_sqrtf(a); }
inline float fabs(float a) { return __builtin_fabsf(a); }
inline float abs(float a) { return __builtin_fabsf(a); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline bool isnan(float a) { return a != a; }
// Of a number and a NaN both give the number. Two types are two candidates, as in Metal: an error.
template <class T> inline T max(T a, T b) { return a < b || a != a ? b : a; }
template <class T> inline T min(T a, T b) { return b < a || a != a ? b : a; }
template <class T> inline T clamp(T a, T low, T high) { return min(max(a, low), high); }
template <class T> inline T select(T a, T b, bool c) { return c ? b : a; }

template <class T>
struct lanes {
  T value[32];
  uint active;
  lanes(T mine, int site) {
    __builtin_memcpy(value, metal_host_exchange(&mine, sizeof(T), site, &active), sizeof value);
  }
  T at(uint lane) const { return value[lane & 31u]; }
};

// By halves, as a tree of shuffles does it; lanes that do not exist have no part in it.
template <class T, class F>
inline T reduce(T mine, int site, F combine) {
  lanes<T> all(mine, site);
  for (uint half_ = 16; half_ > 0; half_ >>= 1) {
    for (uint i = 0; i < half_; i++) {
      if (!(all.active >> (i + half_) & 1u)) continue;
      const bool both = all.active >> i & 1u;
      all.value[i] = both ? combine(all.value[i], all.value[i + half_]) : all.value[i + half_];
      all.active |= 1u << i;
    }
  }
  return all.value[0];
}
template <class T>
T simd_sum(T v, METAL_SITE) {
  return reduce(v, site, [](T a, T b) { return T(a + b); });
}
template <class T>
T simd_max(T v, METAL_SITE) {
  return reduce(v, site, [](T a, T b) { return max(a, b); });
}
template <class T>
T simd_min(T v, METAL_SITE) {
  return reduce(v, site, [](T a, T b) { return min(a, b); });
}
template <class T>
T simd_shuffle(T v, ushort lane, METAL_SITE) {
  return lanes<T>(v, site).at(lane);
}
template <class T>
T simd_broadcast(T v, ushort lane, METAL_SITE) {
  return lanes<T>(v, site).at(lane);
}
template <class T>
T simd_shuffle_xor(T v, ushort mask, METAL_SITE) {
  return lanes<T>(v, site).at(metal_host_lane() ^ mask);
}
template <class T>
T simd_shuffle_down(T v, ushort delta, METAL_SITE) {
  const uint from = metal_host_lane() + delta;
  return lanes<T>(v, site).at(from < 32u ? from : metal_host_lane());
}
inline void threadgroup_barrier(mem_flags flags, METAL_SITE) {
  metal_host_barrier(1, flags != mem_flags::mem_none, site);
}
inline void simdgroup_barrier(mem_flags flags, METAL_SITE) {
  metal_host_barrier(0, flags != mem_flags::mem_none, site);
}
namespace precise {
using metal::exp;
}
namespace fast {
using metal::exp;
}
}  // namespace metal
using namespace metal;

// The address spaces come last, so that no header of the system sees them. One copy of threadgroup
// memory will do, for threadgroups run one after the other; a section of its own makes it
// something that the host can measure against Metal's 32 KB, and fill with NaN before each.
#ifdef METAL_FLAT
#define device
#define constant
#define METAL_SPACE_3
#else
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define METAL_SPACE_3 __attribute__((address_space(3)))
#endif
#ifdef __APPLE__
#define METAL_SECTION "__DATA,metal_tg"
#else
#define METAL_SECTION "metal_tg"
#endif
// `volatile` when the text is only looked at: it marks the pointers that say `thread`.
#ifndef METAL_THREAD
#define METAL_THREAD
#endif
#define thread METAL_THREAD
#define threadgroup static __attribute__((section(METAL_SECTION))) METAL_SPACE_3
#define kernel
#define METAL_FUNC inline
