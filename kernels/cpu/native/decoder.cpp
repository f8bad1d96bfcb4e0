// A whole forward step of the decoder on a ragged batch, in one parallel region.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "attention.h"
#include "attention_amx.h"
#include "check.h"
#include "gemm.h"
#include "interface.h"
#include "routing.h"
#include "sampling.h"
#include "team.h"

namespace {

// Hands out aligned parts of the workspace; with no workspace it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    int64_t at = used;
    used += round_up(count * sizeof(T), 128);
    return base ? (T*)(base + at) : nullptr;
  }
};

template <class Engine, class KV>
struct AttentionOf {
  using Type = LaneAttention<Engine, KV>;
};
#ifdef MOE_LM_AMX
template <>
struct AttentionOf<Amx, bfloat16> {
  using Type = TileAttention;
};
#endif

template <class Engine, class KV>
struct Forward {
  static constexpr int64_t PHASES = 13;  // of a layer, at most

  using Weight = typename Engine::Weight;
  using Activation = typename Engine::Activation;
  using Attention = typename AttentionOf<Engine, KV>::Type;

  const Model& m;
  const Step& step;
  const int64_t N, D, stride, attention_width, attention_stride, qkv_width, qkv_stride, token_panels, most_panels;
  float *x, *normed, *qkv, *attended, *expert_out, *logits, *scores, *weights;
  Activation *panels, *expert_panels, *hidden, *shared_hidden;
  std::vector<Slots> slots;  // of each layer with a router
  Counter* counters;
  char* desks;
  int64_t counter_count, bytes;

  Forward(const Model& model, const Step& s)
      : m(model), step(s), N(s.tokens_count), D(m.hidden), stride(round_up(D, 32)),
        attention_width(m.heads * m.head_dim), attention_stride(round_up(attention_width, 32)),
        qkv_width((m.heads + 2 * m.kv_heads) * m.head_dim), qkv_stride(round_up(qkv_width, 32)),
        token_panels((N + TILE - 1) / TILE),
        most_panels(m.experts ? N * m.top / TILE + std::min(m.experts, N * m.top) : 0) {
    Arena arena{(char*)step.workspace};
    x = arena.take<float>(N * stride);
    normed = arena.take<float>(N * stride);
    qkv = arena.take<float>(N * qkv_stride);
    attended = arena.take<float>(N * attention_stride);
    panels = arena.take<Activation>(token_panels * Engine::panel_size(std::max(D, attention_width)));
    shared_hidden = arena.take<Activation>(token_panels * Engine::panel_size(std::max(m.shared_width, m.dense_width)));
    if (m.experts) {
      expert_panels = arena.take<Activation>(most_panels * Engine::panel_size(D));
      hidden = arena.take<Activation>(most_panels * Engine::panel_size(m.width));
      expert_out = arena.take<float>(most_panels * TILE * stride);
      logits = arena.take<float>(N * m.experts);
      scores = arena.take<float>(2 * N * m.experts);
      weights = arena.take<float>(N * m.top);
      for (int64_t l = 0; l < m.layers; l++) {
        if (!m.layer[l].router) continue;
        slots.push_back({arena.take<int64_t>(most_panels * TILE), arena.take<int64_t>(N * m.top),
                         arena.take<int64_t>(m.experts), arena.take<int64_t>(m.experts + 1),
                         arena.take<int64_t>(most_panels), arena.take<int64_t>(m.experts), arena.take<int64_t>(1)});
      }
    }
    counter_count = Team::counters(m.layers * PHASES + 3, step.threads);
    counters = arena.take<Counter>(counter_count);
    int64_t shared = arena.used;
    desk_of(arena);
    desks = arena.base ? arena.base + shared : nullptr;
    bytes = shared + (arena.used - shared) * step.threads;
  }

  Desk<Engine> desk_of(Arena& arena) const {
    const int64_t heads = m.heads / m.kv_heads, rows = Attention::tokens_of_item(heads) * heads;
    int64_t widest = std::max({D, attention_width, m.width, m.dense_width, m.shared_width});
    return {arena.take<float>(2 * MOST_BLOCKS * TILE * TILE), arena.take<Weight>(Engine::scratch_size(widest)),
            arena.take<float>(Attention(rows, m.head_dim, nullptr).floats)};
  }

