// The choice of a token: the largest score, or a draw from the whole vocabulary or from its likeliest tokens; with it its
// log-probability, those of the likeliest tokens, and whether the row is fit to choose from. Scores are for choosing;
// log-probabilities are of the logits.
//
// All threads look through the rows part by part, so that they share even a single row; then each row's token is found
// in the part, and for a draw in the block, that holds it, or among those in the blocks with the largest maxima. A row's
// answer depends neither on the other rows nor on the number of threads.
//
// Ranks that hold a part of the columns each take the largest score together: what each has found among its own goes
// round, and all of them have the answer. Its log-probability may then differ from one rank's in the last bits, unless
// ranks hold whole parts.
#pragma once

#include "cut.h"
#include "peers.h"

namespace shardstream {

constexpr size_t kDrawBlock = 256;
constexpr size_t kDrawBlocks = kLogitsPart / kDrawBlock;  // of a part

// Blocks whose maxima are looked at for a nucleus before it is known how far down it reaches: most end within.
constexpr size_t kFirstLook = 64;

// What is colder than this is as good as greedy.
constexpr float kLeastTemperature = 1e-30f;

// Most tokens as likely as the last of the likeliest that are returned with it.
constexpr size_t kMaxTopTies = 8;

struct Draws {
  const uint64_t* seeds;     // of each row, for those that draw
  const int64_t* positions;  // of the tokens to be chosen, in their sequences
};

struct Choice {
  int64_t* tokens;
  float* logprobs;        // log-softmax of the logits
  bool* faults;           // a NaN, or no finite maximum; then the rest means nothing
  uint64_t max_top;       // of a row, ties included
  int64_t* num_top;       // of each row
  int64_t* top_tokens;    // [rows, max_top], the most likely first
  float* top_logprobs;
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
  Chooser(const float* logits, size_t num_rows, size_t width, const ScoreRules& rules, const Draws& draws)
      : scores_(logits, width, rules), rules_(rules.rules), num_rows_(num_rows), width_(width), draws_(draws),
        num_parts_(parts_of(width)), num_blocks_((width + kLogitsBlock - 1) / kLogitsBlock), parts_(num_rows * num_parts_) {
    const auto any = [&](auto is) { return std::any_of(rules_, rules_ + num_rows, is); };
    if (any(is_weighed)) weights_.resize(parts_.size() * kDrawBlocks);
    if (any([](const Rule& rule) { return rule.cuts(); })) maxima_.resize(num_rows * num_blocks_);
    if (any([](const Rule& rule) { return rule.num_top > 0; })) logit_maxima_.resize(num_rows * num_blocks_);
  }

  void choose(Threads& threads, const Choice& choice) {
    threads.each(parts_.size(), [&](size_t index) { look_through(index / num_parts_, index % num_parts_); });
    threads.each(num_rows_, [&](size_t row) { answer(row, found_in(row), choice); });
  }

  // Where the columns here are some of the rows', those from `first` on, and no row wants more than its largest score.
  PeerFault choose_together(Threads& threads, Peers& peers, size_t first, const Choice& choice) {
    threads.each(parts_.size(), [&](size_t index) { look_through(index / num_parts_, index % num_parts_); });
    std::vector<Found> own(num_rows_), of_all(num_rows_ * peers.count());
    threads.each(num_rows_, [&](size_t row) {
      own[row] = found_in(row);
      own[row].token += first;
    });
    const size_t num_bytes = num_rows_ * sizeof(Found);
    const auto fault = peers.gather(reinterpret_cast<char*>(own.data()), num_bytes, reinterpret_cast<char*>(of_all.data()));
    if (fault) return fault;
    for (size_t row = 0; row < num_rows_; row++) {
      Found found = of_all[row];
      for (size_t rank = 1; rank < peers.count(); rank++) found = joined(found, of_all[rank * num_rows_ + row]);
      answer(row, found, choice);
    }
    return kNone;
  }

 private:
  // What some columns of a row come to.
  struct Found {
    double sum;       // of e^(logit - peak)
    float peak;       // the largest logit
    float score;      // the token's; minus infinity where the rules leave none, and it is the model's own choice
    float logit;      // the token's
    uint32_t defined;  // whether no logit is a NaN
    uint64_t token;

    bool is_fit() const { return defined && std::isfinite(peak); }
  };

