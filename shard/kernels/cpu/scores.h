// What stands in the place of a row's logits where rules change them: by masks, the penalties of tokens that are known,
// and changes of single tokens, in this order.
//
// Nothing is written over the logits: whoever looks at some of a row's scores has a copy of these few made, where a rule
// changes any.
#pragma once

#include <cmath>
#include <cstring>
#include <utility>

#include "logits.h"

namespace shardstream {

// How a row's token is chosen, and what else is asked of it. All doubles, as one row of a tensor.
struct Rule {
  double temperature;  // 0: the largest score is taken
  double top_k;        // a whole number; 0: off
  double top_p;        // 1: off
  double min_p;        // 0: off
  double typical_p;    // 1: off
  double repetition;   // 1: off
  double frequency;    // 0: off
  double presence;     // 0: off
  double forbids;      // 0: off; 1: all tokens that are known
  double num_top;      // a whole number: how many of the likeliest tokens are wanted too

  bool draws() const { return temperature > 0; }
  bool cuts() const { return draws() && (top_k > 0 || top_p < 1 || min_p > 0 || typical_p < 1); }
  bool counts() const { return frequency != 0 || presence != 0; }
  bool penalises() const { return repetition != 1 || counts() || forbids; }

  // Whether typical-p is of the whole vocabulary.
  bool is_typical_alone() const { return typical_p < 1 && !top_k && top_p >= 1 && !min_p; }

  // Whether the limits are fractions of the mass of the whole vocabulary.
  bool need_mass() const { return cuts() && !top_k && (top_p < 1 || is_typical_alone()); }
};

// Adds one number to all tokens of a row whose bit is set, and another to all others.
struct Mask {
  double row;
  double if_set;
  double if_unset;
};

struct Change {
  double row;
  double token;
  double added;  // minus infinity: the token is forbidden
};

struct ScoreRules {
  const Rule* rules;         // of each row
  const int64_t* seats;      // of each row, for those that penalise
  uint8_t* known;            // [seats, width]: 1 for tokens that a sequence has
  int32_t* counts;           // [seats, width]: how often it has generated them
  const Mask* masks;
  const uint32_t* mask_bits;  // of each mask a bit per token
  uint64_t mask_stride;      // in words
  uint64_t num_masks;
  const Change* biases;      // by row, then by token
  uint64_t num_biases;
  const Change* forbidden;   // likewise; what is added last
  uint64_t num_forbidden;
};

class Scores {
 public:
  Scores(const float* logits, size_t width, const ScoreRules& rules) : logits_(logits), width_(width), rules_(rules) {}

  const float* logits(size_t row) const { return logits_ + row * width_; }

  // Of a row from `start`, a multiple of kLogitsBlock, on: its logits themselves, or a copy where any differs.
  const float* at(size_t row, size_t start, size_t size, float* copy) const {
    Part part{masked(row, start, size, copy), start, size, copy};
    if (rules_.rules[row].penalises()) penalise(part, row);
    change(part, row, rules_.biases, rules_.num_biases);
    change(part, row, rules_.forbidden, rules_.num_forbidden);
    return part.scores;
  }

  // As `at`, but by masks alone.
  const float* masked(size_t row, size_t start, size_t size, float* copy) const {
    Part part{logits(row) + start, start, size, copy};
    for (size_t i = 0; i < rules_.num_masks; i++) {
      if (static_cast<size_t>(rules_.masks[i].row) == row) mask(part, i);
    }
    return part.scores;
  }

  // From now on the row's sequence has this token.
  void note(size_t row, size_t token) const {
    if (!rules_.rules[row].penalises()) return;
    const size_t place = place_of(row) + token;
    rules_.known[place] = 1;
    if (rules_.rules[row].counts()) rules_.counts[place]++;
  }

 private:
  struct Part {
    const float* scores;
    size_t start;
    size_t size;
    float* copy;

    float* changed() {
      if (scores != copy) std::copy_n(scores, size, copy);
      scores = copy;
      return copy;
    }
  };

  size_t place_of(size_t row) const { return static_cast<size_t>(rules_.seats[row]) * width_; }

  void mask(Part& part, size_t index) const {
    const float if_set = static_cast<float>(rules_.masks[index].if_set);
    const float if_unset = static_cast<float>(rules_.masks[index].if_unset);
    const uint32_t* words = rules_.mask_bits + index * rules_.mask_stride + part.start / 32;
    for (size_t i = 0; i < part.size; i += 32) {
      const uint32_t word = words[i / 32];
      if ((word == 0 && if_unset == 0) || (word == ~0u && if_set == 0)) continue;
      float* scores = part.changed() + i;
      const size_t num = std::min<size_t>(32, part.size - i);
      for (size_t bit = 0; bit < num; bit++) scores[bit] += word >> bit & 1 ? if_set : if_unset;
    }
  }

  void penalise(Part& part, size_t row) const {
    const Rule& rule = rules_.rules[row];
    const uint8_t* known = rules_.known + place_of(row) + part.start;
    const auto next = [&](size_t i) { return static_cast<const uint8_t*>(std::memchr(known + i, 1, part.size - i)); };
    for (const uint8_t* found = next(0); found; found = next(static_cast<size_t>(found - known) + 1)) {
      const size_t place = static_cast<size_t>(found - known);
      float& score = part.changed()[place];
      score = rule.forbids ? -INFINITY : repeated(score, rule);
      if (rule.counts()) score = counted(score, rules_.counts[place_of(row) + part.start + place], rule);
    }
  }

  // As `shard.processors.penalise_repetition`.
  static float repeated(float score, const Rule& rule) {
    const float penalty = static_cast<float>(rule.repetition);
    return score < 0 ? product(score, penalty) : score / penalty;
  }

  // As `shard.processors.penalise_counts`.
  static float counted(float score, int32_t count, const Rule& rule) {
    if (count == 0) return score;
    score -= product(static_cast<float>(count), static_cast<float>(rule.frequency));
    return score - static_cast<float>(rule.presence);
  }

  // Rounded before it is taken off anything, as torch's: a compiler that may would fuse the two.
  static float product(float x, float y) {
    const volatile float rounded = x * y;
    return rounded;
  }

  static void change(Part& part, size_t row, const Change* changes, size_t num) {
    const auto place_of = [](const Change& change) { return std::make_pair(change.row, change.token); };
    const auto precedes = [&](const Change& change, const auto& place) { return place_of(change) < place; };
    const auto place_at = [&](size_t token) { return std::make_pair(double(row), double(token)); };
    const Change* first = std::lower_bound(changes, changes + num, place_at(part.start), precedes);
    for (; first < changes + num && place_of(*first) < place_at(part.start + part.size); first++) {
      part.changed()[static_cast<size_t>(first->token) - part.start] += static_cast<float>(first->added);
    }
  }

  const float* logits_;
  size_t width_;
  const ScoreRules& rules_;
};

}  // namespace shardstream
