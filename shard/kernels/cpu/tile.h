// The one inner loop: a few rows of numbers times a few packed columns.
//
// A packed matrix [outputs, inputs] is a sequence of lines of 64 bytes. A line holds 16 outputs times one word of 4
// bytes of inputs: 1 float32, 2 bfloat16 or 4 int8. Lines follow each other along the inputs, then along the outputs:
//
//     [outputs / 16][inputs / per word][16][per word]
//
// so that one instruction multiplies a line by a word of the other operand, repeated sixteen times, and adds to 16 sums.
// Weights, key blocks (outputs are 16 places) and value blocks (inputs are 16 places) all have this form.
#pragma once

#include <array>
#include <type_traits>
#include <utility>

#include "lanes.h"

namespace shardstream {

struct alignas(64) Line {
  uint32_t words[kLanes];
};

struct Float32 {
  using Number = float;
  using Sum = __m512;
  static constexpr size_t kPerWord = 1;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add(Sum sum, __m512i line, __m512i word) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(line), _mm512_castsi512_ps(word), sum);
  }
};

struct BFloat16 {
  using Number = bfloat16;
  using Sum = __m512;
  static constexpr size_t kPerWord = 2;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add(Sum sum, __m512i line, __m512i word) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(line), reinterpret_cast<__m512bh>(word));
  }
};

// Lines are unsigned, int8 plus 128, and words signed: the instruction wants it so. What the 128 add to a sum is known
// from the words alone. Words come in groups with a scale each, because one large input would take the others' bits.
struct Int8 {
  using Number = int8_t;
  using Sum = __v16si;  // as __m512i, whose elements are 64 bits, GCC would not keep it in a register
  static constexpr size_t kPerWord = 4;
  static Sum zero() { return Sum{}; }
  static Sum add(Sum sum, __m512i line, __m512i word) {
    return reinterpret_cast<Sum>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), line, word));
  }
};

constexpr size_t kGroup = 64;  // int8 inputs under one scale
constexpr size_t kGroupSteps = kGroup / Int8::kPerWord;

// Rows of words, where a tile begins. The last three are of int8 only.
struct Operand {
  const uint32_t* words;
  size_t stride;  // words from row to row
  const float* scales = nullptr;     // [rows, num_groups]
  const int32_t* offsets = nullptr;  // [rows, num_groups] -128 times the sum of a group's numbers
  size_t num_groups = 0;
};

// Rows times columns of 16 outputs; the sums stay in registers, of which there are 32.
constexpr size_t kMaxColumns = 4;
constexpr size_t max_rows(size_t num_columns) { return num_columns <= 2 ? 12 : num_columns == 3 ? 8 : 6; }

// sums[m][r * 16 ...] = sum over panels p and steps s of x[m][p * num_steps + s] * columns[p * R + r][s].
//
// One prefetch goes with each step, from `ahead` on.
using TileFunction = void (*)(const Operand& x, const Line* const* columns, size_t num_panels, size_t num_steps,
                              const Line* ahead, float* sums);

template <class Dot, size_t M, size_t R>
void tile(const Operand& operand, const Line* const* columns, size_t num_panels, size_t num_steps, const Line* ahead,
          float* sums) {
  const uint32_t* x = operand.words;
  const size_t stride = operand.stride;
  typename Dot::Sum sum[M][R];
#pragma GCC unroll 12
  for (size_t m = 0; m < M; m++)
#pragma GCC unroll 4
    for (size_t r = 0; r < R; r++) sum[m][r] = Dot::zero();
  for (size_t panel = 0; panel < num_panels; panel++, columns += R, x += num_steps) {
    const Line* column[R];
    for (size_t r = 0; r < R; r++) column[r] = columns[r];
    for (size_t step = 0; step < num_steps; step++) {
      __m512i line[R];
      _mm_prefetch(reinterpret_cast<const char*>(ahead + step), _MM_HINT_T1);
#pragma GCC unroll 4
      for (size_t r = 0; r < R; r++) line[r] = _mm512_load_si512(column[r] + step);
#pragma GCC unroll 12
      for (size_t m = 0; m < M; m++) {
        const __m512i word = _mm512_set1_epi32(static_cast<int>(x[m * stride + step]));
#pragma GCC unroll 4
        for (size_t r = 0; r < R; r++) sum[m][r] = Dot::add(sum[m][r], line[r], word);
      }
    }
  }
#pragma GCC unroll 12
  for (size_t m = 0; m < M; m++)
#pragma GCC unroll 4
    for (size_t r = 0; r < R; r++) store(sums + (m * R + r) * kLanes, sum[m][r]);
}

