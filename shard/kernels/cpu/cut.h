// The likeliest tokens of a row, down to where its rules cut the distribution: their order, and the masses to draw by.
//
// As `shard.processors.truncate`: by score, equal ones by token, and masses summed from the left in double precision.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <utility>

#include "scores.h"

namespace shardstream {

struct Candidate {
  uint32_t rank;  // the score as a number that is the smaller, the larger the score; equal for zeros of both signs
  uint32_t token;
};

// Its own inverse on the bits of floats.
inline uint32_t reversed(uint32_t bits) { return bits >> 31 ? bits : bits ^ 0x7fffffff; }

inline uint32_t rank_of(float score) {
  const float number = score + 0.f;  // no negative zero
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return reversed(bits);
}

inline float score_of(Candidate candidate) {
  const uint32_t bits = reversed(candidate.rank);
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
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

// What the weights of a row's tokens, e^((score - peak) / temperature), are in relation to.
struct Scale {
  float peak;
  double temperature;

  // The weight is e^-depth.
  double depth_of(float score) const { return (static_cast<double>(peak) - score) / temperature; }

  double weight_of(float score) const { return std::exp(-depth_of(score)); }

  // A score that is deeper, but hardly, however this and `depth_of` are rounded; one below the peak in any case.
  float score_below(double depth) const {
    const double distance = temperature * depth;
    const double score = peak - distance - 1e-15 * (std::abs(peak) + distance + temperature);
    return std::nextafter(static_cast<float>(std::max<double>(score, -FLT_MAX)), -INFINITY);
  }
};

// Of all weights of a row: their sum, and the mean of their depths, each by its weight.
struct Total {
  double mass;
  double mean_depth;
};

// The `count`-th largest of some numbers, or less than any finite one if there are not as many.
inline float nth_largest(const float* numbers, size_t num, size_t count) {
  if (count > num) return -INFINITY;
  std::vector<float> ordered(numbers, numbers + num);
  const auto nth = ordered.begin() + static_cast<ptrdiff_t>(count) - 1;
  std::nth_element(ordered.begin(), nth, ordered.end(), std::greater<float>());
  return *nth;
}

// A score that none of the tokens that count is below: those within the limits, and all that top-k leaves if top-p is a
// fraction of their mass. `maxima` are of the row's blocks, `total` is for limits that need it.
inline float least_within(const Rule& rule, const Scale& scale, const float* maxima, size_t num_blocks, size_t width,
                          const Total& total) {
  // The k blocks of largest maximum alone have k tokens that are not below the least of these.
  float least = rule.top_k ? nth_largest(maxima, num_blocks, static_cast<size_t>(rule.top_k)) : -INFINITY;
  const auto end_at = [&](double weight) { least = std::max(least, scale.score_below(-std::log(std::min(weight, 1.0)))); };
  if (!rule.top_k || rule.top_p >= 1) end_at(rule.min_p);
  if (rule.need_mass() && rule.top_p < 1) {
    // All tokens below this score together have no more than what top-p leaves over, even if the mass is a bit too much.
    const double left_over = (1 - rule.top_p * 1.00001) * total.mass;
    end_at(std::max(0.0, left_over / static_cast<double>(width)));
  }
  return std::max(least, -FLT_MAX);  // a weight of zero is never drawn
}

// How many of the sorted candidates are as likely as the k-th.
inline size_t num_within_top_k(const std::vector<Candidate>& candidates, size_t top_k) {
  size_t num = std::min(top_k, candidates.size());
  while (num < candidates.size() && candidates[num].rank == candidates[num - 1].rank) num++;
  return num;
}

// As `shard.processors._typical`: the range of those tokens, given by their depths in order, whose surprise is nearest the
// entropy, until they have a fraction of the mass. Surprise and entropy are as far apart as depth and mean depth.
struct Typical {
  size_t first;
  size_t end;
  bool is_reached;
};

inline Typical most_typical(const std::vector<double>& depths, const Total& total, double fraction) {
  const auto distance_at = [&](size_t i) { return i < depths.size() ? std::abs(depths[i] - total.mean_depth) : INFINITY; };
  const auto middle = std::lower_bound(depths.begin(), depths.end(), total.mean_depth) - depths.begin();
  size_t first = static_cast<size_t>(middle), end = first;
  double mass = 0, reach;
  do {
    const double above = distance_at(first - 1), below = distance_at(end);  // the former of a huge index behind the first
    reach = std::min(above, below);
    mass += std::exp(-depths[above <= below ? --first : end++]);
  } while (end - first < depths.size() && mass < fraction * total.mass);
  while (distance_at(first - 1) <= reach) first--;
  while (distance_at(end) <= reach) end++;
  return {first, end, mass >= fraction * total.mass};
}

// Neighbours among the sorted candidates: from `first` on one for each sum, which is of their weights up to its own.
struct Kept {
  size_t first;
  std::vector<double> sums;
  bool is_certain;  // that no token beyond the candidates is among them
};

// Those of the sorted candidates that are within the limits.
inline Kept kept_within(const Rule& rule, const std::vector<Candidate>& candidates, const Scale& scale, Total total) {
  size_t num = candidates.size();
  if (rule.top_k) {
    num = num_within_top_k(candidates, static_cast<size_t>(rule.top_k));
    total.mass = 0;
    for (size_t i = 0; i < num; i++) total.mass += scale.weight_of(score_of(candidates[i]));
  }
  const double wanted = rule.top_p < 1 ? rule.top_p * total.mass : INFINITY;
  std::vector<double> sums, depths;
  double sum = 0, depth_sum = 0;
  for (size_t i = 0; i < num; i++) {
    const double depth = scale.depth_of(score_of(candidates[i])), weight = std::exp(-depth);
    sum += weight;
    if (i && !(sum - weight < wanted && weight >= rule.min_p)) break;
    sums.push_back(sum);
    depths.push_back(depth);
    depth_sum += weight * depth;
  }
  const bool is_cut = sums.size() < candidates.size();
  if (rule.typical_p >= 1) return {0, std::move(sums), is_cut};
  if (!rule.is_typical_alone()) total = {sums.back(), depth_sum / sums.back()};
  const Typical typical = most_typical(depths, total, rule.typical_p);
  sums.clear();
  sum = 0;
  for (size_t i = typical.first; i < typical.end; i++) sums.push_back(sum += std::exp(-depths[i]));
  return {typical.first, std::move(sums), rule.is_typical_alone() ? typical.is_reached : is_cut};
}

}  // namespace shardstream
