// What training does between matrix products, each in one pass over its rows; kernels/cpu/native_passes.py calls it.
//
// N tokens, K experts per token, D hidden width, F expert width, V vocabulary, M rows that experts compute, B rows of T
// tokens, R query heads that share a key head, C channels of a head. Matrices are row by row, without gaps. Numbers are
// float32 or bfloat16 (T of a template); every pass computes in float32 and rounds once. A row is one thread's, so that
// sums over it do not depend on the number of threads; sums over rows are made of each thread's, in order.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cross_entropy.h"
#include "gate.h"
#include "slots.h"

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

INLINE Floats larger(Floats a, Floats b) { return select(a > b, a, b); }

// Calls run(row) for each row; a thread takes a stretch of them.
template <class F>
void each_row(int64_t rows, int64_t threads, F run) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) run(row);
}

template <class T>
double cross_entropy(T* logits, const int64_t* targets, int64_t rows, int64_t V, bool gradient, int64_t threads) {
  std::vector<double> losses(rows);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> powers(round_up(V, LANES));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++)
      losses[row] = cross_entropy_row(logits + row * V, targets[row], V, gradient, powers.data());
  }
  double loss = 0;
  for (double each : losses) loss += each;
  return loss;
}

template <class T>
void swiglu(const T* hidden, T* act, int64_t rows, int64_t F, int64_t threads) {
  each_row(rows, threads, [=](int64_t row) { swiglu_row(hidden + row * 2 * F, act + row * F, F); });
}

// Of the row whose slot is s, its output counts weights[s] times: grad_act becomes weight * act, which grad_down is made
// of. A row without a slot, -1, gets zeros. weights and slots null: every row counts once, and grad_act becomes act.
template <class T>
void swiglu_backward(T* grad_act, const T* hidden, const float* weights, const int64_t* slots, T* grad_hidden,
                     float* grad_weights, int64_t rows, int64_t F, int64_t threads) {
  each_row(rows, threads, [=](int64_t row) {
    T *act = grad_act + row * F, *to_hidden = grad_hidden + row * 2 * F;
    if (slots && slots[row] < 0) {
      memset((void*)act, 0, F * sizeof(T));
      memset((void*)to_hidden, 0, 2 * F * sizeof(T));
      return;
    }
    const float inner = swiglu_backward_row(act, hidden + row * 2 * F, slots ? weights[slots[row]] : 1.0f, to_hidden, F);
    if (slots) grad_weights[slots[row]] = inner;
  });
}

template <class T>
void gather(const T* x, const int64_t* sources, T* out, int64_t rows, int64_t D, int64_t threads) {
  each_row(rows, threads, [=](int64_t row) {
    if (sources[row] < 0)
      memset((void*)(out + row * D), 0, D * sizeof(T));
    else
      memcpy((void*)(out + row * D), (const void*)(x + sources[row] * D), D * sizeof(T));
  });
}

// Sum over each token's K rows, by weight; each counts once if weights is null.
template <class T>
void combine(const T* y, const float* weights, const int64_t* row_of_slot, T* out, int64_t N, int64_t K, int64_t D,
             int64_t threads) {
  each_row(N, threads, [=](int64_t n) {
    for (int64_t i = 0; i < D; i += LANES) {
      Floats total{};
      for (int64_t k = n * K; k < n * K + K; k++)
        total = fma(get(y + row_of_slot[k] * D + i, D - i), splat(weights ? weights[k] : 1.0f), total);
      put(out + n * D + i, total, D - i);
    }
  });
}

// residual and total null: the norm of x; else that of total = x + residual, which is rounded first.
template <class T>
void rms_norm(const T* x, const T* residual, const float* weight, T* total, T* out, float* inverse, int64_t rows,
              int64_t D, double eps, int64_t threads) {
  each_row(rows, threads, [=](int64_t row) {
    const T* from = x + row * D;
    Floats squares{};
    for (int64_t i = 0; i < D; i += LANES) {
      Floats v = get(from + i, D - i);
      if (residual) {
        put(total + row * D + i, v + get(residual + row * D + i, D - i), D - i);
        v = get(total + row * D + i, D - i);
      }
      squares = fma(v, v, squares);
    }
    if (residual) from = total + row * D;
    const float r = (float)(1.0 / std::sqrt((double)sum(squares) / D + eps));
    inverse[row] = r;
    for (int64_t i = 0; i < D; i += LANES)
      put(out + row * D + i, get(from + i, D - i) * r * get(weight + i, D - i), D - i);
  });
}

