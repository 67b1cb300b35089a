// A few threads that share out indices.
//
// An operation waits for its indices, never for its threads: whoever is there takes the next index, so a thread that
// the system has put aside for another process delays only the one index it may hold. Whoever waits looks for about as
// long as an index takes and then sleeps: the holder, or the process before it, can have the processor meanwhile, which
// looking on would keep from them until the system's next tick. Between steps nothing spins.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
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
  explicit Threads(size_t count) {
    for (size_t i = 1; i < count; i++) workers_.emplace_back([this] { serve(); });
  }

  ~Threads() {
    ending_.store(true);
    announce(generation_.load() + 1, 0);
    for (auto& worker : workers_) worker.join();
  }

  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  size_t count() const { return workers_.size() + 1; }

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
    num_.store(static_cast<uint32_t>(num), std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const uint32_t generation = generation_.load(std::memory_order_relaxed) + 1;
    announce(generation, static_cast<uint32_t>(num));
    await_others(take(generation));
  }

 private:
  using Call = void (*)(const void* context, size_t index);

  void announce(uint32_t generation, uint32_t num) {
    ticket_.store(static_cast<uint64_t>(generation) << 32 | num, std::memory_order_release);
    generation_.store(generation);
    if (sleeping_.load()) futex(generation_, FUTEX_WAKE_PRIVATE, INT_MAX);
  }

  // Takes indices of one generation until none is left. The ticket holds the generation and how many are left, and
  // what is read besides counts only if the ticket is still the same afterwards: a late thread can neither take an
  // index that is not there nor one of a generation whose work it has not seen. Returns how many clock ticks an index
  // that another thread holds may well take.
  uint64_t take(uint32_t generation) {
    const uint64_t begun_at = __rdtsc();
    uint64_t num_taken = 0;
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
      const uint32_t left = static_cast<uint32_t>(ticket);
      if (ticket >> 32 != generation || !left) break;
      const Call call = call_.load(std::memory_order_relaxed);
      const void* context = context_.load(std::memory_order_relaxed);
      const uint32_t num = num_.load(std::memory_order_relaxed);
      if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      call(context, num - left);
      if (done_.fetch_add(1) + 1 == num && waiting_.load()) futex(done_, FUTEX_WAKE_PRIVATE, 1);
      num_taken++;
      ticket = ticket_.load(std::memory_order_acquire);
    }
    return kLeastPatience + 2 * (__rdtsc() - begun_at) / std::max<uint64_t>(1, num_taken);
  }

  void await_others(uint64_t patience) {
    const uint32_t num = num_.load(std::memory_order_relaxed);
    for (const uint64_t begun_at = __rdtsc(); __rdtsc() - begun_at < patience;) {
      if (done_.load(std::memory_order_acquire) == num) return;
      _mm_pause();
    }
    waiting_.store(true);
    for (uint32_t done; (done = done_.load()) != num;) futex(done_, FUTEX_WAIT_PRIVATE, done);
    waiting_.store(false);
  }

  void serve() {
    for (uint32_t seen = 0;;) {
      seen = await_other_than(seen);
      if (ending_.load()) return;
      take(seen);
    }
  }

  uint32_t await_other_than(uint32_t seen) {
    for (int looks = 0; looks < kLooksBeforeSleep; looks++) {
      const uint32_t generation = generation_.load(std::memory_order_acquire);
      if (generation != seen) return generation;
      _mm_pause();
    }
    sleeping_.fetch_add(1);
    while (generation_.load() == seen) futex(generation_, FUTEX_WAIT_PRIVATE, seen);
    sleeping_.fetch_sub(1);
    return generation_.load();
  }

  std::vector<std::thread> workers_;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  std::atomic<bool> waiting_{false};
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::atomic<uint32_t> sleeping_{0};
  std::atomic<bool> ending_{false};
  std::atomic<Call> call_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<uint32_t> num_{0};
};

}  // namespace shardstream
