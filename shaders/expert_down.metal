// d[row] = down . h[row] for every (token, expert) pair of a step, not yet weighted.
//
// For many tokens an expert, and for models that weight and sum by themselves. Tiles, TOKENS and
// the reuse of codes are those of expert_gate_up_swiglu.
//
// inputs   h [pairs, IN] float · bank, 32-bit words · tiles [n, 3 + TOKENS] uint
// outputs  d [pairs, OUT] T
// template T S BITS TWO_PLANES GROUP VPT IN OUT ROWS TOKENS STRIDE DW DS DB DRW DRS DRB
// grid     (32 * NSG, ceil(OUT / (ROWS * NSG)), n), threadgroup (32 * NSG, 1, 1)
  constexpr int STEP = MOE_LANES * VPT;
  constexpr int PITCH = IN * BITS / 32;
  constexpr int GROUPS = IN / GROUP;
  const uint lane = thread_index_in_simdgroup;
  const uint tile = threadgroup_position_in_grid.z * uint(3 + TOKENS);
  const uint row0 = (threadgroup_position_in_grid.y * (threads_per_threadgroup.x / MOE_LANES)
                     + simdgroup_index_in_threadgroup) * uint(ROWS);
  const bool full = TWO_PLANES && tiles[tile] >= MOE_FULL;
  const uint slot = TWO_PLANES ? tiles[tile] & ~MOE_FULL : tiles[tile];
  const uint first = tiles[tile + 1];
  const uint count = tiles[tile + 2];

  const device uint* record = bank + ulong(slot) * ulong(STRIDE);
  const device uint* dw = record + DW;
  const device uint* dr = record + (full ? DRW : DW);
  const device S* ds = (const device S*)record + (full ? DRS : DS);
  const device S* db = (const device S*)record + (full ? DRB : DB);
  const uint keep = full ? ~0u : 0u;
  const float factor = TWO_PLANES && !full ? 0.25f : 1.0f;

  float acc[ROWS][TOKENS];
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int t = 0; t < TOKENS; t++) acc[r][t] = 0.0f;

#pragma unroll
  for (int c = 0; c < IN; c += STEP) {
    const int col = c + int(lane) * VPT;
    if (IN % STEP != 0 && col >= IN) break;
    float xs[TOKENS][VPT];
    float sum[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const ulong from = ulong(first + metal::min(uint(t), count - 1)) * ulong(IN);
      sum[t] = moe_load_x<BITS, TWO_PLANES, VPT>(h + from + uint(col), xs[t]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const uint row = metal::min(row0 + uint(r), uint(OUT - 1));
      float codes[VPT];
      const uint start = row * uint(PITCH);
      const uint word = uint(col * BITS / 32);
      moe_load_codes<BITS, TWO_PLANES, VPT>(dw + start + word, dr + start + word, keep, codes);
      const uint group = row * uint(GROUPS) + uint(col / GROUP);
      const float scale = factor * float(ds[group]);
      const float bias = float(db[group]);
#pragma unroll
      for (int t = 0; t < TOKENS; t++)
        acc[r][t] += scale * moe_dot<VPT>(codes, xs[t]) + bias * sum[t];
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const float v = simd_sum(acc[r][t]);
      const uint row = row0 + uint(r);
      if (lane == 0 && row < uint(OUT) && uint(t) < count)
        d[ulong(first + uint(t)) * ulong(OUT) + row] = T(v);
    }
  }
