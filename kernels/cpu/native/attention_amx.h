// Attention by AMX tiles, for bfloat16 caches: the same definition as attention.h in blocks of 32 keys.
//
// A tile of scores is (16 keys, 16 queries): keys are the left operand as they lie in the cache, queries a panel. So a
// query is a lane, softmax runs down the lanes without a sum across them, and the probabilities of two keys side by
// side are the panel that the second product needs, with values turned to (channels, 32 keys) on its left. Queries and
// probabilities are rounded to bfloat16, their sum is not.
//
// A probability of 0 does not silence a NaN, and leaves the sign of a 0: each token meets values beyond its position as
// zeros, in a product of its own where the 16 queries of a tile do not see the same keys.
#pragma once

#include "attention.h"
#include "gemm.h"

#ifdef MOE_LM_AMX

struct TileAttention {
  static constexpr int64_t BLOCK = 32;  // keys: the depth of a tile
  static constexpr int64_t ROWS = 128;  // (token, head) pairs of an item of work, about

  const int64_t C, depth, width, tiles;
  bfloat16 *keys, *values, *visible_values, *queries, *probability;
  float *scores, *trial, *largest, *total, *value;
  int64_t floats = 0;

  static constexpr bool divides_heads = false;  // the heads of a token are lanes of one tile
  static int64_t tokens_of_item(int64_t heads) { return std::clamp<int64_t>(ROWS / heads, 1, 16); }

  TileAttention(int64_t rows, int64_t channels, float* scratch)
      : C(channels), depth(Amx::padded(channels)), width(round_up(channels, LANES)), tiles((rows + TILE - 1) / TILE) {
    auto take = [&](int64_t count) {
      float* at = scratch ? scratch + floats : nullptr;
      floats += round_up(count, LANES);
      return at;
    };
    keys = (bfloat16*)take(BLOCK * depth / 2);
    values = (bfloat16*)take(width * BLOCK / 2);
    visible_values = (bfloat16*)take(width * BLOCK / 2);
    queries = (bfloat16*)take(tiles * TILE * depth / 2);
    probability = (bfloat16*)take(BLOCK * TILE / 2);
    scores = take(tiles * BLOCK * TILE);
    trial = take(width * TILE);
    largest = take(tiles * TILE);
    total = take(tiles * TILE);
    value = take(tiles * width * TILE);
  }

  // As LaneAttention's.
  void run(const Model& m, const Step& step, const AttentionItem& item, const float* qkv, int64_t qkv_row,
           const bfloat16* key_pages, const bfloat16* value_pages, float* out, int64_t stride) const {
    const int64_t heads = item.high - item.low, rows = (item.last - item.first) * heads;
    const int64_t length = step.lengths[item.sequence], end = step.query_offsets[item.sequence + 1];
    auto token = [&](int64_t row) { return item.first + row / heads; };
    auto last_row = [&](int64_t tile) { return std::min(rows, (tile + 1) * TILE) - 1; };
    for (int64_t tile = 0; tile < tiles; tile++)
      Amx::put_rows(queries + tile * TILE * depth, depth, [&](int64_t i, int64_t c) {
        const int64_t row = tile * TILE + i;
        if (row >= rows || c >= C) return Floats{};
        return load_first(qkv + token(row) * qkv_row + (item.low + row % heads) * C + c, C - c);
      });
    std::fill(largest, largest + tiles * TILE, -INFINITY);
    std::fill(total, total + tiles * TILE, 0.0f);
    std::fill(value, value + tiles * width * TILE, 0.0f);
    for (int64_t start = 0; start < length - (end - item.last); start += BLOCK) {
      copy_block(step, item, m.kv_heads, start, std::min(BLOCK, length - start), key_pages, value_pages);
      auto visible = [&](int64_t t) { return std::min(BLOCK, length - (end - t) - start + 1); };
      // All scores first: a load right after a tile's store waits for it.
      int64_t seeing = 0;
      while (seeing < tiles && visible(token(last_row(seeing))) <= 0) seeing++;
      for (int64_t tile = seeing; tile < tiles; tile++) multiply_keys(tile);
      for (int64_t tile = seeing; tile < tiles; tile++) {
        const int64_t low = tile * TILE, first = token(low), last = token(last_row(tile));
        if (visible(first) == BLOCK) add(tile, values, BLOCK, low, low + TILE);
        else
          for (int64_t t = first; t <= last; t++)
            if (visible(t) > 0)
              add(tile, only_visible(visible(t)), visible(t), (t - item.first) * heads, (t - item.first + 1) * heads);
      }
    }
    for (int64_t tile = 0; tile < tiles; tile++)
      for (int64_t c = 0; c < width; c += LANES) {
        Floats x[LANES];
        for (int i = 0; i < LANES; i++)
          x[i] = load(value + (tile * width + c + i) * TILE) / load(total + tile * TILE);
        transpose(x);
        for (int64_t i = 0, row = tile * TILE; i < TILE && row < rows; i++, row++)
          store_first(out + token(row) * stride + (item.low + row % heads) * C + c, x[i], C - c);
      }
  }

