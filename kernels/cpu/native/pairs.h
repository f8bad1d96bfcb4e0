// Products of bfloat16 matrices, two of k at a time, summed in float32: by AVX512-BF16's pair products (VDPBF16PS), or
// by two fused multiply-adds, which are slower than a library's.
//
// Neighbours in k lie side by side as one 32-bit pair. The left operand is anything whose pairs are a fixed step apart
// in every row, such as plain rows; the right one is packed, Pairs. A row of a product is a chain over k of its own, so
// its bits do not depend on the rows beside it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "elements.h"

#if defined(MOE_LM_AVX512) && defined(__AVX512BF16__)
#define MOE_LM_PAIRS 1
#endif

typedef uint32_t Pair;

constexpr int64_t TALL = 6, WIDE = 4;  // rows, and vectors of 16 columns, of a block: 24 of 32 registers are its sums
constexpr int64_t PANEL = WIDE * LANES;

// A matrix (k, columns) in panels of 64 columns, each (k / 2, 64): what a block reads lies side by side, so that caches
// fetch it ahead and few pages are met. In rows of all columns experts took 1.1 to 1.2 times as long.
struct Pairs {
  std::vector<Pair> data;
  int64_t count = 0, columns = 0;

  void resize(int64_t k, int64_t wide) {
    count = (k + 1) / 2, columns = wide;
    const int64_t size = count * round_up(wide, PANEL);
    if ((int64_t)data.size() < size) data.resize(size);
  }
  // Where pair k of a column is; its next one is PANEL further.
  Pair* at(int64_t k, int64_t column) { return data.data() + (column / PANEL * count + k) * PANEL + column % PANEL; }
  const Pair* at(int64_t k, int64_t column) const { return const_cast<Pairs*>(this)->at(k, column); }

  // Of a matrix whose row k is row_of(k), k < depth, a multiple of 16 columns wide. Float32 is rounded.
  template <class F>
  void pack(int64_t depth, int64_t wide, F row_of) {
    resize(depth, wide);
    for (int64_t k = 0; k < depth; k += 2) {
      const auto *even = row_of(k), *odd = k + 1 < depth ? row_of(k + 1) : nullptr;
      for (int64_t i = 0; i < wide; i += LANES) {
        const Bits both = halves(even + i) | (odd ? halves(odd + i) << 16 : Bits{});
        memcpy(at(k / 2, i), &both, sizeof both);
      }
    }
  }

  // Of the transpose of matrix (wide, depth), both multiples of 16: its pairs lie in its rows.
  template <class T>
  void pack_transposed(const T* matrix, int64_t wide, int64_t depth) {
    resize(depth, wide);
    for (int64_t i = 0; i < wide; i += LANES)
      for (int64_t k = 0; k < depth; k += 2 * LANES) {
        const int64_t pairs = std::min<int64_t>(LANES, (depth - k) / 2);
        Floats x[LANES];
        for (int j = 0; j < LANES; j++) x[j] = neighbours(matrix + (i + j) * depth + k, pairs);
        transpose(x);
        for (int64_t j = 0; j < pairs; j++) store((float*)at(k / 2 + j, i), x[j]);
      }
  }

 private:
  static INLINE Bits halves(const bfloat16* p) {
    Halves h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, Bits);
  }
  static INLINE Bits halves(const float* p) { return __builtin_convertvector(narrow(load(p)), Bits); }

  // The first n pairs of a row, the rest 0; n is 8 or 16.
  static INLINE Floats neighbours(const bfloat16* p, int64_t n) { return load_first((const float*)p, n); }
  static INLINE Floats neighbours(const float* p, int64_t n) {
    const Halves h[2] = {narrow(load(p)), n < LANES ? Halves{} : narrow(load(p + LANES))};
    Floats x;
    memcpy(&x, h, sizeof x);
    return x;
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
template <int C, class T>
INLINE void block(const Pair* const* a, int64_t step, const Pair* b, int64_t count, T* const* out) {
  Floats sums[TALL][C] = {};
  for (int64_t k = 0; k < count; k++) {
    Floats right[C];
    for (int c = 0; c < C; c++) right[c] = load((const float*)(b + k * PANEL) + c * LANES);
    for (int i = 0; i < TALL; i++)
      for (int c = 0; c < C; c++) sums[i][c] = add_products(sums[i][c], a[i][k * step], right[c]);
  }
  for (int i = 0; i < TALL; i++)
    for (int c = 0; c < C && out[i]; c++) put(out[i] + c * LANES, sums[i][c], LANES);
}

// Rows [0, rows) of the left operand by b, to out_of(i): left_of(i) is where the pairs of row i begin, `step` apart.
template <class Left, class Out>
void multiply(int64_t rows, Left left_of, int64_t step, const Pairs& b, Out out_of) {
  using T = std::remove_pointer_t<decltype(out_of(0))>;
  for (int64_t column = 0; column < b.columns;) {
    const bool whole = b.columns - column >= PANEL;
    for (int64_t i = 0; i < rows; i += TALL) {
      const Pair* a[TALL];
      T* out[TALL];
      for (int j = 0; j < TALL; j++) {
        a[j] = left_of(std::min(i + j, rows - 1));
        out[j] = i + j < rows ? out_of(i + j) + column : nullptr;
      }
      if (whole)
        block<WIDE>(a, step, b.at(0, column), b.count, out);
      else
        block<1>(a, step, b.at(0, column), b.count, out);
    }
    column += whole ? PANEL : LANES;
  }
}
