// Rows of numbers times a packed matrix, with what becomes of the sums decided by the caller.
#pragma once

#include <cmath>
#include <cstring>

#include "threads.h"
#include "tile.h"

namespace shardstream {

// A packed matrix as `shard.kernels.packing` makes it. Outputs are padded to blocks of 16 with zeros.
struct Matrix {
  const Line* lines;
  uint64_t num_blocks;  // of 16 outputs
  uint64_t num_steps;   // lines of a block: one word of inputs each
  const float* scales;  // [16 * num_blocks] of int8 outputs; null otherwise
  const float* bias;    // [16 * num_blocks] or null
};

// Where rows of `width` numbers are written to be multiplied. Rows follow each other.
template <class Dot>
struct RowsBuffer {
  typename Dot::Number* numbers;
  size_t width;
  float* scales = nullptr;     // [rows, groups] of int8
  int32_t* offsets = nullptr;  // [rows, groups] of int8

  size_t num_groups() const { return width / kGroup; }

  Operand from(size_t row) const {
    const Operand all{reinterpret_cast<const uint32_t*>(numbers + row * width), width / Dot::kPerWord};
    if constexpr (!std::is_same_v<Dot, Int8>) return all;
    return {all.words, all.stride, scales + row * num_groups(), offsets + row * num_groups(), num_groups()};
  }

  // Writes one row of floats. `from` yields 16 lanes at an index.
  template <class From>
  void write(size_t row, const From& from) const {
    typename Dot::Number* to = numbers + row * width;
    if constexpr (!std::is_same_v<Dot, Int8>) {
      for (size_t i = 0; i < width; i += kLanes) store(to + i, from(i));
    } else {
      for (size_t group = 0; group < num_groups(); group++) write_group(row, group, to + group * kGroup, from);
    }
  }

 private:
  template <class From>
  void write_group(size_t row, size_t group, int8_t* to, const From& from) const {
    Lanes largest = _mm512_setzero_ps();
    for (size_t i = 0; i < kGroup; i += kLanes) largest = _mm512_max_ps(largest, _mm512_abs_ps(from(group * kGroup + i)));
    const float scale = std::max(_mm512_reduce_max_ps(largest) / 127.f, 1e-30f);
    const Lanes inverse = fill(1.f / scale);
    __m512i sum = _mm512_setzero_si512();
    for (size_t i = 0; i < kGroup; i += kLanes) {
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(from(group * kGroup + i), inverse));
      sum = _mm512_add_epi32(sum, whole);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(whole));
    }
    scales[row * num_groups() + group] = scale;
    offsets[row * num_groups() + group] = -128 * _mm512_reduce_add_epi32(sum);
  }
};

// 16 sums as what they stand for.
inline Lanes finished(const float* sums, const Matrix& matrix, size_t block) {
  Lanes lanes = load(sums);
  if (matrix.scales) lanes = _mm512_mul_ps(lanes, load(matrix.scales + block * kLanes));
  if (matrix.bias) lanes = _mm512_add_ps(lanes, load(matrix.bias + block * kLanes));
  return lanes;
}

// Columns of one task: as many as possible while the tasks still divide evenly among the threads.
inline size_t columns_per_task(size_t num_blocks, size_t unit, size_t num_threads) {
  for (size_t columns = kMaxColumns; columns > unit; columns--) {
    const size_t num_tasks = (num_blocks + columns - 1) / columns;
    if (columns % unit == 0 && (num_tasks % num_threads == 0 || num_tasks >= 16 * num_threads)) return columns;
  }
  return unit;
}

// Calls write(row, block, lanes) for every row and block; with unit 2, write(row, block, lanes, next block's lanes) for
// every other block.
template <class Dot, size_t unit, class Write>
void multiply(Threads& threads, const Matrix& matrix, const RowsBuffer<Dot>& rows, size_t num_rows, const Write& write) {
  const size_t per_task = columns_per_task(matrix.num_blocks, unit, threads.count());
  const size_t num_tasks = (matrix.num_blocks + per_task - 1) / per_task;
  threads.each(num_tasks, [&](size_t task) {
    const size_t first = task * per_task;
    const size_t num_columns = std::min<size_t>(per_task, matrix.num_blocks - first);
    const Line* columns[kMaxColumns];
    for (size_t c = 0; c < num_columns; c++) columns[c] = matrix.lines + (first + c) * matrix.num_steps;
    // The columns this thread is likely to take next.
    const size_t next = std::min<size_t>(first + threads.count() * per_task, matrix.num_blocks - num_columns);
    const size_t num_tiles = (num_rows + max_rows(num_columns) - 1) / max_rows(num_columns);
    for (size_t t = 0, row = 0; t < num_tiles; t++) {
      const size_t count = num_rows * (t + 1) / num_tiles - row;
      const Line* ahead = matrix.lines + (next + std::min(t, num_columns - 1)) * matrix.num_steps;
      alignas(64) float sums[24 * kLanes];
      tile_for<Dot>(count, num_columns)(rows.from(row), columns, 1, matrix.num_steps, ahead, sums);
      for (size_t m = 0; m < count; m++, row++) {
        for (size_t c = 0; c < num_columns; c += unit) {
          const float* at = sums + (m * num_columns + c) * kLanes;
          const Lanes lanes = finished(at, matrix, first + c);
          if constexpr (unit == 1) write(row, first + c, lanes);
          else write(row, first + c, lanes, finished(at + kLanes, matrix, first + c + 1));
        }
      }
    }
  });
}

}  // namespace shardstream
