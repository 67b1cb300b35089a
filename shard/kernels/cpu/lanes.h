// Sixteen numbers at a time: loading, storing and the few functions of one number that a decoder layer needs.
//
// Everything is computed in float32, whatever numbers are stored as.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace shardstream {

constexpr size_t kLanes = 16;

struct bfloat16 {
  uint16_t bits;
};

using Lanes = __m512;

inline Lanes load(const float* from) { return _mm512_loadu_ps(from); }

inline Lanes load(const bfloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store(float* to, Lanes lanes) { _mm512_storeu_ps(to, lanes); }

inline void store(bfloat16* to, Lanes lanes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(lanes)));
}

inline Lanes fill(float number) { return _mm512_set1_ps(number); }

// What is not finite becomes zero: memory that is read with weight zero must not hold a NaN.
inline Lanes finite(Lanes lanes) {
  const Lanes limit = fill(3.38e38f);  // the next bfloat16 after it is infinite
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(lanes), limit, _CMP_LT_OQ), lanes);
}

// e^x within 2 units in the last place; 0 below -87.
inline Lanes exponential(Lanes x) {
  const Lanes inside = _mm512_min_ps(_mm512_max_ps(x, fill(-104.f)), fill(88.7f));
  const Lanes n = _mm512_roundscale_ps(_mm512_mul_ps(inside, fill(1.44269504089f)), 0);
  // ln 2 in two parts, the first of few bits, so that n times it is exact.
  Lanes r = _mm512_fnmadd_ps(n, fill(0.693359375f), inside);
  r = _mm512_fnmadd_ps(n, fill(-2.12194440e-4f), r);
  Lanes sum = fill(1.f / 5040);  // Taylor around 0, |r| <= ln 2 / 2
  for (const float inverse_factorial : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) {
    sum = _mm512_fmadd_ps(sum, r, fill(inverse_factorial));
  }
  return _mm512_scalef_ps(sum, n);
}

inline Lanes silu(Lanes x) {
  return _mm512_div_ps(x, _mm512_add_ps(fill(1.f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// GELU by its tanh approximation; tanh(y) = 1 - 2 / (e^2y + 1).
inline Lanes gelu_tanh(Lanes x) {
  const Lanes cubic = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_mul_ps(x, x), x), fill(0.044715f), x);
  const Lanes e2y = exponential(_mm512_mul_ps(cubic, fill(2.f * 0.79788456f)));
  const Lanes tanh = _mm512_sub_ps(fill(1.f), _mm512_div_ps(fill(2.f), _mm512_add_ps(e2y, fill(1.f))));
  return _mm512_mul_ps(_mm512_mul_ps(fill(0.5f), x), _mm512_add_ps(fill(1.f), tanh));
}

}  // namespace shardstream
