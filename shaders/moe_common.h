// Helpers shared by the expert kernels. The same text is compiled by Metal, by nvcc (the header
// metal_on_cuda.h gives it the Metal names) and by clang on a host (metal_on_host.h), so it keeps
// to what all three understand: `threadgroup` in declarations only, metal:: mathematics, vectors
// without constructors, an address space on every pointer that a helper takes.
//
// Weights are affine: value = scale * code + bias, a scale and a bias for every GROUP columns, the
// codes a little-endian bit stream along a row. So a row's dot product is, group by group,
//     scale * sum(code * x) + bias * sum(x)
// and sum(x) is the same for every row. A lane takes VPT neighbouring columns at a time; VPT
// divides GROUP, so that a lane's columns have one scale.
//
// TWO_PLANES records have codes of 4 bits in two planes of 2: code = 4 * hi + lo. A pair is computed
// from both, with the 4-bit weights' scales and biases, or from hi alone, with those fitted to it:
// the top bit of its slot tells. Of hi alone the code is 4 * hi and the scale a quarter, both
// exact, so that all pairs take one path of arithmetic, in which nothing branches.

#define MOE_LANES 32
#define MOE_FULL 0x80000000u

// N neighbouring words, 16 bytes a load. A row is a multiple of 32 elements, so its parts are aligned.
template <int N>
inline void moe_load_words(const device uint* w, thread uint* v) {
#pragma unroll
  for (int i = 0; i < N / 4; i++) {
    const uint4 a = ((const device uint4*)w)[i];
    v[4 * i] = a.x;
    v[4 * i + 1] = a.y;
    v[4 * i + 2] = a.z;
    v[4 * i + 3] = a.w;
  }
  if (N == 2) {
    const uint2 a = *(const device uint2*)w;
    v[0] = a.x;
    v[1] = a.y;
  } else if (N % 4 != 0) {
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = w[i];
  }
}

// N neighbouring activations as floats, by words. With loads of 2 bytes an H200 was the slower the
// more simdgroups loaded x: 89 us a layer at 1 row each, 51 at 4.
template <int N>
inline void moe_load(const device float* x, thread float* v) {
  uint w[N];
  moe_load_words<N>((const device uint*)x, w);
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = as_type<float>(w[i]);
}

template <int N>
inline void moe_load(const device bfloat16_t* x, thread float* v) {
  uint w[N / 2];
  moe_load_words<N / 2>((const device uint*)x, w);
#pragma unroll
  for (int i = 0; i < N / 2; i++) {
    v[2 * i] = as_type<float>(w[i] << 16);
    v[2 * i + 1] = as_type<float>(w[i] & 0xFFFF0000u);
  }
}

template <int N>
inline void moe_load(const device half* x, thread float* v) {
  uint w[N / 2];
  moe_load_words<N / 2>((const device uint*)x, w);
#pragma unroll
  for (int i = 0; i < N / 2; i++) {
    v[2 * i] = float(as_type<half>(ushort(w[i] & 0xFFFFu)));
    v[2 * i + 1] = float(as_type<half>(ushort(w[i] >> 16)));
  }
}

// The bit of a lane's words at which code i begins: see moe_load_codes for where planes join.
template <int BITS, bool TWO_PLANES>
inline int moe_place(int i) {
  return TWO_PLANES ? i / 16 * 64 + i % 2 * 32 + i % 16 / 2 * 4 : i * BITS;
}

// VPT activations and their sum. Scaling them once spares a shift for every code: a code masked
// where it lies in its half word is code * 2^shift, exactly. Three bits cross the borders and are
// shifted.
template <int BITS, bool TWO_PLANES, int VPT, typename T>
inline float moe_load_x(const device T* x, thread float* xs) {
  moe_load<VPT>(x, xs);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < VPT; i++) {
    sum += xs[i];
    if (BITS != 3) xs[i] *= 1.0f / float(1u << (moe_place<BITS, TWO_PLANES>(i) % 16));
  }
  return sum;
}

// Code i of the words, times what moe_load_x divided x by. Planted into the mantissa of 2^23 and
// that taken off again, both exact: with integer conversions an H200 took 34 us a layer, so 21.
template <int BITS, bool TWO_PLANES>
inline float moe_code(const thread uint* v, int i) {
  constexpr uint MASK = TWO_PLANES ? 15u : (1u << BITS) - 1u;
  const int word = moe_place<BITS, TWO_PLANES>(i) / 32;
  const int shift = moe_place<BITS, TWO_PLANES>(i) % 32;
  uint code;
  if (BITS == 3) {
    code = v[word] >> shift;
    if (shift + BITS > 32) code |= v[word + 1] << (32 - shift);
    code &= MASK;
  } else {
    code = (shift < 16 ? v[word] : v[word] >> 16) & (MASK << (shift % 16));
  }
  return as_type<float>(code | 0x4B000000u) - 8388608.0f;
}

// VPT codes of the words at w. Of planes, a word of hi at w and one of lo at `rest` make two words
// of 4-bit codes, those of even and those of odd columns. A pair that leaves lo out gives w as its
// rest and keeps nothing of it: no byte more is read from memory, and no load waits for a branch.
template <int BITS, bool TWO_PLANES, int VPT>
inline void moe_load_codes(const device uint* w, const device uint* rest, uint keep,
                           thread float* codes) {
  constexpr int WORDS = VPT * BITS / 32;
  uint v[2 * WORDS];
  moe_load_words<WORDS>(w, v);
  if (TWO_PLANES) {
    uint low[WORDS];
    moe_load_words<WORDS>(rest, low);
#pragma unroll
    for (int i = WORDS - 1; i >= 0; i--) {
      const uint hi = v[i], lo = low[i] & keep;
      v[2 * i] = (hi & 0x33333333u) << 2 | (lo & 0x33333333u);
      v[2 * i + 1] = (hi & 0xCCCCCCCCu) | (lo >> 2 & 0x33333333u);
    }
  }
#pragma unroll
  for (int i = 0; i < VPT; i++) codes[i] = moe_code<BITS, TWO_PLANES>(v, i);
}

template <int VPT>
inline float moe_dot(const thread float* codes, const thread float* xs) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < VPT; i++) sum = metal::fma(codes[i], xs[i], sum);
  return sum;
}
