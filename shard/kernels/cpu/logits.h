// What choosing a token needs of a row of logits, in one pass each: the maxima of blocks, and the sum of exponentials.
#pragma once

#include <cmath>

#include "threads.h"

namespace shardstream {

constexpr size_t kLogitsBlock = 64;

// A part of a row that is short enough for several threads to share a single row.
constexpr size_t kLogitsPart = 128 * kLogitsBlock;

// Up to 16 numbers from `i` on, those past the end as minus infinity.
inline Lanes load_until(const float* row, size_t i, size_t width) {
  return i + kLanes <= width ? load(row + i) : load_some(row + i, width - i, -INFINITY);
}

// `maxima` [num_rows, ceil(width / kLogitsBlock)]. A NaN is its block's maximum.
inline void block_maxima(Threads& threads, const float* logits, size_t num_rows, size_t width, float* maxima) {
  const size_t num_blocks = (width + kLogitsBlock - 1) / kLogitsBlock;
  const size_t num_parts = (width + kLogitsPart - 1) / kLogitsPart;
  threads.each(num_rows * num_parts, [&](size_t index) {
    const float* row = logits + index / num_parts * width;
    float* to = maxima + index / num_parts * num_blocks;
    const size_t start = index % num_parts * kLogitsPart, stop = std::min(width, start + kLogitsPart);
    for (size_t i = start; i < stop; i += kLogitsBlock) {
      Lanes largest = fill(-INFINITY);
      bool defined = true;
      for (size_t j = i; j < std::min(stop, i + kLogitsBlock); j += kLanes) {
        const Lanes lanes = load_until(row, j, width);
        defined &= all_defined(lanes);
        largest = max(largest, lanes);
      }
      to[i / kLogitsBlock] = defined ? largest_of(largest) : NAN;
    }
  });
}

inline Mass mass_of(const float* row, size_t start, size_t stop, size_t width) {
  Lanes largest = fill(-INFINITY);
  for (size_t i = start; i < stop; i += kLanes) largest = max(largest, load_until(row, i, width));
  const float peak = largest_of(largest);
  if (peak == -INFINITY) return {peak, 0};
  Lanes sum = fill(0);
  for (size_t i = start; i < stop; i += kLanes) sum = sum + exponential(load_until(row, i, width) - fill(peak));
  return {peak, sum_of(sum)};
}

// Per row its largest number and log(sum(e^(number - largest))), [num_rows] each. A row with a NaN may give anything.
inline void log_sums_of(Threads& threads, const float* logits, size_t num_rows, size_t width, float* peaks,
                        float* log_sums) {
  const size_t num_parts = (width + kLogitsPart - 1) / kLogitsPart;
  std::vector<Mass> masses(num_rows * num_parts);
  threads.each(masses.size(), [&](size_t index) {
    const size_t start = index % num_parts * kLogitsPart;
    masses[index] = mass_of(logits + index / num_parts * width, start, std::min(width, start + kLogitsPart), width);
  });
  for (size_t row = 0; row < num_rows; row++) {
    const Mass* parts = &masses[row * num_parts];
    float peak = -INFINITY;
    for (size_t p = 0; p < num_parts; p++) peak = std::max(peak, parts[p].peak);
    double sum = 0;
    for (size_t p = 0; p < num_parts; p++) {
      if (parts[p].sum > 0) sum += static_cast<double>(parts[p].sum) * std::exp(static_cast<double>(parts[p].peak - peak));
    }
    peaks[row] = peak;
    log_sums[row] = static_cast<float>(std::log(sum));
  }
}

}  // namespace shardstream
