// y = silu of a convolution over the last TAPS tokens, each channel by itself; and what the next
// token needs: the last TAPS - 1 rows of x.
//
// One launch in place of MLX's five: joining the past to x, convolution, silu, slice, copy.
//
// inputs   x [tokens, CHANNELS] · past [TAPS - 1, CHANNELS] · weight [CHANNELS, TAPS] · count [1]
//          uint, the tokens
// outputs  y [tokens, CHANNELS] T · last [TAPS - 1, CHANNELS] T
// template T CHANNELS TAPS
// grid     (CHANNELS, tokens + TAPS - 1, 1) in threadgroups of (n, 1, 1)
  constexpr int BEFORE = TAPS - 1;
  const uint channel = thread_position_in_grid.x;
  const uint row = threadgroup_position_in_grid.y;
  const uint tokens = count[0];
  if (channel < uint(CHANNELS)) {
    if (row < tokens) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < TAPS; i++) {
        const uint from = row + uint(i);
        const float value = from < uint(BEFORE)
                                ? float(past[from * uint(CHANNELS) + channel])
                                : float(x[ulong(from - uint(BEFORE)) * ulong(CHANNELS) + channel]);
        sum = metal::fma(float(weight[channel * uint(TAPS) + uint(i)]), value, sum);
      }
      y[ulong(row) * ulong(CHANNELS) + channel] = T(sum / (1.0f + metal::exp(-sum)));
    } else {
      const uint to = row - tokens;
      last[to * uint(CHANNELS) + channel] =
          row < uint(BEFORE) ? past[row * uint(CHANNELS) + channel]
                             : x[ulong(row - uint(BEFORE)) * ulong(CHANNELS) + channel];
    }
  }