// One group of int8 inputs: whole sums, which are scaled and added to `sums`.
template <size_t M, size_t R>
inline void add_group(const Operand& operand, size_t group, const Line* const* columns, const Line* ahead,
                                 float* sums) {
  const size_t first = group * kGroupSteps, stride = operand.stride, num_groups = operand.num_groups;
  const uint32_t* x = operand.words + first;
  const Line* column[R];
  Int8::Sum sum[M][R];
  for (size_t r = 0; r < R; r++) column[r] = columns[r] + first;
#pragma GCC unroll 12
  for (size_t m = 0; m < M; m++) {
#pragma GCC unroll 4
    for (size_t r = 0; r < R; r++) sum[m][r] = Int8::Sum{} + operand.offsets[m * num_groups + group];
  }
#pragma GCC unroll 1
  for (size_t step = 0; step < kGroupSteps; step++) {
    __m512i line[R];
    _mm_prefetch(reinterpret_cast<const char*>(ahead + first + step), _MM_HINT_T1);
#pragma GCC unroll 4
    for (size_t r = 0; r < R; r++) line[r] = _mm512_load_si512(column[r] + step);
#pragma GCC unroll 12
    for (size_t m = 0; m < M; m++) {
      const __m512i word = _mm512_set1_epi32(static_cast<int>(x[m * stride + step]));
#pragma GCC unroll 4
      for (size_t r = 0; r < R; r++) sum[m][r] = Int8::add(sum[m][r], line[r], word);
    }
  }
#pragma GCC unroll 12
  for (size_t m = 0; m < M; m++) {
    const Lanes scale = fill(operand.scales[m * num_groups + group]);
#pragma GCC unroll 4
    for (size_t r = 0; r < R; r++) {
      float* to = sums + (m * R + r) * kLanes;
      store(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(reinterpret_cast<__m512i>(sum[m][r])), scale, load(to)));
    }
  }
}

// The same as `tile` for int8, always one panel.
template <size_t M, size_t R>
void tile_of_groups(const Operand& operand, const Line* const* columns, size_t, size_t num_steps, const Line* ahead,
                    float* sums) {
  for (size_t i = 0; i < M * R; i++) store(sums + i * kLanes, _mm512_setzero_ps());
  for (size_t group = 0; group * kGroupSteps < num_steps; group++) add_group<M, R>(operand, group, columns, ahead, sums);
}

namespace detail {

template <class Dot, size_t R, size_t... Ms>
constexpr std::array<TileFunction, sizeof...(Ms)> tiles_of(std::index_sequence<Ms...>) {
  if constexpr (std::is_same_v<Dot, Int8>) return {tile_of_groups<Ms + 1, R>...};
  else return {tile<Dot, Ms + 1, R>...};
}

template <class Dot, size_t R>
constexpr auto kTiles = tiles_of<Dot, R>(std::make_index_sequence<max_rows(R)>{});

}  // namespace detail

// The tile for 1 <= num_rows <= max_rows(num_columns) and 1 <= num_columns <= kMaxColumns.
template <class Dot>
TileFunction tile_for(size_t num_rows, size_t num_columns) {
  switch (num_columns) {
    case 1: return detail::kTiles<Dot, 1>[num_rows - 1];
    case 2: return detail::kTiles<Dot, 2>[num_rows - 1];
    case 3: return detail::kTiles<Dot, 3>[num_rows - 1];
    default: return detail::kTiles<Dot, 4>[num_rows - 1];
  }
}

}  // namespace shardstream
