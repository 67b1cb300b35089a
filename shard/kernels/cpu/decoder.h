// The decoder layers of one step, from embeddings to normed hidden states, without coming back in between.
//
//     normed -> queries, keys, values -> rotated, remembered -> attended -> projected -> added to the stream
//     normed -> gate and up -> activated -> projected down -> added to the stream
//
// The stream and whatever is added to it are float32 in every kind of model; only what is multiplied is smaller.
// The structs here are `shard.kernels.native`'s, field by field.
#pragma once

#include <stdexcept>

#include "attention.h"
#include "peers.h"

namespace shardstream {

enum Activation : int64_t { kSilu = 0, kGeluTanh = 1 };

struct Rotation {
  const float* frequencies;  // [num]: the first 2 * num numbers of a head are rotated
  uint64_t num;
  float factor;
  float unused;
};

struct Layer {
  Matrix query_key_value;
  Matrix output;
  Matrix gate_up;  // blocks of 16 gates and 16 ups take turns
  Matrix down;
  // Weights of RMS norms as float32; null where the layer has none.
  const float* before_attention;  // [width]
  const float* after_attention;   // [width]
  const float* before_mlp;        // [width]
  const float* after_mlp;         // [width]
  const float* of_query;          // [head width]
  const float* of_key;            // [head width]
  int64_t rotation;               // index; -1 for none
  int64_t window;                 // places a query sees; 0 for all
  double scaling;
};

struct Model {
  uint64_t num_layers;
  const Layer* layers;
  const Rotation* rotations;
  uint64_t num_rotations;
  const float* last_norm;  // [width]
  uint64_t width;
  Heads heads;
  uint64_t inner_width;  // of the MLP, padded
  int64_t activation;
  double epsilon;
  double residual_factor;
  double embedding_factor;
};

// Grows and is never given back: a step's largest wish is soon known.
template <class T>
class Scratch {
 public:
  ~Scratch() { free(memory_); }
  T* of(size_t num) {
    if (num > capacity_) {
      free(memory_);
      capacity_ = num + num / 4;
      memory_ = static_cast<T*>(aligned_alloc(64, (capacity_ * sizeof(T) + 127) & ~size_t{63}));
      if (!memory_) throw std::bad_alloc();
    }
    return memory_;
  }

 private:
  T* memory_ = nullptr;
  size_t capacity_ = 0;
};

// Dot multiplies weights, Attend keys and values; activations come and go as Outer numbers.
template <class Dot, class Attend>
class Decoder {
 public:
  using Outer = typename Attend::Number;

  Decoder(const Model& model, Threads& threads, Peers* peers) : model_(model), threads_(threads), peers_(peers) {}

  // `hidden` [num_tokens, width]: embeddings in, normed hidden states out. Returns a PeerFault.
  int run(const Step& step, const Memory* memory, Outer* hidden) {
    begin(step, hidden);
    for (size_t i = 0; i < model_.num_layers; i++) {
      const Layer& layer = model_.layers[i];
      attention(layer, memory[i], step);
      if (fault_) return fault_;
      mlp(layer, step.num_tokens);
      if (fault_) return fault_;
    }
    each_token(step.num_tokens, [&](size_t token) {
      Outer* to = hidden + token * model_.width;
      norm(stream_ + token * model_.width, model_.width, model_.last_norm, [&](size_t i, Lanes lanes) { store(to + i, lanes); });
    });
    return kNone;
  }

 private:
  static constexpr bool kQuantized = Dot::kGroup != 0;

  void begin(const Step& step, const Outer* hidden) {
    const size_t num = step.num_tokens, width = model_.width, heads_width = model_.heads.query * model_.heads.width;
    const size_t widest = std::max({width, heads_width, static_cast<size_t>(model_.inner_width)});
    stream_ = stream_memory_.of(num * width);
    projected_ = projected_memory_.of(num * (heads_width + 2 * model_.heads.key_value * model_.heads.width));
    added_ = added_memory_.of(num * width);
    queries_ = queries_memory_.of(num * heads_width);
    operand_ = operand_memory_.of(num * widest);
    if constexpr (kQuantized) {
      exact_ = exact_memory_.of(num * widest);
      scales_ = scales_memory_.of(num * groups_in<Dot>(widest));
      sums_ = sums_memory_.of(num * groups_in<Dot>(widest));
    }
    each_token(num, [&](size_t token) {
      const size_t at = token * width;
      const Lanes factor = fill(static_cast<float>(model_.embedding_factor));
      for (size_t i = 0; i < width; i += kLanes) store(stream_ + at + i, load(hidden + at + i) * factor);
    });
    rotate_ahead(step);
    divide(shares_, step, model_.heads, threads_.count());
  }

