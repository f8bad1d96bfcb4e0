// Which experts the tokens of a training step go to, and the rows that their slots get in the experts' products.
//
// N tokens, K experts per token, E experts. Slot n * K + k is the k-th choice of token n.
#pragma once

#include <omp.h>

#include <limits>
#include <vector>

#include "elements.h"
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

// e^(x - largest) of x (E) to p, which has room for whole vectors. Gives their sum, and that of each times x - largest.
inline float exponentials(const float* x, int64_t E, float* p, float* largest, float* inner) {
  constexpr float INFINITE = std::numeric_limits<float>::infinity();
  Floats most = splat(-INFINITE), total{}, weighted{};
  for (int64_t e = 0; e < E; e += LANES) {
    const Floats v = beyond(load_first(x + e, E - e), E - e, -INFINITE);
    most = select(most > v, most, v);  // v where one is no number
  }
  *largest = maximum(most);
  for (int64_t e = 0; e < E; e += LANES) {
    const Floats shifted = load_first(x + e, E - e) - *largest;
    const Floats power = beyond(exponential(shifted), E - e, 0.0f);
    store(p + e, power);
    total += power;
    weighted += power * shifted;
  }
  *inner = sum(weighted);
  return sum(total);
}

// Of `rows` equal parts of the tokens, one after the other: the mean probability of every expert, (rows, E). And means
// over all tokens: of the squared logarithm of the sum of exponentials, of the entropy, of the largest probability.
inline void router_statistics(const float* logits, int64_t N, int64_t E, int64_t rows, float* probability,
                              float* z, float* entropy, float* confidence, int64_t threads) {
  typedef double Doubles __attribute__((vector_size(2 * sizeof(Floats))));
  const int64_t length = N / rows, wide = round_up(E, LANES), all = rows * wide;
  std::vector<double> sums(threads * (all + LANES));
#pragma omp parallel num_threads(threads)
  {
    double *own = &sums[omp_get_thread_num() * (all + LANES)], *means = own + all;
    std::vector<float> p(wide);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n++) {
      float largest, inner;
      const float total = exponentials(logits + n * E, E, p.data(), &largest, &inner), scale = 1 / total;
      for (int64_t e = 0; e < E; e += LANES) {
        double* to = own + n / length * wide + e;
        Doubles so_far;
        memcpy(&so_far, to, sizeof so_far);
        so_far += __builtin_convertvector(load(&p[e]) * scale, Doubles);
        memcpy(to, &so_far, sizeof so_far);
      }
      const float log_total = std::log(total), log_sum = largest + log_total;
      means[0] += log_sum * log_sum;
      means[1] += log_total - inner * scale;
      means[2] += scale;
    }
  }
  for (int64_t t = 1; t < threads; t++)
    for (int64_t i = 0; i < all + 3; i++) sums[i] += sums[t * (all + LANES) + i];
  for (int64_t row = 0; row < rows; row++)
    for (int64_t e = 0; e < E; e++) probability[row * E + e] = sums[row * wide + e] / length;
  *z = sums[all] / N, *entropy = sums[all + 1] / N, *confidence = sums[all + 2] / N;
}

// Gradient of the logits, from those of the mean probabilities (rows, E) and of the mean squared logarithm.
inline void router_statistics_backward(const float* logits, const float* grad_probability, float grad_z, int64_t N,
                                       int64_t E, int64_t rows, float* grad, int64_t threads) {
  const int64_t length = N / rows;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> p(round_up(E, LANES));
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n++) {
      const float* of_row = grad_probability + n / length * E;
      float largest, unused;
      const float total = exponentials(logits + n * E, E, p.data(), &largest, &unused), scale = 1 / total;
      Floats inner{};
      for (int64_t e = 0; e < E; e += LANES) inner = fma(load(&p[e]), load_first(of_row + e, E - e), inner);
      const float shift = 2 * grad_z * (largest + std::log(total)) / N - sum(inner) * scale / length;
      for (int64_t e = 0; e < E; e += LANES) {
        const Floats of_logit = fma(load_first(of_row + e, E - e), splat(1.0f / length), splat(shift));
        store_first(grad + n * E + e, load(&p[e]) * scale * of_logit, E - e);
      }
    }
  }
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
