// h[row] = silu(gate . x) * (up . x) for every (token, expert) pair of a step, one launch.
//
// Both projections, the activation and the product in one pass: x is read once for gate and up,
// sum(x) is shared by all rows of both, and neither gate . x nor up . x is ever written. MLX's
// chain is two gather_qmm and an activation, with both products written and read again.
// Weights come straight from the bank's slots, one packed record an expert.
//
// A tile is one expert and up to TOKENS tokens that chose it: (slot, first, count, token ...);
// its rows of h are first .. first + count. With TOKENS = 1 this is decoding. With more, every
// code that is loaded and unpacked serves all the tile's tokens.
//
// inputs   x [tokens, IN] T · bank, 32-bit words · tiles [n, 3 + TOKENS] uint
// outputs  h [pairs, OUT] float
// template T S BITS TWO_PLANES GROUP VPT IN OUT ROWS TOKENS STRIDE, and the parts of a record: GW UW
//          STRIDE in words, GS GB US UB in elements of S; of a second plane GRW GRS GRB URW URS URB
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
  const device uint* gw = record + GW;
  const device uint* uw = record + UW;
  const device uint* gr = record + (full ? GRW : GW);
  const device uint* ur = record + (full ? URW : UW);
  const device S* gs = (const device S*)record + (full ? GRS : GS);
  const device S* gb = (const device S*)record + (full ? GRB : GB);
  const device S* us = (const device S*)record + (full ? URS : US);
  const device S* ub = (const device S*)record + (full ? URB : UB);
  const uint keep = full ? ~0u : 0u;
  const float factor = TWO_PLANES && !full ? 0.25f : 1.0f;

  // A tile that is not full computes its last token again, and does not store it.
  ulong at[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++)
    at[t] = ulong(tiles[tile + 3 + metal::min(uint(t), count - 1)]) * ulong(IN);

  float gate[ROWS][TOKENS];
  float up[ROWS][TOKENS];
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int t = 0; t < TOKENS; t++) gate[r][t] = up[r][t] = 0.0f;

#pragma unroll
  for (int c = 0; c < IN; c += STEP) {
    const int col = c + int(lane) * VPT;
    if (IN % STEP != 0 && col >= IN) break;
    float xs[TOKENS][VPT];
    float sum[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
      sum[t] = moe_load_x<BITS, TWO_PLANES, VPT>(x + at[t] + uint(col), xs[t]);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      // The last simdgroup computes the last row again where OUT is no multiple of its rows.
      const uint row = metal::min(row0 + uint(r), uint(OUT - 1));
      const uint word = row * uint(PITCH) + uint(col * BITS / 32);
      const uint group = row * uint(GROUPS) + uint(col / GROUP);
      float codes[VPT];
      moe_load_codes<BITS, TWO_PLANES, VPT>(gw + word, gr + word, keep, codes);
      float scale = factor * float(gs[group]);
      float bias = float(gb[group]);
#pragma unroll
      for (int t = 0; t < TOKENS; t++)
        gate[r][t] += scale * moe_dot<VPT>(codes, xs[t]) + bias * sum[t];
      moe_load_codes<BITS, TWO_PLANES, VPT>(uw + word, ur + word, keep, codes);
      scale = factor * float(us[group]);
      bias = float(ub[group]);
#pragma unroll
      for (int t = 0; t < TOKENS; t++)
        up[r][t] += scale * moe_dot<VPT>(codes, xs[t]) + bias * sum[t];
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const float g = simd_sum(gate[r][t]);
      const float u = simd_sum(up[r][t]);
      const uint row = row0 + uint(r);
      if (lane == 0 && row < uint(OUT) && uint(t) < count)
        h[ulong(first + uint(t)) * ulong(OUT) + row] = g / (1.0f + metal::exp(-g)) * u;
    }
  }
