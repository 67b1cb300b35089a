// Sixteen numbers at a time: loading, storing and the few functions of one number that a decoder layer needs.
//
// Everything is computed in float32, whatever numbers are stored as. What a processor's registers are is known to
// `avx512.h` and `avx2.h` alone, of which a library has one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace shardstream {

constexpr size_t kLanes = 16;

struct bfloat16 {
  uint16_t bits;
};

}  // namespace shardstream

#ifdef __AVX512BF16__
#include "avx512.h"
#else
#include "avx2.h"
#endif

namespace shardstream {

// What is not finite becomes zero: memory that is read with weight zero must not hold a NaN.
inline Lanes finite(Lanes lanes) {
  return zero_from(lanes, 3.38e38f);  // the next bfloat16 after it is infinite
}

// e^x within 2 units in the last place; 0 below -88.
inline Lanes exponential(Lanes x) {
  const Lanes inside = min(max(x, fill(-104.f)), fill(88.3f));
  const Lanes n = rounded(inside * fill(1.44269504089f));
  // ln 2 in two parts, the first of few bits, so that n times it is exact.
  Lanes r = multiply_add(n, fill(-0.693359375f), inside);
  r = multiply_add(n, fill(2.12194440e-4f), r);
  Lanes sum = fill(1.f / 5040);  // Taylor around 0, |r| <= ln 2 / 2
  for (const float inverse_factorial : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) {
    sum = multiply_add(sum, r, fill(inverse_factorial));
  }
  return times_power_of_two(sum, n);
}

// Of some numbers the largest, and the sum of e^(number - largest): what several parts of a softmax are joined by.
struct Mass {
  float peak;
  float sum;
};

inline Lanes silu(Lanes x) { return x / (fill(1.f) + exponential(fill(0.f) - x)); }

// tanh within 3 units in the last place, of small numbers too: by Lambert's continued fraction for x / 4, doubled twice by
// tanh 2y = 2 tanh y / (1 + tanh^2 y), with numerator and denominator kept apart.
inline Lanes hyperbolic_tangent(Lanes x) {
  const Lanes y = min(max(x, fill(-9.2f)), fill(9.2f)) * fill(0.25f);  // beyond, tanh is 1 in float32
  const Lanes square = y * y;
  Lanes above = multiply_add(square, fill(1.f / 135135), fill(378.f / 135135));
  above = multiply_add(square, above, fill(17325.f / 135135));
  above = y * multiply_add(square, above, fill(1));
  Lanes below = multiply_add(square, fill(28.f / 135135), fill(3150.f / 135135));
  below = multiply_add(square, below, fill(62370.f / 135135));
  below = multiply_add(square, below, fill(1));
  for (int doubling = 0; doubling < 2; doubling++) {
    const Lanes both = above * below;
    below = multiply_add(above, above, below * below);
    above = both + both;
  }
  return above / below;
}

// GELU by its tanh approximation; tanh(y) = 1 - 2 / (e^2y + 1).
inline Lanes gelu_tanh(Lanes x) {
  const Lanes cubic = multiply_add(x * x * x, fill(0.044715f), x);
  const Lanes e2y = exponential(cubic * fill(2.f * 0.79788456f));
  const Lanes tanh = fill(1.f) - fill(2.f) / (e2y + fill(1.f));
  return fill(0.5f) * x * (fill(1.f) + tanh);
}

}  // namespace shardstream
