// The one inner loop: a few rows of numbers times a few packed columns.
//
// A packed matrix [outputs, inputs] is a sequence of lines of 64 bytes. A line holds 16 outputs times one word of 4
// bytes of inputs: 1 float32, 2 bfloat16 or 4 int8. Lines follow each other along the inputs, then along the outputs:
//
//     [outputs / 16][inputs / per word][16][per word]
//
// so that one instruction multiplies a line by a word of the other operand, repeated sixteen times, and adds to 16 sums.
// Weights, key blocks (outputs are 16 places) and value blocks (inputs are 16 places) all have this form. Weights of 8
// bits and less are in `bytes.h`.
#pragma once

#include <array>
#include <type_traits>
#include <utility>

#include "lanes.h"

namespace shardstream {

struct alignas(64) Line {
  uint32_t words[kLanes];
};

// Columns of 16 outputs that one tile takes; its rows are no more than Dot::max_rows(columns), so that all sums stay in
// registers.
constexpr size_t kMaxColumns = 4;

// Sums of more than `kRun` steps are made of sums of so many, so that small products are not lost beside large sums: one
// long float32 sum is four times as far from what transformers computes. bfloat16 has lost more before it comes here.
struct Float32 {
  using Number = float;
  using Cells = Lanes;  // a line, or a word sixteen times
  static constexpr size_t kPerWord = 1;
  static constexpr size_t kRun = 128;
  static constexpr size_t kGroup = 0;  // numbers have no common scale
  static constexpr size_t max_rows(size_t num_columns) { return shardstream::max_rows(num_columns); }
  static constexpr size_t max_columns(size_t) { return kMaxColumns; }
  static Cells line(const Line& line) { return load(reinterpret_cast<const float*>(&line)); }
  static Cells word(const uint32_t& word) { return fill(reinterpret_cast<const float&>(word)); }
};

struct BFloat16 {
  using Number = bfloat16;
  using Cells = Pairs;
  static constexpr size_t kPerWord = 2;
  static constexpr size_t kRun = 0;  // all steps are one run
  static constexpr size_t kGroup = 0;
  static constexpr size_t max_rows(size_t num_columns) { return shardstream::max_rows(num_columns); }
  static constexpr size_t max_columns(size_t) { return kMaxColumns; }
  static Cells line(const Line& line) { return load_pairs(line.words); }
  static Cells word(const uint32_t& word) { return fill_pairs(word); }
};

// Rows of words, where a tile begins. The last three are of numbers in groups.
struct Operand {
  const uint32_t* words;
  size_t stride;  // words from row to row
  const float* scales = nullptr;  // [rows, num_groups]
  const int32_t* sums = nullptr;  // [rows, num_groups] of a group's numbers
  size_t num_groups = 0;
};

// Sums of any tile.
constexpr size_t kTileSums = 24 * kLanes;

// sums[m][r * 16 ...] = sum over panels p and steps s of x[m][p * num_steps + s] * columns[p * R + r][s].
//
// One prefetch goes with each step, from `ahead` on.
using TileFunction = void (*)(const Operand& x, const Line* const* columns, size_t num_panels, size_t num_steps,
                              const Line* ahead, float* sums);

// To the second cache, for tiles of several columns, which other rows will read again. A column alone hardly ever is: it
// goes past the larger caches, which would otherwise hold nothing but weights when the interpreters' turn comes. Not by
// the intrinsic: GCC takes a function that only prefetches for one that does nothing, and may leave out calls of it.
template <size_t R>
inline void prefetch(const Line* line) {
  if constexpr (R == 1) asm volatile("prefetchnta %0" : : "m"(*line));
  else asm volatile("prefetcht1 %0" : : "m"(*line));
}

// Adds the registers to `sums` and clears them.
template <size_t M, size_t R>
inline void flush(Lanes (&sum)[M][R], float* sums) {
#pragma GCC unroll 12
  for (size_t m = 0; m < M; m++)
#pragma GCC unroll 4
    for (size_t r = 0; r < R; r++) {
      float* to = sums + (m * R + r) * kLanes;
      store(to, load(to) + sum[m][r]);
      sum[m][r] = fill(0);
    }
}

template <class Dot, size_t M, size_t R>
void tile(const Operand& operand, const Line* const* columns, size_t num_panels, size_t num_steps, const Line* ahead,
          float* sums) {
  const uint32_t* x = operand.words;
  const size_t stride = operand.stride;
  Lanes sum[M][R];
#pragma GCC unroll 12
  for (size_t m = 0; m < M; m++)
#pragma GCC unroll 4
    for (size_t r = 0; r < R; r++) sum[m][r] = fill(0);
  for (size_t i = 0; Dot::kRun && i < M * R; i++) store(sums + i * kLanes, fill(0));
  for (size_t panel = 0; panel < num_panels; panel++, columns += R, x += num_steps) {
    const Line* column[R];
    for (size_t r = 0; r < R; r++) column[r] = columns[r];
    for (size_t step = 0; step < num_steps; step++) {
      typename Dot::Cells line[R];
      prefetch<R>(ahead + step);
      if constexpr (Dot::kRun != 0) {
        if (step && step % Dot::kRun == 0) flush(sum, sums);
      }
#pragma GCC unroll 4
      for (size_t r = 0; r < R; r++) line[r] = Dot::line(column[r][step]);
#pragma GCC unroll 12
      for (size_t m = 0; m < M; m++) {
        const typename Dot::Cells word = Dot::word(x[m * stride + step]);
#pragma GCC unroll 4
        for (size_t r = 0; r < R; r++) sum[m][r] = multiply_add(line[r], word, sum[m][r]);
      }
    }
  }
  if constexpr (Dot::kRun != 0) return flush(sum, sums);
#pragma GCC unroll 12
  for (size_t m = 0; m < M; m++)
#pragma GCC unroll 4
    for (size_t r = 0; r < R; r++) store(sums + (m * R + r) * kLanes, sum[m][r]);
}

// The same for numbers in groups, always one panel: `add_group` adds one group's share to the totals, which stay in
// registers beside the sums of the group.
template <class Dot, size_t M, size_t R>
void tile_of_groups(const Operand& operand, const Line* const* columns, size_t, size_t, const Line* ahead, float* sums) {
  Lanes total[M][R];
#pragma GCC unroll 12
  for (size_t m = 0; m < M; m++)
#pragma GCC unroll 4
    for (size_t r = 0; r < R; r++) total[m][r] = fill(0);
#pragma GCC unroll 1
  for (size_t group = 0; group < operand.num_groups; group++) {
    Dot::template add_group<M, R>(operand, group, columns, ahead, total);
  }
#pragma GCC unroll 12
  for (size_t m = 0; m < M; m++)
#pragma GCC unroll 4
    for (size_t r = 0; r < R; r++) store(sums + (m * R + r) * kLanes, total[m][r]);
}

namespace detail {

template <class Dot, size_t R, size_t... Ms>
constexpr std::array<TileFunction, sizeof...(Ms)> tiles_of(std::index_sequence<Ms...>) {
  if constexpr (Dot::kGroup) return {tile_of_groups<Dot, Ms + 1, R>...};
  else return {tile<Dot, Ms + 1, R>...};
}

template <class Dot, size_t R>
constexpr auto kTiles = tiles_of<Dot, R>(std::make_index_sequence<Dot::max_rows(R)>{});

}  // namespace detail

// The tile for 1 <= num_rows <= Dot::max_rows(num_columns) and 1 <= num_columns <= kMaxColumns.
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