  // Of neighbouring columns, the lower ones first.
  static Found joined(const Found& low, const Found& high) {
    const bool is_high = high.score != low.score ? high.score > low.score : high.logit > low.logit;
    Found found = is_high ? high : low;
    found.peak = std::max(low.peak, high.peak);
    found.sum = sum_below(low, found.peak) + sum_below(high, found.peak);
    found.defined = low.defined && high.defined;
    return found;
  }

  static double sum_below(const Found& found, float peak) {
    return found.sum > 0 ? found.sum * std::exp(static_cast<double>(found.peak) - peak) : 0;
  }

  struct Part {
    Mass mass;  // of the logits
    bool defined;
    float peak;  // of the scores
  };

  // Of a block's tokens, e^-depth each, where depths are relative to the peak of its part.
  struct Weight {
    float sum;
    float depth_sum;  // each depth by its weight
  };

  static bool is_weighed(const Rule& rule) { return rule.draws() && (!rule.cuts() || rule.need_mass()); }

  size_t size_of(size_t part) const { return std::min(kLogitsPart, width_ - part * kLogitsPart); }
  const Part* parts_in(size_t row) const { return &parts_[row * num_parts_]; }

  void look_through(size_t row, size_t index) {
    const size_t start = index * kLogitsPart, size = size_of(index), first_block = row * num_blocks_ + start / kLogitsBlock;
    const float* logits = scores_.logits(row) + start;
    Part& part = parts_[row * num_parts_ + index];
    part.mass = mass_of(logits, size);
    part.defined = are_defined(logits, size);
    alignas(64) float copy[kLogitsPart];
    const float* scores = scores_.at(row, start, size, copy);
    part.peak = scores == copy ? peak_if_defined(copy, size) : part.mass.peak;
    if (rules_[row].num_top > 0) write_maxima(logits, size, &logit_maxima_[first_block]);
    if (rules_[row].cuts()) write_maxima(scores, size, &maxima_[first_block]);
    if (!is_weighed(rules_[row])) return;
    for (size_t i = 0; i < size; i += kDrawBlock) {
      Lanes sum = fill(0), depth_sum = fill(0);
      weigh(row, scores + i, std::min(kDrawBlock, size - i), part.peak, [&](size_t, Lanes exponents, Lanes weights) {
        sum = sum + weights;
        depth_sum = depth_sum - weights * max(exponents, fill(-128));  // no weight times no infinity
      });
      weights_[(row * num_parts_ + index) * kDrawBlocks + i / kDrawBlock] = {sum_of(sum), sum_of(depth_sum)};
    }
  }

  // A NaN, as of infinities that cancel, is no score to choose by: then the peak is infinite, and the model's choice stands.
  static float peak_if_defined(const float* scores, size_t size) {
    return are_defined(scores, size) ? peak_of(scores, size) : INFINITY;
  }

  static void write_maxima(const float* numbers, size_t size, float* maxima) {
    for (size_t i = 0; i < size; i += kLogitsBlock) *maxima++ = peak_of(numbers + i, std::min(kLogitsBlock, size - i));
  }

  // Calls take(i, (number - peak) / temperature, and e^ that) for each sixteen numbers, from i on.
  template <class Take>
  void weigh(size_t row, const float* numbers, size_t num, float peak, const Take& take) const {
    if (peak == -INFINITY) return;
    const Lanes largest = fill(peak), cold = fill(coldness(row));
    for (size_t i = 0; i < num; i += kLanes) {
      const Lanes exponents = (load_until(numbers, i, num) - largest) * cold;
      take(i, exponents, exponential(exponents));
    }
  }

  float coldness(size_t row) const {
    return 1 / std::max(static_cast<float>(rules_[row].temperature), kLeastTemperature);
  }

  Found found_in(size_t row) const {
    const Part* parts = parts_in(row);
    Found found{0, -INFINITY, -INFINITY, -INFINITY, true, 0};
    float peak_score = -INFINITY;
    for (size_t p = 0; p < num_parts_; p++) {
      found.peak = std::max(found.peak, parts[p].mass.peak);
      peak_score = std::max(peak_score, parts[p].peak);
      found.defined &= parts[p].defined;
    }
    if (!found.is_fit()) return found;
    found.sum = joined_sum(num_parts_, found.peak, [&](size_t p) { return parts[p].mass; });
    found.token = chosen(row, found.peak, peak_score);
    found.logit = scores_.logits(row)[found.token];
    if (std::isfinite(peak_score)) found.score = peak_score;
    return found;
  }