  // Cosines and sines of every token's angles, per rotation [num_tokens, 2, num].
  void rotate_ahead(const Step& step) {
    size_t total = 0;
    for (size_t r = 0; r < model_.num_rotations; r++) total += 2 * model_.rotations[r].num * step.num_tokens;
    float* at = angles_memory_.of(total);
    angles_.clear();
    for (size_t r = 0; r < model_.num_rotations; r++) {
      const Rotation& rotation = model_.rotations[r];
      angles_.push_back(at);
      each_token(step.num_tokens, [&, at](size_t token) {
        float* cosines = at + 2 * rotation.num * token;
        for (size_t i = 0; i < rotation.num; i++) {
          const float angle = static_cast<float>(step.positions[token]) * rotation.frequencies[i];
          cosines[i] = std::cos(angle) * rotation.factor;
          cosines[rotation.num + i] = std::sin(angle) * rotation.factor;
        }
      });
      at += 2 * rotation.num * step.num_tokens;
    }
  }

  void attention(const Layer& layer, const Memory& memory, const Step& step) {
    const Heads& heads = model_.heads;
    const size_t num = step.num_tokens, projected_width = (heads.query + 2 * heads.key_value) * heads.width;
    const RowsBuffer<Dot> normed{operand_, model_.width, scales_, sums_};
    norm_rows(layer.before_attention, normed, num);
    multiply<Dot, 1>(threads_, layer.query_key_value, normed, num, [&](size_t row, size_t block, Lanes lanes) {
      store(projected_ + row * projected_width + block * kLanes, lanes);
    });
    each_token(num, [&](size_t token) { place(layer, memory, step, token); });

    const RowsBuffer<Dot> attended{operand_, heads.query * heads.width, scales_, sums_};
    attend_all<Attend>(threads_, memory, heads, step, layer.window, queries_, shares_,
                       [&](size_t token, size_t head, size_t i, Lanes lanes) {
                         const size_t at = token * attended.width + head * heads.width + i;
                         if constexpr (kQuantized) store(exact_ + at, lanes);
                         else store(operand_ + at, lanes);
                       });
    project(layer.output, attended, layer.after_attention, num);
  }

  // One token's queries, normed, rotated and scaled; its keys and values into memory.
  void place(const Layer& layer, const Memory& memory, const Step& step, size_t token) {
    const Heads& heads = model_.heads;
    const size_t group = heads.group();
    float* head = projected_ + token * (heads.query + 2 * heads.key_value) * heads.width;
    const Lanes scaling = fill(static_cast<float>(layer.scaling));
    for (size_t h = 0; h < heads.query; h++, head += heads.width) {
      turn(layer, layer.of_query, token, head);
      Outer* to = queries_ + ((h / group * step.num_tokens + token) * group + h % group) * heads.width;
      for (size_t d = 0; d < heads.width; d += kLanes) store(to + d, load(head + d) * scaling);
    }
    for (size_t h = 0; h < heads.key_value; h++, head += heads.width) {
      turn(layer, layer.of_key, token, head);
      remember<Attend>(memory, heads, h, step.slots[token], head, head + heads.key_value * heads.width);
    }
  }

  void turn(const Layer& layer, const float* weight, size_t token, float* head) {
    if (weight) norm(head, model_.heads.width, weight, [&](size_t i, Lanes lanes) { store(head + i, lanes); });
    if (layer.rotation < 0) return;
    const size_t num = model_.rotations[layer.rotation].num;
    const float* cosines = angles_[layer.rotation] + 2 * num * token;
    const float* sines = cosines + num;
    float* __restrict first = head;
    float* __restrict second = head + num;
    for (size_t i = 0; i < num; i++) {
      const float x = first[i], y = second[i];
      first[i] = x * cosines[i] - y * sines[i];
      second[i] = y * cosines[i] + x * sines[i];
    }
  }

