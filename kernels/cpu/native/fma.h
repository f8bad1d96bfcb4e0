// Products of weights and activations by fused multiply-adds, on any CPU.
//
// A panel holds up to 16 rows of activations in the form that the products want, here float32 (16, K) with K padded by
// zeros to whole vectors. A tile is the product of 16 rows of a weight and one panel, float32 (16 outputs, 16 rows).
// An output is a sum of 16 lanes, each over every 16th k in order: a chain that depends on K alone.
#pragma once

#include "vector.h"

constexpr int TILE = 16;
constexpr int MOST_BLOCKS = 4;  // of 16 weight rows that one call of `tiles` takes

// Sixteen consecutive rows of a weight (outputs, K), fewer at its end.
template <class Weight>
struct Block {
  const Weight* start;
  int64_t rows;
  const Weight* next;  // the block that this thread reads next, to be fetched ahead; null for none
};

template <class W>
struct Fma {
  using Weight = W;
  using Activation = float;
  static constexpr bool rounds = sizeof(W) == 2;

  // As activations of the weights' dtype are kept.
  static INLINE Floats round(Floats x) { return rounds ? round_bfloat16(x) : x; }

  static int64_t padded(int64_t K) { return round_up(K, LANES); }
  static int64_t panel_size(int64_t K) { return TILE * padded(K); }
  static int64_t scratch_size(int64_t) { return 0; }
  static void begin() {}
  static void end() {}

  static constexpr int64_t CHANNELS = 16;  // that `put` takes

  // Channels k .. k + 15 of a panel from (16 channels, 16 rows), rounded. Changes x.
  static INLINE void put(float* panel, int64_t K, int64_t k, Floats (&x)[LANES]) {
    transpose(x);
    for (int i = 0; i < TILE; i++) store(panel + i * padded(K) + k, round(x[i]));
  }

  // A panel from channels k .. k + 15 of row i, load(i, k), rounded.
  template <class Load>
  static INLINE void put_rows(float* panel, int64_t K, Load&& load) {
    for (int i = 0; i < TILE; i++)
      for (int64_t k = 0; k < padded(K); k += LANES) store(panel + i * padded(K) + k, round(load(i, k)));
  }

  static INLINE Floats quotient(Floats a, Floats b) { return a / b; }

  // Tiles (blocks, panels, 16, 16) of `blocks` blocks and `panels` panels whose last holds `last` rows. Meanwhile
  // some of the backlog may be done.
  template <class Backlog>
  static void tiles(const Block<W>* block, int blocks, const float* panel, int panels, int64_t last, int64_t K,
                    float* out, W*, Backlog&) {
    for (int b = 0; b < blocks; b++)
      for (int p = 0; p < panels; p++) {
        int64_t columns = p + 1 < panels ? TILE : last;
        float* tile = out + (b * panels + p) * TILE * TILE;
        for (int64_t row = 0; row < block[b].rows; row += 4)
          for (int64_t column = 0; column < columns; column += 4)
            corner(block[b], row, panel + p * panel_size(K), column, columns, K, tile);
      }
  }

 private:
  // Up to four rows by four columns of a tile; those beyond the edge repeat the last one.
  static INLINE void corner(const Block<W>& block, int64_t row, const float* panel, int64_t column, int64_t columns,
                            int64_t K, float* tile) {
    // One pass over the weights whatever the number: column by column, three tokens of nano took a fifth longer.
    switch (columns - column) {
      case 1: return corner_of<1>(block, row, panel, column, K, tile);
      case 2: return corner_of<2>(block, row, panel, column, K, tile);
      case 3: return corner_of<3>(block, row, panel, column, K, tile);
      default: return corner_of<4>(block, row, panel, column, K, tile);
    }
  }

  template <int COLUMNS>
  static INLINE void corner_of(const Block<W>& block, int64_t row, const float* panel, int64_t column, int64_t K,
                               float* tile) {
    const W* w[4];
    for (int i = 0; i < 4; i++) w[i] = block.start + (row + i < block.rows ? row + i : block.rows - 1) * K;
    const float* x = panel + column * padded(K);
    Floats total[4][COLUMNS] = {};
    // What this thread reads next, fetched by the first columns: four rows side by side are four streams of one page,
    // hard to foresee for the processor. Steps of 1 to 8 tokens of nano took 4 to 8% less (medians).
    const W* next = row + 4 < block.rows ? w[0] + 4 * K : block.next;
    const bool ahead = next && !column;
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) {
      Floats a[4];
      if (ahead)
        for (int i = 0; i < 4; i++) __builtin_prefetch(next + i * K + k);
      for (int i = 0; i < 4; i++) a[i] = load(w[i] + k);
      for (int j = 0; j < COLUMNS; j++) {
        Floats b = load(x + j * padded(K) + k);
        for (int i = 0; i < 4; i++) total[i][j] = fma(a[i], b, total[i][j]);
      }
    }
    if (k < K)
      for (int j = 0; j < COLUMNS; j++) {
        Floats b = load(x + j * padded(K) + k);
        for (int i = 0; i < 4; i++) total[i][j] = fma(load_first(w[i] + k, K - k), b, total[i][j]);
      }
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < COLUMNS; j++) tile[(row + i) * TILE + column + j] = sum(total[i][j]);
  }
};
