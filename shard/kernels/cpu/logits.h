// What choosing a token needs of rows of logits, in one pass each: the maxima of blocks, and the sum of exponentials.
#pragma once

#include <cmath>

#include "threads.h"

namespace shardstream {

constexpr size_t kLogitsBlock = 64;

// A part of a row that is short enough for several threads to share a single row.
constexpr size_t kLogitsPart = 128 * kLogitsBlock;

inline size_t parts_of(size_t width) { return (width + kLogitsPart - 1) / kLogitsPart; }

// Up to 16 of `num` numbers from `i` on, those past the end as minus infinity.
inline Lanes load_until(const float* numbers, size_t i, size_t num) {
  return i + kLanes <= num ? load(numbers + i) : load_some(numbers + i, num - i, -INFINITY);
}

inline bool are_defined(const float* numbers, size_t num) {
  bool defined = true;
  for (size_t i = 0; i < num; i += kLanes) defined &= all_defined(load_until(numbers, i, num));
  return defined;
}

inline float peak_of(const float* numbers, size_t num) {
  Lanes largest = fill(-INFINITY);
  for (size_t i = 0; i < num; i += kLanes) largest = max(largest, load_until(numbers, i, num));
  return largest_of(largest);
}

// The place of the first number that equals the largest of them.
inline size_t first_of(const float* numbers, size_t num, float largest) {
  size_t i = 0;
  while (i + kLogitsBlock < num && peak_of(numbers + i, kLogitsBlock) != largest) i += kLogitsBlock;
  while (numbers[i] != largest) i++;
  return i;
}

// `maxima` [num_rows, ceil(width / kLogitsBlock)]. A NaN is its block's maximum.
inline void block_maxima(Threads& threads, const float* logits, size_t num_rows, size_t width, float* maxima) {
  const size_t num_blocks = (width + kLogitsBlock - 1) / kLogitsBlock;
  const size_t num_parts = parts_of(width);
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

inline Mass mass_of(const float* numbers, size_t num) {
  const float peak = peak_of(numbers, num);
  if (peak == -INFINITY) return {peak, 0};
  Lanes sum = fill(0);
  for (size_t i = 0; i < num; i += kLanes) sum = sum + exponential(load_until(numbers, i, num) - fill(peak));
  return {peak, sum_of(sum)};
}

// The sum of several parts, given by their index, in relation to the largest peak.
template <class MassOf>
double joined_sum(size_t num_parts, float peak, const MassOf& mass_of_part) {
  double sum = 0;
  for (size_t p = 0; p < num_parts; p++) {
    const Mass mass = mass_of_part(p);
    if (mass.sum > 0) sum += static_cast<double>(mass.sum) * std::exp(static_cast<double>(mass.peak - peak));
  }
  return sum;
}

// Per row its largest number and log(sum(e^(number - largest))), [num_rows] each. A row with a NaN may give anything.
inline void log_sums_of(Threads& threads, const float* logits, size_t num_rows, size_t width, float* peaks,
                        float* log_sums) {
  const size_t num_parts = parts_of(width);
  std::vector<Mass> masses(num_rows * num_parts);
  threads.each(masses.size(), [&](size_t index) {
    const size_t start = index % num_parts * kLogitsPart;
    masses[index] = mass_of(logits + index / num_parts * width + start, std::min(kLogitsPart, width - start));
  });
  for (size_t row = 0; row < num_rows; row++) {
    const Mass* parts = &masses[row * num_parts];
    float peak = -INFINITY;
    for (size_t p = 0; p < num_parts; p++) peak = std::max(peak, parts[p].peak);
    peaks[row] = peak;
    log_sums[row] = static_cast<float>(std::log(joined_sum(num_parts, peak, [&](size_t p) { return parts[p]; })));
  }
}

}  // namespace shardstream