  void run(int member, int members) {
    Arena sizes{nullptr};
    desk_of(sizes);
    Arena own{desks + member * sizes.used};
    const Desk<Engine> desk = desk_of(own);
    Team team{member, members, counters};
    Engine::begin();
    int64_t mixtures = 0;  // so far
    for (int64_t l = 0; l < m.layers; l++) {
      const Layer& layer = m.layer[l];
      team.each(token_panels, [&](int64_t p) {
        for (int64_t i = p * TILE; i < end_of(p); i++) {
          if (l == 0) embed(i);
          else if (m.layer[l - 1].router) combine(slots[mixtures - 1], i);
          norm(x + i * stride, layer.input_norm, normed + i * stride);
        }
        pack_rows(p, normed, stride, D);
      });
      rows_product<false>(team, layer.qkv, qkv_width, D, N, panels, qkv, qkv_stride, desk);
      KV *keys = (KV*)step.keys + l * cache_size(), *values = (KV*)step.values + l * cache_size();
      team.each(N, [&](int64_t i) { rotate_and_append(m, step, qkv + i * qkv_stride, i, keys, values); });
      attention(team, keys, values, desk);
      team.each(token_panels, [&](int64_t p) { pack_rows(p, attended, attention_stride, attention_width); });
      rows_product<true>(team, layer.attention_out, D, attention_width, N, panels, x, stride, desk);
      if (layer.router) {
        mixture(team, layer, slots[mixtures], step.experts + mixtures * N * m.top, desk);
        mixtures++;
      } else dense(team, layer, desk);
    }
    project(team, desk);
    Engine::end();
  }

  int64_t cache_size() const { return step.pages * step.page_size * m.kv_heads * m.head_dim; }
  int64_t end_of(int64_t panel) const { return std::min(N, (panel + 1) * TILE); }

  void embed(int64_t i) const {
    const Weight* from = (const Weight*)m.embedding + step.tokens[i] * D;
    for (int64_t d = 0; d < stride; d += LANES)
      store(x + i * stride + d, load_first(from + d, std::max<int64_t>(0, D - d)));
  }

  // x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019), rounded to the weights' dtype.
  void norm(const float* row, const float* weight, float* out) const {
    Floats squares[2] = {};
    for (int64_t d = 0; d < stride; d += 2 * LANES)
      for (int i = 0; i < 2; i++) {
        Floats v = load(row + d + i * LANES);
        squares[i] = fma(v, v, squares[i]);
      }
    const float scale = 1.0f / std::sqrt(sum(squares[0] + squares[1]) / (float)D + (float)m.eps);
    for (int64_t d = 0; d < stride; d += LANES) store(out + d, Engine::round(load(row + d) * scale * load(weight + d)));
  }

  void pack_rows(int64_t p, const float* rows, int64_t rows_stride, int64_t width) const {
    pack<Engine>(panels + p * Engine::panel_size(width), width, rows + p * TILE * rows_stride, rows_stride, nullptr,
                 end_of(p) - p * TILE);
  }

  // Units that a thread takes at a time: some strips of weights, and enough of them to share out evenly.
  static int64_t chunk(const Team& team, int64_t units) {
    return std::clamp<int64_t>(units / (8 * team.members) / MOST_BLOCKS, 1, 4) * MOST_BLOCKS;
  }

  template <bool ADD>
  void rows_product(Team& team, const void* weight, int64_t outputs, int64_t width, int64_t n, const Activation* in,
                    float* out, int64_t out_stride, const Desk<Engine>& desk) const {
    Product<Engine> product{(const Weight*)weight, outputs, width, in, n, false};
    team.each(product.units(), chunk(team, product.units()), [&](int64_t low, int64_t high) {
      multiply_rows<ADD>(product, low, high, desk, out, out_stride);
    });
  }

  void attention(Team& team, const KV* keys, const KV* values, const Desk<Engine>& desk) const {
    const int64_t heads = m.heads / m.kv_heads, tokens = Attention::tokens_of_item(heads);
    // The heads of a key head are divided where there are fewer items than threads.
    const bool divided = Attention::divides_heads && N * m.kv_heads < team.members;
    const int64_t parts = divided ? std::min<int64_t>(heads, team.members) : 1;
    int64_t blocks = 0;
    for (int64_t s = 0; s < step.sequences; s++) blocks += blocks_of(s, tokens);
    team.each(blocks * m.kv_heads * parts, [&](int64_t unit) {
      const int64_t part = unit % parts, g = unit / parts % m.kv_heads;
      int64_t block = unit / parts / m.kv_heads, s = 0;
      for (; block >= blocks_of(s, tokens); s++) block -= blocks_of(s, tokens);
      const int64_t first = step.query_offsets[s] + block * tokens;
      const AttentionItem item{s, first, std::min(first + tokens, step.query_offsets[s + 1]), g,
                               g * heads + heads * part / parts, g * heads + heads * (part + 1) / parts};
      Attention((item.last - first) * (item.high - item.low), m.head_dim, desk.attention)
          .run(m, step, item, qkv, qkv_stride, keys, values, attended, attention_stride);
      // The channels that fill the last tile's depth.
      for (int64_t i = item.first; i < item.last; i++)
        std::fill(attended + i * attention_stride + attention_width, attended + (i + 1) * attention_stride, 0.0f);
    });
  }

