// The Metal names that our kernels use, for CUDA. Goes before the text of a kernel, from which the
// address spaces have been taken (they have no spelling in CUDA, and defining `device` away would
// break CUDA's own headers). A grid must be a multiple of its threadgroup: CUDA runs whole blocks.
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned long ulong;
typedef __half half;
typedef __nv_bfloat16 bfloat16_t;
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#define MOE_D __device__ __forceinline__

MOE_D uint metal_thread() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
MOE_D uint3 metal_position() {
  return make_uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y,
                    blockIdx.z * blockDim.z + threadIdx.z);
}
#define thread_index_in_simdgroup (metal_thread() & 31u)
#define simdgroup_index_in_threadgroup (metal_thread() >> 5)
#define thread_position_in_threadgroup (threadIdx)
#define thread_position_in_grid (metal_position())
#define threadgroup_position_in_grid (blockIdx)
#define threads_per_threadgroup (blockDim)
#define threadgroup __shared__

template <class To, class From>
MOE_D To as_type(From v) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs equal sizes");
  To to;
  memcpy(&to, &v, sizeof to);
  return to;
}

namespace metal {
MOE_D float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
MOE_D float exp(float a) { return ::expf(a); }
MOE_D float log(float a) { return ::logf(a); }
MOE_D float rsqrt(float a) { return ::rsqrtf(a); }
MOE_D float abs(float a) { return ::fabsf(a); }
template <class T> MOE_D T max(T a, T b) { return a > b ? a : b; }
template <class T> MOE_D T min(T a, T b) { return a < b ? a : b; }
}  // namespace metal

template <class T> MOE_D T simd_sum(T v) {
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}
template <class T> MOE_D T simd_max(T v) {
  for (int d = 16; d; d >>= 1) v = metal::max(v, __shfl_xor_sync(0xffffffffu, v, d));
  return v;
}
template <class T> MOE_D T simd_min(T v) {
  for (int d = 16; d; d >>= 1) v = metal::min(v, __shfl_xor_sync(0xffffffffu, v, d));
  return v;
}
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
MOE_D void threadgroup_barrier(mem_flags) { __syncthreads(); }
