// The experts' MLPs in bfloat16, forward and backward, each expert's rows as many as it has; native_experts.py calls it.
//
// N tokens, K experts per token, D hidden width, F expert width, E experts, M = N * K slots. A slot's row is its place in
// the order by experts. D and F are multiples of 16. A task is some rows of an expert, or some rows of a weight's
// gradient: a thread's own, from packing to rounding, so it waits for no other. Weights are packed panel by panel, each
// for all rows of a task before the next, so that rows and panel stay in a core's second-level cache.
#include <omp.h>

#include <vector>

#include "elements.h"
#include "pairs.h"

namespace {

struct Shape {  // kernels/cpu/native_experts.py declares the same fields in the same order
  int64_t N, K, D, F, E, threads;
  int64_t float_weights;  // whether the weights and their gradients are float32, which is rounded as it is read
};

struct Task {
  int64_t expert, first, rows;
};

constexpr int64_t ROWS = 48;  // a task has a multiple of it, but for an expert's last: whole blocks of TALL

// Stretches of `count[e]` things of every expert, a few for each thread, long ones first.
template <class Count>
std::vector<Task> share_out(const Shape& s, Count count) {
  int64_t total = 0;
  for (int64_t e = 0; e < s.E; e++) total += count(e);
  const int64_t most = round_up(std::max(ROWS, total / (4 * s.threads)), ROWS);
  std::vector<Task> tasks;
  for (int64_t e = 0; e < s.E; e++)
    for (int64_t i = 0; i < count(e); i += most) tasks.push_back({e, i, std::min(most, count(e) - i)});
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.rows > b.rows; });
  return tasks;
}

// Calls run(column, width) for each panel of a matrix so wide.
template <class F>
void each_panel(int64_t columns, F run) {
  for (int64_t column = 0; column < columns; column += PANEL) run(column, std::min(PANEL, columns - column));
}

// Whether they are the slots of a routing.
bool sorted_slots(const Shape& s, const int64_t* order, const int64_t* offsets) {
  const int64_t slots = s.N * s.K;
  for (int64_t e = 0; e < s.E; e++)
    if (offsets[e] > offsets[e + 1]) return false;
  return offsets[0] == 0 && offsets[s.E] == slots &&
         std::all_of(order, order + slots, [=](int64_t slot) { return slot >= 0 && slot < slots; });
}

// hidden (M, 2F), y (M, D), row_of_slot (N, K). 0, and nothing done, where `order` and `offsets` are no routing's.
template <class Weight>
int64_t forward(const Shape& s, const bfloat16* x, const int64_t* order, const int64_t* offsets, const Weight* gate_up,
                const Weight* down, bfloat16* hidden, bfloat16* y, int64_t* row_of_slot) {
  if (!sorted_slots(s, order, offsets)) return 0;
  const int64_t D = s.D, F = s.F;
  const auto tasks = share_out(s, [=](int64_t e) { return offsets[e + 1] - offsets[e]; });
#pragma omp parallel num_threads(s.threads)
  {
    Pairs panel;
    std::vector<bfloat16> acts;
#pragma omp for schedule(dynamic, 1)
    for (const Task& task : tasks) {
      const int64_t begin = offsets[task.expert] + task.first, rows = task.rows;
      each_panel(2 * F, [&](int64_t c, int64_t wide) {
        panel.pack_transposed(wide, D, [&](int64_t i) { return gate_up + (task.expert * 2 * F + c + i) * D; });
        multiply(rows, [&](int64_t i) { return as_pairs(x + order[begin + i] / s.K * D); }, 1, panel,
                 [&](int64_t i) { return hidden + (begin + i) * 2 * F + c; });
      });
      acts.resize(rows * F);
      for (int64_t i = 0; i < rows; i++) {
        swiglu_row(hidden + (begin + i) * 2 * F, &acts[i * F], F);
        row_of_slot[order[begin + i]] = begin + i;
      }
      each_panel(D, [&](int64_t c, int64_t wide) {
        panel.pack_transposed(wide, F, [&](int64_t i) { return down + (task.expert * D + c + i) * F; });
        multiply(rows, [&](int64_t i) { return as_pairs(&acts[i * F]); }, 1, panel,
                 [&](int64_t i) { return y + (begin + i) * D + c; });
      });
    }
  }
  return 1;
}

