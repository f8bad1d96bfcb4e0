// Causal attention inside whole rows in bfloat16, forward and backward; kernels/cpu/native_attention.py calls it.
//
// B rows of T tokens, H query heads, G key-value heads, R = H / G query heads that share one, C channels, a multiple of
// 16. A row of a product is a query of one head, those of a token side by side. Tokens see those of their row from
// starts (B, T) to themselves, and starts do not fall within a row. A task is the queries of some tokens with the heads
// of one key head; the scores of 96 of them are in its core's cache from their product to the next.
#include <omp.h>

#include <cmath>
#include <limits>
#include <vector>

#include "elements.h"
#include "pairs.h"

namespace {

struct Shape {  // kernels/cpu/native_attention.py declares the same fields in the same order
  int64_t B, T, H, G, C, queries, threads;
};

int64_t count_parts(const Shape& s) { return (s.T + s.queries - 1) / s.queries; }

constexpr int64_t ROWS = 96;   // that go through together; an even number
constexpr int64_t KEYS = 256;  // of a block of scores in the backward; whole panels

struct Task {
  const Shape& s;
  int64_t b, g, part, begin, end;  // queries of tokens [begin, end) of row b
  int64_t from;                    // the first key that they see
  int64_t R = s.H / s.G, keys = end - from, rows = (end - begin) * R;

  Task(const Shape& shape, const int64_t* starts, int64_t index)
      : s(shape), b(index / (s.G * count_parts(s))), g(index / count_parts(s) % s.G), part(index % count_parts(s)),
        begin(part * s.queries), end(std::min(s.T, begin + s.queries)), from(starts[b * s.T + begin]) {}

  int64_t token(int64_t row) const { return b * s.T + begin + row / R; }
  int64_t head(int64_t row) const { return token(row) * s.H + g * R + row % R; }
  template <class T>
  T* query(T* of, int64_t row) const {
    return of + head(row) * s.C;
  }
  // Beyond the last one it is that one.
  const bfloat16* key(const bfloat16* of, int64_t j) const {
    return of + ((b * s.T + std::min(from + j, end - 1)) * s.G + g) * s.C;
  }
  // Which keys a row sees.
  Span seen(const int64_t* starts, int64_t row) const {
    return {starts[token(row)] - from, begin + row / R + 1 - from};
  }
};

struct Chunk {  // rows of a task, and which columns of their scores are made
  int64_t first, rows;
  Span columns, pairs;

  Chunk(const Task& task, const int64_t* starts, int64_t row)
      : first(row), rows(std::min(ROWS, task.rows - row)),
        columns{task.seen(starts, row).begin / PANEL * PANEL, round_up(task.seen(starts, row + rows - 1).end, LANES)},
        pairs{columns.begin / 2, std::min(columns.end, task.keys + 1) / 2} {}
};

INLINE Ints inside(int64_t i, Span seen) {
  const Ints lane = Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + (int32_t)i;
  return (lane >= (int32_t)seen.begin) & (lane < (int32_t)seen.end);
}

// Scores become probabilities, 0 in columns that are not seen; the log-sum-exp of those that are.
float softmax(float* scores, bfloat16* p, Span columns, Span seen, float scale) {
  constexpr float INFINITE = std::numeric_limits<float>::infinity();
  const int64_t begin = seen.begin / LANES * LANES, end = round_up(seen.end, LANES);
  Floats most = splat(-INFINITE), total{};
  for (int64_t i = begin; i < end; i += LANES) {
    const Floats x = select(inside(i, seen), load(scores + i) * scale, splat(-INFINITE));
    store(scores + i, x);
    most = select(x > most, x, most);
  }
  const float peak = maximum(most);
  for (int64_t i = begin; i < end; i += LANES) {
    const Floats power = exponential(load(scores + i) - peak);
    store(scores + i, power);
    total += power;
  }
  const float sum_of = sum(total), factor = 1.0f / sum_of;
  for (int64_t i = begin; i < end; i += LANES) put(p + i, load(scores + i) * factor, LANES);
  std::fill(p + columns.begin, p + begin, bfloat16{});
  std::fill(p + end, p + columns.end, bfloat16{});
  return peak + std::log(sum_of);
}

// What the gradient of a row's scores is made of.
struct Row {
  Span seen{};
  float lse = 0, delta = 0;  // the latter is the sum over the channels of grad * out

