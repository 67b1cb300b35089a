// Attention over paged memory.
//
// A block of 16 places holds, per KV head, a packed matrix of keys (outputs: places, inputs: the head's width) and one
// of values (outputs: the head's width, inputs: places), so scores and weighted sums are both products by `tile`.
// Queries of one KV head's group and of neighbouring tokens are rows of one tile and read keys and values once.
#pragma once

#include <vector>

#include "matrix.h"

namespace shardstream {

constexpr size_t kPlaces = 16;  // of a block
constexpr size_t kSegmentBlocks = 16;  // seen at once, so that scores stay in a processor's first cache
constexpr size_t kPartRows = 24;       // queries' rows that are attended to together

// One layer's memory. Blocks follow each other; in a block, KV heads do.
struct Memory {
  Line* keys;
  Line* values;
};

struct Heads {
  size_t query;
  size_t key_value;
  size_t width;  // of one head, a multiple of 16

  size_t group() const { return query / key_value; }
};

// Lines of one KV head in one block.
template <class Dot>
constexpr size_t lines_per_head(size_t width) {
  return width / Dot::kPerWord;
}

// How a layer attends.
struct Options {
  double scaling;      // of queries
  double softcap;      // scores are squeezed to within plus and minus this; 0 for no limit
  uint64_t window;     // places a query sees, its own included; 0 for all before it
  const float* sinks;  // [query heads] a logit each that takes part in the softmax and adds nothing; null for none
};

// One step as attention sees it: rows of packed tokens.
struct Step {
  uint64_t num_tokens;
  uint64_t num_rows;
  const int64_t* positions;  // [num_tokens]; null where nobody asks
  const int64_t* slots;      // [num_tokens]
  const int64_t* starts;     // [num_rows + 1] each row's first token
  const int64_t* contexts;   // [num_rows] tokens of its sequence, this step's included
  const int64_t* tables;     // [num_rows, table_width] block ids
  uint64_t table_width;
};

// Some neighbouring queries of one row, for one KV head.
struct Queries {
  size_t row;
  size_t head;   // KV head
  size_t token;  // the first, of the step
  size_t count;  // tokens
  size_t num_segments;
  size_t first_partial;  // of its results in `Shares::partials`

  // Of one of its rows [token, group].
  size_t query_head(size_t row, const Heads& heads) const { return head * heads.group() + row % heads.group(); }
};

// What queries found in segments of their keys, still to be joined.
struct Partials {
  std::vector<float> numbers;  // [num, head width]
  std::vector<Mass> masses;    // [num]

