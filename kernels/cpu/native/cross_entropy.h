// The cross-entropy of a row of logits. V vocabulary.
#pragma once

#include <limits>

#include "elements.h"

// -log softmax(logits)[target], and 0 for a target below 0. With `gradient` the logits become its gradient, 0 in the
// latter case, whatever they held. `powers` has room for V in whole vectors.
template <class T>
inline double cross_entropy_row(T* logits, int64_t target, int64_t V, bool gradient, float* powers) {
  constexpr float INFINITE = std::numeric_limits<float>::infinity();
  if (target < 0) {
    if (gradient) memset((void*)logits, 0, V * sizeof(T));
    return 0;
  }
  const float chosen = value(logits[target]);
  Floats most = splat(-INFINITE), total{};
  for (int64_t i = 0; i < V; i += LANES) {
    Floats v = get(logits + i, V - i);
    if (V - i < LANES) v = beyond(v, V - i, -INFINITE);
    most = select(v > most, v, most);
  }
  const float peak = maximum(most);
  for (int64_t i = 0; i < V; i += LANES) {
    Floats p = exponential(get(logits + i, V - i) - peak);
    if (V - i < LANES) p = beyond(p, V - i, 0.0f);
    store(powers + i, p);
    total += p;
  }
  const float sum_of = sum(total);
  if (gradient) {
    const float scale = 1.0f / sum_of;
    for (int64_t i = 0; i < V; i += LANES) put(logits + i, load(powers + i) * scale, V - i);
    put(logits + target, splat(powers[target] * scale - 1.0f), 1);
  }
  return (double)peak + std::log((double)sum_of) - chosen;
}
