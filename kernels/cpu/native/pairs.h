// Products of bfloat16 matrices, two of k at a time, summed in float32: by AVX512-BF16's pair products (VDPBF16PS), or
// by two fused multiply-adds, which are slower than a library's.
//
// Neighbours in k lie side by side as one 32-bit pair. The left operand is anything whose pairs are a fixed step apart
// in every row, such as plain rows; the right one is packed, Pairs. A row of a product is a chain over k of its own, so
// its bits do not depend on the rows beside it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "amx.h"
#include "elements.h"

#if defined(MOE_LM_AVX512) && defined(__AVX512BF16__)
#define MOE_LM_PAIRS 1
#endif

// Whether these products are faster here than oneDNN's, which has AMX, several times faster than pairs, where that is.
extern "C" int64_t moe_lm_fastest() {
#if defined(MOE_LM_PAIRS) && !defined(MOE_LM_AMX)
  return 1;
#else
  return 0;
#endif
}

typedef uint32_t Pair;

inline const Pair* as_pairs(const bfloat16* row) { return (const Pair*)row; }

struct Span {
  int64_t begin, end;
};

constexpr int64_t TALL = 6, WIDE = 4;  // rows, and vectors of 16 columns, of a block: 24 of 32 registers are its sums
constexpr int64_t PANEL = WIDE * LANES;
constexpr int64_t AHEAD = 4;  // rows that are asked for early: packing takes 0.5 to 0.75 of the time so

// A matrix (k, columns) in panels of 64 columns, each (k / 2, 64): what a block reads lies side by side, so that caches
// fetch it ahead and few pages are met. In rows of all columns experts took 1.1 to 1.2 times as long.
struct Pairs {
  int64_t count = 0, columns = 0;

  // For a matrix (k, wide), of whatever is there.
  void resize(int64_t k, int64_t wide) {
    count = (k + 1) / 2, columns = wide;
    const int64_t size = count * round_up(wide, PANEL);
    if (size <= room) return;
    data.reset((Pair*)std::aligned_alloc(LINE, size * sizeof(Pair)));
    if (!data) throw std::bad_alloc();
    room = size;
  }
  // Where pair k of a column is; its next one is PANEL further.
  Pair* at(int64_t k, int64_t column) { return data.get() + (column / PANEL * count + k) * PANEL + column % PANEL; }
  const Pair* at(int64_t k, int64_t column) const { return const_cast<Pairs*>(this)->at(k, column); }

  // Of a matrix whose row k is row_of(k), k < depth, a multiple of 16 columns wide. Float32 is rounded.
  template <class F>
  void pack(int64_t depth, int64_t wide, F row_of) {
    resize(depth, wide);
    pack_rows({0, depth}, row_of);
  }

  // The pairs of rows [begin, end) alone, of which begin is even, and end too unless it is the matrix's.
  template <class F>
  void pack_rows(Span rows, F row_of) {
    for (int64_t k = rows.begin; k < rows.end; k += 2) {
      const auto *even = row_of(k), *odd = k + 1 < rows.end ? row_of(k + 1) : nullptr;
      const int64_t early = std::min(k + AHEAD, rows.end - 1);
      const auto *next = row_of(early), *last = row_of(std::min(early + 1, rows.end - 1));
      for (int64_t i = 0; i < columns; i += LANES) {
        __builtin_prefetch(next + i), __builtin_prefetch(last + i);
        const Bits both = halves(even + i) | (odd ? halves(odd + i) << 16 : Bits{});
        memcpy(at(k / 2, i), &both, sizeof both);
      }
    }
  }

  // Of the transpose of a matrix whose rows are row_of(i), i < wide, both multiples of 16: its pairs lie in its rows.
  template <class F>
  void pack_transposed(int64_t wide, int64_t depth, F row_of) {
    resize(depth, wide);
    pack_columns({0, wide}, depth, row_of);
  }

  // Columns [begin, end) of it alone, multiples of 16.
  template <class F>
  void pack_columns(Span wide, int64_t depth, F row_of) {
    for (int64_t i = wide.begin; i < wide.end; i += LANES)
      for (int64_t k = 0; k < depth; k += 2 * LANES) {
        const int64_t pairs = std::min<int64_t>(LANES, (depth - k) / 2);
        Floats x[LANES];
        for (int j = 0; j < LANES; j++) x[j] = neighbours(row_of(i + j) + k, pairs);
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
#if defined(MOE_LM_PAIRS)
    const Floats further = n < LANES ? Floats{} : load(p + LANES);
    return (Floats)_mm512_cvtne2ps_pbh((__m512)further, (__m512)load(p));
#endif
    const Halves h[2] = {narrow(load(p)), n < LANES ? Halves{} : narrow(load(p + LANES))};
    Floats x;
    memcpy(&x, h, sizeof x);
    return x;
  }

  static constexpr int64_t LINE = 64;  // of a cache, which a vector fills
  struct Free {
    void operator()(Pair* p) const { std::free(p); }
  };
  std::unique_ptr<Pair, Free> data;
  int64_t room = 0;
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

// TALL rows by C vectors, to out[i] where it is not null, or added to it: row i's pairs are a[i][0], a[i][step] ..
template <bool ADD, int C, class T>
INLINE void block(const Pair* const* a, int64_t step, const Pair* b, int64_t count, T* const* out) {
  Floats sums[TALL][C] = {};
  for (int64_t k = 0; k < count; k++) {
    Floats right[C];
    for (int c = 0; c < C; c++) right[c] = load((const float*)(b + k * PANEL) + c * LANES);
    for (int i = 0; i < TALL; i++)
      for (int c = 0; c < C; c++) sums[i][c] = add_products(sums[i][c], a[i][k * step], right[c]);
  }
  for (int i = 0; i < TALL; i++)
    for (int c = 0; c < C && out[i]; c++) {
      T* to = out[i] + c * LANES;
      put(to, ADD ? load(to) + sums[i][c] : sums[i][c], LANES);
    }
}

// Rows [0, rows) of the left operand by some columns of b, over some of its pairs, to out_of(i) + column, or added to
// what is there. left_of(i) is where pair 0 of row i is, the next one `step` further. Columns begin with a panel.
template <bool ADD = false, class Left, class Out>
void multiply(int64_t rows, Left left_of, int64_t step, const Pairs& b, Span columns, Span pairs, Out out_of) {
  using T = std::remove_pointer_t<decltype(out_of(0))>;
  const int64_t count = pairs.end - pairs.begin;
  for (int64_t column = columns.begin; column < columns.end; column += PANEL) {
    const int64_t vectors = std::min(WIDE, (columns.end - column) / LANES);
    const Pair* right = b.at(pairs.begin, column);
    for (int64_t i = 0; i < rows; i += TALL) {
      const Pair* a[TALL];
      T* out[TALL];
      for (int j = 0; j < TALL; j++) {
        a[j] = left_of(std::min(i + j, rows - 1)) + pairs.begin * step;
        out[j] = i + j < rows ? out_of(i + j) + column : nullptr;
      }
      if (vectors == 4)
        block<ADD, 4>(a, step, right, count, out);
      else if (vectors == 3)
        block<ADD, 3>(a, step, right, count, out);
      else if (vectors == 2)
        block<ADD, 2>(a, step, right, count, out);
      else
        block<ADD, 1>(a, step, right, count, out);
    }
  }
}

template <class Left, class Out>
void multiply(int64_t rows, Left left_of, int64_t step, const Pairs& b, Out out_of) {
  multiply(rows, left_of, step, b, {0, b.columns}, {0, b.count}, out_of);
}
