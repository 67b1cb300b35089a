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

enum Activation : int64_t { kSilu = 0, kGeluTanh = 1, kRelu2 = 2 };

inline Lanes activated(Activation activation, Lanes x) {
  switch (activation) {
    case kSilu: return silu(x);
    case kGeluTanh: return gelu_tanh(x);
    default: {
      const Lanes positive = max(fill(0), x);  // in this order a NaN stays one
      return positive * positive;
    }
  }
}

// What a norm multiplies by and adds.
struct Norm {
  const float* weight;  // [width]; null where there is no norm
  const float* bias;    // [width] or null
};

struct Rotation {
  const float* frequencies;  // [num]: the first 2 * num numbers of a head are rotated
  uint64_t num;
  float factor;
  float unused;
};

struct Layer {
  Matrix query_key_value;
  Matrix output;
  Matrix gate_up;  // blocks of 16 gates and 16 ups take turns; ups alone where there are no gates
  Matrix down;
  Norm before_attention;
  Norm after_attention;
  Norm before_mlp;
  Norm after_mlp;
  const float* of_query;  // [head width], or [query heads, head width] where heads are normed together, or null
  const float* of_key;    // [head width], or [KV heads, head width], or null
  int64_t rotation;               // index; -1 for none
  Options options;
};

struct Model {
  uint64_t num_layers;
  const Layer* layers;
  const Rotation* rotations;
  uint64_t num_rotations;
  Norm last_norm;
  uint64_t width;          // a multiple of 16
  Heads heads;
  // Of the heads of all ranks, where norms of queries and keys are over all of them together; 0 where over each alone.
  uint64_t all_queries_width;
  uint64_t all_keys_width;
  uint64_t inner_width;  // of the MLP, padded
  Activation activation;
  int64_t has_gates;
  int64_t is_centered;  // norms take the mean away first
  int64_t is_parallel;  // the MLP gets what attention gets, not what comes of it
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
      norm(stream_ + token * model_.width, model_.last_norm, [&](size_t i, Lanes lanes) { store(to + i, lanes); });
    });
    return kNone;
  }

 private:
  static constexpr bool kQuantized = Dot::kGroup != 0;

  // Inputs of a matrix, with those that are zero to fill the last group.
  static size_t padded(size_t width) {
    const size_t unit = kQuantized ? Dot::kGroup : kLanes;
    return (width + unit - 1) / unit * unit;
  }

  void begin(const Step& step, const Outer* hidden) {
    const size_t num = step.num_tokens, width = model_.width, heads_width = model_.heads.query * model_.heads.width;
    const size_t widest = padded(std::max({width, heads_width, static_cast<size_t>(model_.inner_width)}));
    stream_ = stream_memory_.of(num * width);
    projected_ = projected_memory_.of(num * (heads_width + 2 * model_.heads.key_value * model_.heads.width));
    added_ = added_memory_.of(num * width);
    before_mlp_ = model_.is_parallel ? before_memory_.of(num * width) : stream_;
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
    const RowsBuffer<Dot> normed{operand_, padded(model_.width), scales_, sums_};
    norm_rows(stream_, layer.before_attention, normed, num);
    multiply<Dot, 1>(threads_, layer.query_key_value, normed, num, [&](size_t row, size_t block, Lanes lanes) {
      store(projected_ + row * projected_width + block * kLanes, lanes);
    });
    if (model_.all_queries_width) norm_all_heads(layer, num);
    if (fault_) return;
    each_token(num, [&](size_t token) { place(layer, memory, step, token); });

    const size_t attended_width = heads.query * heads.width;
    const RowsBuffer<Dot> attended{operand_, padded(attended_width), scales_, sums_};
    attend_all<Attend>(threads_, memory, heads, step, layer.options, queries_, shares_,
                       [&](size_t token, size_t head, size_t i, Lanes lanes) {
                         const size_t at = token * attended_width + head * heads.width + i;
                         if constexpr (kQuantized) store(exact_ + at, lanes);
                         else store(operand_ + at, lanes);
                       });
    if (model_.is_parallel) {
      const size_t width = model_.width;
      each_token(num, [&](size_t token) {
        memcpy(before_mlp_ + token * width, stream_ + token * width, width * sizeof(float));
      });
    }
    project(layer.output, attended, attended_width, layer.after_attention, num);
  }

  // Norms a token's queries over all heads of all ranks, and its keys likewise.
  void norm_all_heads(const Layer& layer, size_t num) {
    const size_t queries_width = model_.heads.query * model_.heads.width;
    const size_t keys_width = model_.heads.key_value * model_.heads.width, stride = queries_width + 2 * keys_width;
    float* squares = squares_memory_.of(2 * num);
    each_token(num, [&](size_t token) {
      const float* queries = projected_ + token * stride;
      squares[2 * token] = squares_of(queries, queries_width);
      squares[2 * token + 1] = squares_of(queries + queries_width, keys_width);
    });
    if (peers_ && (fault_ = peers_->sum(squares, 2 * num))) return;
    each_token(num, [&](size_t token) {
      float* queries = projected_ + token * stride;
      float* keys = queries + queries_width;
      const Lanes query_scale = norm_scale(squares[2 * token], model_.all_queries_width);
      const Lanes key_scale = norm_scale(squares[2 * token + 1], model_.all_keys_width);
      for (size_t i = 0; i < queries_width; i += kLanes) {
        store(queries + i, load(layer.of_query + i) * (load(queries + i) * query_scale));
      }
      for (size_t i = 0; i < keys_width; i += kLanes) {
        store(keys + i, load(layer.of_key + i) * (load(keys + i) * key_scale));
      }
    });
  }

  // One token's queries, normed, rotated and scaled; its keys and values into memory.
  void place(const Layer& layer, const Memory& memory, const Step& step, size_t token) {
    const Heads& heads = model_.heads;
    const size_t group = heads.group();
    float* head = projected_ + token * (heads.query + 2 * heads.key_value) * heads.width;
    const Lanes scaling = fill(static_cast<float>(layer.options.scaling));
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
    const size_t width = model_.heads.width;
    if (weight && !model_.all_queries_width) {
      const Lanes scale = norm_scale(squares_of(head, width), width);
      for (size_t i = 0; i < width; i += kLanes) store(head + i, load(weight + i) * (load(head + i) * scale));
    }
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
    const RowsBuffer<Dot> normed{operand_, padded(model_.width), scales_, sums_};
    norm_rows(before_mlp_, layer.before_mlp, normed, num);
    // Activations go where no thread still reads its operand.
    auto* activated_numbers = activated_memory_.of(num * model_.inner_width);
    const auto put = [&](size_t row, size_t block, Lanes lanes) {
      const size_t at = row * model_.inner_width + block * kLanes;
      if constexpr (kQuantized) store(exact_ + at, lanes);
      else store(activated_numbers + at, lanes);
    };
    if (model_.has_gates) {
      multiply<Dot, 2>(threads_, layer.gate_up, normed, num, [&](size_t row, size_t block, Lanes gate, Lanes up) {
        put(row, block / 2, activated(model_.activation, gate) * up);
      });
    } else {
      multiply<Dot, 1>(threads_, layer.gate_up, normed, num, [&](size_t row, size_t block, Lanes up) {
        put(row, block, activated(model_.activation, up));
      });
    }
    const RowsBuffer<Dot> activated{activated_numbers, model_.inner_width, scales_, sums_};
    project(layer.down, activated, model_.inner_width, layer.after_mlp, num);
  }

  // Multiplies and adds to the stream, over all ranks and through a norm where the layer has one. What is quantised
  // before has `operand_width` numbers.
  void project(const Matrix& matrix, const RowsBuffer<Dot>& operand, size_t operand_width, const Norm& after,
               size_t num) {
    if (peers_) peers_->announce();
    if constexpr (kQuantized) {
      each_token(num, [&](size_t token) {
        const float* from = exact_ + token * operand_width;
        write_padded(operand, token, operand_width, [&](size_t i) { return load(from + i); });
      });
    }
    const size_t width = model_.width;
    const Lanes factor = fill(static_cast<float>(model_.residual_factor));
    if (!peers_ && !after.weight) {
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
      if (after.weight) norm(row, after, [&](size_t i, Lanes lanes) { store(row + i, lanes); });
      for (size_t i = 0; i < width; i += kLanes) store(to + i, multiply_add(load(row + i), factor, load(to + i)));
    });
  }

  void norm_rows(const float* from, const Norm& by, const RowsBuffer<Dot>& to, size_t num) {
    each_token(num, [&](size_t token) {
      const float* row = from + token * model_.width;
      const auto write = [&](const auto& lanes_at) { write_padded(to, token, model_.width, lanes_at); };
      if (by.weight) normed(row, by, write);
      else write([&](size_t i) { return load(row + i); });
    });
  }

  // Writes a row of `width` numbers, and zeros after them.
  template <class LanesAt>
  static void write_padded(const RowsBuffer<Dot>& to, size_t token, size_t width, const LanesAt& lanes_at) {
    if (to.width == width) to.write(token, lanes_at);
    else to.write(token, [&](size_t i) { return i < width ? lanes_at(i) : fill(0); });
  }

  // Calls use(f), where f(index) gives 16 lanes of the normed row [width].
  template <class Use>
  void normed(const float* row, const Norm& by, const Use& use) const {
    const size_t width = model_.width;
    if (!model_.is_centered && !by.bias) {
      const Lanes scale = norm_scale(squares_of(row, width), width);
      use([&](size_t i) { return load(by.weight + i) * (load(row + i) * scale); });
      return;
    }
    const Lanes mean = model_.is_centered ? mean_of(row, width) : fill(0);
    const Lanes scale = norm_scale(squares_around(mean, row, width), width);
    use([&](size_t i) {
      const Lanes lanes = load(by.weight + i) * ((load(row + i) - mean) * scale);
      return by.bias ? lanes + load(by.bias + i) : lanes;
    });
  }

  template <class Write>
  void norm(const float* row, const Norm& by, const Write& write) const {
    normed(row, by, [&](const auto& lanes_at) {
      for (size_t i = 0; i < model_.width; i += kLanes) write(i, lanes_at(i));
    });
  }

  static Lanes mean_of(const float* row, size_t width) {
    Lanes sum = fill(0);
    for (size_t i = 0; i < width; i += kLanes) sum = sum + load(row + i);
    return fill(sum_of(sum) / static_cast<float>(width));
  }

  static float squares_of(const float* row, size_t width) {
    Lanes squares = fill(0);
    for (size_t i = 0; i < width; i += kLanes) squares = multiply_add(load(row + i), load(row + i), squares);
    return sum_of(squares);
  }

  static float squares_around(Lanes mean, const float* row, size_t width) {
    Lanes squares = fill(0);
    for (size_t i = 0; i < width; i += kLanes) {
      const Lanes distance = load(row + i) - mean;
      squares = multiply_add(distance, distance, squares);
    }
    return sum_of(squares);
  }

  // What numbers of such squares are multiplied by, so that their mean square becomes one.
  Lanes norm_scale(float squares, size_t width) const {
    return fill(1.f / std::sqrt(squares / static_cast<float>(width) + static_cast<float>(model_.epsilon)));
  }

  // A few tokens are done sooner than another thread could be told of them.
  template <class Work>
  void each_token(size_t num, const Work& work) {
    const size_t together = std::max<size_t>(1, num <= 4 ? num : num / (4 * threads_.count()));
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
  Scratch<float> stream_memory_, projected_memory_, added_memory_, scales_memory_, angles_memory_, exact_memory_, squares_memory_,
      before_memory_;
  Scratch<int32_t> sums_memory_;
  Scratch<Outer> queries_memory_;
  Scratch<typename Dot::Number> operand_memory_, activated_memory_;
  float* stream_ = nullptr;     // [num_tokens, width]
  float* before_mlp_ = nullptr;  // [num_tokens, width] what the MLP gets, the stream or what that was before attention
  float* projected_ = nullptr;  // [num_tokens, query, key and value heads]
  float* added_ = nullptr;      // [num_tokens, width]
  float* scales_ = nullptr;     // [num_tokens, groups]
  int32_t* sums_ = nullptr;  // [num_tokens, groups]
  float* exact_ = nullptr;      // [num_tokens, widest] what is about to be quantised
  Outer* queries_ = nullptr;    // [KV heads, num_tokens, group, head width]
  typename Dot::Number* operand_ = nullptr;  // [num_tokens, widest]
};

}  // namespace shardstream