  Row() = default;
  Row(const Task& task, const int64_t* starts, const bfloat16* grad, const bfloat16* out, const float* of_lse,
      int64_t row)
      : seen(task.seen(starts, row)), lse(of_lse[task.head(row)]) {
    const bfloat16 *a = task.query(grad, row), *b = task.query(out, row);
    Floats total{};
    for (int64_t c = 0; c < task.s.C; c += LANES) total = fma(load(a + c), load(b + c), total);
    delta = sum(total);
  }
};

// Of two neighbouring rows, 16 columns from `at` on: pairs of their probabilities to p, of the gradients of their
// scores to d, and these row by row to grad_scores (2, stride). scores and grad_p, what they are made of: (2, KEYS).
void pair_up(const Row* rows, int64_t at, float scale, const float* scores, const float* grad_p, int64_t stride,
             bfloat16* grad_scores, Pair* p, Pair* d) {
  Bits of_p{}, of_d{};
  for (int j = 0; j < 2; j++) {
    const Ints mask = inside(at, rows[j].seen);
    const Floats score = load(scores + j * KEYS) * scale, slope = load(grad_p + j * KEYS) - rows[j].delta;
    const Floats probability = select(mask, exponential(score - rows[j].lse), Floats{});
    const Halves gradient = narrow(select(mask, probability * slope * scale, Floats{}));
    memcpy(grad_scores + j * stride, &gradient, sizeof gradient);
    of_p |= __builtin_convertvector(narrow(probability), Bits) << (16 * j);
    of_d |= __builtin_convertvector(gradient, Bits) << (16 * j);
  }
  memcpy(p, &of_p, sizeof of_p);
  memcpy(d, &of_d, sizeof of_d);
}

// Whether every token's first is in its row, not behind it, and not before that of the one to its left.
bool in_rows(const Shape& s, const int64_t* starts) {
  for (int64_t i = 0; i < s.B * s.T; i++)
    if (starts[i] > i % s.T || starts[i] < (i % s.T ? starts[i - 1] : 0)) return false;
  return true;
}

template <class F>
void each_task(const Shape& s, const int64_t* starts, F run) {
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < s.B * s.G * count_parts(s); i++) run(Task(s, starts, i));
}

}  // namespace

