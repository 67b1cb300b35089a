// The choice of a token: the largest logit, or a draw from the whole vocabulary or from its likeliest tokens; with it its
// log-probability, and whether the row is fit to choose from.
//
// All threads look through the rows part by part, so that they share even a single row; then each row's token is found
// in the part, and for a draw in the block, that holds it, or among those in the blocks with the largest maxima. A row's
// answer depends neither on the other rows nor on the number of threads.
#pragma once

#include "cut.h"

namespace shardstream {

constexpr size_t kDrawBlock = 256;
constexpr size_t kDrawBlocks = kLogitsPart / kDrawBlock;  // of a part

// Blocks whose maxima are looked at for a nucleus before it is known how far down it reaches: most end within.
constexpr size_t kFirstLook = 64;

// What is colder than this is as good as greedy.
constexpr float kLeastTemperature = 1e-30f;

struct ForbiddenToken {
  int64_t row;
  int64_t token;
};

struct Rules {
  const double* temperatures;       // of each row; 0: the largest logit is taken
  const Limits* limits;             // of each row, for those that draw
  const uint64_t* seeds;            // of each row, for those that draw
  const int64_t* positions;         // of the tokens to be chosen, in their sequences
  const ForbiddenToken* forbidden;  // in the order of rows
  uint64_t num_forbidden;
};

struct Choice {
  int64_t* tokens;
  float* logprobs;  // log-softmax of the logits
  bool* faults;     // a NaN, or no finite maximum; then the other two mean nothing
};

// As `shard.draw.uniform`.
inline double uniform(uint64_t seed, int64_t position) {
  const auto mix = [](uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  };
  const uint64_t bits = mix(mix(seed) + (static_cast<uint64_t>(position) + 1) * 0x9e3779b97f4a7c15);
  return (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
}

class Chooser {
 public:
  Chooser(const float* logits, size_t num_rows, size_t width, const Rules& rules)
      : logits_(logits), num_rows_(num_rows), width_(width), rules_(rules), num_parts_(parts_of(width)),
        num_blocks_((width + kLogitsBlock - 1) / kLogitsBlock), parts_(num_rows * num_parts_) {
    bool any_weighed = false, any_cut = false;
    for (size_t row = 0; row < num_rows; row++) {
      any_weighed |= is_weighed(row);
      any_cut |= is_cut(row);
    }
    if (any_weighed) weights_.resize(parts_.size() * kDrawBlocks);
    if (any_cut) maxima_.resize(num_rows * num_blocks_);
  }

  void choose(Threads& threads, const Choice& choice) {
    threads.each(parts_.size(), [&](size_t index) { look_through(index / num_parts_, index % num_parts_); });
    threads.each(num_rows_, [&](size_t row) { choose_in(row, choice); });
  }

 private:
  struct Part {
    Mass mass;
    bool defined;
    float peak;  // of what is allowed
  };

  const float* row_at(size_t row) const { return logits_ + row * width_; }
  size_t size_of(size_t part) const { return std::min(kLogitsPart, width_ - part * kLogitsPart); }
  bool draws(size_t row) const { return rules_.temperatures[row] > 0; }
  bool is_cut(size_t row) const { return draws(row) && rules_.limits[row].cut(); }
  bool is_weighed(size_t row) const { return draws(row) && (!is_cut(row) || rules_.limits[row].need_mass()); }

  void look_through(size_t row, size_t index) {
    const size_t start = index * kLogitsPart, size = size_of(index);
    Part& part = parts_[row * num_parts_ + index];
    part.mass = mass_of(row_at(row) + start, size);
    part.defined = are_defined(row_at(row) + start, size);
    alignas(64) float copy[kLogitsPart];
    const float* allowed = allowed_of(row, start, size, copy);
    part.peak = allowed == copy ? peak_of(copy, size) : part.mass.peak;
    if (is_cut(row)) {
      float* maxima = &maxima_[row * num_blocks_ + start / kLogitsBlock];
      for (size_t i = 0; i < size; i += kLogitsBlock) *maxima++ = peak_of(allowed + i, std::min(kLogitsBlock, size - i));
    }
    if (!is_weighed(row)) return;
    for (size_t i = 0; i < size; i += kDrawBlock) {
      Lanes sum = fill(0);
      weigh(row, allowed + i, std::min(kDrawBlock, size - i), part.peak, [&](size_t, Lanes lanes) { sum = sum + lanes; });
      weights_[(row * num_parts_ + index) * kDrawBlocks + i / kDrawBlock] = sum_of(sum);
    }
  }

  // The numbers of a row from `start` on with minus infinity in the place of what is forbidden; in `copy` if anything
  // among them is.
  const float* allowed_of(size_t row, size_t start, size_t size, float* copy) const {
    const ForbiddenToken* end = rules_.forbidden + rules_.num_forbidden;
    const auto precedes = [](const ForbiddenToken& pair, size_t row) { return static_cast<size_t>(pair.row) < row; };
    const float* allowed = row_at(row) + start;
    for (const auto* pair = std::lower_bound(rules_.forbidden, end, row, precedes); pair < end; pair++) {
      if (static_cast<size_t>(pair->row) != row) break;
      const size_t place = static_cast<size_t>(pair->token) - start;  // huge for tokens before `start`
      if (place >= size) continue;
      if (allowed != copy) std::copy_n(allowed, size, copy);
      allowed = copy;
      copy[place] = -INFINITY;
    }
    return allowed;
  }

  // Calls take(i, e^((number - peak) / temperature)) for each sixteen numbers, from i on.
  template <class Take>
  void weigh(size_t row, const float* numbers, size_t num, float peak, const Take& take) const {
    if (peak == -INFINITY) return;
    const Lanes largest = fill(peak), cold = fill(coldness(row));
    for (size_t i = 0; i < num; i += kLanes) take(i, exponential((load_until(numbers, i, num) - largest) * cold));
  }

  float coldness(size_t row) const {
    return 1 / std::max(static_cast<float>(rules_.temperatures[row]), kLeastTemperature);
  }

  void choose_in(size_t row, const Choice& choice) const {
    const Part* parts = &parts_[row * num_parts_];
    float peak = -INFINITY, allowed_peak = -INFINITY;
    bool defined = true;
    for (size_t p = 0; p < num_parts_; p++) {
      peak = std::max(peak, parts[p].mass.peak);
      allowed_peak = std::max(allowed_peak, parts[p].peak);
      defined &= parts[p].defined;
    }
    const bool is_fit = defined && std::isfinite(peak);
    size_t token = 0;
    // Where nothing is allowed, the model's own choice stands.
    if (is_fit && allowed_peak == -INFINITY) token = first_of(row_at(row), width_, peak);
    else if (is_cut(row) && is_fit) token = drawn_of_likeliest(row, allowed_peak);
    else if (is_fit) token = draws(row) ? drawn(row, allowed_peak) : likeliest(row, allowed_peak);
    const double sum = joined_sum(num_parts_, peak, [&](size_t p) { return parts[p].mass; });
    choice.tokens[row] = static_cast<int64_t>(token);
    choice.logprobs[row] = row_at(row)[token] - peak - static_cast<float>(std::log(sum));
    choice.faults[row] = !is_fit;
  }

  size_t likeliest(size_t row, float peak) const {
    size_t part = 0;
    while (parts_[row * num_parts_ + part].peak != peak) part++;
    const size_t start = part * kLogitsPart, size = size_of(part);
    alignas(64) float copy[kLogitsPart];
    return start + first_of(allowed_of(row, start, size, copy), size, peak);
  }

  // First the block, then the token in it, each by sums from the left. No token of weight zero is drawn.
  size_t drawn(size_t row, float peak) const {
    std::vector<double> sums((width_ + kDrawBlock - 1) / kDrawBlock);
    double sum = 0;
    for (size_t block = 0; block < sums.size(); block++) {
      sums[block] = sum += factor(row, block, peak) * weights_[row * num_parts_ * kDrawBlocks + block];
    }
    const double wanted = uniform(rules_.seeds[row], rules_.positions[row]) * sum;
    auto found = std::upper_bound(sums.begin(), sums.end(), wanted);
    if (found == sums.end()) found = std::lower_bound(sums.begin(), sums.end(), sum);  // rounding stepped over the end
    const size_t block = static_cast<size_t>(found - sums.begin()), start = block * kDrawBlock;
    const double before = block ? sums[block - 1] : 0;
    return start + drawn_in(row, start, (wanted - before) / factor(row, block, peak));
  }

  // Among few candidates, if these hold all that the limits leave, else among all that they can leave.
  size_t drawn_of_likeliest(size_t row, float peak) const {
    const Limits& limits = rules_.limits[row];
    const Scale scale{peak, rules_.temperatures[row]};
    const float* maxima = &maxima_[row * num_blocks_];
    const double mass = limits.need_mass() ? mass_at_temperature(row, peak) : 0;
    const float least = least_within(limits, scale, maxima, num_blocks_, width_, mass);
    float looked_at = limits.need_mass() ? std::max(least, nth_largest(maxima, num_blocks_, kFirstLook)) : least;
    for (;;) {
      std::vector<Candidate> candidates = candidates_of(row, looked_at);
      sort(candidates);
      const std::vector<double> sums = sums_within(limits, candidates, scale, mass);
      if (sums.size() < candidates.size() || looked_at == least) {
        const double wanted = uniform(rules_.seeds[row], rules_.positions[row]) * sums.back();
        return candidates[static_cast<size_t>(std::upper_bound(sums.begin(), sums.end(), wanted) - sums.begin())].token;
      }
      looked_at = least;
    }
  }

  double mass_at_temperature(size_t row, float peak) const {
    double sum = 0;
    for (size_t block = 0; block * kDrawBlock < width_; block++) {
      sum += factor(row, block, peak) * weights_[row * num_parts_ * kDrawBlocks + block];
    }
    return sum;
  }

  // Those tokens of a row whose logits are not below `least`, in the order of tokens.
  std::vector<Candidate> candidates_of(size_t row, float least) const {
    std::vector<Candidate> found;
    size_t num_found = 0;
    for (size_t start = 0; start < width_; start += kLogitsBlock) {
      if (maxima_[row * num_blocks_ + start / kLogitsBlock] < least) continue;
      const size_t size = std::min(kLogitsBlock, width_ - start);
      alignas(64) float copy[kLogitsBlock];
      const float* allowed = allowed_of(row, start, size, copy);
      found.resize(num_found + size);
      for (size_t i = 0; i < size; i++) {  // without a branch that nobody could foresee
        found[num_found] = {rank_of(allowed[i]), static_cast<uint32_t>(start + i)};
        num_found += allowed[i] >= least;
      }
    }
    found.resize(num_found);
    return found;
  }

  // What the weights of a block, which are relative to the peak of its part, are in relation to that of the row.
  double factor(size_t row, size_t block, float peak) const {
    const float part_peak = parts_[row * num_parts_ + block / kDrawBlocks].peak;
    return std::exp((static_cast<double>(part_peak) - peak) * coldness(row));
  }

  // The place in a block at which the weights before it and its own exceed `wanted`.
  size_t drawn_in(size_t row, size_t start, double wanted) const {
    const size_t num = std::min(kDrawBlock, width_ - start);
    alignas(64) float copy[kDrawBlock], weights[kDrawBlock];
    const float peak = parts_[row * num_parts_ + start / kLogitsPart].peak;
    weigh(row, allowed_of(row, start, num, copy), num, peak, [&](size_t i, Lanes lanes) { store(weights + i, lanes); });
    size_t place = 0;
    double sum = 0;
    for (size_t i = 0; i < num && sum <= wanted; i++) {
      if (weights[i] > 0) place = i;
      sum += weights[i];
    }
    return place;
  }

  const float* logits_;
  size_t num_rows_;
  size_t width_;
  const Rules& rules_;
  size_t num_parts_;
  size_t num_blocks_;
  std::vector<Part> parts_;
  std::vector<float> weights_;  // of blocks, relative to the peak of their part
  std::vector<float> maxima_;   // of blocks of logits that are allowed, in the rows that draw from the likeliest tokens
};

}  // namespace shardstream
