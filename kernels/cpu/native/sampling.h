// A token from one row of logits: the likeliest one, or one drawn by temperature. What comes out depends on the row
// alone. Both give -1 where there is a NaN or no largest value that is finite.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector.h"

// Largest of `count` logits, NaN if one of them is.
inline float largest_of(const float* logits, int64_t count) {
  Floats largest = splat(-INFINITY);
  Ints nan = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    Floats x = load(logits + i);
    nan |= x != x;
    largest = select(x > largest, x, largest);
  }
  float top = maximum(largest);
  bool bad = !equal((Floats)(nan & 0x3f800000), Floats{});
  for (; i < count; i++) {
    bad |= std::isnan(logits[i]);
    top = std::max(top, logits[i]);
  }
  return bad ? NAN : top;
}

// The lowest index among equals.
inline int64_t likeliest(const float* logits, int64_t count) {
  const float top = largest_of(logits, count);
  return std::isfinite(top) ? std::find(logits, logits + count, top) - logits : -1;
}

// Writes law (count,), the softmax of logits / temperature, and gives the token whose interval of its running sum, in
// double as moe_lm.engine.sampler.draw adds it, holds `uniform` in [0, 1).
inline int64_t draw(const float* logits, int64_t count, float temperature, double uniform, float* law) {
  const float top = largest_of(logits, count);
  if (!std::isfinite(top)) return -1;
  Floats total = {};
  for (int64_t i = 0; i < count; i += LANES) {
    // The largest score becomes 0 first: a tiny temperature then never makes it infinite.
    store_first(law + i, exponential((load_first(logits + i, count - i) - top) / temperature), count - i);
    total = total + load_first(law + i, count - i);
  }
  const float whole = sum(total);
  std::vector<double> running(count);
  double below = 0;
  for (int64_t i = 0; i < count; i++) running[i] = below += law[i] /= whole;
  int64_t token = std::upper_bound(running.begin(), running.end(), below * uniform) - running.begin();
  // Rounding can put the target on the total itself: then the last token with any probability is meant.
  return token < count ? token : std::lower_bound(running.begin(), running.end(), below) - running.begin();
}
