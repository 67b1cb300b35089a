// What `shard.kernels.native` calls. Plain functions over plain memory: no Python, no torch.

#include "choice.h"
#include "decoder.h"

using namespace shardstream;

namespace {

enum Kind : int64_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kInt4 = 3 };

// A decoder of whichever kind.
struct AnyDecoder {
  virtual ~AnyDecoder() = default;
  virtual int run(const Step& step, const Memory* memory, void* hidden) = 0;
};

template <class Dot, class Attend>
struct DecoderOf : AnyDecoder {
  Decoder<Dot, Attend> decoder;
  DecoderOf(const Model& model, Threads& threads, Peers* peers) : decoder(model, threads, peers) {}
  int run(const Step& step, const Memory* memory, void* hidden) override {
    return decoder.run(step, memory, static_cast<typename Attend::Number*>(hidden));
  }
};

// `x` [num_rows, width] Number -> `out` [num_rows, num_outputs] float32.
template <class Dot, class Number>
void linear(Threads& threads, const Matrix& matrix, const Number* x, size_t num_rows, size_t width, size_t num_outputs,
            float* out) {
  std::vector<typename Dot::Number> numbers(num_rows * width + 64);
  const size_t num_groups = num_rows * groups_in<Dot>(width);
  std::vector<float> scales(num_groups);
  std::vector<int32_t> sums(num_groups);
  const RowsBuffer<Dot> operand{numbers.data(), width, scales.data(), sums.data()};
  for (size_t row = 0; row < num_rows; row++) operand.write(row, [&](size_t i) { return load(x + row * width + i); });
  multiply<Dot, 1>(threads, matrix, operand, num_rows, [&](size_t row, size_t block, Lanes lanes) {
    const size_t left = num_outputs - block * kLanes;
    float* to = out + row * num_outputs + block * kLanes;
    if (left >= kLanes) store(to, lanes);
    else store_some(to, lanes, left);
  });
}

// Everything is [num_tokens, heads, head width] of the memory's numbers.
template <class Dot, class Number = typename Dot::Number>
void attention(Threads& threads, const Memory& memory, const Heads& heads, const Step& step, const Options& options,
               const Number* query, const Number* key, const Number* value, Number* out) {
  constexpr size_t kTogether = 8;  // tokens
  thread_local std::vector<Number> queries;
  const size_t group = heads.group(), num = step.num_tokens;
  const Lanes scaling = fill(static_cast<float>(options.scaling));
  queries.resize(num * heads.query * heads.width);
  Number* scaled = queries.data();  // [KV head, token, group, head width]
  const auto place = [&](size_t token) {
    for (size_t h = 0; h < heads.query; h++) {
      const Number* from = query + (token * heads.query + h) * heads.width;
      Number* to = scaled + ((h / group * num + token) * group + h % group) * heads.width;
      for (size_t d = 0; d < heads.width; d += kLanes) store(to + d, load(from + d) * scaling);
    }
    for (size_t h = 0; h < heads.key_value; h++) {
      const size_t at = (token * heads.key_value + h) * heads.width;
      remember<Dot>(memory, heads, h, step.slots[token], key + at, value + at);
    }
  };
  threads.each((num + kTogether - 1) / kTogether, [&](size_t part) {
    for (size_t token = part * kTogether; token < std::min(num, (part + 1) * kTogether); token++) place(token);
  });
  Shares shares;
  divide(shares, step, heads, threads.count());
  attend_all<Dot>(threads, memory, heads, step, options, scaled, shares,
                  [&](size_t token, size_t head, size_t i, Lanes lanes) {
                    store(out + (token * heads.query + head) * heads.width + i, lanes);
                  });
}

}  // namespace

#pragma GCC visibility push(default)

