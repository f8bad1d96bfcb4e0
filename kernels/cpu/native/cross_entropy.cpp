// Projection to the vocabulary and cross-entropy in bfloat16, with their gradients; native_cross_entropy.py calls it.
//
// N tokens, D hidden width, V vocabulary; D and V are multiples of 16. A task is some tokens: their logits stay in its
// core's cache from their product through the loss to the product of their gradients with the weight, and are kept as
// pairs, of which the weight's gradient is made, a stretch of the vocabulary a task.
#include "cross_entropy.h"

#include <omp.h>

#include <vector>

#include "pairs.h"

namespace {

struct Shape {  // kernels/cpu/native_cross_entropy.py declares the same fields in the same order
  int64_t N, D, V, threads;
  int64_t chunk;         // tokens whose gradients are kept at a time, an even number
  int64_t float_weight;  // whether the weight is float32, which is rounded as it is read
  int64_t gradients;     // whether they are made
};

constexpr int64_t ROWS = 48;    // tokens of a task
constexpr int64_t WORDS = 192;  // of the vocabulary, of a task; whole panels, and blocks of TALL
constexpr int64_t DEPTH = 256;  // pairs of the vocabulary whose panel stays in the second-level cache

// loss (1), grad_x (N, D) and grad_weight (V, D) are written, the latter two only with gradients.
template <class Weight>
void run(const Shape& s, const bfloat16* x, const Weight* weight, const int64_t* targets, double* loss,
         bfloat16* grad_x, float* grad_weight) {
  const int64_t D = s.D, V = s.V, stride = V + 2 * LANES;  // rows a power of two apart share few places of a cache
  Pairs words, words_by_row, grads, inputs;
  std::vector<double> losses(s.N);
  const std::vector<bfloat16> nothing(D);
  words.resize(D, V);
  if (s.gradients) words_by_row.resize(V, D);
#pragma omp parallel for schedule(static) num_threads(s.threads)
  for (int64_t v = 0; v < V; v += PANEL) {
    const auto row_of = [=](int64_t i) { return weight + i * D; };
    words.pack_columns({v, std::min(v + PANEL, V)}, D, row_of);
    if (s.gradients) words_by_row.pack_rows({v, std::min(v + PANEL, V)}, row_of);
  }
  for (int64_t begin = 0; begin < s.N; begin += s.chunk) {
    const int64_t depth = std::min(s.chunk, s.N - begin);
    if (s.gradients) grads.resize(depth, V), inputs.resize(depth, D);
#pragma omp parallel num_threads(s.threads)
    {
      std::vector<bfloat16> logits(ROWS * stride);
      std::vector<float> powers(V), sums(ROWS * D);
#pragma omp for schedule(dynamic, 1)
      for (int64_t first = 0; first < depth; first += ROWS) {
        const int64_t rows = std::min(ROWS, depth - first), token = begin + first;
        multiply(rows, [&](int64_t i) { return as_pairs(x + (token + i) * D); }, 1, words,
                 [&](int64_t i) { return &logits[i * stride]; });
        for (int64_t i = 0; i < rows; i++)
          losses[token + i] = cross_entropy_row(&logits[i * stride], targets[token + i], V, s.gradients, powers.data());
        if (!s.gradients) continue;
        grads.pack_rows({first, first + rows}, [&](int64_t k) { return &logits[(k - first) * stride]; });
        // An unscored row's zeros must not meet its NaN.
        inputs.pack_rows({first, first + rows}, [&](int64_t k) {
          return targets[begin + k] < 0 ? nothing.data() : x + (begin + k) * D;
        });
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t k = 0; k < V / 2; k += DEPTH)
          multiply<true>(rows, [&](int64_t i) { return as_pairs(&logits[i * stride]); }, 1, words_by_row, {0, D},
                         {k, std::min(k + DEPTH, V / 2)}, [&](int64_t i) { return &sums[i * D]; });
        for (int64_t i = 0; i < rows * D; i += LANES) put(grad_x + token * D + i, load(&sums[i]), LANES);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t v = 0; v < (s.gradients ? V : 0); v += WORDS) {
        const auto left = [&](int64_t i) { return grads.at(0, v + i); };
        const auto out = [&](int64_t i) { return grad_weight + (v + i) * D; };
        const int64_t rows = std::min(WORDS, V - v);
        if (begin)
          multiply<true>(rows, left, PANEL, inputs, {0, D}, {0, inputs.count}, out);
        else
          multiply(rows, left, PANEL, inputs, out);
      }
    }
  }
  *loss = 0;
  for (double each : losses) *loss += each;
}

}  // namespace

// 0, and nothing done, where a target is beyond the vocabulary.
extern "C" int64_t moe_lm_cross_entropy(const Shape* shape, const bfloat16* x, const void* weight,
                                        const int64_t* targets, double* loss, bfloat16* grad_x, float* grad_weight) {
  if (std::any_of(targets, targets + shape->N, [=](int64_t target) { return target >= shape->V; })) return 0;
  if (shape->float_weight)
    run(*shape, x, (const float*)weight, targets, loss, grad_x, grad_weight);
  else
    run(*shape, x, (const bfloat16*)weight, targets, loss, grad_x, grad_weight);
  return 1;
}