  void mlp(const Layer& layer, size_t num) {
    const RowsBuffer<Dot> normed{operand_, model_.width, scales_, sums_};
    norm_rows(layer.before_mlp, normed, num);
    // Activations go where no thread still reads its operand.
    auto* activated_numbers = activated_memory_.of(num * model_.inner_width);
    multiply<Dot, 2>(threads_, layer.gate_up, normed, num, [&](size_t row, size_t block, Lanes gate, Lanes up) {
      const Lanes open = model_.activation == kSilu ? silu(gate) : gelu_tanh(gate);
      const size_t at = row * model_.inner_width + block / 2 * kLanes;
      if constexpr (kQuantized) store(exact_ + at, open * up);
      else store(activated_numbers + at, open * up);
    });
    project(layer.down, {activated_numbers, model_.inner_width, scales_, sums_}, layer.after_mlp, num);
  }

  // Multiplies and adds to the stream, over all ranks and through a norm where the layer has one.
  void project(const Matrix& matrix, const RowsBuffer<Dot>& operand, const float* norm_weight, size_t num) {
    if constexpr (kQuantized) {
      each_token(num, [&](size_t token) {
        const float* from = exact_ + token * operand.width;
        operand.write(token, [&](size_t i) { return load(from + i); });
      });
    }
    const size_t width = model_.width;
    const Lanes factor = fill(static_cast<float>(model_.residual_factor));
    if (!peers_ && !norm_weight) {
      multiply<Dot, 1>(threads_, matrix, operand, num, [&](size_t row, size_t block, Lanes lanes) {
        float* to = stream_ + row * width + block * kLanes;
        store(to, multiply_add(lanes, factor, load(to)));
      });
      return;
    }
    multiply<Dot, 1>(threads_, matrix, operand, num, [&](size_t row, size_t block, Lanes lanes) {
      store(added_ + row * width + block * kLanes, lanes);
    });
    if (peers_ && (fault_ = peers_->sum(added_, num * width))) return;
    each_token(num, [&](size_t token) {
      float* row = added_ + token * width;
      float* to = stream_ + token * width;
      if (norm_weight) norm(row, width, norm_weight, [&](size_t i, Lanes lanes) { store(row + i, lanes); });
      for (size_t i = 0; i < width; i += kLanes) store(to + i, multiply_add(load(row + i), factor, load(to + i)));
    });
  }

  void norm_rows(const float* weight, const RowsBuffer<Dot>& to, size_t num) {
    each_token(num, [&](size_t token) {
      const float* row = stream_ + token * model_.width;
      if (!weight) return to.write(token, [&](size_t i) { return load(row + i); });
      const Lanes scale = norm_scale(row, model_.width);
      to.write(token, [&](size_t i) { return load(weight + i) * (load(row + i) * scale); });
    });
  }

  Lanes norm_scale(const float* row, size_t width) const {
    Lanes squares = fill(0);
    for (size_t i = 0; i < width; i += kLanes) squares = multiply_add(load(row + i), load(row + i), squares);
    return fill(1.f / std::sqrt(sum_of(squares) / static_cast<float>(width) + static_cast<float>(model_.epsilon)));
  }

  template <class Write>
  void norm(const float* row, size_t width, const float* weight, const Write& write) const {
    const Lanes scale = norm_scale(row, width);
    for (size_t i = 0; i < width; i += kLanes) write(i, load(weight + i) * (load(row + i) * scale));
  }

  // A few tokens are done sooner than another thread could be told of them.
  template <class Work>
  void each_token(size_t num, const Work& work) {
    const size_t together = num <= 4 ? num : std::max<size_t>(1, num / (4 * threads_.count()));
    threads_.each((num + together - 1) / together, [&](size_t part) {
      for (size_t token = part * together; token < std::min(num, (part + 1) * together); token++) work(token);
    });
  }

  const Model model_;
  Threads& threads_;
  Peers* peers_;
  int fault_ = kNone;
  Shares shares_;
  std::vector<float*> angles_;
  Scratch<float> stream_memory_, projected_memory_, added_memory_, scales_memory_, angles_memory_, exact_memory_;
  Scratch<int32_t> sums_memory_;
  Scratch<Outer> queries_memory_;
  Scratch<typename Dot::Number> operand_memory_, activated_memory_;
  float* stream_ = nullptr;     // [num_tokens, width]
  float* projected_ = nullptr;  // [num_tokens, query, key and value heads]
  float* added_ = nullptr;      // [num_tokens, width]
  float* scales_ = nullptr;     // [num_tokens, groups]
  int32_t* sums_ = nullptr;  // [num_tokens, groups]
  float* exact_ = nullptr;      // [num_tokens, widest] what is about to be quantised
  Outer* queries_ = nullptr;    // [KV heads, num_tokens, group, head width]
  typename Dot::Number* operand_ = nullptr;  // [num_tokens, widest]
};

}  // namespace shardstream