template <class T>
void rms_norm_backward(const T* grad, const T* x, const float* weight, const float* inverse, const T* grad_sum,
                       T* grad_x, float* grad_weight, int64_t rows, int64_t D, int64_t threads) {
  const int64_t wide = round_up(D, LANES);
  std::vector<float> sums(threads * wide);
#pragma omp parallel num_threads(threads)
  {
    float* own = &sums[omp_get_thread_num() * wide];
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      const T *g = grad + row * D, *v = x + row * D;
      const float r = inverse[row];
      Floats inner{};
      for (int64_t i = 0; i < D; i += LANES) {
        Floats both = get(g + i, D - i) * get(v + i, D - i);
        store(own + i, fma(both, splat(r), load(own + i)));
        inner = fma(both, get(weight + i, D - i), inner);
      }
      const float shift = -sum(inner) * r * r * r / D;
      for (int64_t i = 0; i < D; i += LANES) {
        Floats d = fma(get(v + i, D - i), splat(shift), get(g + i, D - i) * get(weight + i, D - i) * r);
        if (grad_sum) d += get(grad_sum + row * D + i, D - i);
        put(grad_x + row * D + i, d, D - i);
      }
    }
  }
  for (int64_t i = 0; i < D; i++) {
    float total = 0;
    for (int64_t t = 0; t < threads; t++) total += sums[t * wide + i];
    grad_weight[i] = total;
  }
}

template <class T>
void rope(const T* x, int64_t stride, const float* cosines, const float* sines, T* out, int64_t N, int64_t H,
          int64_t C, int64_t threads) {
  const int64_t half = C / 2;
  each_row(N, threads, [=](int64_t n) {
    for (int64_t h = 0; h < H; h++) {
      const T* from = x + n * stride + h * C;
      T* to = out + (n * H + h) * C;
      for (int64_t i = 0; i < half; i += LANES) {
        const int64_t left = half - i;
        Floats a = get(from + i, left), b = get(from + half + i, left);
        Floats c = get(cosines + n * half + i, left), s = get(sines + n * half + i, left);
        put(to + i, a * c - b * s, left);
        put(to + half + i, b * c + a * s, left);
      }
    }
  });
}

// A block of scores: row ((b I) + i) R + r has the products of query first + i of head r with the keys 0 .. J.
struct Block {  // kernels/cpu/native_passes.py declares the same fields in the same order
  int64_t B, I, R, J, first;
  const int64_t* documents;  // (B, T), or null
  int64_t T;

  // Keys that the query sees, as a mask beside `seen`, how many there are at most.
  template <class F>
  void each_query(int64_t threads, F run) const {
#pragma omp parallel num_threads(threads)
    {
      std::vector<float> shown(round_up(J, LANES));
#pragma omp for schedule(static)
      for (int64_t row = 0; row < B * I; row++) {
        const int64_t b = row / I, query = first + row % I, seen = std::min(query + 1, J);
        if (documents) {
          const int64_t* own = documents + b * T;
          for (int64_t j = 0; j < seen; j++) shown[j] = own[j] == own[query] ? 1.0f : 0.0f;
        }
        run(row, b, query, seen, documents ? shown.data() : nullptr);
      }
    }
  }
};

