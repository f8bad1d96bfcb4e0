// Sixteen float32 lanes and what is computed with them. Every function gives the same bits wherever it is inlined:
// products are fused only where `fma` is written (the library is compiled with -ffp-contract=off).
//
// MOE_LM_GENERIC leaves the compiler's portable vectors alone, without AVX2, AVX-512 or AMX code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if !defined(MOE_LM_GENERIC) && (defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__)))
#include <immintrin.h>
#endif
#if !defined(MOE_LM_GENERIC) && defined(__AVX512F__) && defined(__AVX512DQ__)
#define MOE_LM_AVX512 1
#elif !defined(MOE_LM_GENERIC) && defined(__AVX2__) && defined(__FMA__)
#define MOE_LM_AVX2 1
#endif

#define INLINE inline __attribute__((always_inline))

constexpr int LANES = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

// The upper half of a float32.
struct bfloat16 {
  uint16_t bits;
};

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Not 0 + x, which costs an addition: -0 is not to become 0.
INLINE Floats splat(float x) { return Floats{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

INLINE Floats load(const float* p) {
  Floats x;
  memcpy(&x, p, sizeof x);
  return x;
}

INLINE Floats load(const bfloat16* p) {
  Halves h;
  memcpy(&h, p, sizeof h);
  return (Floats)(__builtin_convertvector(h, Bits) << 16);
}

INLINE void store(float* p, Floats x) { memcpy(p, &x, sizeof x); }

// The first n lanes, the rest 0; nothing beyond them is read or written.
template <class T>
INLINE Floats load_first(const T* p, int64_t n) {
  if (n >= LANES) return load(p);
  T padded[LANES] = {};
  memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

INLINE void store_first(float* p, Floats x, int64_t n) { memcpy(p, &x, (n < LANES ? n : LANES) * sizeof(float)); }

INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(MOE_LM_AVX512)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(MOE_LM_AVX2)
  __m256 x[2], y[2], z[2];
  memcpy(x, &a, 64), memcpy(y, &b, 64), memcpy(z, &c, 64);
  for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  memcpy(&c, z, 64);
  return c;
#else
  return a * b + c;
#endif
}

INLINE Floats select(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }

INLINE bool equal(Floats x, Floats y) {
#if defined(MOE_LM_AVX512)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_EQ_OQ) == 0xffff;
#else
  for (int i = 0; i < LANES; i++)
    if (!(x[i] == y[i])) return false;
  return true;
#endif
}

// Sum of the lanes, halves onto halves.
INLINE float sum(Floats x) {
  float v[LANES];
  store(v, x);
#if defined(MOE_LM_AVX512)
  __m512 z = (__m512)x;
  __m256 y = _mm256_add_ps(_mm512_castps512_ps256(z), _mm512_extractf32x8_ps(z, 1));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
#endif
}

INLINE float maximum(Floats x) {
#if defined(MOE_LM_AVX512)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float v[LANES];
  store(v, x);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  return v[0];
#endif
}

// The smaller of a limit and x; NaN where x is.
INLINE Floats at_most(float limit, Floats x) {
#if defined(MOE_LM_AVX512)
  return (Floats)_mm512_min_ps((__m512)splat(limit), (__m512)x);
#else
  return select(x > splat(limit), splat(limit), x);
#endif
}

// e^x to a unit in the last place: 2^n by exponent bits times a polynomial on half a turn of log 2 (Cephes expf).
// 0 below -87, e^88 above 88, 1 exactly at 0, NaN at NaN.
INLINE Floats exponential(Floats x) {
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Floats bounded = at_most(88.0f, x);
  Floats shifted = fma(bounded, splat(1.44269504f), magic);
  Floats n = shifted - magic;
  Floats r = fma(n, splat(-0.693359375f), bounded);
  r = fma(n, splat(2.12194440e-4f), r);
  Floats p = splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fma(p, r, splat(c));
  p = fma(p, r * r, r) + 1.0f;
#if defined(MOE_LM_AVX512)
  __mmask16 not_below = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-87.0f), _CMP_NLT_UQ);
  return (Floats)_mm512_maskz_scalef_ps(not_below, (__m512)p, (__m512)n);
#else
  Floats power = (Floats)((((Ints)shifted - (Ints)magic) + 127) << 23);
  return select(x < splat(-87.0f), Floats{}, p * power);
#endif
}

// The nearest bfloat16 values, ties to even, as float32.
INLINE Floats round_bfloat16(Floats x) {
  Bits u = (Bits)x;
  Bits rounded = u + 0x7fffu + ((u >> 16) & 1u);
  // Rounding could carry a NaN's payload into its sign; a set quiet bit keeps it a NaN.
  Ints nan = (Ints)(u & 0x7fffffffu) > 0x7f800000;
  return (Floats)((((Bits)nan & (u | 0x400000u)) | (~(Bits)nan & rounded)) & 0xffff0000u);
}

INLINE void store_first(bfloat16* p, Floats x, int64_t n) {
  Halves h = __builtin_convertvector((Bits)round_bfloat16(x) >> 16, Halves);
  memcpy(p, &h, (n < LANES ? n : LANES) * sizeof(bfloat16));
}

// Rows become columns, in place.
INLINE void transpose(Floats (&x)[LANES]) {
#if defined(MOE_LM_AVX512)
  __m512 t[LANES];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps((__m512)x[i], (__m512)x[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps((__m512)x[i], (__m512)x[i + 1]);
  }
  __m512 u[LANES];
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      __m512d low = _mm512_castps_pd(t[i + j]), high = _mm512_castps_pd(t[i + j + 2]);
      u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int j = 0; j < 4; j++) {
    __m512 a = _mm512_shuffle_f32x4(u[j], u[j + 4], 0x88), b = _mm512_shuffle_f32x4(u[j], u[j + 4], 0xdd);
    __m512 c = _mm512_shuffle_f32x4(u[j + 8], u[j + 12], 0x88), d = _mm512_shuffle_f32x4(u[j + 8], u[j + 12], 0xdd);
    x[j] = (Floats)_mm512_shuffle_f32x4(a, c, 0x88);
    x[j + 4] = (Floats)_mm512_shuffle_f32x4(b, d, 0x88);
    x[j + 8] = (Floats)_mm512_shuffle_f32x4(a, c, 0xdd);
    x[j + 12] = (Floats)_mm512_shuffle_f32x4(b, d, 0xdd);
  }
#else
  float t[LANES][LANES];
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < LANES; j++) t[j][i] = x[i][j];
  memcpy(x, t, sizeof t);
#endif
}
