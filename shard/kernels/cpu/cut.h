// The likeliest tokens of a row, down to where its rules cut the distribution: their order, and the masses to draw by.
//
// As `shard.processors.truncate`: by logit, equal ones by token, and masses summed from the left in double precision.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <utility>

#include "logits.h"

namespace shardstream {

struct Limits {
  double top_k;   // a whole number; 0: off
  double top_p;   // 1: off
  double min_p;   // 0: off

  bool cut() const { return top_k > 0 || top_p < 1 || min_p > 0; }

  // Whether top-p is a fraction of the mass of the whole vocabulary.
  bool need_mass() const { return top_k == 0 && top_p < 1; }
};

struct Candidate {
  uint32_t rank;  // the logit as a number that is the smaller, the larger the logit; equal for zeros of both signs
  uint32_t token;
};

// Its own inverse on the bits of floats.
inline uint32_t reversed(uint32_t bits) { return bits >> 31 ? bits : bits ^ 0x7fffffff; }

inline uint32_t rank_of(float logit) {
  const float number = logit + 0.f;  // no negative zero
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return reversed(bits);
}

inline float logit_of(Candidate candidate) {
  const uint32_t bits = reversed(candidate.rank);
  float logit;
  std::memcpy(&logit, &bits, sizeof logit);
  return logit;
}

// By rank; equal ones stay as they are. A radix sort: thousands of candidates, in flat distributions the whole
// vocabulary, must not cost much more each than a few do.
inline void sort(std::vector<Candidate>& candidates) {
  std::vector<Candidate> sorted(candidates.size());
  for (int shift = 0; shift < 32; shift += 8) {
    const auto digit_of = [&](Candidate candidate) { return candidate.rank >> shift & 255; };
    uint32_t places[257] = {};
    for (const Candidate candidate : candidates) places[digit_of(candidate) + 1]++;
    for (int digit = 1; digit < 256; digit++) places[digit] += places[digit - 1];
    for (const Candidate candidate : candidates) sorted[places[digit_of(candidate)]++] = candidate;
    std::swap(candidates, sorted);
  }
}

// What the weights of a row's tokens, e^((logit - peak) / temperature), are in relation to.
struct Scale {
  float peak;
  double temperature;

  double weight_of(float logit) const { return std::exp((static_cast<double>(logit) - peak) / temperature); }

  // A logit whose weight is less, but hardly, however this and `weight_of` are rounded; one below the peak in any case.
  float logit_below(double weight) const {
    const double distance = -temperature * std::log(std::min(weight, 1.0));
    const double logit = peak - distance - 1e-15 * (std::abs(peak) + distance + temperature);
    return std::nextafter(static_cast<float>(std::max<double>(logit, -FLT_MAX)), -INFINITY);
  }
};

// The `count`-th largest of some numbers, or less than any finite one if there are not as many.
inline float nth_largest(const float* numbers, size_t num, size_t count) {
  if (count > num) return -INFINITY;
  std::vector<float> ordered(numbers, numbers + num);
  const auto nth = ordered.begin() + static_cast<ptrdiff_t>(count) - 1;
  std::nth_element(ordered.begin(), nth, ordered.end(), std::greater<float>());
  return *nth;
}

// A logit that none of the tokens that count is below: those within the limits, and all that top-k leaves if top-p is a
// fraction of their mass. `maxima` are of the row's blocks, `mass` is what all its weights sum to, where the limits need
// it.
inline float least_within(const Limits& limits, const Scale& scale, const float* maxima, size_t num_blocks, size_t width,
                          double mass) {
  // The k blocks of largest maximum alone have k tokens that are not below the least of these.
  float least = limits.top_k ? nth_largest(maxima, num_blocks, static_cast<size_t>(limits.top_k)) : -INFINITY;
  if (!limits.top_k || limits.top_p >= 1) least = std::max(least, scale.logit_below(limits.min_p));
  if (limits.need_mass()) {
    // All tokens below this logit together have no more than what top-p leaves over, even if `mass` is a bit too much.
    const double left_over = (1 - limits.top_p * 1.00001) * mass;
    least = std::max(least, scale.logit_below(std::max(0.0, left_over / static_cast<double>(width))));
  }
  return std::max(least, -FLT_MAX);  // a weight of zero is never drawn
}

// How many of the sorted candidates are as likely as the k-th.
inline size_t num_within_top_k(const std::vector<Candidate>& candidates, size_t top_k) {
  size_t num = std::min(top_k, candidates.size());
  while (num < candidates.size() && candidates[num].rank == candidates[num - 1].rank) num++;
  return num;
}

// The sums of the weights of the sorted candidates up to each of those within the limits; the first always is.
inline std::vector<double> sums_within(const Limits& limits, const std::vector<Candidate>& candidates, const Scale& scale,
                                       double mass) {
  size_t num = candidates.size();
  if (limits.top_k) {
    num = num_within_top_k(candidates, static_cast<size_t>(limits.top_k));
    mass = 0;
    for (size_t i = 0; i < num; i++) mass += scale.weight_of(logit_of(candidates[i]));
  }
  const double wanted = limits.top_p < 1 ? limits.top_p * mass : INFINITY;
  std::vector<double> sums;
  double sum = 0;
  for (size_t i = 0; i < num; i++) {
    const double weight = scale.weight_of(logit_of(candidates[i]));
    sum += weight;
    if (i && !(sum - weight < wanted && weight >= limits.min_p)) break;
    sums.push_back(sum);
  }
  return sums;
}

}  // namespace shardstream