// grad (N, D) of the output; grad_rows (M, D), whose sums over a token's slots are the gradient of x; grad_hidden (M, 2F)
// and acts (M, F), each times its weight, are room. 0 as above.
template <class Weight>
int64_t backward(const Shape& s, const bfloat16* grad, const bfloat16* x, const float* weights, const int64_t* order,
                 const int64_t* offsets, const Weight* gate_up, const Weight* down, const bfloat16* hidden,
                 bfloat16* grad_hidden, bfloat16* acts, bfloat16* grad_rows, float* grad_weights,
                 Weight* grad_gate_up, Weight* grad_down, int64_t* row_of_slot) {
  if (!sorted_slots(s, order, offsets)) return 0;
  const int64_t D = s.D, F = s.F;
  const auto tasks = share_out(s, [=](int64_t e) { return offsets[e + 1] - offsets[e]; });
  const auto outputs = share_out(s, [=](int64_t) { return D + 2 * F; });  // rows of down, then of gate and up
  const auto token_row = [=](const bfloat16* of, int64_t row) { return of + order[row] / s.K * D; };
#pragma omp parallel num_threads(s.threads)
  {
    Pairs panel, left, right;
#pragma omp for schedule(dynamic, 1)
    for (const Task& task : tasks) {
      const int64_t begin = offsets[task.expert] + task.first, end = begin + task.rows;
      each_panel(F, [&](int64_t c, int64_t wide) {
        panel.pack(D, wide, [&](int64_t k) { return down + (task.expert * D + k) * F + c; });
        multiply(task.rows, [&](int64_t i) { return as_pairs(token_row(grad, begin + i)); }, 1, panel,
                 [&](int64_t i) { return acts + (begin + i) * F + c; });
      });
      for (int64_t i = begin; i < end; i++) {
        const int64_t slot = order[i];
        row_of_slot[slot] = i;
        grad_weights[slot] =
            swiglu_backward_row(acts + i * F, hidden + i * 2 * F, weights[slot], grad_hidden + i * 2 * F, F);
      }
      each_panel(D, [&](int64_t c, int64_t wide) {
        panel.pack(2 * F, wide, [&](int64_t k) { return gate_up + (task.expert * 2 * F + k) * D + c; });
        multiply(task.rows, [&](int64_t i) { return as_pairs(grad_hidden + (begin + i) * 2 * F); }, 1, panel,
                 [&](int64_t i) { return grad_rows + (begin + i) * D + c; });
      });
    }
#pragma omp for schedule(dynamic, 1)
    for (const Task& task : outputs) {
      const int64_t e = task.expert, begin = offsets[e], depth = offsets[e + 1] - begin;
      const int64_t end = task.first + task.rows, of_down = std::min(end, D) - task.first;
      if (of_down > 0) {
        Weight* to = grad_down + (e * D + task.first) * F;
        left.pack(depth, D, [&](int64_t k) { return token_row(grad, begin + k); });
        right.pack(depth, F, [&](int64_t k) { return acts + (begin + k) * F; });
        multiply(of_down, [&](int64_t i) { return left.at(0, task.first + i); }, PANEL, right,
                 [&](int64_t i) { return to + i * F; });
      }
      const int64_t first = std::max(task.first, D) - D;
      if (end > D) {
        Weight* to = grad_gate_up + (e * 2 * F + first) * D;
        left.pack(depth, 2 * F, [&](int64_t k) { return grad_hidden + (begin + k) * 2 * F; });
        right.pack(depth, D, [&](int64_t k) { return token_row(x, begin + k); });
        multiply(end - D - first, [&](int64_t i) { return left.at(0, first + i); }, PANEL, right,
                 [&](int64_t i) { return to + i * D; });
      }
    }
  }
  return 1;
}

}  // namespace

extern "C" {

int64_t moe_lm_forward(const Shape* shape, const bfloat16* x, const int64_t* order, const int64_t* offsets,
                       const void* gate_up, const void* down, bfloat16* hidden, bfloat16* y, int64_t* row_of_slot) {
  const auto run = [&](auto of) {
    typedef decltype(of) Weight;
    return forward(*shape, x, order, offsets, (const Weight*)gate_up, (const Weight*)down, hidden, y, row_of_slot);
  };
  return shape->float_weights ? run(float()) : run(bfloat16());
}

int64_t moe_lm_backward(const Shape* shape, const bfloat16* grad, const bfloat16* x, const float* weights,
                        const int64_t* order, const int64_t* offsets, const void* gate_up, const void* down,
                        const bfloat16* hidden, bfloat16* grad_hidden, bfloat16* acts, bfloat16* grad_rows,
                        float* grad_weights, void* grad_gate_up, void* grad_down, int64_t* row_of_slot) {
  const auto run = [&](auto of) {
    typedef decltype(of) Weight;
    return backward(*shape, grad, x, weights, order, offsets, (const Weight*)gate_up, (const Weight*)down, hidden,
                    grad_hidden, acts, grad_rows, grad_weights, (Weight*)grad_gate_up, (Weight*)grad_down, row_of_slot);
  };
  return shape->float_weights ? run(float()) : run(bfloat16());
}

}  // extern "C"