 private:
  // Keys (32, depth) and values (width, 32) of a block of which n are there, zeros elsewhere.
  void copy_block(const Step& step, const AttentionItem& item, int64_t G, int64_t start, int64_t n,
                  const bfloat16* key_pages, const bfloat16* value_pages) const {
    const int64_t* pages = step.page_table + item.sequence * step.table_width;
    int64_t at[BLOCK];
    for (int64_t j = 0; j < n; j++) {
      int64_t t = start + j;
      at[j] = ((pages[t / step.page_size] * step.page_size + t % step.page_size) * G + item.kv_head) * C;
      memcpy(keys + j * depth, key_pages + at[j], C * sizeof(bfloat16));
      memset(keys + j * depth + C, 0, (depth - C) * sizeof(bfloat16));
    }
    memset(keys + n * depth, 0, (BLOCK - n) * depth * sizeof(bfloat16));
    for (int64_t c = 0; c < width; c += LANES)
      for (int64_t half = 0; half < BLOCK; half += LANES) {
        Floats x[LANES] = {};
        for (int64_t j = 0; j < LANES && half + j < n; j++) x[j] = load_first(value_pages + at[half + j] + c, C - c);
        transpose(x);
        for (int i = 0; i < LANES; i++) {
          Halves row = __builtin_convertvector((Bits)x[i] >> 16, Halves);
          memcpy(values + (c + i) * BLOCK + half, &row, sizeof row);
        }
      }
  }

  const bfloat16* only_visible(int64_t n) const {
    if (n == BLOCK) return values;
    uint16_t mask[BLOCK];
    for (int64_t j = 0; j < BLOCK; j++) mask[j] = j < n ? 0xffff : 0;
    Bits kept;
    memcpy(&kept, mask, sizeof kept);
    for (int64_t c = 0; c < width; c++) {
      Bits row;
      memcpy(&row, values + c * BLOCK, sizeof row);
      row &= kept;
      memcpy(visible_values + c * BLOCK, &row, sizeof row);
    }
    return visible_values;
  }

  // Scores (32 keys, 16 queries) of a tile's queries.
  void multiply_keys(int64_t tile) const {
    float* out = scores + tile * BLOCK * TILE;
    const bfloat16* panel = queries + tile * TILE * depth;
    asm volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t c = 0; c < depth; c += Amx::DEPTH) {
      _tile_loadd(6, panel + c * TILE, Amx::ROW_BYTES);
      _tile_loadd(4, keys + c, depth * sizeof(bfloat16));
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, keys + TILE * depth + c, depth * sizeof(bfloat16));
      _tile_dpbf16ps(1, 5, 6);
    }
    _tile_stored(0, out, Amx::ROW_BYTES);
    _tile_stored(1, out + TILE * TILE, Amx::ROW_BYTES);
  }

  // Lets rows low .. high - 1 of the item, as far as they lie in the tile, see the first `visible` keys of the block.
  void add(int64_t tile, const bfloat16* seen_values, int64_t visible, int64_t low, int64_t high) const {
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    low = std::max<int64_t>(0, low - tile * TILE);
    high = std::min<int64_t>(TILE, high - tile * TILE);
    const Ints chosen = (lane >= (int32_t)low) & (lane < (int32_t)high);
    const bool all = low == 0 && high == TILE;
    const float* score = scores + tile * BLOCK * TILE;
    float *m = largest + tile * TILE, *l = total + tile * TILE, *o = value + tile * width * TILE;
    const Floats before = load(m);
    Floats top = before;
    for (int64_t j = 0; j < visible; j++) {
      Floats s = load(score + j * TILE);
      top = select(s > top, s, top);
    }
    const Floats by = exponential(before - top);
    float* to = all ? o : trial;
    // A maximum that stays needs no pass over the values: a product with 1 changes no bit.
    if (!all || !equal(by, splat(1.0f)))
      for (int64_t c = 0; c < width; c++) store(to + c * TILE, load(o + c * TILE) * by);
    Floats sums = load(l) * by;
    for (int64_t k = 0; k < BLOCK; k += LANES) {
      Floats p[LANES] = {};
      for (int64_t j = 0; j < LANES && k + j < visible; j++) {
        p[j] = exponential(load(score + (k + j) * TILE) - top);
        sums += p[j];
      }
      for (int j = 0; j < LANES; j += Amx::CHANNELS) Amx::put(probability, BLOCK, k + j, p + j);
    }
    store(m, select(chosen, top, before));
    store(l, select(chosen, sums, load(l)));
    asm volatile("" ::: "memory");
    _tile_loadd(6, probability, Amx::ROW_BYTES);
    // Two sums at a time, as each waits for its own product.
    int64_t c = 0;
    for (; c + TILE < width; c += 2 * TILE) {
      float *first = to + c * TILE, *second = first + TILE * TILE;
      _tile_loadd(0, first, Amx::ROW_BYTES);
      _tile_loadd(4, seen_values + c * BLOCK, Amx::ROW_BYTES);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(1, second, Amx::ROW_BYTES);
      _tile_loadd(5, seen_values + (c + TILE) * BLOCK, Amx::ROW_BYTES);
      _tile_dpbf16ps(1, 5, 6);
      _tile_stored(0, first, Amx::ROW_BYTES);
      _tile_stored(1, second, Amx::ROW_BYTES);
    }
    if (c < width) {
      _tile_loadd(0, to + c * TILE, Amx::ROW_BYTES);
      _tile_loadd(4, seen_values + c * BLOCK, Amx::ROW_BYTES);
      _tile_dpbf16ps(0, 4, 6);
      _tile_stored(0, to + c * TILE, Amx::ROW_BYTES);
    }
    if (!all)
      for (int64_t c = 0; c < width; c++)
        store(o + c * TILE, select(chosen, load(trial + c * TILE), load(o + c * TILE)));
  }
};
#endif