  int64_t blocks_of(int64_t s, int64_t tokens) const {
    return (step.query_offsets[s + 1] - step.query_offsets[s] + tokens - 1) / tokens;
  }

  void dense(Team& team, const Layer& layer, const Desk<Engine>& desk) const {
    team.each(token_panels, [&](int64_t p) {
      for (int64_t i = p * TILE; i < end_of(p); i++) norm(x + i * stride, layer.post_norm, normed + i * stride);
      pack_rows(p, normed, stride, D);
    });
    every_row(team, layer.gate_up, layer.down, m.dense_width, desk);
  }

  // An MLP that all rows pass through, added to the residual stream.
  void every_row(Team& team, const void* gate_up, const void* down, int64_t width, const Desk<Engine>& desk) const {
    Product<Engine> up{(const Weight*)gate_up, width, D, panels, N, true};
    team.each(up.units(), chunk(team, up.units()), [&](int64_t low, int64_t high) {
      multiply_swiglu(up, low, high, desk, shared_hidden);
    });
    rows_product<true>(team, down, D, width, N, shared_hidden, x, stride, desk);
  }

  void mixture(Team& team, const Layer& layer, Slots own, int32_t* chosen, const Desk<Engine>& desk) const {
    team.each(token_panels, [&](int64_t p) {
      for (int64_t i = p * TILE; i < end_of(p); i++) {
        norm(x + i * stride, layer.post_norm, normed + i * stride);
        router_logits(normed + i * stride, layer.router, m.experts, stride, logits + i * m.experts);
        choose(logits + i * m.experts, layer.router_bias, m.normalize, m.experts, m.top, chosen + i * m.top,
               weights + i * m.top, scores + 2 * i * m.experts);
      }
      if (m.shared_width) pack_rows(p, normed, stride, D);
    });
    team.each(1, [&](int64_t) { own.sort(chosen, N * m.top, m.top, m.experts, TILE); });
    team.each(own.first_panel[m.experts], [&](int64_t p) {
      pack<Engine>(expert_panels + p * Engine::panel_size(D), D, normed, stride, own.token + p * TILE,
                   own.panel_rows[p]);
    });
    if (m.shared_width) every_row(team, layer.shared_gate_up, layer.shared_down, m.shared_width, desk);
    experts(team, own, layer.gate_up, m.width, D, expert_panels, true,
            [&](const Product<Engine>& product, int64_t low, int64_t high, int64_t first) {
              multiply_swiglu(product, low, high, desk, hidden + first * Engine::panel_size(m.width));
            });
    experts(team, own, layer.down, D, m.width, hidden, false,
            [&](const Product<Engine>& product, int64_t low, int64_t high, int64_t first) {
              multiply_rows<false>(product, low, high, desk, expert_out + first * TILE * stride, stride);
            });
  }

  // One product for each chosen expert, all of them one row of units.
  template <class Run>
  void experts(Team& team, const Slots& own, const void* weight, int64_t outputs, int64_t width,
               const Activation* rows, bool gated, Run&& run) const {
    const int64_t size = (gated ? 2 : 1) * outputs * width, units = (outputs + TILE - 1) / TILE;
    team.each(*own.chosen_count * units, chunk(team, *own.chosen_count * units), [&](int64_t low, int64_t high) {
      for (int64_t next; low < high; low = next) {
        const int64_t e = own.chosen_experts[low / units], before = low / units * units, first = own.first_panel[e];
        next = std::min(high, before + units);
        Product<Engine> product{(const Weight*)weight + e * size, outputs, width,
                                rows + first * Engine::panel_size(width), own.count[e], gated};
        run(product, low - before, next - before, first);
      }
    });
  }

  // Adds a row's experts by their weights to the residual stream.
  void combine(const Slots& from_slots, int64_t i) const {
    const int64_t* from = from_slots.row + i * m.top;
    const float* by = weights + i * m.top;
    for (int64_t d = 0; d < D; d += LANES) {
      Floats total = by[0] * load_first(expert_out + from[0] * stride + d, D - d);
      for (int64_t k = 1; k < m.top; k++)
        total = fma(splat(by[k]), load_first(expert_out + from[k] * stride + d, D - d), total);
      store(x + i * stride + d, load(x + i * stride + d) + total);
    }
  }

  // Logits of the rows that are wanted.
  void project(Team& team, const Desk<Engine>& desk) const {
    const int64_t R = step.rows_count;
    if (R == 0) return;
    // A row may be wanted twice, so that what changes the stream comes before what reads it.
    if (m.layer[m.layers - 1].router) team.each(N, [&](int64_t i) { combine(slots.back(), i); });
    team.each((R + TILE - 1) / TILE, [&](int64_t p) {
      const int64_t end = std::min(R, (p + 1) * TILE);
      for (int64_t i = p * TILE; i < end; i++) norm(x + step.rows[i] * stride, m.norm, normed + i * stride);
      pack<Engine>(panels + p * Engine::panel_size(D), D, normed + p * TILE * stride, stride, nullptr, end - p * TILE);
    });
    rows_product<false>(team, m.head, m.vocabulary, D, R, panels, step.logits, m.vocabulary, desk);
  }
};

