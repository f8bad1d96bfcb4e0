// Products of whole weights with any number of rows, shared out by 16 outputs.
//
// Neither who computes an output nor which rows stand beside it is part of its chain of operations (fma.h, amx.h), so
// the loops here are free to choose whatever is fastest for a number of rows.
#pragma once

#include <algorithm>

#include "amx.h"

// What one thread works in.
template <class Engine>
struct Desk {
  float* tiles;                     // MOST_BLOCKS * 2 tiles
  typename Engine::Weight* scratch;  // Engine::scratch_size of the widest product
  float* attention;                 // see attention.h
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

// Units low .. high - 1. Calls finish(unit, panel, tile, up), tiles being (16 outputs, 16 rows), `up` for gated ones.
template <class Engine, class Finish>
void multiply(const Product<Engine>& product, int64_t low, int64_t high, const Desk<Engine>& desk, Finish&& finish) {
  using Weight = typename Engine::Weight;
  const int64_t K = product.K, count = product.panel_count(), panel_size = Engine::panel_size(K);
  const int halves = product.gated ? 2 : 1;
  const int64_t group = std::max<int64_t>(2, PANEL_BYTES / (panel_size * sizeof(*product.panels)) / 2 * 2);
  // Four blocks of weights against one panel, or two against two: that many tile registers there are.
  const int64_t most = (count == 1 ? MOST_BLOCKS : 2) / halves;
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
                      product.columns(panel + panels - 1), K, desk.tiles, desk.scratch);
        for (int p = 0; p < panels; p++)
          for (int i = 0; i < units; i++) {
            float* tile = desk.tiles + (i * halves * panels + p) * TILE * TILE;
            finish(unit + i, panel + p, tile, tile + panels * TILE * TILE);
          }
        for (auto& block : blocks) block.next = nullptr;
      }
    }
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
void multiply_rows(const Product<Engine>& product, int64_t low, int64_t high, const Desk<Engine>& desk, float* out,
                   int64_t stride) {
  multiply(product, low, high, desk, [&](int64_t unit, int64_t panel, float* tile, float*) {
    put_tile<ADD>(tile, product.rows(unit), product.columns(panel), out + panel * TILE * stride + unit * TILE, stride);
  });
}

// Gated product, silu(gate) * up (Shazeer 2020), into panels of `outputs` channels.
template <class Engine>
void multiply_swiglu(const Product<Engine>& product, int64_t low, int64_t high, const Desk<Engine>& desk,
                     typename Engine::Activation* out) {
  const int64_t F = product.outputs, size = Engine::panel_size(F);
  multiply(product, low, high, desk, [&](int64_t unit, int64_t panel, float* gate, float* up) {
    Floats x[LANES] = {};
    for (int i = 0; i < product.rows(unit); i++) {
      Floats g = load(gate + i * TILE);
      x[i] = Engine::round(g / (1.0f + exponential(-g)) * load(up + i * TILE));
    }
    Engine::put(out + panel * size, F, unit * TILE, x);
    // The zeros that fill the last tile's depth.
    for (int64_t k = (unit + 1) * TILE; unit + 1 == product.units() && k < Engine::padded(F); k += LANES) {
      Floats none[LANES] = {};
      Engine::put(out + panel * size, F, k, none);
    }
  });
}

// Panel of n <= 16 rows of `rows` (.., stride), of which the padded channels are 0: rows[index[i]], or rows[i].
template <class Engine>
void pack(typename Engine::Activation* panel, int64_t K, const float* rows, int64_t stride, const int64_t* index,
          int64_t n) {
  for (int64_t k = 0; k < Engine::padded(K); k += LANES) {
    Floats x[LANES] = {};
    for (int64_t i = 0; i < n; i++) x[i] = load(rows + (index ? index[i] : i) * stride + k);
    Engine::put_rows(panel, K, k, x);
  }
}
