// ids, weights = the first KEEP of the K largest of softmax(logits), largest first, ties to the lowest
// index.
//
// One launch a step in place of softmax, argpartition, take, sum and divide, and what the host
// reads back is K numbers. One simdgroup a token; the softmax runs over all N experts, before the
// cut, as the models do it. RENORMALISE divides by the sum of all K weights: with fewer experts than a
// model was trained with, each keeps the weight that it has among all.
//
// inputs   logits [tokens, N] T
// outputs  ids [tokens, KEEP] uint · weights [tokens, KEEP] float
// template T N K KEEP RENORMALISE (KEEP <= K <= 32, K <= N <= 1024)
// grid     (32, tokens, 1), threadgroup (32, 1, 1)
  constexpr int PER_LANE = (N + MOE_LANES - 1) / MOE_LANES;
  const uint lane = thread_index_in_simdgroup;
  const uint token = threadgroup_position_in_grid.y;
  float v[PER_LANE];
  float high = -INFINITY;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    const uint e = uint(i * MOE_LANES) + lane;
    v[i] = e < uint(N) ? float(logits[token * uint(N) + e]) : -INFINITY;
    high = metal::max(high, v[i]);
  }
  high = simd_max(high);
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) total += metal::exp(v[i] - high);
  total = simd_sum(total);

  // Bit i: v[i] is taken, or is no expert at all. Never by its value, which may be -inf or NaN.
  uint taken = 0u;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    if (uint(i * MOE_LANES) + lane >= uint(N)) taken |= 1u << i;
    if (!(v[i] == v[i])) v[i] = -INFINITY;
  }
  float kept = 0.0f;
  float weight = 0.0f;
  uint id = 0u;
  for (int j = 0; j < K; j++) {
    float best = -INFINITY;
    uint mine = 0xFFFFFFFFu;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const bool free = ((taken >> i) & 1u) == 0u;
      if (free && (mine == 0xFFFFFFFFu || v[i] > best)) {
        best = v[i];
        mine = uint(i * MOE_LANES) + lane;
      }
    }
    const float top = simd_max(best);
    const uint winner = simd_min(best == top ? mine : 0xFFFFFFFFu);
    if (winner % uint(MOE_LANES) == lane) taken |= 1u << (winner / uint(MOE_LANES));
    const float p = metal::exp(top - high) / total;
    kept += p;
    if (lane == uint(j)) {
      weight = p;
      id = winner;
    }
  }
  if (lane < uint(KEEP)) {
    ids[token * uint(KEEP) + lane] = id;
    weights[token * uint(KEEP) + lane] = RENORMALISE ? weight / kept : weight;
  }