// Calls visit(Forward<Engine, KV>&) for the dtypes of a model.
template <class Visit>
void with_forward(const Model& m, const Step& step, Visit&& visit) {
  auto with = [&](auto engine, auto cache) {
    Forward<decltype(engine), decltype(cache)> forward(m, step);
    visit(forward);
  };
  if (!m.half_weights) return with(Fma<float>{}, float{});
#ifdef MOE_LM_AMX
  static const bool tiles = Amx::permitted();
  if (tiles) return m.half_cache ? with(Amx{}, bfloat16{}) : with(Amx{}, float{});
#endif
  return m.half_cache ? with(Fma<bfloat16>{}, bfloat16{}) : with(Fma<bfloat16>{}, float{});
}

}  // namespace

extern "C" int moe_lm_has_tiles() {
#ifdef MOE_LM_AMX
  return Amx::permitted();
#else
  return 0;
#endif
}

extern "C" int64_t moe_lm_workspace_bytes(const Model* m, const Step* step) {
  Step sizes = *step;
  sizes.workspace = nullptr;
  int64_t bytes = 0;
  with_forward(*m, sizes, [&](auto& forward) { bytes = forward.bytes; });
  return bytes;
}

namespace {

void run_step(const Model& m, const Step& step) {
  with_forward(m, step, [&](auto& forward) {
    const int members = step.threads;
    memset((void*)forward.counters, 0, forward.counter_count * sizeof(Counter));
#pragma omp parallel num_threads(members)
    forward.run(omp_get_thread_num(), omp_get_num_threads());
  });
}

}  // namespace

extern "C" int moe_lm_forward(const Model* m, const Step* step) {
  if (int reason = refused(*m, *step)) return reason;
  run_step(*m, *step);
  return 0;
}

// A step, then one more for each further token: every sequence that wants more brings the one that it has got.
extern "C" int moe_lm_guess(const Model* m, const Step* shared, const Guess* guess) {
  const int64_t half = m->head_dim / 2, W = shared->table_width, P = shared->page_size, V = m->vocabulary;
  std::vector<int64_t> active(shared->sequences), ends(guess->starts, guess->starts + shared->sequences);
  std::iota(active.begin(), active.end(), 0);
  std::fill(guess->found, guess->found + shared->sequences * guess->width, -1);
  for (int64_t place = 0; !active.empty(); place++) {
    std::vector<int64_t> tokens, slots, table, offsets{0}, lengths, rows, going;
    std::vector<float> cos, sin;
    for (int64_t s : active) {
      const int64_t* pages = shared->page_table + s * W;
      const int64_t* from = place ? guess->found + s * guess->width + place - 1 : guess->tokens + guess->offsets[s];
      tokens.insert(tokens.end(), from, from + (place ? 1 : guess->offsets[s + 1] - guess->offsets[s]));
      for (size_t i = offsets.back(); i < tokens.size(); i++) {
        const int64_t position = ends[s]++;
        if (position / P >= W) return 5;
        slots.push_back(pages[position / P] * P + position % P);
        cos.insert(cos.end(), guess->cos_table + position * half, guess->cos_table + (position + 1) * half);
        sin.insert(sin.end(), guess->sin_table + position * half, guess->sin_table + (position + 1) * half);
      }
      table.insert(table.end(), pages, pages + W);
      offsets.push_back(tokens.size());
      rows.push_back(tokens.size() - 1);
      lengths.push_back(ends[s]);
    }
    Step step = *shared;
    step.tokens_count = tokens.size(), step.sequences = step.rows_count = active.size();
    step.tokens = tokens.data(), step.slots = slots.data(), step.page_table = table.data(), step.rows = rows.data();
    step.query_offsets = offsets.data(), step.lengths = lengths.data(), step.cos = cos.data(), step.sin = sin.data();
    if (int reason = refused(*m, step)) return reason;
    run_step(*m, step);
#pragma omp parallel for num_threads(shared->threads) if (active.size() > 1)
    for (size_t i = 0; i < active.size(); i++) {
      const int64_t s = active[i], at = s * guess->width + place;
      const float *logits = shared->logits + i * V, temperature = guess->temperatures[s];
      guess->found[at] = temperature ? draw(logits, V, temperature, guess->uniforms[at], guess->laws + at * V)
                                     : likeliest(logits, V);
    }
    for (int64_t s : active)
      if (guess->found[s * guess->width + place] >= 0 && place + 1 < guess->counts[s]) going.push_back(s);
    active = going;
  }
  return 0;
}
