// Products of bfloat16 weights and activations by AMX tiles.
//
// The weights are the left operand, 16 rows by 32 channels a tile, read from where the model keeps them. The
// activations are the right one: a panel is bfloat16 (K / 2, 16 rows, 2), pairs of channels side by side, K padded by
// zeros to whole tiles. An element of a tile is one chain over k in order, whatever stands in the other rows.
#pragma once

#include "fma.h"

#if defined(MOE_LM_AVX512) && defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__AMX_TILE__) && \
    defined(__linux__)
#define MOE_LM_AMX 1

#include <sys/syscall.h>
#include <unistd.h>

struct Amx {
  using Weight = bfloat16;
  using Activation = bfloat16;
  static constexpr int64_t DEPTH = 32;  // channels of a tile
  static constexpr int64_t ROW_BYTES = 64;

  static INLINE Floats round(Floats x) { return round_bfloat16(x); }

  // Whether the kernel lets this process use tiles. The numbers are ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA.
  static bool permitted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

  static int64_t padded(int64_t K) { return round_up(K, DEPTH); }
  static int64_t panel_size(int64_t K) { return TILE * padded(K); }
  static int64_t scratch_size(int64_t K) { return MOST_BLOCKS * TILE * padded(K); }

  // All eight tile registers as 16 rows of 64 bytes. A thread's setting, undone by `end`.
  static void begin() {
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; i++) {
      config[16 + 2 * i] = ROW_BYTES;
      config[48 + i] = TILE;
    }
    _tile_loadconfig(config);
  }
  static void end() { _tile_release(); }

  static constexpr int64_t CHANNELS = 2;  // that lie side by side

  // Channels k and k + 1 of a panel, (2, 16 rows), rounded.
  static INLINE void put(bfloat16* panel, int64_t, int64_t k, const Floats* x) {
    const Ints first = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, side_by_side = first | (first + 16) << 16;
    _mm512_storeu_si512(panel + k * TILE, _mm512_permutexvar_epi16((__m512i)side_by_side, pair(x[0], x[1])));
  }

  // As Fma::put_rows.
  template <class Load>
  static INLINE void put_rows(bfloat16* panel, int64_t K, Load&& load) {
    for (int64_t k = 0; k < padded(K); k += DEPTH) {
      Floats x[LANES];
      for (int i = 0; i < TILE; i++) x[i] = (Floats)pair(load(i, k), load(i, k + LANES));
      transpose(x);
      for (int i = 0; i < LANES; i++) store((float*)(panel + (k + 2 * i) * TILE), x[i]);
    }
  }

  // a / b to two units in the last place of float32, enough for what is rounded to bfloat16: a division takes longer
  // than all else of SwiGLU.
  static INLINE Floats quotient(Floats a, Floats b) {
    const Floats about = (Floats)_mm512_rcp14_ps((__m512)b);
    return a * (about * fma(-about, b, splat(2.0f)));
  }

  // As Fma::tiles; `scratch` holds copies of blocks that do not fill tiles.
  template <class Backlog>
  static void tiles(const Block<bfloat16>* block, int blocks, const bfloat16* panel, int panels, int64_t, int64_t K,
                    float* out, bfloat16* scratch, Backlog& backlog) {
    const bfloat16* start[MOST_BLOCKS];
    const char* next[MOST_BLOCKS];
    int64_t stride = K * sizeof(bfloat16), depth = padded(K);
    bool whole = K == depth;
    for (int b = 0; b < blocks; b++) whole &= block[b].rows == TILE;
    for (int b = 0; b < blocks; b++) {
      start[b] = whole ? block[b].start : pad(block[b], K, scratch + b * TILE * depth);
      next[b] = (const char*)block[b].next;
    }
    if (!whole) stride = depth * sizeof(bfloat16);
    // The compiler's tile loads do not say that they read memory.
    asm volatile("" ::: "memory");
    int64_t steps = depth / DEPTH;
    const bfloat16* second = panel + panel_size(K);
    if (panels == 2 && blocks == 2) return product_2x2(start, stride, panel, second, steps, next, out, backlog);
    for (int p = 0; p < panels; p++) {
      const bfloat16* x = p ? second : panel;
      if (blocks == 4) product_4x1(start, stride, x, steps, next, out, backlog);
      else
        for (int b = 0; b < blocks; b++)
          product(start[b], stride, x, steps, next[b], out + (b * panels + p) * 256, backlog);
    }
  }

 private:
  // Both rounded to bfloat16, one after the other.
  static INLINE __m512i pair(Floats low, Floats high) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  }

  static const bfloat16* pad(const Block<bfloat16>& block, int64_t K, bfloat16* to) {
    int64_t depth = padded(K);
    memset(to, 0, TILE * depth * sizeof(bfloat16));
    for (int64_t i = 0; i < block.rows; i++) memcpy(to + i * depth, block.start + i * K, K * sizeof(bfloat16));
    return to;
  }

  // A tile's worth of lines of the next block, in the order of memory.
  static INLINE void fetch(const char* next, int64_t step) {
    if (next)
      for (int line = 0; line < TILE; line++) _mm_prefetch(next + step * 1024 + line * 64, _MM_HINT_T0);
  }

  static INLINE void zero_four() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  static INLINE void store_four(float* out) {
    _tile_stored(0, out, ROW_BYTES);
    _tile_stored(1, out + 256, ROW_BYTES);
    _tile_stored(2, out + 512, ROW_BYTES);
    _tile_stored(3, out + 768, ROW_BYTES);
  }

  template <class Backlog>
  static void product(const bfloat16* w, int64_t stride, const bfloat16* x, int64_t steps, const char* next, float* out,
                      Backlog& backlog) {
    const int64_t share = backlog.share(steps);
    _tile_zero(0);
    for (int64_t s = 0; s < steps; s++) {
      _tile_loadd(4, w + s * DEPTH, stride);
      _tile_loadd(6, x + s * DEPTH * TILE, ROW_BYTES);
      _tile_dpbf16ps(0, 4, 6);
      fetch(next, s);
      backlog.work(share);
    }
    _tile_stored(0, out, ROW_BYTES);
  }

  template <class Backlog>
  static void product_2x2(const bfloat16* const* w, int64_t stride, const bfloat16* x, const bfloat16* y,
                          int64_t steps, const char* const* next, float* out, Backlog& backlog) {
    const int64_t share = backlog.share(steps);
    zero_four();
    for (int64_t s = 0; s < steps; s++) {
      _tile_loadd(4, w[0] + s * DEPTH, stride);
      _tile_loadd(6, x + s * DEPTH * TILE, ROW_BYTES);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, y + s * DEPTH * TILE, ROW_BYTES);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, w[1] + s * DEPTH, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      fetch(next[0], s), fetch(next[1], s);
      backlog.work(share);
    }
    store_four(out);
  }

  template <class Backlog>
  static void product_4x1(const bfloat16* const* w, int64_t stride, const bfloat16* x, int64_t steps,
                          const char* const* next, float* out, Backlog& backlog) {
    const int64_t share = backlog.share(steps);
    zero_four();
    for (int64_t s = 0; s < steps; s++) {
      _tile_loadd(6, x + s * DEPTH * TILE, ROW_BYTES);
      _tile_loadd(4, w[0] + s * DEPTH, stride);
      _tile_dpbf16ps(0, 4, 6);
      fetch(next[0], s);
      _tile_loadd(5, w[1] + s * DEPTH, stride);
      _tile_dpbf16ps(1, 5, 6);
      fetch(next[1], s);
      _tile_loadd(7, w[2] + s * DEPTH, stride);
      _tile_dpbf16ps(2, 7, 6);
      fetch(next[2], s);
      _tile_loadd(4, w[3] + s * DEPTH, stride);
      _tile_dpbf16ps(3, 4, 6);
      fetch(next[3], s);
      backlog.work(share);
    }
    store_four(out);
  }
};
#endif
