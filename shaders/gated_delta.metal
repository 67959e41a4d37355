// The gated delta rule, token after token: a state [DV, DK] a head, of which every row s goes its own
// way. With the head's key k and query q, and v the row's value:
//
//     s = decay s;  s = s + beta (v - s.k) k;  y = s.q
//
// A simdgroup keeps ROWS rows in registers over all tokens, a lane every 32nd column of each, so the
// state is read and written once a call. MLX's operations take a dozen launches a token, each over
// all of the state. The result is the same to the bit for tokens in one call and in several.
//
// RAW takes what the layer before it computes, as Qwen3-Next's models do, and spares nine launches:
// k and q are brought to length 1 and q divided by sqrt(DK); beta = sigmoid(beta); and
// decay = exp(-exp(log_rate) softplus(decay + step)).
//
// inputs   q, k [tokens, KEY_HEADS, DK], v [tokens, HEADS, DV]: rows KEY_PITCH and VALUE_PITCH apart,
//          the first of k at K0 and of v at V0 · decay [tokens, HEADS], and where EACH_KEY [..., DK]
//          · beta [tokens, HEADS] · log_rate, step [HEADS] (anything where not RAW) · state
//          [HEADS, DV, DK] float · count [1] uint, the tokens
// outputs  y [tokens, HEADS, DV] T · kept [HEADS, DV, DK] float, the new state
// template T KEY_HEADS HEADS DK DV KEY_PITCH K0 VALUE_PITCH V0 ROWS EACH_KEY RAW (DK a multiple of 32)
// grid     (32 * NSG, ceil(DV / (ROWS * NSG)), HEADS), threadgroup (32 * NSG, 1, 1)
  constexpr int PER_LANE = DK / MOE_LANES;
  const uint lane = thread_index_in_simdgroup;
  const uint head = threadgroup_position_in_grid.z;
  const uint key_head = head / uint(HEADS / KEY_HEADS);
  const uint row0 = (threadgroup_position_in_grid.y * (threads_per_threadgroup.x / MOE_LANES)
                     + simdgroup_index_in_threadgroup) * uint(ROWS);

  // A row after the last is the last once more, and not stored.
  uint rows[ROWS];
  float s[ROWS][PER_LANE];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    rows[r] = head * uint(DV) + metal::min(row0 + uint(r), uint(DV - 1));
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
      s[r][i] = state[ulong(rows[r]) * ulong(DK) + uint(i * MOE_LANES) + lane];
  }
  const float rate = RAW ? -metal::exp(float(log_rate[head])) : 0.0f;
  const float shift = RAW ? float(step[head]) : 0.0f;
  const uint tokens = count[0];
  for (uint t = 0; t < tokens; t++) {
    const ulong at = ulong(t) * ulong(HEADS) + head;
    const ulong key = ulong(t) * ulong(KEY_PITCH) + key_head * uint(DK) + lane;
    float ks[PER_LANE], qs[PER_LANE], decays[PER_LANE];
    float k_length = 0.0f, q_length = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      ks[i] = float(k[key + uint(K0) + uint(i * MOE_LANES)]);
      qs[i] = float(q[key + uint(i * MOE_LANES)]);
      decays[i] = float(decay[EACH_KEY ? at * ulong(DK) + uint(i * MOE_LANES) + lane : at]);
      k_length = metal::fma(ks[i], ks[i], k_length);
      q_length = metal::fma(qs[i], qs[i], q_length);
    }
    float blend = float(beta[at]);
    if (RAW) {
      const float k_scale = metal::rsqrt(simd_sum(k_length) + 1e-6f);
      const float q_scale = metal::rsqrt((simd_sum(q_length) + 1e-6f) * float(DK));
      const float z = decays[0] + shift;
      const float softplus = metal::max(z, 0.0f) + metal::log(1.0f + metal::exp(-metal::abs(z)));
      const float shrink = metal::exp(rate * softplus);
      blend = 1.0f / (1.0f + metal::exp(-blend));
#pragma unroll
      for (int i = 0; i < PER_LANE; i++) {
        ks[i] *= k_scale;
        qs[i] *= q_scale;
        decays[i] = shrink;
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float seen = 0.0f;
#pragma unroll
      for (int i = 0; i < PER_LANE; i++) {
        s[r][i] *= decays[i];
        seen = metal::fma(s[r][i], ks[i], seen);
      }
      const float value = float(v[ulong(t) * ulong(VALUE_PITCH) + uint(V0) + rows[r]]);
      const float delta = (value - simd_sum(seen)) * blend;
      float out = 0.0f;
#pragma unroll
      for (int i = 0; i < PER_LANE; i++) {
        s[r][i] = metal::fma(ks[i], delta, s[r][i]);
        out = metal::fma(s[r][i], qs[i], out);
      }
      const float answer = simd_sum(out);
      if (lane == 0 && row0 + uint(r) < uint(DV)) y[ulong(t) * ulong(HEADS * DV) + rows[r]] = T(answer);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
      if (row0 + uint(r) < uint(DV))
        kept[ulong(rows[r]) * ulong(DK) + uint(i * MOE_LANES) + lane] = s[r][i];
