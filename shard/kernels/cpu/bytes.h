// Weights of 8 and of 4 bits, times rows of int8 numbers.
//
// Rows come in groups of neighbours with a scale each, because one large number would take the others' bits. Sums of
// products are whole numbers within a group, and floats over the groups. The instruction wants lines unsigned and words
// signed.
#pragma once

#include <algorithm>

#include "tile.h"

#ifdef SHARDSTREAM_BYTES

namespace shardstream {

using Whole = __v16si;  // as __m512i, whose elements are 64 bits, GCC would not keep it in a register

inline Whole add_products(Whole sum, __m512i line, __m512i word) {
  return reinterpret_cast<Whole>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), line, word));
}

inline __m512i fill_word(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }

inline Lanes to_floats(Whole sum) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(sum)); }

// The other operand of both.
struct Bytes {
  using Number = int8_t;
  static constexpr size_t kPerWord = 4;

  // Twelve sums of a group and twelve totals have room in 32 registers, though GCC finds it for ten when columns are two.
  // Three columns take the fewest loads for them.
  static constexpr size_t max_rows(size_t num_columns) { return num_columns == 2 ? 5 : 12 / num_columns; }
  static constexpr size_t max_columns(size_t num_rows) { return num_rows <= 3 ? kMaxColumns : 3; }

  // `num` floats as numbers under a scale, and the sum of the numbers. `from` yields 16 lanes at an index.
  template <class From>
  static void write_group(const From& from, size_t num, Number* to, float* scale, int32_t* total) {
    Lanes largest = fill(0);
    for (size_t i = 0; i < num; i += kLanes) largest = max(largest, absolute(from(i)));
    *scale = std::max(largest_of(largest) / 127.f, 1e-30f);
    const Lanes inverse = fill(1.f / *scale);
    __m512i sum = _mm512_setzero_si512();
    for (size_t i = 0; i < num; i += kLanes) {
      const __m512i whole = _mm512_cvtps_epi32(from(i) * inverse);
      sum = _mm512_add_epi32(sum, whole);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(whole));
    }
    *total = _mm512_reduce_add_epi32(sum);
  }
};

// Lines are int8 plus 128. What the 128 add to a sum is known from the words alone.
struct Int8 : Bytes {
  static constexpr size_t kGroup = 64;  // inputs
  static constexpr size_t kSteps = kGroup / kPerWord;

  template <size_t M, size_t R>
  [[gnu::always_inline]] static inline void add_group(const Operand& operand, size_t group, const Line* const* columns,
                                                      const Line* ahead, Lanes (&total)[M][R]) {
    const size_t first = group * kSteps, stride = operand.stride, num_groups = operand.num_groups;
    const uint32_t* x = operand.words + first;
    const Line* column[R];
    Whole sum[M][R];
    for (size_t r = 0; r < R; r++) column[r] = columns[r] + first;
#pragma GCC unroll 12
    for (size_t m = 0; m < M; m++) {
#pragma GCC unroll 4
      for (size_t r = 0; r < R; r++) sum[m][r] = Whole{} - 128 * operand.sums[m * num_groups + group];
    }
#pragma GCC unroll 1
    for (size_t step = 0; step < kSteps; step++) {
      __m512i line[R];
      prefetch<R>(ahead + first + step);
#pragma GCC unroll 4
      for (size_t r = 0; r < R; r++) line[r] = _mm512_load_si512(column[r] + step);
#pragma GCC unroll 12
      for (size_t m = 0; m < M; m++) {
        const __m512i word = fill_word(x[m * stride + step]);
#pragma GCC unroll 4
        for (size_t r = 0; r < R; r++) sum[m][r] = add_products(sum[m][r], line[r], word);
      }
    }
#pragma GCC unroll 12
    for (size_t m = 0; m < M; m++) {
      const Lanes scale = fill(operand.scales[m * num_groups + group]);
#pragma GCC unroll 4
      for (size_t r = 0; r < R; r++) total[m][r] = multiply_add(to_floats(sum[m][r]), scale, total[m][r]);
    }
  }
};

// A weight is `least + step * n`, with n from 0 to 15 and both numbers common to the group. A group's first line holds
// them, 16 steps and 16 leasts as float16; in the lines after it each byte holds n of one input and of the fourth after.
struct Int4 : Bytes {
  static constexpr size_t kGroup = 32;  // inputs
  static constexpr size_t kLines = 1 + kGroup / 8;

  template <size_t M, size_t R>
  [[gnu::always_inline]] static inline void add_group(const Operand& operand, size_t group, const Line* const* columns,
                                                      const Line* ahead, Lanes (&total)[M][R]) {
    const size_t first = group * kLines, stride = operand.stride, num_groups = operand.num_groups;
    const uint32_t* x = operand.words + group * (kGroup / kPerWord);
    const __m512i lower = _mm512_set1_epi8(0x0f);
    const Line* column[R];
    Whole sum[M][R];
    for (size_t r = 0; r < R; r++) column[r] = columns[r] + first;
#pragma GCC unroll 12
    for (size_t m = 0; m < M; m++)
#pragma GCC unroll 4
      for (size_t r = 0; r < R; r++) sum[m][r] = Whole{};
    const auto fetch_ahead = [&](size_t line) { prefetch<R>(ahead + first + line); };
    fetch_ahead(0);
#pragma GCC unroll 1
    for (size_t step = 0; step < kLines - 1; step++) {
      __m512i even[R], odd[R];
      fetch_ahead(1 + step);
#pragma GCC unroll 4
      for (size_t r = 0; r < R; r++) {
        const __m512i both = _mm512_load_si512(column[r] + 1 + step);
        even[r] = _mm512_and_si512(both, lower);
        odd[r] = _mm512_and_si512(_mm512_srli_epi16(both, 4), lower);
      }
#pragma GCC unroll 12
      for (size_t m = 0; m < M; m++) {
        const __m512i word = fill_word(x[m * stride + 2 * step]), next = fill_word(x[m * stride + 2 * step + 1]);
#pragma GCC unroll 4
        for (size_t r = 0; r < R; r++) sum[m][r] = add_products(add_products(sum[m][r], even[r], word), odd[r], next);
      }
    }
#pragma GCC unroll 4
    for (size_t r = 0; r < R; r++) {
      const auto* halves = reinterpret_cast<const __m256i*>(column[r]);
      const Lanes step = _mm512_cvtph_ps(_mm256_load_si256(halves)), least = _mm512_cvtph_ps(_mm256_load_si256(halves + 1));
#pragma GCC unroll 12
      for (size_t m = 0; m < M; m++) {
        const Lanes numbers = fill(static_cast<float>(operand.sums[m * num_groups + group]));
        const Lanes share = multiply_add(least, numbers, to_floats(sum[m][r]) * step);
        total[m][r] = multiply_add(share, fill(operand.scales[m * num_groups + group]), total[m][r]);
      }
    }
  }
};

}  // namespace shardstream

#endif