  void answer(size_t row, const Found& found, const Choice& choice) const {
    const bool is_fit = found.is_fit();
    const float log_sum = static_cast<float>(std::log(found.sum));
    const auto logprob_of = [&](float logit) { return logit - found.peak - log_sum; };
    const uint64_t token = is_fit ? found.token : 0;
    scores_.note(row, token);
    choice.tokens[row] = static_cast<int64_t>(token);
    choice.logprobs[row] = logprob_of(found.logit);
    choice.faults[row] = !is_fit;
    const std::vector<Candidate> top = is_fit ? likeliest(row) : std::vector<Candidate>();
    choice.num_top[row] = static_cast<int64_t>(top.size());
    for (size_t i = 0; i < choice.max_top; i++) {
      const size_t id = i < top.size() ? top[i].token : 0;
      choice.top_tokens[row * choice.max_top + i] = static_cast<int64_t>(id);
      choice.top_logprobs[row * choice.max_top + i] = logprob_of(scores_.logits(row)[id]);
    }
  }

  size_t chosen(size_t row, float peak, float peak_score) const {
    if (!std::isfinite(peak_score)) return chosen_by_model(row, peak);
    if (rules_[row].cuts()) return drawn_of_likeliest(row, peak_score);
    return rules_[row].draws() ? drawn(row, peak_score) : first_of_largest(row, peak_score);
  }

  // Where the rules leave no token, the model's own choice stands: among those that masks leave, if there are any.
  size_t chosen_by_model(size_t row, float peak) const {
    std::vector<float> copy(width_);
    const float* masked = scores_.masked(row, 0, width_, copy.data());
    const float masked_peak = peak_of(masked, width_);
    return std::isfinite(masked_peak) ? first_of(masked, width_, masked_peak) : first_of(scores_.logits(row), width_, peak);
  }

  size_t first_of_largest(size_t row, float peak) const {
    size_t part = 0;
    while (parts_in(row)[part].peak != peak) part++;
    const size_t start = part * kLogitsPart, size = size_of(part);
    alignas(64) float copy[kLogitsPart];
    return start + first_of(scores_.at(row, start, size, copy), size, peak);
  }

  // First the block, then the token in it, each by sums from the left. No token of weight zero is drawn.
  size_t drawn(size_t row, float peak) const {
    std::vector<double> sums((width_ + kDrawBlock - 1) / kDrawBlock);
    double sum = 0;
    for (size_t block = 0; block < sums.size(); block++) {
      sums[block] = sum += factor(row, block, peak) * weight_of(row, block).sum;
    }
    const double wanted = uniform(draws_.seeds[row], draws_.positions[row]) * sum;
    auto found = std::upper_bound(sums.begin(), sums.end(), wanted);
    if (found == sums.end()) found = std::lower_bound(sums.begin(), sums.end(), sum);  // rounding stepped over the end
    const size_t block = static_cast<size_t>(found - sums.begin()), start = block * kDrawBlock;
    const double before = block ? sums[block - 1] : 0;
    return start + drawn_in(row, start, (wanted - before) / factor(row, block, peak));
  }

  // Among few candidates, if these hold all that the limits leave, else among all that they can leave.
  size_t drawn_of_likeliest(size_t row, float peak) const {
    const Rule& rule = rules_[row];
    const Scale scale{peak, rule.temperature};
    const float* maxima = &maxima_[row * num_blocks_];
    const Total total = rule.need_mass() ? total_of(row, peak) : Total{};
    const float least = least_within(rule, scale, maxima, num_blocks_, width_, total);
    float looked_at = least;
    // What is deeper than twice the mean is less typical than the likeliest token.
    if (rule.is_typical_alone()) looked_at = std::max(least, scale.score_below(2 * total.mean_depth));
    else if (rule.need_mass()) looked_at = std::max(least, nth_largest(maxima, num_blocks_, kFirstLook));
    for (;;) {
      const auto scores_at = [&](size_t start, size_t size, float* copy) { return scores_.at(row, start, size, copy); };
      std::vector<Candidate> candidates = candidates_of(scores_at, maxima, looked_at);
      sort(candidates);
      const Kept kept = kept_within(rule, candidates, scale, total);
      if (kept.is_certain || looked_at == least) {
        const double wanted = uniform(draws_.seeds[row], draws_.positions[row]) * kept.sums.back();
        const auto found = std::upper_bound(kept.sums.begin(), kept.sums.end(), wanted);
        return candidates[kept.first + static_cast<size_t>(found - kept.sums.begin())].token;
      }
      looked_at = least;
    }
  }