// lse (B, T, R).
template <class T>
void softmax(T* scores, float* lse, float scale, const Block& block, int64_t threads) {
  block.each_query(threads, [=](int64_t row, int64_t b, int64_t query, int64_t seen, const float* shown) {
    for (int64_t r = 0; r < block.R; r++) {
      T* x = scores + (row * block.R + r) * block.J;
      Floats most = splat(-INFINITE), total{};
      for (int64_t j = 0; j < seen; j += LANES) {
        Floats v = get(x + j, block.J - j) * scale;
        if (shown) v = select(load(shown + j) > 0.5f, v, splat(-INFINITE));
        most = larger(seen - j < LANES ? beyond(v, seen - j, -INFINITE) : v, most);
      }
      const float peak = maximum(most);
      for (int64_t j = 0; j < seen; j += LANES) {
        Floats p = exponential(get(x + j, block.J - j) * scale - peak);
        if (shown) p = select(load(shown + j) > 0.5f, p, Floats{});
        total += seen - j < LANES ? beyond(p, seen - j, 0.0f) : p;
      }
      const float sum_of = sum(total), factor = 1.0f / sum_of;
      lse[(b * block.T + query) * block.R + r] = peak + std::log(sum_of);
      for (int64_t j = 0; j < block.J; j += LANES) {
        Floats p{};
        if (j < seen) {
          p = exponential(get(x + j, block.J - j) * scale - peak) * factor;
          if (shown) p = select(load(shown + j) > 0.5f, p, Floats{});
          if (seen - j < LANES) p = beyond(p, seen - j, 0.0f);
        }
        put(x + j, p, block.J - j);
      }
    }
  });
}

// scores become probabilities, grad_p the gradient of the scores before they were scaled.
template <class T>
void softmax_backward(T* scores, T* grad_p, const float* lse, const float* delta, float scale, const Block& block,
                      int64_t threads) {
  block.each_query(threads, [=](int64_t row, int64_t b, int64_t query, int64_t seen, const float* shown) {
    for (int64_t r = 0; r < block.R; r++) {
      T *x = scores + (row * block.R + r) * block.J, *g = grad_p + (row * block.R + r) * block.J;
      const int64_t at = (b * block.T + query) * block.R + r;
      for (int64_t j = 0; j < block.J; j += LANES) {
        Floats p{}, d{};
        if (j < seen) {
          p = exponential(get(x + j, block.J - j) * scale - lse[at]);
          if (shown) p = select(load(shown + j) > 0.5f, p, Floats{});
          d = p * (get(g + j, block.J - j) - delta[at]) * scale;
          if (shown) d = select(load(shown + j) > 0.5f, d, Floats{});
          if (seen - j < LANES) p = beyond(p, seen - j, 0.0f), d = beyond(d, seen - j, 0.0f);
        }
        put(x + j, p, block.J - j);
        put(g + j, d, block.J - j);
      }
    }
  });
}

// delta (rows): sums over the channels of grad * out.
template <class T>
void row_products(const T* a, const T* b, float* out, int64_t rows, int64_t C, int64_t threads) {
  each_row(rows, threads, [=](int64_t row) {
    Floats total{};
    for (int64_t i = 0; i < C; i += LANES) total = fma(get(a + row * C + i, C - i), get(b + row * C + i, C - i), total);
    out[row] = sum(total);
  });
}

}  // namespace

// Each by the dtype of its numbers: bfloat16 where `half` is not 0, else float32.
#define WITH(HALF, ...)         \
  if (HALF) {                   \
    using T = bfloat16;         \
    __VA_ARGS__;                \
  } else {                      \
    using T = float;            \
    __VA_ARGS__;                \
  }

