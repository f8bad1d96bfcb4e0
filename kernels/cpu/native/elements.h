// Numbers of either dtype, computed with in float32, and SwiGLU of a row of them. F expert width.
#pragma once

#include "vector.h"

// The first n lanes of 16 numbers, the rest 0.
template <class T>
INLINE Floats get(const T* p, int64_t n) {
  return load_first(p, n);
}

INLINE void put(float* p, Floats x, int64_t n) {
  if (n >= LANES) return store(p, x);
  memcpy(p, &x, n * sizeof(float));
}

// The nearest bfloat16 values, as `round_bfloat16` has them; AVX512-BF16's own instruction takes what is below 2^-126
// for 0.
INLINE Halves narrow(Floats x) {
#if defined(MOE_LM_AVX512) && defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  return __builtin_convertvector((Bits)round_bfloat16(x) >> 16, Halves);
#endif
}

INLINE void put(bfloat16* p, Floats x, int64_t n) {
  const Halves h = narrow(x);
  if (n >= LANES)
    memcpy(p, &h, sizeof h);  // a size that is known needs no call
  else
    memcpy(p, &h, n * sizeof(bfloat16));
}

INLINE float value(float x) { return x; }
INLINE float value(bfloat16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

// Lanes from n on become x.
INLINE Floats beyond(Floats v, int64_t n, float x) {
  for (int64_t i = n; i < LANES; i++) v[i] = x;
  return v;
}

INLINE Floats sigmoid(Floats x) { return splat(1.0f) / (splat(1.0f) + exponential(-x)); }

// silu(gate) * up (Shazeer 2020) of a row (2F), gates first, to (F).
template <class T>
INLINE void swiglu_row(const T* hidden, T* act, int64_t F) {
  for (int64_t i = 0; i < F; i += LANES) {
    Floats g = get(hidden + i, F - i);
    put(act + i, g * sigmoid(g) * get(hidden + F + i, F - i), F - i);
  }
}

// act holds the gradient of an output that counts `weight` times, and becomes weight * output; grad_hidden (2F) gets the
// gradient of hidden. Gives the weight's.
template <class T>
INLINE float swiglu_backward_row(T* act, const T* hidden, float weight, T* grad_hidden, int64_t F) {
  Floats inner{};
  for (int64_t i = 0; i < F; i += LANES) {
    Floats g = get(hidden + i, F - i), u = get(hidden + F + i, F - i), d = get(act + i, F - i);
    Floats s = sigmoid(g), silu = g * s, a = silu * u;
    inner = fma(d, a, inner);
    d = d * weight;
    put(grad_hidden + F + i, d * silu, F - i);
    put(grad_hidden + i, d * u * s * (splat(1.0f) + g - silu), F - i);
    put(act + i, a * weight, F - i);
  }
  return sum(inner);
}
