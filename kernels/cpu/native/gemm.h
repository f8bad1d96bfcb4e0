// Products of whole weights with any number of rows, shared out by 16 outputs.
//
// Neither who computes an output nor which rows stand beside it is part of its chain of operations (fma.h, amx.h), so
// the loops here are free to choose whatever is fastest for a number of rows.
#pragma once

#include <algorithm>
#include <utility>

#include "amx.h"

// What one thread works in.
template <class Engine>
struct Desk {
  float* tiles;                      // 2 * MOST_BLOCKS tiles
  typename Engine::Weight* scratch;  // Engine::scratch_size of the widest product
  float* attention;                  // see attention.h
};

// weight (outputs, K), or (2 outputs, K) if gated, times n rows in panels.
template <class Engine>
struct Product {
  const typename Engine::Weight* weight;
  int64_t outputs, K;
  const typename Engine::Activation* panels;
  int64_t n;
  bool gated;  // rows f and outputs + f are the two halves of output f

  int64_t units() const { return (outputs + TILE - 1) / TILE; }
  int64_t panel_count() const { return (n + TILE - 1) / TILE; }
  int64_t rows(int64_t unit) const { return std::min<int64_t>(TILE, outputs - unit * TILE); }
  int64_t columns(int64_t panel) const { return std::min<int64_t>(TILE, n - panel * TILE); }
};

constexpr int64_t PANEL_BYTES = 1 << 20;  // of activations that stay in a core's L2 while weights pass by

// A product of 16 outputs and 16 rows that is done: where it belongs, and its float32 (16, 16), for gated ones two.
struct Finished {
  int64_t unit, panel;
  float *tile, *up;
};

// Tiles that wait for what follows their product, finish(tile, part) for part 0 .. Finish::PARTS - 1. An engine does it
// a part at a time between the products of the next ones, which leave the vector units idle.
template <class Finish>
struct Backlog {
  const Finish& finish;
  Finished items[MOST_BLOCKS];
  int64_t parts = 0, done = 0;  // of all items

  void add(const Finished& item) {
    items[parts / Finish::PARTS] = item;
    parts += Finish::PARTS;
  }

  // Parts to do in each of so many steps.
  int64_t share(int64_t steps) const { return (parts - done + steps - 1) / steps; }

  INLINE void work(int64_t share) {
    for (const int64_t end = std::min(parts, done + share); done < end; done++)
      finish(items[done / Finish::PARTS], done % Finish::PARTS);
  }

  void empty() {
    work(parts);
    parts = done = 0;
  }
};

// Units low .. high - 1, each part of each tile of them given to `finish`.
template <class Engine, class Finish>
void multiply(const Product<Engine>& product, int64_t low, int64_t high, const Desk<Engine>& desk, const Finish& finish) {
  using Weight = typename Engine::Weight;
  const int64_t K = product.K, count = product.panel_count(), panel_size = Engine::panel_size(K);
  const int halves = product.gated ? 2 : 1;
  const int64_t group = std::max<int64_t>(2, PANEL_BYTES / (panel_size * sizeof(*product.panels)) / 2 * 2);
  // Four blocks of weights against one panel, or two against two: that many tile registers there are.
  const int64_t most = (count == 1 ? MOST_BLOCKS : 2) / halves;
  Backlog<Finish> backlog{finish};
  float *tiles = desk.tiles, *other_tiles = tiles + MOST_BLOCKS * TILE * TILE;
  for (int64_t first = 0; first < count; first += group)
    for (int64_t unit = low, units; unit < high; unit += units) {
      units = std::min(most, high - unit);
      if (units == 3) units = 2;
      Block<Weight> blocks[MOST_BLOCKS];
      for (int i = 0; i < units; i++)
        for (int half = 0; half < halves; half++) {
          const Weight* start = product.weight + (half * product.outputs + (unit + i) * TILE) * K;
          blocks[i * halves + half] = {start, product.rows(unit + i),
                                       unit + i + units < product.units() ? start + units * TILE * K : nullptr};
        }
      for (int64_t panel = first; panel < std::min(count, first + group); panel += 2) {
        int panels = panel + 1 < count ? 2 : 1;
        Engine::tiles(blocks, units * halves, product.panels + panel * panel_size, panels,
                      product.columns(panel + panels - 1), K, tiles, desk.scratch, backlog);
        backlog.empty();
        for (int p = 0; p < panels; p++)
          for (int i = 0; i < units; i++) {
            float* tile = tiles + (i * halves * panels + p) * TILE * TILE;
            backlog.add({unit + i, panel + p, tile, tile + panels * TILE * TILE});
          }
        std::swap(tiles, other_tiles);
        for (auto& block : blocks) block.next = nullptr;
      }
    }
  backlog.empty();
}