  void resize(size_t num, size_t width) {
    numbers.resize(num * width);
    masses.resize(num);
  }
};

// A step's work as parts of similar size, and as segments of these where there are too few parts for the threads.
struct Shares {
  struct Segment {
    size_t part;
    size_t index;
  };
  std::vector<Queries> parts;
  std::vector<Segment> segments;  // empty: threads take whole parts
  Partials partials;
};

// Stores a head's key and value at a slot. A key that is not finite does no harm to the next owner of the block, because
// scores of places that are not seen are masked; a value would, because it is multiplied by zero.
template <class Dot, class Number>
void remember(const Memory& memory, const Heads& heads, size_t head, size_t slot, const Number* key, const Number* value) {
  const size_t lines = lines_per_head<Dot>(heads.width);
  const size_t first = (slot / kPlaces * heads.key_value + head) * lines;
  const size_t place = slot % kPlaces;
  alignas(64) typename Dot::Number numbers[256];
  for (size_t d = 0; d < heads.width; d += kLanes) store(numbers + d, load(key + d));
  const auto* words = reinterpret_cast<const uint32_t*>(numbers);
  for (size_t line = 0; line < lines; line++) memory.keys[first + line].words[place] = words[line];

  constexpr size_t kSteps = kPlaces / Dot::kPerWord;
  for (size_t d = 0; d < heads.width; d += kLanes) {
    Line* line = memory.values + first + d / kLanes * kSteps + place / Dot::kPerWord;
    const Lanes lanes = finite(load(value + d));
    if constexpr (std::is_same_v<Dot, BFloat16>) {
      store_alternately(reinterpret_cast<bfloat16*>(line), lanes, place % 2);
    } else {
      store(reinterpret_cast<float*>(line), lanes);
    }
  }
}

inline void squeeze(float* scores, size_t num, float softcap) {
  const Lanes most = fill(softcap), inverse = fill(1.f / softcap);
  for (size_t i = 0; i < num; i += kLanes) store(scores + i, most * hyperbolic_tangent(load(scores + i) * inverse));
}

// `num` scores, of which those from `seen_from` to `seen_to` count, become weights of that mass.
template <class Number>
Mass soften(float* scores, size_t num, size_t seen_from, size_t seen_to) {
  const auto seen = [&](size_t i, Lanes lanes, float other) {
    if (seen_from <= i && i + kLanes <= seen_to) return lanes;
    return within(lanes, static_cast<int>(seen_from) - static_cast<int>(i), static_cast<int>(seen_to) - static_cast<int>(i), other);
  };
  Lanes largest = fill(-INFINITY);
  for (size_t i = 0; i < num; i += kLanes) largest = max(largest, seen(i, load(scores + i), -INFINITY));
  const float peak = largest_of(largest);
  Lanes sum = fill(0);
  auto* weights = reinterpret_cast<Number*>(scores);  // no longer than the scores read so far
  for (size_t i = 0; i < num; i += kLanes) {
    const Lanes weight = seen(i, exponential(load(scores + i) - fill(peak)), 0);
    sum = sum + weight;
    store(weights + i, weight);
  }
  return {peak, sum_of(sum)};
}

// What a query's weights are divided by.
inline float total_of(Mass mass, const Options& options, size_t query_head) {
  return options.sinks ? mass.sum + std::exp(options.sinks[query_head] - mass.peak) : mass.sum;
}

// `queries` are words [KV head][token][group][width], already scaled. For rows [part's tokens, group] calls
// write(row, index, lanes) with what they find in one segment of the keys, divided by what total(row, mass) returned.
template <class Dot, class Write, class Total>
void attend(const Memory& memory, const Heads& heads, const Step& step, const Options& options,
            const typename Dot::Number* queries, const Queries& part, size_t segment, const Write& write,
            const Total& total) {
  thread_local std::vector<float> scratch;
  thread_local std::vector<const Line*> columns;
  const size_t group = heads.group(), num_rows = part.count * group, lines = lines_per_head<Dot>(heads.width);
  const size_t window = options.window;
  const size_t row_context = step.contexts[part.row], row_start = step.starts[part.row];
  const size_t row_begin = row_context - (step.starts[part.row + 1] - row_start);  // position of the row's first token
  const size_t first_position = row_begin + part.token - row_start;
  const size_t end_position = first_position + part.count;
  const size_t first_seen = window && first_position + 1 > window ? (first_position + 1 - window) / kPlaces : 0;
  const size_t first_block = std::max(first_seen, segment * kSegmentBlocks);
  const size_t end_block = std::min((end_position + kPlaces - 1) / kPlaces, (segment + 1) * kSegmentBlocks);
  const size_t num_blocks = std::max(end_block, first_block) - first_block;
  const size_t num_places = num_blocks * kPlaces;
  const int64_t* table = step.tables + part.row * step.table_width + first_block;
  auto head_lines = [&](const Line* from, size_t block) {
    return from + (static_cast<size_t>(table[block]) * heads.key_value + part.head) * lines;
  };

  scratch.resize(num_rows * num_places + num_rows);
  columns.resize(std::max<size_t>(1, kMaxColumns * num_blocks));
  const auto* rows = reinterpret_cast<const uint32_t*>(queries) + (part.head * step.num_tokens + part.token) * group * lines;

  // Scores: queries times keys, four blocks at a time.
  for (size_t b = 0; b < num_blocks; b++) columns[b] = head_lines(memory.keys, b);
  alignas(64) float sums[kTileSums];
  for (size_t b = 0; b < num_blocks; b += kMaxColumns) {
    const size_t num = std::min(kMaxColumns, num_blocks - b);
    const Line* ahead = columns[std::min(b + num, num_blocks - 1)];
    for (size_t row = 0; row < num_rows;) {
      const size_t count = std::min(Dot::max_rows(num), num_rows - row);
      tile_for<Dot>(count, num)({rows + row * lines, lines}, columns.data() + b, 1, lines, ahead, sums);
      for (size_t m = 0; m < count; m++, row++) {
        for (size_t c = 0; c < num; c++) {
          store(&scratch[row * num_places + (b + c) * kPlaces], load(sums + (m * num + c) * kLanes));
        }
      }
    }
  }

  float* inverses = &scratch[num_rows * num_places];
  for (size_t row = 0; row < num_rows; row++) {
    const size_t end = first_position + row / group + 1, first_place = first_block * kPlaces;
    const auto from_here = [&](size_t place) { return std::min(num_places, std::max(place, first_place) - first_place); };
    float* scores = &scratch[row * num_places];
    if (options.softcap > 0) squeeze(scores, num_places, static_cast<float>(options.softcap));
    const Mass mass = soften<typename Dot::Number>(scores, num_places,
                                                   from_here(window && end > window ? end - window : 0), from_here(end));
    const float divisor = total(row, mass);
    inverses[row] = divisor > 0 ? 1.f / divisor : 0;
  }

  // Weights times values, four times 16 of the head's width at a time.
  constexpr size_t kSteps = kPlaces / Dot::kPerWord;
  const size_t num_columns = heads.width / kLanes;
  for (size_t c = 0; c < num_columns; c += kMaxColumns) {
    const size_t num = std::min(kMaxColumns, num_columns - c);
    for (size_t b = 0; b < num_blocks; b++) {
      const Line* at = head_lines(memory.values, b) + c * kSteps;
      for (size_t r = 0; r < num; r++) columns[b * num + r] = at + r * kSteps;
    }
    for (size_t row = 0; row < num_rows;) {
      const size_t count = std::min(Dot::max_rows(num), num_rows - row);
      const auto* weights = reinterpret_cast<const uint32_t*>(&scratch[row * num_places]);
      tile_for<Dot>(count, num)({weights, num_places}, columns.data(), num_blocks, kSteps, columns[0], sums);
      for (size_t m = 0; m < count; m++, row++) {
        const Lanes inverse = fill(inverses[row]);
        for (size_t r = 0; r < num; r++) write(row, (c + r) * kLanes, load(sums + (m * num + r) * kLanes) * inverse);
      }
    }
  }
}

// Joins what a part's rows found in its segments, and calls put(row, index, lanes).
template <class Put>
void join(Partials& partials, const Queries& part, const Heads& heads, const Options& options, const Put& put) {
  const size_t num_rows = part.count * heads.group();
  for (size_t row = 0; row < num_rows; row++) {
    const auto at = [&](size_t segment) { return part.first_partial + segment * num_rows + row; };
    float peak = -INFINITY, total = 0;
    for (size_t s = 0; s < part.num_segments; s++) peak = std::max(peak, partials.masses[at(s)].peak);
    for (size_t s = 0; s < part.num_segments; s++) {
      Mass& mass = partials.masses[at(s)];
      mass = {peak, mass.sum * std::exp(mass.peak - peak)};
      total += mass.sum;
    }
    total = total_of({peak, total}, options, part.query_head(row, heads));
    for (size_t i = 0; i < heads.width; i += kLanes) {
      Lanes sum = fill(0);
      for (size_t s = 0; s < part.num_segments; s++) {
        sum = multiply_add(load(&partials.numbers[at(s) * heads.width + i]), fill(partials.masses[at(s)].sum / total), sum);
      }
      put(row, i, sum);
    }
  }
}

// All parts of a step. Calls put(token, head, index, lanes).
//
// A row's result does not depend on who shares the step with it: the same segments, which begin at fixed places, are
// joined in the same order whether one thread takes all of a part or several do.
template <class Dot, class Put>
void attend_all(Threads& threads, const Memory& memory, const Heads& heads, const Step& step, const Options& options,
                const typename Dot::Number* queries, Shares& shares, const Put& put) {
  const size_t group = heads.group();
  const auto put_rows_of = [&](const Queries& part) {
    return [&, part](size_t row, size_t i, Lanes lanes) {
      put(part.token + row / group, part.query_head(row, heads), i, lanes);
    };
  };
  const auto attend_segment = [&](const Queries& part, size_t segment, Partials& to) {
    const size_t first = part.first_partial + segment * part.count * group;
    attend<Dot>(
        memory, heads, step, options, queries, part, segment,
        [&](size_t row, size_t i, Lanes lanes) { store(&to.numbers[(first + row) * heads.width + i], lanes); },
        [&](size_t row, Mass mass) {
          to.masses[first + row] = mass;
          return mass.sum;
        });
  };
  if (!shares.segments.empty()) {
    threads.each(shares.segments.size(), [&](size_t index) {
      const Shares::Segment segment = shares.segments[index];
      attend_segment(shares.parts[segment.part], segment.index, shares.partials);
    });
    for (const Queries& part : shares.parts) join(shares.partials, part, heads, options, put_rows_of(part));
    return;
  }
  threads.each(shares.parts.size(), [&](size_t index) {
    Queries part = shares.parts[index];
    if (part.num_segments == 1) {
      attend<Dot>(memory, heads, step, options, queries, part, 0, put_rows_of(part),
                  [&](size_t row, Mass mass) { return total_of(mass, options, part.query_head(row, heads)); });
      return;
    }
    thread_local Partials partials;
    part.first_partial = 0;
    partials.resize(part.num_segments * part.count * group, heads.width);
    for (size_t s = 0; s < part.num_segments; s++) attend_segment(part, s, partials);
    join(partials, part, heads, options, put_rows_of(part));
  });
}

// Divides a step among so many threads: as many tokens together as fill the tiles.
inline void divide(Shares& shares, const Step& step, const Heads& heads, size_t num_threads) {
  const size_t most = std::max<size_t>(1, kPartRows / heads.group());
  size_t num_partials = 0, num_rows = 0;
  shares.parts.clear();
  shares.segments.clear();
  for (size_t row = 0; row < step.num_rows; row++) {
    const size_t start = step.starts[row], stop = step.starts[row + 1];
    for (size_t token = start; token < stop; token += most) {
      const size_t count = std::min(most, stop - token);
      const size_t end = step.contexts[row] - (stop - token - count);  // places up to the last of these tokens
      const size_t num_segments = (end + kSegmentBlocks * kPlaces - 1) / (kSegmentBlocks * kPlaces);
      for (size_t head = 0; head < heads.key_value; head++) {
        shares.parts.push_back({row, head, token, count, num_segments, num_partials});
        num_partials += num_segments * count * heads.group();
        num_rows += count * heads.group();
      }
    }
  }
  const bool is_enough = num_threads == 1 || shares.parts.size() >= 4 * num_threads;
  if (is_enough || num_partials == num_rows) return;
  for (size_t part = 0; part < shares.parts.size(); part++) {
    for (size_t s = 0; s < shares.parts[part].num_segments; s++) shares.segments.push_back({part, s});
  }
  shares.partials.resize(num_partials, heads.width);
}

}  // namespace shardstream
