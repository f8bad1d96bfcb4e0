// Which experts the tokens of a training step go to, and the rows that their slots get in the experts' products.
//
// N tokens, K experts per token, E experts. Slot n * K + k is the k-th choice of token n.
#pragma once

#include <vector>

#include "routing.h"

// weights and experts (N, K) as `choose` has them, a NaN before all numbers; order (N * K), the slots expert by expert,
// and offsets (E + 1), where each expert's begin in it.
inline void route(const float* logits, const float* bias, bool normalize, int64_t N, int64_t E, int64_t K,
                  float* weights, int64_t* experts, int64_t* order, int64_t* offsets, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> room(2 * E);
    std::vector<int32_t> chosen(K);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n++) {
      choose<true>(logits + n * E, bias, normalize, E, K, chosen.data(), weights + n * K, room.data());
      std::copy(chosen.begin(), chosen.end(), experts + n * K);
    }
  }
  std::fill(offsets, offsets + E + 1, 0);
  for (int64_t i = 0; i < N * K; i++) offsets[experts[i] + 1]++;
  for (int64_t e = 0; e < E; e++) offsets[e + 1] += offsets[e];
  std::vector<int64_t> next(offsets, offsets + E);
  for (int64_t i = 0; i < N * K; i++) order[next[experts[i]]++] = i;
}

// Token and slot of each of `total` rows, -1 where it is spare, and the row of each of `count` slots. An expert's first
// `size` slots have the rows from e * size on, the others those from starts[e] + size on. False where `order` or
// `offsets` are no such list of slots.
inline bool place(const int64_t* order, const int64_t* offsets, const int64_t* starts, int64_t count, int64_t E,
                  int64_t K, int64_t size, int64_t total, int64_t* tokens, int64_t* slots, int64_t* row_of_slot) {
  std::fill(tokens, tokens + total, -1);
  std::fill(slots, slots + total, -1);
  if (offsets[0] != 0 || offsets[E] != count) return false;
  for (int64_t e = 0; e < E; e++)
    for (int64_t i = offsets[e]; i < offsets[e + 1]; i++) {
      const int64_t rank = i - offsets[e], row = (rank < size ? e * size : starts[e]) + rank;
      if (i < 0 || i >= count || row >= total || order[i] < 0 || order[i] >= count) return false;
      tokens[row] = order[i] / K;
      slots[row] = order[i];
      row_of_slot[order[i]] = row;
    }
  return true;
}
