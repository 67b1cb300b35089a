// Ranks on one host, each a process, exchanging through shared memory.
//
//     word of rank 0, word of rank 1, ...    rounds entered so far, a cache line each
//     2 x slots                              one slot per rank; rounds use them alternately
//
// A round: each rank copies its bytes into its slot, publishes its word, waits for the others' words, reads their slots.
// Two sets of slots suffice: who has entered round n + 1 has read all of round n, and nobody enters round n + 2 before
// everybody has entered n + 1.
//
// A rank holds a lock on its byte of the file while it lives. The system takes the lock away with the process, however
// that ends, so who waits can tell a slow rank from a dead one.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

#include <cerrno>
#include <cstring>
#include <numeric>

#include "threads.h"

namespace shardstream {

enum PeerFault : int { kNone = 0, kDied = 1, kLate = 2 };

// Who waits looks on, then lets others have the processor in between, and soon sleeps: another process may be what keeps
// the peer, and moves over to a processor that has nothing to do.
constexpr int kLooksBeforeYield = 1000;  // of about 15 ns each
constexpr int kYieldsBeforeSleep = 100;  // of about 300 ns each
constexpr long kSleepNanoseconds = 20'000'000;

class Peers {
 public:
  Peers(void* memory, int file, size_t rank, size_t count, size_t slot_bytes, double timeout_s)
      : memory_(static_cast<char*>(memory)), file_(file), rank_(rank), count_(count), slot_bytes_(slot_bytes),
        timeout_s_(timeout_s) {}

  ~Peers() {
    munmap(memory_, bytes(count_, slot_bytes_));
    close(file_);
  }

  Peers(const Peers&) = delete;
  Peers& operator=(const Peers&) = delete;

  static size_t bytes(size_t count, size_t slot_bytes) { return count * 64 + 2 * count * slot_bytes; }

  size_t rank() const { return rank_; }
  size_t count() const { return count_; }
  size_t slot_bytes() const { return slot_bytes_; }

  // Begins a round; what is returned is the own slot, to be filled.
  char* begin() {
    round_++;
    return const_cast<char*>(slot(rank_));
  }

  // Wakes those who sleep until this rank has come, which it will soon: a sleeper takes longer to wake up than to look on
  // for the rest.
  void announce() {
    if (sleepers().load()) futex(word(rank_), FUTEX_WAKE, INT_MAX);
  }

  // Returns when all slots of the round can be read.
  PeerFault meet() {
    word(rank_).store(round_);
    announce();
    for (size_t peer = 0; peer < count_; peer++) {
      if (const PeerFault fault = await(peer)) return fault;
    }
    return kNone;
  }

  const char* slot(size_t peer) const {
    return memory_ + count_ * 64 + ((round_ & 1) * count_ + peer) * slot_bytes_;
  }

  // 16 floats from the `i`-th of every slot on, summed always in the order of the ranks, so that all get the same bits.
  Lanes sum_at(size_t i) const {
    return sum_at(i, [](const float* from) { return load(from); });
  }

  // Sums floats over the ranks.
  PeerFault sum(float* numbers, size_t num) {
    const size_t most = slot_bytes_ / sizeof(float);
    for (size_t start = 0; start < num; start += most) {
      const size_t part = std::min(most, num - start);
      memcpy(begin(), numbers + start, part * sizeof(float));
      if (const PeerFault fault = meet()) return fault;
      for (size_t i = 0; i < part; i += kLanes) {
        if (i + kLanes <= part) {
          store(numbers + start + i, sum_at(i));
        } else {
          const size_t rest = part - i;
          store_some(numbers + start + i, sum_at(i, [&](const float* from) { return load_some(from, rest, 0); }), rest);
        }
      }
    }
    return kNone;
  }

  // Joins every rank's bytes in the order of the ranks: `to` is [count, num_bytes].
  PeerFault gather(const char* from, size_t num_bytes, char* to) {
    for (size_t start = 0; start < num_bytes; start += slot_bytes_) {
      const size_t part = std::min(slot_bytes_, num_bytes - start);
      memcpy(begin(), from + start, part);
      if (const PeerFault fault = meet()) return fault;
      for (size_t peer = 0; peer < count_; peer++) memcpy(to + peer * num_bytes + start, slot(peer), part);
    }
    return kNone;
  }

  // Rows of a table of which rank r holds those from `starts[r]` to `starts[r + 1]`: `to` is [num, row_bytes]. No row is
  // larger than a slot.
  PeerFault look_up(const char* table, const int64_t* starts, size_t row_bytes, const int64_t* rows, size_t num, char* to) {
    const size_t most = slot_bytes_ / row_bytes;
    for (size_t start = 0; start < num; start += most, rows += most, to += most * row_bytes) {
      const size_t part = std::min(most, num - start);
      char* own = begin();
      for (size_t i = 0; i < part; i++) {
        const int64_t row = rows[i] - starts[rank_];
        if (row >= 0 && rows[i] < starts[rank_ + 1]) memcpy(own + i * row_bytes, table + row * row_bytes, row_bytes);
      }
      if (const PeerFault fault = meet()) return fault;
      for (size_t i = 0; i < part; i++) {
        const size_t owner = std::upper_bound(starts + 1, starts + count_, rows[i]) - (starts + 1);
        memcpy(to + i * row_bytes, slot(owner) + i * row_bytes, row_bytes);
      }
    }
    return kNone;
  }

