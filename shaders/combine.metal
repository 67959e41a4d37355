// y = sigmoid(shared_gate) * shared + sum over k of weight[k] * d[place[k]].
//
// The end of a mixture for many tokens, whose experts' outputs lie sorted by expert: one launch
// gathers, weights and adds them, in the order of k, in place of MLX's un-sort, product and sum.
//
// inputs   d [tokens * K, OUT] · place, weights [tokens * K] · shared
//          [tokens, OUT] T and shared_gate [tokens] T (anything where there is none)
// outputs  y [tokens, OUT] T
// template T OUT K SHARED
// grid     (OUT rounded up to threads, tokens, 1)
  const uint row = thread_position_in_grid.x;
  const uint token = thread_position_in_grid.y;
  if (row < uint(OUT)) {
    const ulong at = ulong(token) * ulong(OUT) + row;
    float total = 0.0f;
    for (int e = 0; e < K; e++) {
      const uint pair = token * uint(K) + uint(e);
      total = metal::fma(weights[pair], float(d[ulong(place[pair]) * ulong(OUT) + row]), total);
    }
    if (SHARED) total += float(shared[at]) / (1.0f + metal::exp(-float(shared_gate[token])));
    y[at] = T(total);
  }
