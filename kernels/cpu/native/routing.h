// Which experts each row goes to, and their rows side by side in panels. All of it in float32 and whole numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>

#include "vector.h"

// Scores (experts,) of one row (stride,) against the router (experts, stride), stride a multiple of 16.
inline void router_logits(const float* row, const float* router, int64_t experts, int64_t stride, float* logits) {
  for (int64_t e = 0; e < experts; e += 4) {
    Floats total[4] = {};
    const float* w[4];
    for (int i = 0; i < 4; i++) w[i] = router + std::min(e + i, experts - 1) * stride;
    for (int64_t k = 0; k < stride; k += LANES)
      for (int i = 0; i < 4; i++) total[i] = fma(load(w[i] + k), load(row + k), total[i]);
    for (int i = 0; i < 4 && e + i < experts; i++) logits[e + i] = sum(total[i]);
  }
}

// The softmax over all experts' logits, (experts,).
inline void softmax(const float* logits, int64_t experts, float* probability) {
  const float largest = *std::max_element(logits, logits + experts);
  float total = 0;
  for (int64_t e = 0; e < experts; e += LANES)
    store_first(probability + e, exponential(load_first(logits + e, experts - e) - largest), experts - e);
  for (int64_t e = 0; e < experts; e++) total += probability[e];
  for (int64_t e = 0; e < experts; e++) probability[e] /= total;
}

// Chooses as best_of does while the largest of what is left is a number, and nothing is none. Gives how many it chose.
inline int64_t best_of_vector(const float* scores, int64_t experts, int64_t top, int32_t* chosen) {
#if defined(MOE_LM_AVX512)
  const __mmask16 there = (1u << experts) - 1;
  const __m512 x = _mm512_maskz_loadu_ps(there, scores);
  __mmask16 left = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) ? 0 : there;
  for (int64_t k = 0; k < top; k++) {
    const float largest = _mm512_mask_reduce_max_ps(left, x);
    const __mmask16 found = _mm512_mask_cmp_ps_mask(left, x, _mm512_set1_ps(largest), _CMP_EQ_OQ);
    if (!found) return k;
    chosen[k] = __builtin_ctz(found);
    left &= ~(1u << chosen[k]);
  }
  return top;
#else
  return 0;
#endif
}

// The experts with the `top` largest scores, ties to the lowest index. Always `top` different ones: a NaN is larger than
// nothing, or than everything if NAN_FIRST, and the first of what is left is taken where nothing is larger.
template <bool NAN_FIRST = false>
inline void best_of(const float* scores, int64_t experts, int64_t top, int32_t* chosen) {
  int64_t k = experts <= LANES ? best_of_vector(scores, experts, top, chosen) : 0;
  for (; k < top; k++) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; e++) {
      if (std::find(chosen, chosen + k, e) != chosen + k) continue;
      if (best < 0 || scores[e] > scores[best] ||
          (std::isnan(scores[NAN_FIRST ? e : best]) && !std::isnan(scores[NAN_FIRST ? best : e])))
        best = e;
    }
    chosen[k] = best;
  }
}

// The experts that a row goes to, by their logits or, with a bias, by probability + bias; and their weights: the softmax
// over their logits, or theirs in the one over all experts if not `normalize`. `room` is (2, experts).
template <bool NAN_FIRST = false>
inline void choose(const float* logits, const float* bias, bool normalize, int64_t experts, int64_t top,
                   int32_t* chosen, float* weights, float* room) {
  float *probability = room, *scores = room + experts;
  if (bias || !normalize) softmax(logits, experts, probability);
  if (bias) std::transform(probability, probability + experts, bias, scores, std::plus<float>());
  best_of<NAN_FIRST>(bias ? scores : logits, experts, top, chosen);
  if (!normalize) {
    for (int64_t k = 0; k < top; k++) weights[k] = probability[chosen[k]];
    return;
  }
  for (int64_t k = 0; k < top; k++) weights[k] = logits[chosen[k]];
  float largest = *std::max_element(weights, weights + top), total = 0;
  for (int64_t k = 0; k < top; k++) {
    weights[k] = exponential(splat(weights[k] - largest))[0];
    total += weights[k];
  }
  for (int64_t k = 0; k < top; k++) weights[k] /= total;
}

// Slots (token, choice) sorted by expert, each expert's from a panel of its own on.
struct Slots {
  int64_t* token;         // of every row of the panels, (panels * 16)
  int64_t* row;           // of every slot, (N * top)
  int64_t* count;         // rows of every expert, (experts)
  int64_t* first_panel;   // of every expert, (experts + 1)
  int64_t* panel_rows;    // rows in use of every panel
  int64_t* chosen_experts;  // those with a row, in order, (experts)
  int64_t* chosen_count;    // how many these are

  void sort(const int32_t* chosen, int64_t slots, int64_t top, int64_t experts, int64_t tile) {
    std::fill(count, count + experts, 0);
    for (int64_t i = 0; i < slots; i++) count[chosen[i]]++;
    first_panel[0] = *chosen_count = 0;
    for (int64_t e = 0; e < experts; e++) {
      if (count[e]) chosen_experts[(*chosen_count)++] = e;
      first_panel[e + 1] = first_panel[e] + (count[e] + tile - 1) / tile;
      count[e] = 0;
    }
    for (int64_t i = 0; i < slots; i++) {
      int64_t e = chosen[i];
      row[i] = first_panel[e] * tile + count[e]++;
      token[row[i]] = i / top;
    }
    for (int64_t e = 0; e < experts; e++)
      for (int64_t p = first_panel[e]; p < first_panel[e + 1]; p++)
        panel_rows[p] = std::min(tile, count[e] - (p - first_panel[e]) * tile);
  }
};