  // By logit, with some of those as likely as the last.
  std::vector<Candidate> likeliest(size_t row) const {
    const size_t num = static_cast<size_t>(rules_[row].num_top);
    if (num == 0) return {};
    const float* maxima = &logit_maxima_[row * num_blocks_];
    const auto logits_at = [&](size_t start, size_t, float*) { return scores_.logits(row) + start; };
    std::vector<Candidate> candidates = candidates_of(logits_at, maxima, nth_largest(maxima, num_blocks_, num));
    sort(candidates);
    candidates.resize(std::min(num_within_top_k(candidates, num), num + kMaxTopTies));
    return candidates;
  }

  Total total_of(size_t row, float peak) const {
    double mass = 0, depth_sum = 0;
    for (size_t block = 0; block * kDrawBlock < width_; block++) {
      const Weight& weight = weight_of(row, block);
      if (weight.sum == 0) continue;
      mass += factor(row, block, peak) * weight.sum;
      depth_sum += factor(row, block, peak) * (weight.depth_sum + weight.sum * depth_of_part(row, block, peak));
    }
    return {mass, depth_sum / mass};
  }

  // Those tokens of a row whose numbers are not below `least`, in the order of tokens; `maxima` are of its blocks.
  template <class NumbersAt>
  std::vector<Candidate> candidates_of(const NumbersAt& numbers_at, const float* maxima, float least) const {
    std::vector<Candidate> found;
    size_t num_found = 0;
    for (size_t start = 0; start < width_; start += kLogitsBlock) {
      if (maxima[start / kLogitsBlock] < least) continue;
      const size_t size = std::min(kLogitsBlock, width_ - start);
      alignas(64) float copy[kLogitsBlock];
      const float* numbers = numbers_at(start, size, copy);
      found.resize(num_found + size);
      for (size_t i = 0; i < size; i++) {  // without a branch that nobody could foresee
        found[num_found] = {rank_of(numbers[i]), static_cast<uint32_t>(start + i)};
        num_found += numbers[i] >= least;
      }
    }
    found.resize(num_found);
    return found;
  }

  const Weight& weight_of(size_t row, size_t block) const { return weights_[row * num_parts_ * kDrawBlocks + block]; }

  // How much deeper a block's tokens, whose depths are relative to the peak of its part, are below that of the row.
  double depth_of_part(size_t row, size_t block, float peak) const {
    return (static_cast<double>(peak) - parts_in(row)[block / kDrawBlocks].peak) * coldness(row);
  }

  double factor(size_t row, size_t block, float peak) const { return std::exp(-depth_of_part(row, block, peak)); }

  // The place in a block at which the weights before it and its own exceed `wanted`.
  size_t drawn_in(size_t row, size_t start, double wanted) const {
    const size_t num = std::min(kDrawBlock, width_ - start);
    alignas(64) float copy[kDrawBlock], weights[kDrawBlock];
    const float peak = parts_in(row)[start / kLogitsPart].peak;
    const float* scores = scores_.at(row, start, num, copy);
    weigh(row, scores, num, peak, [&](size_t i, Lanes, Lanes lanes) { store(weights + i, lanes); });
    size_t place = 0;
    double sum = 0;
    for (size_t i = 0; i < num && sum <= wanted; i++) {
      if (weights[i] > 0) place = i;
      sum += weights[i];
    }
    return place;
  }

  Scores scores_;
  const Rule* rules_;  // of each row
  size_t num_rows_;
  size_t width_;
  const Draws& draws_;
  size_t num_parts_;
  size_t num_blocks_;
  std::vector<Part> parts_;
  std::vector<Weight> weights_;      // of blocks for draws, in the rows that need them
  std::vector<float> maxima_;        // of blocks of scores, in the rows that draw from the likeliest tokens
  std::vector<float> logit_maxima_;  // of blocks of logits, in the rows whose likeliest tokens are wanted
};

}  // namespace shardstream
