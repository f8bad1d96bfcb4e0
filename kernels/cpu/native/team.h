// How threads share the phases of a step.
//
// A phase is a number of units that no other unit of it waits for. Each thread takes units from its own stretch of
// them, in order, then helps with the others'. It goes on when all units are done, not when all threads have come: a
// thread that the system has put aside holds up at most what it has in hand. So what decides the number of units must
// not be overwritten by a later phase.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

struct alignas(64) Counter {
  std::atomic<int64_t> value;
};

struct Team {
  static constexpr int PATIENCE = 2000;  // looks at a counter before the thread offers its core to others

  const int member, members;
  Counter* phase;  // of the next phase: units taken of each stretch, then units done

  static int64_t counters(int64_t phases, int64_t members) { return phases * (members + 1); }

  // Calls run(low, high) for stretches of at most `chunk` units until all `units` are done.
  template <class Run>
  void each(int64_t units, int64_t chunk, Run&& run) {
    std::atomic<int64_t>& done = phase[members].value;
    int64_t mine = 0;
    for (int i = 0; i < members; i++) {
      const int owner = (member + i) % members;
      const int64_t start = units * owner / members, end = units * (owner + 1) / members;
      while (phase[owner].value.load(std::memory_order_relaxed) < end - start) {
        const int64_t low = start + phase[owner].value.fetch_add(chunk, std::memory_order_relaxed);
        if (low >= end) break;
        const int64_t high = std::min(end, low + chunk);
        run(low, high);
        mine += high - low;
      }
    }
    if (mine) done.fetch_add(mine, std::memory_order_release);
    for (int looks = 0; done.load(std::memory_order_acquire) < units; looks++)
      if (looks < PATIENCE) pause();
      else sched_yield();
    phase += members + 1;
  }

  // Phases of single units.
  template <class Run>
  void each(int64_t units, Run&& run) {
    each(units, 1, [&](int64_t low, int64_t) { run(low); });
  }

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }
};
