// Products of bfloat16 matrices, two of k at a time, summed in float32: by AVX512-BF16's pair products (VDPBF16PS), or
// by two fused multiply-adds, which are slower than a library's.
//
// Neighbours in k lie side by side as one 32-bit pair. The left operand is anything whose pairs are a fixed step apart
// in every row, such as plain rows; the right one is packed, Pairs. A row of a product is a chain over k of its own, so
// its bits do not depend on the rows beside it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "elements.h"

#if defined(MOE_LM_AVX512) && defined(__AVX512BF16__)
#define MOE_LM_PAIRS 1
#endif

typedef uint32_t Pair;

constexpr int64_t TALL = 6, WIDE = 4;  // rows, and vectors of 16 columns, of a block: 24 of 32 registers are its sums

// (k / 2, columns), each row a line longer than it needs, so that not all of a column falls into few sets of a cache.
struct Pairs {
  std::vector<Pair> data;
  int64_t count = 0, columns = 0, stride = 0;

  void resize(int64_t k, int64_t wide) {
    count = (k + 1) / 2, columns = wide, stride = wide + LANES;
    if ((int64_t)data.size() < count * stride) data.resize(count * stride);
  }
  Pair* row(int64_t i) { return data.data() + i * stride; }
  const Pair* row(int64_t i) const { return data.data() + i * stride; }

  // Of a matrix whose row k is row_of(k), k < depth, a multiple of 16 columns wide.
  template <class F>
  void pack(int64_t depth, int64_t wide, F row_of) {
    resize(depth, wide);
    for (int64_t k = 0; k < depth; k += 2) {
      const bfloat16 *even = row_of(k), *odd = k + 1 < depth ? row_of(k + 1) : nullptr;
      Pair* out = row(k / 2);
      for (int64_t i = 0; i < wide; i += LANES) {
        const Bits both = halves(even + i) | (odd ? halves(odd + i) << 16 : Bits{});
        memcpy(out + i, &both, sizeof both);
      }
    }
  }

  // Of the transpose of matrix (wide, depth), both multiples of 16: its pairs lie in its rows.
  void pack_transposed(const bfloat16* matrix, int64_t wide, int64_t depth) {
    resize(depth, wide);
    for (int64_t i = 0; i < wide; i += LANES)
      for (int64_t k = 0; k < depth; k += 2 * LANES) {
        const int64_t pairs = std::min<int64_t>(LANES, (depth - k) / 2);
        Floats x[LANES];
        for (int j = 0; j < LANES; j++) x[j] = load_first((const float*)(matrix + (i + j) * depth + k), pairs);
        transpose(x);
        for (int64_t j = 0; j < pairs; j++) store((float*)row(k / 2 + j) + i, x[j]);
      }
  }

 private:
  static INLINE Bits halves(const bfloat16* p) {
    Halves h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, Bits);
  }
};

// sum plus the products of one pair with 16.
INLINE Floats add_products(Floats sum_of, Pair left, Floats right) {
#if defined(MOE_LM_PAIRS)
  return (Floats)_mm512_dpbf16_ps((__m512)sum_of, (__m512bh)_mm512_set1_epi32(left), (__m512bh)right);
#else
  const Bits both = Bits{} + left, other = (Bits)right;
  sum_of = fma((Floats)(both << 16), (Floats)(other << 16), sum_of);
  return fma((Floats)(both & 0xffff0000u), (Floats)(other & 0xffff0000u), sum_of);
#endif
}

// TALL rows by C vectors, to out[i] where it is not null: row i's pairs are a[i][0], a[i][step] ..
template <int C>
INLINE void block(const Pair* const* a, int64_t step, const Pair* b, int64_t stride, int64_t count,
                  bfloat16* const* out) {
  Floats sums[TALL][C] = {};
  for (int64_t k = 0; k < count; k++) {
    Floats right[C];
    for (int c = 0; c < C; c++) right[c] = load((const float*)(b + k * stride) + c * LANES);
    for (int i = 0; i < TALL; i++)
      for (int c = 0; c < C; c++) sums[i][c] = add_products(sums[i][c], a[i][k * step], right[c]);
  }
  for (int i = 0; i < TALL; i++)
    for (int c = 0; c < C && out[i]; c++) put(out[i] + c * LANES, sums[i][c], LANES);
}

// Rows [0, rows) of the left operand by b, to out_of(i): left_of(i) is where the pairs of row i begin, `step` apart.
template <class Left, class Out>
void multiply(int64_t rows, Left left_of, int64_t step, const Pairs& b, Out out_of) {
  for (int64_t column = 0; column < b.columns;) {
    const bool whole = b.columns - column >= WIDE * LANES;
    for (int64_t i = 0; i < rows; i += TALL) {
      const Pair* a[TALL];
      bfloat16* out[TALL];
      for (int j = 0; j < TALL; j++) {
        a[j] = left_of(std::min(i + j, rows - 1));
        out[j] = i + j < rows ? out_of(i + j) + column : nullptr;
      }
      if (whole)
        block<WIDE>(a, step, b.row(0) + column, b.stride, b.count, out);
      else
        block<1>(a, step, b.row(0) + column, b.stride, b.count, out);
    }
    column += whole ? WIDE * LANES : LANES;
  }
}
