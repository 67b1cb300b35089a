// Rows of numbers times a packed matrix, with what becomes of the sums decided by the caller.
#pragma once

#include <cmath>
#include <cstring>

#include "bytes.h"
#include "threads.h"

namespace shardstream {

// A packed matrix as `shard.kernels.packing` makes it. Outputs are padded to blocks of 16 with zeros.
struct Matrix {
  const Line* lines;
  uint64_t num_blocks;  // of 16 outputs
  uint64_t num_steps;   // lines of a block
  const float* scales;  // [16 * num_blocks] by which sums are multiplied, or null
  const float* bias;    // [16 * num_blocks] or null
};

template <class Dot>
constexpr size_t groups_in(size_t width) {
  if constexpr (Dot::kGroup != 0) return width / Dot::kGroup;
  else return 0;
}

// Where rows of `width` numbers are written to be multiplied. Rows follow each other.
template <class Dot>
struct RowsBuffer {
  typename Dot::Number* numbers;
  size_t width;
  float* scales = nullptr;  // [rows, groups] of numbers in groups
  int32_t* sums = nullptr;  // [rows, groups] of numbers in groups

  size_t num_groups() const { return groups_in<Dot>(width); }

  Operand from(size_t row) const {
    const size_t num = num_groups();
    const auto* words = reinterpret_cast<const uint32_t*>(numbers + row * width);
    return {words, width / Dot::kPerWord, scales + row * num, sums + row * num, num};
  }

  // Writes one row of floats. `from` yields 16 lanes at an index.
  template <class From>
  void write(size_t row, const From& from) const {
    typename Dot::Number* to = numbers + row * width;
    if constexpr (Dot::kGroup) {
      for (size_t group = 0, at = row * num_groups(); group < num_groups(); group++, at++) {
        const size_t start = group * Dot::kGroup;
        Dot::write_group([&](size_t i) { return from(start + i); }, Dot::kGroup, to + start, scales + at, sums + at);
      }
    } else {
      for (size_t i = 0; i < width; i += kLanes) store(to + i, from(i));
    }
  }
};

// 16 sums as what they stand for.
inline Lanes finished(const float* sums, const Matrix& matrix, size_t block) {
  Lanes lanes = load(sums);
  if (matrix.scales) lanes = lanes * load(matrix.scales + block * kLanes);
  if (matrix.bias) lanes = lanes + load(matrix.bias + block * kLanes);
  return lanes;
}

// Columns of one task: as many as possible, up to `most`, while the tasks still divide evenly among the threads.
inline size_t columns_per_task(size_t most, size_t num_blocks, size_t unit, size_t num_threads) {
  for (size_t columns = most; columns > unit; columns--) {
    const size_t num_tasks = (num_blocks + columns - 1) / columns;
    if (columns % unit == 0 && (num_tasks % num_threads == 0 || num_tasks >= 16 * num_threads)) return columns;
  }
  return unit;
}

// Rows of one task: as many as stay in a processor's second cache while all columns pass by.
constexpr size_t kRowsBytes = 512 * 1024;

// So few rows are done with a column before memory has brought the next. They take one column after the other, because
// memory is read fastest as one stream: by up to a third faster than when a tile reads several.
constexpr size_t kFewRows = 12;

// How far ahead that stream is asked for: further than memory is slow, nearer than a first cache is large. Behind the
// last column there is nothing, and asking for it does nothing.
constexpr size_t kLinesAhead = 128;

// Calls write(row, block, lanes) for every row and block; with unit 2, write(row, block, lanes, next block's lanes) for
// every other block.
template <class Dot, size_t unit, class Write>
void multiply(Threads& threads, const Matrix& matrix, const RowsBuffer<Dot>& rows, size_t num_rows,
              const Write& write) {
  const bool in_turn = num_rows <= kFewRows;
  const size_t most_columns = in_turn ? kMaxColumns : Dot::max_columns(num_rows);
  const size_t per_task = columns_per_task(most_columns, matrix.num_blocks, unit, threads.count());
  const size_t num_parts = (matrix.num_blocks + per_task - 1) / per_task;
  const size_t num_chunks = 1 + num_rows * rows.width * sizeof(typename Dot::Number) / kRowsBytes;
  threads.each(num_chunks * num_parts, [&](size_t task) {
    const size_t chunk = task / num_parts, start = num_rows * chunk / num_chunks;
    const size_t num_rows_here = num_rows * (chunk + 1) / num_chunks - start;
    const size_t first = task % num_parts * per_task;
    const size_t num_columns = std::min<size_t>(per_task, matrix.num_blocks - first);
    const size_t at_once = in_turn ? 1 : num_columns;
    const Line* columns[kMaxColumns];
    for (size_t c = 0; c < num_columns; c++) columns[c] = matrix.lines + (first + c) * matrix.num_steps;
    // The columns this thread is likely to take next.
    const size_t next = std::min<size_t>(first + per_task, matrix.num_blocks - at_once);
    const size_t most = Dot::max_rows(at_once), num_tiles = (num_rows_here + most - 1) / most;
    for (size_t t = 0, row = start; t < num_tiles; t++) {
      const size_t count = start + num_rows_here * (t + 1) / num_tiles - row;
      alignas(64) float sums[std::max(kTileSums, kFewRows * kMaxColumns * kLanes)];
      for (size_t c = 0; c < num_columns; c += at_once) {
        const Line* ahead = in_turn ? columns[c] + kLinesAhead
                                    : matrix.lines + (next + std::min(t, num_columns - 1)) * matrix.num_steps;
        tile_for<Dot>(count, at_once)(rows.from(row), columns + c, 1, matrix.num_steps, ahead,
                                      sums + c * count * kLanes);
      }
      const size_t row_step = in_turn ? kLanes : num_columns * kLanes, column_step = in_turn ? count * kLanes : kLanes;
      for (size_t m = 0; m < count; m++, row++) {
        for (size_t c = 0; c < num_columns; c += unit) {
          const float* at = sums + m * row_step + c * column_step;
          const Lanes lanes = finished(at, matrix, first + c);
          if constexpr (unit == 1) write(row, first + c, lanes);
          else write(row, first + c, lanes, finished(at + column_step, matrix, first + c + 1));
        }
      }
    }
  });
}

}  // namespace shardstream
