// Rotation, the paged cache, and causal attention against it.
//
// A query meets its keys in blocks of 16 that begin at multiples of 16, in order, with an online softmax in float32
// (Milakov & Gimelshein 2018): its operations depend on its position alone. Queries are computed together only to load
// a block of keys once. Nothing beyond a sequence's length is read, and no value beyond a query's position touches it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "interface.h"
#include "vector.h"

constexpr int64_t KEYS = LANES;   // keys of a block
constexpr int64_t QUERIES = 64;   // (token, head) pairs of an item of work, about
constexpr int TOGETHER = 8;       // heads whose scores are computed together

// Turns a row's queries and keys (Su et al. 2021), scales the queries by 1 / sqrt(C), and writes keys and values to
// their place in the cache. qkv (H + 2 G, C).
template <class KV>
void rotate_and_append(const Model& m, const Step& step, float* qkv, int64_t token, KV* keys, KV* values) {
  const int64_t C = m.head_dim, half = C / 2, G = m.kv_heads;
  const float *cos = step.cos + token * half, *sin = step.sin + token * half;
  const float scale = 1.0f / std::sqrt((float)C);
  for (int64_t head = 0; head < m.heads + G; head++) {
    float *a = qkv + head * C, *b = a + half;
    const float by = head < m.heads ? scale : 1.0f;
    for (int64_t c = 0; c < half; c++) {
      float x = a[c], y = b[c];
      a[c] = (x * cos[c] - y * sin[c]) * by;
      b[c] = (y * cos[c] + x * sin[c]) * by;
    }
  }
  if (step.slots[token] < 0) return;
  const float* k = qkv + m.heads * C;
  for (int64_t c = 0, to = step.slots[token] * G * C; c < G * C; c += LANES) {
    store_first(keys + to + c, load_first(k + c, G * C - c), G * C - c);
    store_first(values + to + c, load_first(k + G * C + c, G * C - c), G * C - c);
  }
}

// R heads of one token with one block of keys, of which `visible` may be seen. q (R, C), k (C, 16), v (16, width);
// the running maxima, sums and values (R), (R), (R, width).
template <int R>
INLINE void attend_block(const float* q, const float* k, const float* v, int64_t C, int64_t width, int64_t visible,
                         float* largest, float* total, float* value) {
  Floats s[R] = {};
  for (int64_t c = 0; c < C; c++) {
    Floats key = load(k + c * KEYS);
    for (int r = 0; r < R; r++) s[r] = fma(splat(q[r * C + c]), key, s[r]);
  }
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Ints seen = lane < (int32_t)visible;
  float p[R][KEYS], scale[R];
  for (int r = 0; r < R; r++) {
    s[r] = select(seen, s[r], splat(-INFINITY));
    float top = maximum(s[r]);
    top = top > largest[r] ? top : largest[r];
    scale[r] = exponential(splat(largest[r] - top))[0];
    Floats e = exponential(s[r] - top);
    store(p[r], e);
    total[r] = total[r] * scale[r] + sum(e);
    largest[r] = top;
  }
  for (int64_t c = 0; c < width; c += LANES) {
    Floats sums[R];
    for (int r = 0; r < R; r++) sums[r] = load(value + r * width + c) * scale[r];
    for (int64_t j = 0; j < visible; j++) {
      Floats x = load(v + j * width + c);
      for (int r = 0; r < R; r++) sums[r] = fma(splat(p[r][j]), x, sums[r]);
    }
    for (int r = 0; r < R; r++) store(value + r * width + c, sums[r]);
  }
}

// What one thread attends at a time: tokens first .. last - 1 of a sequence, heads low .. high - 1 of one key head.
struct AttentionItem {
  int64_t sequence, first, last, kv_head, low, high;
};

// Keys and values (pages, P, G, C), qkv (N, qkv_row) of turned (H + 2 G, C) -> the channels of an item's heads of out
// (N, stride).
template <class Engine, class KV>
struct LaneAttention {
  const int64_t rows, C, width;
  float *k, *v, *value, *largest, *total;
  int64_t floats;

  static constexpr bool divides_heads = true;  // among threads, where there are fewer items than these
  static int64_t tokens_of_item(int64_t heads) { return std::clamp<int64_t>(QUERIES / heads, 1, 16); }

  // Divides scratch of `floats` floats, which is only counted if there is none.
  LaneAttention(int64_t item_rows, int64_t channels, float* scratch)
      : rows(item_rows), C(channels), width(round_up(C, LANES)), floats(2 * KEYS * width + rows * (width + 2)) {
    if (!scratch) return;
    k = scratch, v = k + KEYS * width, value = v + KEYS * width;
    largest = value + rows * width, total = largest + rows;
  }

  void run(const Model& m, const Step& step, const AttentionItem& item, const float* qkv, int64_t qkv_row,
           const KV* keys, const KV* values, float* out, int64_t stride) const {
    const int64_t G = m.kv_heads, heads = item.high - item.low;
    const int64_t length = step.lengths[item.sequence], end = step.query_offsets[item.sequence + 1];
    const int64_t* pages = step.page_table + item.sequence * step.table_width;
    std::fill(value, value + rows * width, 0.0f);
    std::fill(largest, largest + rows, -INFINITY);
    std::fill(total, total + rows, 0.0f);
    const int64_t last_position = length - (end - item.last) - 1;
    for (int64_t start = 0; start <= last_position; start += KEYS) {
      int64_t at[KEYS], n = std::min(KEYS, length - start);
      for (int64_t j = 0; j < n; j++) {
        int64_t t = start + j;
        at[j] = ((pages[t / step.page_size] * step.page_size + t % step.page_size) * G + item.kv_head) * C;
      }
      for (int64_t c = 0; c < width; c += LANES) {
        Floats x[LANES] = {};
        for (int64_t j = 0; j < n; j++) {
          x[j] = load_first(keys + at[j] + c, C - c);
          store(v + j * width + c, load_first(values + at[j] + c, C - c));
        }
        transpose(x);
        for (int i = 0; i < LANES; i++) store(k + (c + i) * KEYS, x[i]);
      }
      for (int64_t token = item.first; token < item.last; token++) {
        int64_t visible = std::min(KEYS, length - (end - token) - start + 1);
        if (visible <= 0) continue;
        const float* q = qkv + token * qkv_row + item.low * C;
        for (int64_t head = 0, row = (token - item.first) * heads; head < heads;) {
          auto run = [&](auto size) {
            constexpr int R = decltype(size)::value;
            attend_block<R>(q + head * C, k, v, C, width, visible, largest + row, total + row, value + row * width);
            head += R, row += R;
          };
          if (heads - head >= TOGETHER) run(std::integral_constant<int, TOGETHER>{});
          else if (heads - head >= TOGETHER / 2) run(std::integral_constant<int, TOGETHER / 2>{});
          else run(std::integral_constant<int, 1>{});
        }
      }
    }
    for (int64_t row = 0; row < rows; row++)
      for (int64_t c = 0; c < width; c += LANES) {
        float* to = out + (item.first + row / heads) * stride + (item.low + row % heads) * C + c;
        store_first(to, load(value + row * width + c) / total[row], C - c);
      }
  }
};