extern "C" {

// Whether matrices of 8 and 4 bits can be multiplied.
int shardstream_has_bytes() {
#ifdef SHARDSTREAM_BYTES
  return 1;
#else
  return 0;
#endif
}

Threads* shardstream_threads(uint64_t count) { return new Threads(count); }

void shardstream_end_threads(Threads* threads) { delete threads; }

void* shardstream_decoder(const Model* model, int64_t kind, Threads* threads, Peers* peers) {
  AnyDecoder* decoder;  // none for a kind this library does not know
  switch (kind) {
    case kFloat32: decoder = new DecoderOf<Float32, Float32>(*model, *threads, peers); break;
    case kBFloat16: decoder = new DecoderOf<BFloat16, BFloat16>(*model, *threads, peers); break;
#ifdef SHARDSTREAM_BYTES
    case kInt8: decoder = new DecoderOf<Int8, BFloat16>(*model, *threads, peers); break;
    case kInt4: decoder = new DecoderOf<Int4, BFloat16>(*model, *threads, peers); break;
#endif
    default: decoder = nullptr;
  }
  return decoder;
}

void shardstream_end_decoder(void* decoder) { delete static_cast<AnyDecoder*>(decoder); }

int shardstream_decode(void* decoder, const Step* step, const Memory* memory, void* hidden) {
  return static_cast<AnyDecoder*>(decoder)->run(*step, memory, hidden);
}

// `from_bfloat16`: whether `x` holds bfloat16 and not float32 numbers.
void shardstream_linear(Threads* threads, int64_t kind, const Matrix* matrix, const void* x, int64_t from_bfloat16,
                        uint64_t num_rows, uint64_t width, uint64_t num_outputs, float* out) {
  const auto* floats = static_cast<const float*>(x);
  const auto* halves = static_cast<const bfloat16*>(x);
  const auto multiply_as = [&](auto dot) {
    using Dot = decltype(dot);
    if (from_bfloat16) linear<Dot>(*threads, *matrix, halves, num_rows, width, num_outputs, out);
    else linear<Dot>(*threads, *matrix, floats, num_rows, width, num_outputs, out);
  };
  if (kind == kFloat32) multiply_as(Float32{});
  else if (kind == kBFloat16) multiply_as(BFloat16{});
#ifdef SHARDSTREAM_BYTES
  else if (kind == kInt8) multiply_as(Int8{});
  else if (kind == kInt4) multiply_as(Int4{});
#endif
}

void shardstream_attention(Threads* threads, int64_t kind, const Memory* memory, const Heads* heads, const Step* step,
                           const Options* options, const void* query, const void* key, const void* value, void* out) {
  const auto attend_as = [&](auto dot) {
    using Number = typename decltype(dot)::Number;
    attention<decltype(dot)>(*threads, *memory, *heads, *step, *options, static_cast<const Number*>(query),
                             static_cast<const Number*>(key), static_cast<const Number*>(value), static_cast<Number*>(out));
  };
  if (kind == kFloat32) attend_as(Float32{});
  else attend_as(BFloat16{});
}

void shardstream_block_maxima(Threads* threads, const float* logits, uint64_t num_rows, uint64_t width, float* maxima) {
  block_maxima(*threads, logits, num_rows, width, maxima);
}

void shardstream_log_sums(Threads* threads, const float* logits, uint64_t num_rows, uint64_t width, float* peaks,
                          float* log_sums) {
  log_sums_of(*threads, logits, num_rows, width, peaks, log_sums);
}

void shardstream_choose(Threads* threads, const float* logits, uint64_t num_rows, uint64_t width, const ScoreRules* rules,
                        const Draws* draws, const Choice* choice) {
  Chooser(logits, num_rows, width, *rules, *draws).choose(*threads, *choice);
}

int shardstream_choose_together(Threads* threads, Peers* peers, uint64_t first, const float* logits, uint64_t num_rows,
                                uint64_t width, const ScoreRules* rules, const Draws* draws, const Choice* choice) {
  return Chooser(logits, num_rows, width, *rules, *draws).choose_together(*threads, *peers, first, *choice);
}

Peers* shardstream_peers(const char* path, uint64_t rank, uint64_t count, uint64_t slot_bytes, double timeout_s) {
  return join_peers(path, rank, count, slot_bytes, timeout_s);
}

void shardstream_leave_peers(Peers* peers) { delete peers; }

int shardstream_sum(Peers* peers, float* numbers, uint64_t num) { return peers->sum(numbers, num); }

int shardstream_gather(Peers* peers, const char* from, uint64_t num_bytes, char* to) {
  return peers->gather(from, num_bytes, to);
}

int shardstream_look_up(Peers* peers, const char* table, const int64_t* starts, uint64_t row_bytes, const int64_t* rows,
                        uint64_t num, char* to) {
  return peers->look_up(table, starts, row_bytes, rows, num, to);
}

int shardstream_join_rows(Peers* peers, const char* from, const uint64_t* widths, uint64_t num_rows, char* to) {
  return peers->join_rows(from, widths, num_rows, to);
}

}  // extern "C"

#pragma GCC visibility pop
