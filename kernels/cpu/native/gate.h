// The router's product, in float32 whatever the tokens are, and its gradients. N tokens, D hidden width, E experts.
//
// A sum over channels or experts is one chain in order; one over tokens is of each thread's, in order.
#pragma once

#include <omp.h>

#include <algorithm>
#include <vector>

#include "elements.h"

constexpr int64_t TOKENS = 8;  // side by side: as many sums in registers for each vector of the weight that is read
constexpr int64_t STRETCH = 4 * TOKENS;  // that a thread takes at a time
constexpr int64_t TILE_SIDE = 4;  // experts, and vectors of channels, of a tile of the weight's gradient in registers

// Calls run(first, count, own) for stretches of the tokens; `own` is the thread's number.
template <class F>
void each_stretch(int64_t N, int64_t threads, F run) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t first = 0; first < N; first += STRETCH)
    run(first, std::min(STRETCH, N - first), omp_get_thread_num());
}

// Rows `first` .. of x (N, D) in float32, (STRETCH, wide); those beyond the last are zero.
template <class T>
void widen(const T* x, int64_t first, int64_t count, int64_t D, int64_t wide, float* out) {
  for (int64_t i = 0; i < STRETCH; i++)
    for (int64_t d = 0; d < wide; d += LANES)
      store(out + i * wide + d, i < count ? get(x + (first + i) * D + d, std::min<int64_t>(LANES, D - d)) : Floats{});
}

// Row i of a (STRETCH, a_wide) times b (depth, wide), a vector at a time to put_vector(i, column, .).
template <class Put>
INLINE void product_rows(const float* a, int64_t a_wide, const float* b, int64_t depth, int64_t wide, Put put_vector) {
  for (int64_t first = 0; first < STRETCH; first += TOKENS)
    for (int64_t j = 0; j < wide; j += LANES) {
      Floats sums[TOKENS] = {};
      for (int64_t k = 0; k < depth; k++) {
        const Floats w = load(b + k * wide + j);
        for (int64_t i = 0; i < TOKENS; i++) sums[i] = fma(splat(a[(first + i) * a_wide + k]), w, sums[i]);
      }
      for (int64_t i = 0; i < TOKENS; i++) put_vector(first + i, j, sums[i]);
    }
}

// Adds the products of columns of a (STRETCH, a_wide) with columns of b (STRETCH, wide) to out (a_wide, wide).
INLINE void add_products(const float* a, int64_t a_wide, const float* b, int64_t wide, float* out) {
  for (int64_t j = 0; j < wide; j += TILE_SIDE * LANES) {
    const int64_t vectors = std::min(TILE_SIDE, (wide - j) / LANES);
    for (int64_t e = 0; e < a_wide; e += TILE_SIDE) {
      Floats sums[TILE_SIDE][TILE_SIDE] = {};
      for (int64_t i = 0; i < STRETCH; i++) {
        Floats right[TILE_SIDE];
        for (int64_t v = 0; v < TILE_SIDE; v++) right[v] = load(b + i * wide + j + std::min(v, vectors - 1) * LANES);
        for (int64_t c = 0; c < TILE_SIDE; c++) {
          const Floats left = splat(a[i * a_wide + e + c]);
          for (int64_t v = 0; v < TILE_SIDE; v++) sums[c][v] = fma(left, right[v], sums[c][v]);
        }
      }
      for (int64_t c = 0; c < TILE_SIDE; c++)
        for (int64_t v = 0; v < vectors; v++) {
          float* to = out + (e + c) * wide + j + v * LANES;
          store(to, load(to) + sums[c][v]);
        }
    }
  }
}

// logits (N, E) of x (N, D) and weight (E, D).
template <class T>
void gate(const T* x, const float* weight, float* logits, int64_t N, int64_t D, int64_t E, int64_t threads) {
  const int64_t wide = round_up(D, LANES), wide_e = round_up(E, LANES);
  std::vector<float> turned(D * wide_e), room(threads * STRETCH * wide);
  for (int64_t e = 0; e < E; e++)
    for (int64_t d = 0; d < D; d++) turned[d * wide_e + e] = weight[e * D + d];
  each_stretch(N, threads, [&](int64_t first, int64_t count, int64_t own) {
    float* rows = &room[own * STRETCH * wide];
    widen(x, first, count, D, wide, rows);
    product_rows(rows, wide, turned.data(), D, wide_e, [&](int64_t i, int64_t e, Floats sum_of) {
      if (i < count) put(logits + (first + i) * E + e, sum_of, E - e);
    });
  });
}

// Gradients of x (N, D) and weight (E, D) from that of the logits, grad (N, E).
template <class T>
void gate_backward(const float* grad, const T* x, const float* weight, T* grad_x, float* grad_weight, int64_t N,
                   int64_t D, int64_t E, int64_t threads) {
  const int64_t wide = round_up(D, LANES), wide_e = round_up(E, LANES);
  std::vector<float> padded(E * wide), sums(threads * wide_e * wide), room(threads * STRETCH * (wide + wide_e));
  for (int64_t e = 0; e < E; e++) std::copy(weight + e * D, weight + (e + 1) * D, &padded[e * wide]);
  each_stretch(N, threads, [&](int64_t first, int64_t count, int64_t own) {
    float *rows = &room[own * STRETCH * (wide + wide_e)], *grads = rows + STRETCH * wide;
    widen(x, first, count, D, wide, rows);
    widen(grad, first, count, E, wide_e, grads);
    product_rows(grads, wide_e, padded.data(), E, wide, [&](int64_t i, int64_t d, Floats sum_of) {
      if (i < count) put(grad_x + (first + i) * D + d, sum_of, D - d);
    });
    add_products(grads, wide_e, rows, wide, &sums[own * wide_e * wide]);
  });
  for (int64_t e = 0; e < E; e++)
    for (int64_t d = 0; d < D; d++) {
      float total = 0;
      for (int64_t t = 0; t < threads; t++) total += sums[(t * wide_e + e) * wide + d];
      grad_weight[e * D + d] = total;
    }
}
