// Attention over paged memory.
//
// A block of 16 places holds, per KV head, a packed matrix of keys (outputs: places, inputs: the head's width) and one
// of values (outputs: the head's width, inputs: places), so scores and weighted sums are both products by `tile`.
// Queries of one KV head's group and of neighbouring tokens are rows of one tile and read keys and values once.
#pragma once

#include "matrix.h"

namespace shardstream {

constexpr size_t kPlaces = 16;  // of a block
constexpr size_t kScoreBytes = 256 * 1024;

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

// One step as attention sees it: rows of packed tokens.
struct Step {
  uint64_t num_tokens;
  uint64_t num_rows;
  const int64_t* positions;  // [num_tokens]
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
};

// Stores a head's key and value at a slot. A key that is not finite does no harm to the next owner of the block, because
// scores of places that are not seen are masked; a value would, because it is multiplied by zero.
template <class Dot>
void remember(const Memory& memory, const Heads& heads, size_t head, size_t slot, const float* key, const float* value) {
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
      // Every other half of the line. A masked store leaves the others alone, which another thread may be writing.
      const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(lanes));
      const __m512i both = _mm512_mullo_epi32(_mm512_cvtepu16_epi32(bits), _mm512_set1_epi32(0x10001));
      _mm512_mask_storeu_epi16(line, place % 2 ? 0xaaaaaaaa : 0x55555555, both);
    } else {
      store(reinterpret_cast<float*>(line), lanes);
    }
  }
}

// Places [first, end) of a row's scores, of which `seen_from` to `seen_to` count, become weights that sum to the result.
template <class Number>
float soften(float* scores, size_t num, size_t seen_from, size_t seen_to) {
  auto mask = [&](size_t i) {
    const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(i)),
                                            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    return _mm512_cmpge_epi32_mask(places, _mm512_set1_epi32(static_cast<int>(seen_from))) &
           _mm512_cmplt_epi32_mask(places, _mm512_set1_epi32(static_cast<int>(seen_to)));
  };
  Lanes largest = fill(-INFINITY);
  for (size_t i = 0; i < num; i += kLanes) largest = _mm512_mask_max_ps(largest, mask(i), largest, load(scores + i));
  const Lanes top = fill(_mm512_reduce_max_ps(largest));
  Lanes sum = _mm512_setzero_ps();
  auto* weights = reinterpret_cast<Number*>(scores);  // no longer than the scores read so far
  for (size_t i = 0; i < num; i += kLanes) {
    const Lanes weight = _mm512_maskz_mov_ps(mask(i), exponential(_mm512_sub_ps(load(scores + i), top)));
    sum = _mm512_add_ps(sum, weight);
    store(weights + i, weight);
  }
  return _mm512_reduce_add_ps(sum);
}

// `queries` are words [KV head][token][group][width], already scaled. Calls write(token, head, index, lanes).
template <class Dot, class Write>
void attend(const Memory& memory, const Heads& heads, const Step& step, size_t window, const typename Dot::Number* queries,
            const Queries& part, std::vector<float>& scratch, std::vector<const Line*>& columns, const Write& write) {
  const size_t group = heads.group(), num_rows = part.count * group, lines = lines_per_head<Dot>(heads.width);
  const size_t row_context = step.contexts[part.row], row_start = step.starts[part.row];
  const size_t row_begin = row_context - (step.starts[part.row + 1] - row_start);  // position of the row's first token
  const size_t first_position = row_begin + part.token - row_start;
  const size_t end_position = first_position + part.count;
  const size_t first_block = window && first_position + 1 > window ? (first_position + 1 - window) / kPlaces : 0;
  const size_t num_blocks = (end_position + kPlaces - 1) / kPlaces - first_block;
  const size_t num_places = num_blocks * kPlaces;
  const int64_t* table = step.tables + part.row * step.table_width + first_block;
  auto head_lines = [&](const Line* from, size_t block) {
    return from + (static_cast<size_t>(table[block]) * heads.key_value + part.head) * lines;
  };

  scratch.resize(num_rows * num_places);
  columns.resize(std::max<size_t>(num_blocks, kMaxColumns * num_blocks));
  const auto* rows = reinterpret_cast<const uint32_t*>(queries) + (part.head * step.num_tokens + part.token) * group * lines;

  // Scores: queries times keys, four blocks at a time.
  for (size_t b = 0; b < num_blocks; b++) columns[b] = head_lines(memory.keys, b);
  alignas(64) float sums[24 * kLanes];
  for (size_t b = 0; b < num_blocks; b += kMaxColumns) {
    const size_t num = std::min(kMaxColumns, num_blocks - b);
    const Line* ahead = columns[std::min(b + num, num_blocks - 1)];
    for (size_t row = 0; row < num_rows;) {
      const size_t count = std::min(max_rows(num), num_rows - row);
      tile_for<Dot>(count, num)({rows + row * lines, lines}, columns.data() + b, 1, lines, ahead, sums);
      for (size_t m = 0; m < count; m++, row++) {
        for (size_t c = 0; c < num; c++) {
          store(&scratch[row * num_places + (b + c) * kPlaces], load(sums + (m * num + c) * kLanes));
        }
      }
    }
  }

  float totals[512];
  for (size_t row = 0; row < num_rows; row++) {
    const size_t position = first_position + row / group, first_place = first_block * kPlaces;
    const size_t seen_from = window && position + 1 > window ? position + 1 - window - first_place : 0;
    totals[row] = soften<typename Dot::Number>(&scratch[row * num_places], num_places, seen_from, position + 1 - first_place);
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
      const size_t count = std::min(max_rows(num), num_rows - row);
      const auto* weights = reinterpret_cast<const uint32_t*>(&scratch[row * num_places]);
      tile_for<Dot>(count, num)({weights, num_places}, columns.data(), num_blocks, kSteps, columns[0], sums);
      for (size_t m = 0; m < count; m++, row++) {
        const Lanes inverse = fill(1.f / totals[row]);
        for (size_t r = 0; r < num; r++) {
          write(part.token + row / group, part.head * group + row % group, (c + r) * kLanes,
                _mm512_mul_ps(load(sums + (m * num + r) * kLanes), inverse));
        }
      }
    }
  }
}

// The step's work in parts of similar size: as many tokens together as have room for their scores.
inline std::vector<Queries> parts_of(const Step& step, const Heads& heads) {
  std::vector<Queries> parts;
  for (size_t row = 0; row < step.num_rows; row++) {
    const size_t start = step.starts[row], stop = step.starts[row + 1];
    const size_t score_bytes = heads.group() * (step.contexts[row] + kPlaces) * sizeof(float);
    const size_t most = std::max<size_t>(1, std::min(kScoreBytes / score_bytes, 24 / heads.group()));
    for (size_t token = start; token < stop; token += most) {
      for (size_t head = 0; head < heads.key_value; head++) {
        parts.push_back({row, head, token, std::min(most, stop - token)});
      }
    }
  }
  return parts;
}

}  // namespace shardstream