extern "C" {

// out (B, T, H, C), lse (B, T, H). 0, and nothing done, where `starts` are not as above.
int64_t moe_lm_forward(const Shape* shape, const bfloat16* q, const bfloat16* k, const bfloat16* v,
                       const int64_t* starts, bfloat16* out, float* lse) {
  const Shape s = *shape;
  if (!in_rows(s, starts)) return 0;
  const float scale = 1.0f / std::sqrt((float)s.C);
#pragma omp parallel num_threads(s.threads)
  {
    Pairs keys, values;
    std::vector<float> scores;
    std::vector<bfloat16> probabilities;
    each_task(s, starts, [&](const Task& task) {
      const int64_t wide = round_up(task.keys, LANES), stride = wide + LANES;
      scores.resize(ROWS * stride), probabilities.resize(ROWS * stride);
      keys.pack_transposed(wide, s.C, [&](int64_t j) { return task.key(k, j); });
      values.pack(task.keys, s.C, [&](int64_t j) { return task.key(v, j); });
      for (int64_t first = 0; first < task.rows; first += ROWS) {
        const Chunk chunk(task, starts, first);
        multiply(chunk.rows, [&](int64_t i) { return as_pairs(task.query(q, first + i)); }, 1, keys, chunk.columns,
                 {0, keys.count}, [&](int64_t i) { return &scores[i * stride]; });
        for (int64_t i = 0; i < chunk.rows; i++)
          lse[task.head(first + i)] = softmax(&scores[i * stride], &probabilities[i * stride], chunk.columns,
                                              task.seen(starts, first + i), scale);
        multiply(chunk.rows, [&](int64_t i) { return as_pairs(&probabilities[i * stride]); }, 1, values, {0, s.C},
                 chunk.pairs, [&](int64_t i) { return task.query(out, first + i); });
      }
    });
  }
  return 1;
}

// Gradients of q, and of k and v float32 (B, G, parts, T, C) that are to be summed over the parts, and are zero before
// (Dao et al. 2022, algorithm 4). 0 as above.
int64_t moe_lm_backward(const Shape* shape, const bfloat16* grad, const bfloat16* q, const bfloat16* k,
                        const bfloat16* v, const int64_t* starts, const bfloat16* out, const float* lse,
                        bfloat16* grad_q, float* grad_k, float* grad_v) {
  const Shape s = *shape;
  if (!in_rows(s, starts)) return 0;
  const float scale = 1.0f / std::sqrt((float)s.C);
#pragma omp parallel num_threads(s.threads)
  {
    Pairs keys, keys_by_row, values, queries, grads, p, d;
    std::vector<Row> rows;
    std::vector<float> scores(ROWS * KEYS), grad_p(ROWS * KEYS);
    std::vector<bfloat16> grad_scores;
    each_task(s, starts, [&](const Task& task) {
      const int64_t wide = round_up(task.keys, LANES), stride = wide + LANES;
      grad_scores.resize(ROWS * stride);
      keys.pack_transposed(wide, s.C, [&](int64_t j) { return task.key(k, j); });
      values.pack_transposed(wide, s.C, [&](int64_t j) { return task.key(v, j); });
      keys_by_row.pack(task.keys, s.C, [&](int64_t j) { return task.key(k, j); });
      const int64_t place = (((task.b * s.G + task.g) * count_parts(s) + task.part) * s.T + task.from) * s.C;
      for (int64_t first = 0; first < task.rows; first += ROWS) {
        const Chunk chunk(task, starts, first);
        const auto query = [&](int64_t i) { return task.query(q, first + i); };
        const auto grad_out = [&](int64_t i) { return task.query(grad, first + i); };
        queries.pack(chunk.rows, s.C, query);
        grads.pack(chunk.rows, s.C, grad_out);
        rows.assign(ROWS, {});
        for (int64_t i = 0; i < chunk.rows; i++) rows[i] = Row(task, starts, grad, out, lse, first + i);
        for (int64_t from = chunk.columns.begin; from < chunk.columns.end; from += KEYS) {
          const Span block{from, std::min(from + KEYS, chunk.columns.end)};
          const auto at = [&](std::vector<float>& of) {
            return [data = of.data(), from](int64_t i) { return data + i * KEYS - from; };
          };
          multiply(chunk.rows, [&](int64_t i) { return as_pairs(query(i)); }, 1, keys, block, {0, keys.count}, at(scores));
          multiply(chunk.rows, [&](int64_t i) { return as_pairs(grad_out(i)); }, 1, values, block, {0, values.count},
                   at(grad_p));
          p.resize(chunk.rows, KEYS), d.resize(chunk.rows, KEYS);
          for (int64_t i = 0; i < chunk.rows; i += 2)
            for (int64_t j = 0; j < block.end - from; j += LANES)
              pair_up(&rows[i], from + j, scale, &scores[i * KEYS + j], &grad_p[i * KEYS + j], stride,
                      &grad_scores[i * stride + from + j], p.at(i / 2, j), d.at(i / 2, j));
          const int64_t seen = std::min(block.end, task.keys) - from;
          const auto of_keys = [&](float* of) {
            return [=](int64_t i) { return of + place + (from + i) * s.C; };
          };
          multiply<true>(seen, [&](int64_t i) { return p.at(0, i); }, PANEL, grads, {0, s.C}, {0, grads.count},
                         of_keys(grad_v));
          multiply<true>(seen, [&](int64_t i) { return d.at(0, i); }, PANEL, queries, {0, s.C}, {0, queries.count},
                         of_keys(grad_k));
        }
        multiply(chunk.rows, [&](int64_t i) { return as_pairs(&grad_scores[i * stride]); }, 1, keys_by_row, {0, s.C},
                 chunk.pairs, [&](int64_t i) { return task.query(grad_q, first + i); });
      }
    });
  }
  return 1;
}

}  // extern "C"
