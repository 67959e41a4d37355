// y = sigmoid(shared_gate) * shared + sum over k of weight[k] * (down_k . h[k]).
//
// The end of a mixture for one token, one launch: K matrices, the routing weights, their sum, the
// shared expert and its gate. MLX's chain of gather_qmm, products, sums and
// sigmoid writes [K, OUT] and reads it again. One simdgroup an expert; the K partial sums meet in threadgroup memory
// and are added in the order of k, so the result does not depend on a schedule: no atomics.
//
// inputs   h [tokens * K, IN] float · bank, 32-bit words · tiles [tokens * K, 4] uint, of which
//          only the slot is read · weights [tokens, K] float · shared [tokens, OUT] T
//          and shared_gate [tokens] T (anything where there is none)
// outputs  y [tokens, OUT] T
// template T S BITS TWO_PLANES GROUP VPT IN OUT ROWS K STRIDE DW DS DB DRW DRS DRB SHARED
// grid     (32 * K, ceil(OUT / ROWS), tokens), threadgroup (32 * K, 1, 1)
  constexpr int STEP = MOE_LANES * VPT;
  constexpr int PITCH = IN * BITS / 32;
  constexpr int GROUPS = IN / GROUP;
  threadgroup float part[K * ROWS];
  const uint lane = thread_index_in_simdgroup;
  const uint k = simdgroup_index_in_threadgroup;
  const uint token = threadgroup_position_in_grid.z;
  const uint row0 = threadgroup_position_in_grid.y * uint(ROWS);
  const uint pair = token * uint(K) + k;
  const bool full = TWO_PLANES && tiles[pair * 4] >= MOE_FULL;
  const uint slot = TWO_PLANES ? tiles[pair * 4] & ~MOE_FULL : tiles[pair * 4];

  const device uint* record = bank + ulong(slot) * ulong(STRIDE);
  const device uint* dw = record + DW;
  const device uint* dr = record + (full ? DRW : DW);
  const device S* ds = (const device S*)record + (full ? DRS : DS);
  const device S* db = (const device S*)record + (full ? DRB : DB);
  const uint keep = full ? ~0u : 0u;
  const float factor = TWO_PLANES && !full ? 0.25f : 1.0f;

  float acc[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) acc[r] = 0.0f;
#pragma unroll
  for (int c = 0; c < IN; c += STEP) {
    const int col = c + int(lane) * VPT;
    if (IN % STEP != 0 && col >= IN) break;
    float xs[VPT];
    const float sum = moe_load_x<BITS, TWO_PLANES, VPT>(h + ulong(pair) * ulong(IN) + uint(col), xs);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const uint row = metal::min(row0 + uint(r), uint(OUT - 1));
      float codes[VPT];
      const uint start = row * uint(PITCH);
      const uint word = uint(col * BITS / 32);
      moe_load_codes<BITS, TWO_PLANES, VPT>(dw + start + word, dr + start + word, keep, codes);
      const uint group = row * uint(GROUPS) + uint(col / GROUP);
      acc[r] += factor * float(ds[group]) * moe_dot<VPT>(codes, xs) + float(db[group]) * sum;
    }
  }
  const float weight = weights[pair];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float v = simd_sum(acc[r]);
    if (lane == 0) part[k * uint(ROWS) + uint(r)] = weight * v;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint t = thread_position_in_threadgroup.x;
  if (t < uint(ROWS) && row0 + t < uint(OUT)) {
    const ulong at = ulong(token) * ulong(OUT) + row0 + t;
    float total = 0.0f;
    for (int e = 0; e < K; e++) total += part[uint(e * ROWS) + t];
    if (SHARED) total += float(shared[at]) / (1.0f + metal::exp(-float(shared_gate[token])));
    y[at] = T(total);
  }