extern "C" {

double moe_lm_cross_entropy(int64_t half, void* logits, const int64_t* targets, int64_t rows, int64_t V,
                            int64_t gradient, int64_t threads) {
  WITH(half, return cross_entropy((T*)logits, targets, rows, V, gradient, threads))
}

void moe_lm_swiglu(int64_t half, const void* hidden, void* act, int64_t rows, int64_t F, int64_t threads) {
  WITH(half, swiglu((const T*)hidden, (T*)act, rows, F, threads))
}

void moe_lm_swiglu_backward(int64_t half, void* grad_act, const void* hidden, const float* weights,
                            const int64_t* slots, void* grad_hidden, float* grad_weights, int64_t rows, int64_t F,
                            int64_t threads) {
  WITH(half, swiglu_backward((T*)grad_act, (const T*)hidden, weights, slots, (T*)grad_hidden, grad_weights, rows, F,
                             threads))
}

void moe_lm_gather(int64_t half, const void* x, const int64_t* sources, void* out, int64_t rows, int64_t D,
                   int64_t threads) {
  WITH(half, gather((const T*)x, sources, (T*)out, rows, D, threads))
}

void moe_lm_combine(int64_t half, const void* y, const float* weights, const int64_t* row_of_slot, void* out,
                    int64_t N, int64_t K, int64_t D, int64_t threads) {
  WITH(half, combine((const T*)y, weights, row_of_slot, (T*)out, N, K, D, threads))
}

void moe_lm_rms_norm(int64_t half, const void* x, const void* residual, const float* weight, void* total, void* out,
                     float* inverse, int64_t rows, int64_t D, double eps, int64_t threads) {
  WITH(half, rms_norm((const T*)x, (const T*)residual, weight, (T*)total, (T*)out, inverse, rows, D, eps, threads))
}

void moe_lm_rms_norm_backward(int64_t half, const void* grad, const void* x, const float* weight, const float* inverse,
                              const void* grad_sum, void* grad_x, float* grad_weight, int64_t rows, int64_t D,
                              int64_t threads) {
  WITH(half, rms_norm_backward((const T*)grad, (const T*)x, weight, inverse, (const T*)grad_sum, (T*)grad_x,
                               grad_weight, rows, D, threads))
}

void moe_lm_rope(int64_t half, const void* x, int64_t stride, const float* cosines, const float* sines, void* out,
                 int64_t N, int64_t H, int64_t C, int64_t threads) {
  WITH(half, rope((const T*)x, stride, cosines, sines, (T*)out, N, H, C, threads))
}

void moe_lm_softmax(int64_t half, void* scores, float* lse, double scale, const Block* block, int64_t threads) {
  WITH(half, softmax((T*)scores, lse, (float)scale, *block, threads))
}

void moe_lm_softmax_backward(int64_t half, void* scores, void* grad_p, const float* lse, const float* delta,
                             double scale, const Block* block, int64_t threads) {
  WITH(half, softmax_backward((T*)scores, (T*)grad_p, lse, delta, (float)scale, *block, threads))
}

void moe_lm_route(int64_t, const float* logits, const float* bias, float* weights, int64_t* experts, int64_t* order,
                  int64_t* offsets, int64_t N, int64_t E, int64_t K, int64_t normalize, int64_t threads) {
  route(logits, bias, normalize, N, E, K, weights, experts, order, offsets, threads);
}

void moe_lm_gate(int64_t half, const void* x, const float* weight, float* logits, int64_t N, int64_t D, int64_t E,
                 int64_t threads) {
  WITH(half, gate((const T*)x, weight, logits, N, D, E, threads))
}

void moe_lm_gate_backward(int64_t half, const float* grad, const void* x, const float* weight, void* grad_x,
                          float* grad_weight, int64_t N, int64_t D, int64_t E, int64_t threads) {
  WITH(half, gate_backward(grad, (const T*)x, weight, (T*)grad_x, grad_weight, N, D, E, threads))
}

void moe_lm_router_statistics(int64_t, const float* logits, float* probability, float* z, float* entropy,
                              float* confidence, int64_t N, int64_t E, int64_t rows, int64_t threads) {
  router_statistics(logits, N, E, rows, probability, z, entropy, confidence, threads);
}

void moe_lm_router_statistics_backward(int64_t, const float* logits, const float* grad_probability, float* grad,
                                       double grad_z, int64_t N, int64_t E, int64_t rows, int64_t threads) {
  router_statistics_backward(logits, grad_probability, (float)grad_z, N, E, rows, grad, threads);
}

void moe_lm_row_products(int64_t half, const void* a, const void* b, float* out, int64_t rows, int64_t C,
                         int64_t threads) {
  WITH(half, row_products((const T*)a, (const T*)b, out, rows, C, threads))
}

int64_t moe_lm_place(const int64_t* order, const int64_t* offsets, const int64_t* starts, int64_t count, int64_t E,
                     int64_t K, int64_t size, int64_t total, int64_t* tokens, int64_t* slots, int64_t* row_of_slot) {
  return place(order, offsets, starts, count, E, K, size, total, tokens, slots, row_of_slot);
}

}  // extern "C"