// Stores a tile as `columns` rows of `out` (.., stride), or adds it to them.
template <bool ADD>
INLINE void put_tile(const float* tile, int64_t rows, int64_t columns, float* out, int64_t stride) {
  if (columns == 1) {
    for (int64_t i = 0; i < rows; i++) out[i] = ADD ? out[i] + tile[i * TILE] : tile[i * TILE];
    return;
  }
  Floats x[LANES];
  for (int i = 0; i < TILE; i++) x[i] = load(tile + i * TILE);
  transpose(x);
  for (int64_t j = 0; j < columns; j++)
    store_first(out + j * stride, ADD ? load_first(out + j * stride, rows) + x[j] : x[j], rows);
}

// Product into float32 rows (n, stride), stored or added.
template <bool ADD, class Engine>
struct PutRows {
  static constexpr int64_t PARTS = 1;
  const Product<Engine>& product;
  float* out;
  const int64_t stride;

  INLINE void operator()(const Finished& at, int64_t) const {
    put_tile<ADD>(at.tile, product.rows(at.unit), product.columns(at.panel),
                  out + at.panel * TILE * stride + at.unit * TILE, stride);
  }
};

// silu(gate) * up (Shazeer 2020), into panels of `outputs` channels.
template <class Engine>
struct PutSwiglu {
  static constexpr int64_t PARTS = TILE / Engine::CHANNELS;
  const Product<Engine>& product;
  typename Engine::Activation* panels;

  INLINE void operator()(const Finished& at, int64_t part) const {
    const int64_t F = product.outputs, first = part * Engine::CHANNELS, rows = product.rows(at.unit) - first;
    typename Engine::Activation* panel = panels + at.panel * Engine::panel_size(F);
    Floats x[Engine::CHANNELS] = {};
    for (int i = 0; i < Engine::CHANNELS && i < rows; i++) {
      Floats g = load(at.tile + (first + i) * TILE);
      x[i] = Engine::quotient(g, 1.0f + exponential(-g)) * load(at.up + (first + i) * TILE);
    }
    Engine::put(panel, F, at.unit * TILE + first, x);
    // The zeros that fill the last tile's depth.
    for (int64_t k = (at.unit + 1) * TILE + first; at.unit + 1 == product.units() && k < Engine::padded(F); k += TILE) {
      Floats none[Engine::CHANNELS] = {};
      Engine::put(panel, F, k, none);
    }
  }
};

template <bool ADD, class Engine>
void multiply_rows(const Product<Engine>& product, int64_t low, int64_t high, const Desk<Engine>& desk, float* out,
                   int64_t stride) {
  multiply(product, low, high, desk, PutRows<ADD, Engine>{product, out, stride});
}

template <class Engine>
void multiply_swiglu(const Product<Engine>& product, int64_t low, int64_t high, const Desk<Engine>& desk,
                     typename Engine::Activation* out) {
  multiply(product, low, high, desk, PutSwiglu<Engine>{product, out});
}

// Panel of n <= 16 rows of `rows` (.., stride), of which the padded channels are 0: rows[index[i]], or rows[i].
template <class Engine>
void pack(typename Engine::Activation* panel, int64_t K, const float* rows, int64_t stride, const int64_t* index,
          int64_t n) {
  Engine::put_rows(panel, K, [&](int64_t i, int64_t k) {
    return i < n ? load(rows + (index ? index[i] : i) * stride + k) : Floats{};
  });
}
