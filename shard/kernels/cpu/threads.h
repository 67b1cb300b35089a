// A few threads that share out indices.
//
// Each thread has a share of neighbouring indices and takes them in order, so that it reads memory in order too, and
// counts in cache lines that nobody else touches. Whoever has done its share takes from the others': an operation waits
// for its indices, never for its threads, and a thread that the system has put aside for another process delays only
// the one index it may hold. Whoever waits looks for about as long as an index takes and then sleeps: the holder, or
// the process before it, can have the processor meanwhile, which looking on would keep from them until the system's
// next tick. Between steps nothing spins.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <climits>
#include <memory>
#include <thread>
#include <vector>

#include "lanes.h"

namespace shardstream {

constexpr int kLooksBeforeSleep = 4000;      // of about 15 ns each
constexpr uint64_t kLeastPatience = 50'000;  // clock ticks, about 20 us

inline long futex(std::atomic<uint32_t>& word, int operation, uint32_t value, const timespec* timeout = nullptr) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, timeout, nullptr, 0);
}

class Threads {
 public:
  explicit Threads(size_t count) : turns_(count) {
    for (size_t i = 1; i < count; i++) workers_.emplace_back([this, i] { serve(i); });
  }

  ~Threads() {
    ending_.store(true);
    announce(0);
    for (auto& worker : workers_) worker.join();
  }

  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  size_t count() const { return turns_.size(); }

  // Calls work(index) for every index below `num`, in no order, on any of the threads; returns when all are done.
  template <class Work>
  void each(size_t num, const Work& work) {
    if (workers_.empty() || num <= 1) {
      for (size_t index = 0; index < num; index++) work(index);
      return;
    }
    call_.store([](const void* context, size_t index) { (*static_cast<const Work*>(context))(index); },
                std::memory_order_relaxed);
    context_.store(&work, std::memory_order_relaxed);
    const uint64_t job = announce(num);
    await_others(job, take(0, job));
  }

 private:
  using Call = void (*)(const void* context, size_t index);

  // A job is a number, one more than that of the job before, and below it in the same word how many indices there are.
  static constexpr int kIndexBits = 24;
  static constexpr uint64_t kIndices = (uint64_t{1} << kIndexBits) - 1;

  // How far a thread is, in a cache line of its own. Both words hold the number of a job and, below it, a count: of
  // another job they say nothing of this one.
  struct alignas(64) Turn {
    std::atomic<uint64_t> taken{0};  // indices of its share, by any thread
    std::atomic<uint64_t> done{0};   // indices of any share, by this thread
  };

  static uint64_t counted(uint64_t job, uint64_t count) { return (job & ~kIndices) | count; }
  static uint64_t count_in(uint64_t word, uint64_t job) { return (word ^ job) & ~kIndices ? 0 : word & kIndices; }
  static bool is_later(uint64_t word, uint64_t job) {  // also where the numbers have run over
    return static_cast<int64_t>((word & ~kIndices) - (job & ~kIndices)) > 0;
  }

  uint64_t announce(size_t num) {
    assert(num <= kIndices);
    const uint64_t job = ((job_.load(std::memory_order_relaxed) | kIndices) + 1) | num;
    job_.store(job);
    if (sleeping_.load()) wake(announced_, INT_MAX);
    return job;
  }

  static void wake(std::atomic<uint32_t>& word, uint32_t num) {
    word.fetch_add(1);
    futex(word, FUTEX_WAKE_PRIVATE, num);
  }

  // Takes indices of a job until none is left, of this thread's share first. A late thread takes none of a job whose
  // work it has not seen: a job is announced when all indices of those before are done, so what was read before an
  // index could be taken is of the same job. Returns how many clock ticks an index that another thread holds may well
  // take.
  uint64_t take(size_t self, uint64_t job) {
    const uint64_t begun_at = __rdtsc(), num = job & kIndices;
    const Call call = call_.load(std::memory_order_relaxed);
    const void* context = context_.load(std::memory_order_relaxed);
    uint64_t num_done = 0;
    for (size_t i = 0; i < count(); i++) {
      const size_t owner = (self + i) % count();
      const uint64_t start = num * owner / count(), size = num * (owner + 1) / count() - start;
      for (uint64_t index; (index = taken_of(turns_[owner].taken, job, size)) < size;) {
        call(context, start + index);
        turns_[self].done.store(counted(job, ++num_done), std::memory_order_release);
      }
    }
    if (num_done) {
      turns_[self].done.store(counted(job, num_done));  // seen by whoever is not seen waiting
      if (waiting_.load()) wake(ended_, 1);
    }
    return kLeastPatience + 2 * (__rdtsc() - begun_at) / std::max<uint64_t>(1, num_done);
  }

  // Takes the next index of a share; `size` where none is left.
  static uint64_t taken_of(std::atomic<uint64_t>& taken, uint64_t job, uint64_t size) {
    uint64_t word = taken.load(std::memory_order_acquire), index;
    do {
      index = count_in(word, job);
      if (is_later(word, job) || index >= size) return size;
    } while (!taken.compare_exchange_weak(word, counted(job, index + 1), std::memory_order_acq_rel,
                                          std::memory_order_acquire));
    return index;
  }

  bool is_done(uint64_t job) const {
    uint64_t num = 0;
    for (const Turn& turn : turns_) num += count_in(turn.done.load(), job);
    return num == (job & kIndices);
  }

  void await_others(uint64_t job, uint64_t patience) {
    for (const uint64_t begun_at = __rdtsc(); __rdtsc() - begun_at < patience;) {
      if (is_done(job)) return;
      _mm_pause();
    }
    waiting_.store(true);
    for (uint32_t ended; ended = ended_.load(), !is_done(job);) futex(ended_, FUTEX_WAIT_PRIVATE, ended);
    waiting_.store(false);
  }

  void serve(size_t self) {
    for (uint64_t seen = 0;;) {
      seen = await_other_than(seen);
      if (ending_.load()) return;
      take(self, seen);
    }
  }

  uint64_t await_other_than(uint64_t seen) {
    for (int looks = 0; looks < kLooksBeforeSleep; looks++) {
      const uint64_t job = job_.load(std::memory_order_acquire);
      if (job != seen) return job;
      _mm_pause();
    }
    sleeping_.fetch_add(1);
    for (uint32_t announced; announced = announced_.load(), job_.load() == seen;) {
      futex(announced_, FUTEX_WAIT_PRIVATE, announced);
    }
    sleeping_.fetch_sub(1);
    return job_.load();
  }

  std::vector<Turn> turns_;
  std::vector<std::thread> workers_;
  alignas(64) std::atomic<uint64_t> job_{0};
  std::atomic<Call> call_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<bool> ending_{false};
  alignas(64) std::atomic<uint32_t> sleeping_{0};
  std::atomic<uint32_t> announced_{0};  // changes when those who sleep are woken
  alignas(64) std::atomic<bool> waiting_{false};
  std::atomic<uint32_t> ended_{0};  // changes when who waits is woken
};

}  // namespace shardstream