  // Joins the ranks' rows side by side on the first rank: `from` is [num_rows, widths[rank]] bytes and `to`, which the
  // others do not have, [num_rows, all widths].
  PeerFault join_rows(const char* from, const uint64_t* widths, size_t num_rows, char* to) {
    const size_t whole = std::accumulate(widths, widths + count_, size_t{0});
    const size_t widest = *std::max_element(widths, widths + count_);
    const size_t columns = std::min(widest, slot_bytes_), rows = columns ? slot_bytes_ / columns : 1;  // of a round
    for (size_t row = 0; row < num_rows; row += rows) {
      const size_t num = std::min(rows, num_rows - row);
      for (size_t column = 0; column < widest; column += columns) {
        const auto width_of = [&](size_t peer) { return std::min(columns, widths[peer] - std::min(column, widths[peer])); };
        const char* here = from + row * widths[rank_] + column;
        char* own = begin();
        if (rank_) {
          copy_rows(here, widths[rank_], own, width_of(rank_), num, width_of(rank_));
          if (const PeerFault fault = meet()) return fault;
          continue;
        }
        char* there = to + row * whole + column;
        copy_rows(here, widths[0], there, whole, num, width_of(0));
        if (const PeerFault fault = meet()) return fault;
        for (size_t peer = 1; peer < count_; peer++) {
          there += widths[peer - 1];
          copy_rows(slot(peer), width_of(peer), there, whole, num, width_of(peer));
        }
      }
    }
    return kNone;
  }

 private:
  static void copy_rows(const char* from, size_t from_stride, char* to, size_t to_stride, size_t num, size_t width) {
    for (size_t row = 0; row < num; row++) memcpy(to + row * to_stride, from + row * from_stride, width);
  }

  template <class Load>
  Lanes sum_at(size_t i, const Load& load_from) const {
    Lanes total = load_from(reinterpret_cast<const float*>(slot(0)) + i);
    for (size_t peer = 1; peer < count_; peer++) total = total + load_from(reinterpret_cast<const float*>(slot(peer)) + i);
    return total;
  }

  std::atomic<uint32_t>& word(size_t peer) const { return *reinterpret_cast<std::atomic<uint32_t>*>(memory_ + peer * 64); }
  // Beside the first rank's word: how many sleep until a word changes.
  std::atomic<uint32_t>& sleepers() const { return *reinterpret_cast<std::atomic<uint32_t>*>(memory_ + 8); }

  bool arrived(size_t peer) const {
    return static_cast<int32_t>(word(peer).load(std::memory_order_acquire) - round_) >= 0;
  }

  PeerFault await(size_t peer) {
    if (comes_soon(peer)) return kNone;
    const double deadline = now_s() + timeout_s_;
    do {
      if (!alive(peer) && !arrived(peer)) return kDied;
      if (now_s() > deadline) return kLate;
      sleep_until_called(peer);
    } while (!comes_soon(peer));
    return kNone;
  }

  bool comes_soon(size_t peer) const {
    for (int looks = 0; looks < kLooksBeforeYield + kYieldsBeforeSleep; looks++) {
      if (arrived(peer)) return true;
      if (looks < kLooksBeforeYield) _mm_pause();
      else sched_yield();
    }
    return false;
  }

  void sleep_until_called(size_t peer) {
    const timespec most{0, kSleepNanoseconds};
    sleepers().fetch_add(1);
    const uint32_t seen = word(peer).load();
    if (!arrived(peer)) futex(word(peer), FUTEX_WAIT, seen, &most);
    sleepers().fetch_sub(1);
  }

  bool alive(size_t peer) const {
    struct flock lock = {};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    lock.l_start = static_cast<off_t>(peer);
    lock.l_len = 1;
    return peer == rank_ || fcntl(file_, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
  }

  static double now_s() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }

  char* memory_;
  int file_;
  size_t rank_;
  size_t count_;
  size_t slot_bytes_;
  double timeout_s_;
  uint32_t round_ = 0;
};

// Maps `path` as one of `count` ranks and locks this rank's byte; null, with errno set, when that fails.
inline Peers* join_peers(const char* path, size_t rank, size_t count, size_t slot_bytes, double timeout_s) {
  const int file = open(path, O_RDWR | O_CLOEXEC);
  if (file < 0) return nullptr;
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = static_cast<off_t>(rank);
  lock.l_len = 1;
  const size_t bytes = Peers::bytes(count, slot_bytes);
  void* memory = MAP_FAILED;
  if (fcntl(file, F_OFD_SETLK, &lock) == 0 && posix_fallocate(file, 0, static_cast<off_t>(bytes)) == 0) {
    memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  if (memory == MAP_FAILED) {
    close(file);
    return nullptr;
  }
  return new Peers(memory, file, rank, count, slot_bytes, timeout_s);
}

}  // namespace shardstream
