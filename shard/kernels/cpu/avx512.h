// Sixteen numbers in one register, for processors with AVX-512 and its bfloat16 and int8 products.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace shardstream {

using Lanes = __m512;  // of which + - * / are the compiler's

inline Lanes load(const float* from) { return _mm512_loadu_ps(from); }

inline Lanes load(const bfloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store(float* to, Lanes lanes) { _mm512_storeu_ps(to, lanes); }

inline void store(bfloat16* to, Lanes lanes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(lanes)));
}

inline __mmask16 first_lanes(size_t count) { return static_cast<__mmask16>((1u << count) - 1); }

// `count` numbers, less than 16, and `other` after them.
inline Lanes load_some(const float* from, size_t count, float other) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(other), first_lanes(count), from);
}

inline void store_some(float* to, Lanes lanes, size_t count) { _mm512_mask_storeu_ps(to, first_lanes(count), lanes); }

// Stores to every other number of 32, from the second on if `odd`. The others, which another thread may be writing, are
// left alone.
inline void store_alternately(bfloat16* to, Lanes lanes, bool odd) {
  const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(lanes));
  const __m512i both = _mm512_mullo_epi32(_mm512_cvtepu16_epi32(bits), _mm512_set1_epi32(0x10001));
  _mm512_mask_storeu_epi16(to, odd ? 0xaaaaaaaa : 0x55555555, both);
}

inline Lanes fill(float number) { return _mm512_set1_ps(number); }

inline Lanes multiply_add(Lanes x, Lanes y, Lanes sum) { return _mm512_fmadd_ps(x, y, sum); }

inline Lanes max(Lanes x, Lanes y) { return _mm512_max_ps(x, y); }

inline Lanes min(Lanes x, Lanes y) { return _mm512_min_ps(x, y); }

inline Lanes absolute(Lanes x) { return _mm512_abs_ps(x); }

inline Lanes rounded(Lanes x) { return _mm512_roundscale_ps(x, 0); }

// x * 2^n for whole n.
inline Lanes times_power_of_two(Lanes x, Lanes n) { return _mm512_scalef_ps(x, n); }

inline float sum_of(Lanes x) { return _mm512_reduce_add_ps(x); }

inline float largest_of(Lanes x) { return _mm512_reduce_max_ps(x); }

inline bool all_defined(Lanes x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) == 0; }

// x where its absolute value is below `limit`, else zero.
inline Lanes zero_from(Lanes x, float limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(x), fill(limit), _CMP_LT_OQ), x);
}

// x in lanes [from, to), else `other`.
inline Lanes within(Lanes x, int from, int to, float other) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 inside = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(from)) &
                           _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(to));
  return _mm512_mask_mov_ps(fill(other), inside, x);
}

// Sixteen pairs of bfloat16 numbers.
using Pairs = __m512bh;

inline Pairs load_pairs(const uint32_t* from) { return reinterpret_cast<Pairs>(_mm512_load_si512(from)); }

inline Pairs fill_pairs(uint32_t pair) { return reinterpret_cast<Pairs>(_mm512_set1_epi32(static_cast<int>(pair))); }

inline Lanes multiply_add(Pairs x, Pairs y, Lanes sum) { return _mm512_dpbf16_ps(sum, x, y); }

// How many rows of a tile, of so many columns, have room for their sums in 32 registers.
constexpr size_t max_rows(size_t num_columns) { return num_columns <= 2 ? 12 : num_columns == 3 ? 8 : 6; }

#define SHARDSTREAM_BYTES 1  // products of 8-bit numbers are there: `bytes.h`

}  // namespace shardstream
