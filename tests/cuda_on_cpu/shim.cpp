// The fibers of one block and their scheduler.
#include "shim.h"

#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <memory>
#include <vector>

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

unsigned int first_block = 0, most_blocks = ~0u;

namespace {

constexpr size_t STACK = SHIM_STACK;
constexpr unsigned int WARP = 32;

enum class State { RUNNING, AT_BLOCK_BARRIER, AT_WARP_BARRIER, DONE };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  State state = State::DONE;
  unsigned char exchanged[16];
};

struct Scheduler {
  std::vector<Fiber> fibers;
  ucontext_t home;
  unsigned int current = 0;
  void (*thread)(void*) = nullptr;
  void* context = nullptr;
};

Scheduler scheduler;
bool block_barriers_dropped = false;

void begin() {
  scheduler.thread(scheduler.context);
  scheduler.fibers[scheduler.current].state = State::DONE;
  swapcontext(&scheduler.fibers[scheduler.current].context, &scheduler.home);
}

void wait_in(State state) {
  Fiber& fiber = scheduler.fibers[scheduler.current];
  fiber.state = state;
  swapcontext(&fiber.context, &scheduler.home);
}

// Lets fibers [first, last) go on if all that still run wait at this barrier.
bool release(State barrier, size_t first, size_t last) {
  bool any = false;
  for (size_t i = first; i < last; ++i) {
    const State state = scheduler.fibers[i].state;
    if (state != barrier && state != State::DONE) return false;
    any = any || state == barrier;
  }
  for (size_t i = first; any && i < last; ++i)
    if (scheduler.fibers[i].state == barrier) scheduler.fibers[i].state = State::RUNNING;
  return any;
}

}  // namespace

void run_block(unsigned int threads, void (*thread)(void*), void* context) {
  std::vector<Fiber>& fibers = scheduler.fibers;
  if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
  scheduler.thread = thread;
  scheduler.context = context;
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, begin, 0);
    fiber.state = State::RUNNING;
  }
  for (size_t done = 0; done < threads;) {
    bool progress = false;
    done = 0;
    for (unsigned int i = 0; i < threads; ++i) {
      if (fibers[i].state == State::RUNNING) {
        scheduler.current = i;
        threadIdx.x = i;
        swapcontext(&scheduler.home, &fibers[i].context);
        progress = true;
      }
      done += fibers[i].state == State::DONE;
    }
    progress = release(State::AT_BLOCK_BARRIER, 0, threads) || progress;
    for (unsigned int i = 0; i < threads; i += WARP)
      progress = release(State::AT_WARP_BARRIER, i, i + WARP < threads ? i + WARP : threads) || progress;
    if (!progress && done < threads) {
      fprintf(stderr, "a barrier in block %u is not reached by all threads\n", blockIdx.x);
      abort();
    }
  }
}

void wait_for_block() {
  if (!block_barriers_dropped) wait_in(State::AT_BLOCK_BARRIER);
}

void wait_for_warp() { wait_in(State::AT_WARP_BARRIER); }

void exchange(void* value, size_t size, unsigned int other_lane) {
  const unsigned int own = scheduler.current, warp = own / WARP * WARP;
  memcpy(scheduler.fibers[own].exchanged, value, size);
  wait_for_warp();
  memcpy(value, scheduler.fibers[warp + other_lane].exchanged, size);
  wait_for_warp();
}

}  // namespace shim

// For tests of the order in which blocks take the chunks, and of vectors that are too long to walk.
extern "C" __attribute__((visibility("default"))) void shim_run_blocks(unsigned int first, unsigned int most) {
  shim::first_block = first;
  shim::most_blocks = most;
}

// For a test that the shim can fail.
extern "C" __attribute__((visibility("default"))) void shim_drop_block_barriers(int dropped) {
  shim::block_barriers_dropped = dropped != 0;
}
