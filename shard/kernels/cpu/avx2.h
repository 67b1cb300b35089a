// Sixteen numbers in two registers, for processors with AVX2. bfloat16 numbers are multiplied as float32.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace shardstream {

struct Lanes {
  __m256 low, high;
};

inline Lanes operator+(Lanes x, Lanes y) { return {x.low + y.low, x.high + y.high}; }
inline Lanes operator-(Lanes x, Lanes y) { return {x.low - y.low, x.high - y.high}; }
inline Lanes operator*(Lanes x, Lanes y) { return {x.low * y.low, x.high * y.high}; }
inline Lanes operator/(Lanes x, Lanes y) { return {x.low / y.low, x.high / y.high}; }

inline Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }

inline __m256 widened(__m128i halves) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

inline Lanes load(const bfloat16* from) {
  const auto* halves = reinterpret_cast<const __m128i*>(from);
  return {widened(_mm_loadu_si128(halves)), widened(_mm_loadu_si128(halves + 1))};
}

inline void store(float* to, Lanes lanes) {
  _mm256_storeu_ps(to, lanes.low);
  _mm256_storeu_ps(to + 8, lanes.high);
}

// Rounded to nearest, ties to even; a NaN stays one. In the lower half of each 32 bits.
inline __m256i narrowed(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), is_odd);
  const __m256i undefined = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc00000), undefined), 16);
}

inline void store(bfloat16* to, Lanes lanes) {
  const __m256i packed = _mm256_packus_epi32(narrowed(lanes.low), narrowed(lanes.high));  // within each 128 bits
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
}

// `count` numbers, less than 16, and `other` after them.
inline Lanes load_some(const float* from, size_t count, float other) {
  alignas(32) float numbers[16];
  for (size_t i = 0; i < 16; i++) numbers[i] = i < count ? from[i] : other;
  return load(numbers);
}

inline void store_some(float* to, Lanes lanes, size_t count) {
  alignas(32) float numbers[16];
  store(numbers, lanes);
  for (size_t i = 0; i < count; i++) to[i] = numbers[i];
}

// Stores to every other number of 32, from the second on if `odd`. The others, which another thread may be writing, are
// left alone.
inline void store_alternately(bfloat16* to, Lanes lanes, bool odd) {
  bfloat16 numbers[16];
  store(numbers, lanes);
  for (size_t i = 0; i < 16; i++) to[2 * i + odd] = numbers[i];
}

inline Lanes fill(float number) { return {_mm256_set1_ps(number), _mm256_set1_ps(number)}; }

inline Lanes multiply_add(Lanes x, Lanes y, Lanes sum) {
  return {_mm256_fmadd_ps(x.low, y.low, sum.low), _mm256_fmadd_ps(x.high, y.high, sum.high)};
}

inline Lanes max(Lanes x, Lanes y) { return {_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)}; }

inline Lanes min(Lanes x, Lanes y) { return {_mm256_min_ps(x.low, y.low), _mm256_min_ps(x.high, y.high)}; }

inline __m256 absolute(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), x); }

inline Lanes absolute(Lanes x) { return {absolute(x.low), absolute(x.high)}; }

inline Lanes rounded(Lanes x) { return {_mm256_round_ps(x.low, 8), _mm256_round_ps(x.high, 8)}; }

inline __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

// x * 2^n for whole n, which is taken as -127, that is as no power but zero, below that and as 127 above.
inline Lanes times_power_of_two(Lanes x, Lanes n) {
  const Lanes inside = min(max(n, fill(-127)), fill(127));
  return x * Lanes{power_of_two(inside.low), power_of_two(inside.high)};
}

inline float sum_of(Lanes x) {
  const __m256 eight = x.low + x.high;
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return _mm_cvtss_f32(two + _mm_movehdup_ps(two));
}

inline float largest_of(Lanes x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ps(two, _mm_movehdup_ps(two)));
}

inline bool all_defined(Lanes x) {
  const __m256 undefined = _mm256_or_ps(_mm256_cmp_ps(x.low, x.low, _CMP_UNORD_Q), _mm256_cmp_ps(x.high, x.high, _CMP_UNORD_Q));
  return _mm256_movemask_ps(undefined) == 0;
}

inline __m256 zero_from(__m256 x, float limit) {
  return _mm256_and_ps(x, _mm256_cmp_ps(absolute(x), _mm256_set1_ps(limit), _CMP_LT_OQ));
}

// x where its absolute value is below `limit`, else zero.
inline Lanes zero_from(Lanes x, float limit) { return {zero_from(x.low, limit), zero_from(x.high, limit)}; }

inline __m256 within(__m256 x, int from, int to, float other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i inside = _mm256_and_si256(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(from - 1)),
                                          _mm256_cmpgt_epi32(_mm256_set1_epi32(to), lane));
  return _mm256_blendv_ps(_mm256_set1_ps(other), x, _mm256_castsi256_ps(inside));
}

// x in lanes [from, to), else `other`.
inline Lanes within(Lanes x, int from, int to, float other) {
  return {within(x.low, from, to, other), within(x.high, from - 8, to - 8, other)};
}

// Sixteen pairs of bfloat16 numbers, as float32.
struct Pairs {
  Lanes first, second;
};

inline Pairs pairs_of(__m256i low, __m256i high) {
  const __m256i second = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(low, second)), _mm256_castsi256_ps(_mm256_and_si256(high, second))}};
}

inline Pairs load_pairs(const uint32_t* from) {
  const auto* halves = reinterpret_cast<const __m256i*>(from);
  return pairs_of(_mm256_load_si256(halves), _mm256_load_si256(halves + 1));
}

inline Pairs fill_pairs(uint32_t pair) {
  const __m256i words = _mm256_set1_epi32(static_cast<int>(pair));
  return pairs_of(words, words);
}

inline Lanes multiply_add(Pairs x, Pairs y, Lanes sum) {
  return multiply_add(x.second, y.second, multiply_add(x.first, y.first, sum));
}

// How many rows of a tile, of so many columns, have room for their sums in 16 registers.
constexpr size_t max_rows(size_t num_columns) { return num_columns == 1 ? 6 : num_columns == 2 ? 3 : num_columns == 3 ? 2 : 1; }

}  // namespace shardstream
