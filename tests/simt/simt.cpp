// The scheduler of simt.h, and its fibers.
#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// Shared memory: all __shared__ variables, gathered by the linker.
extern "C" char __start_simt_shared[] __attribute__((weak));
extern "C" char __stop_simt_shared[] __attribute__((weak));

namespace simt {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kWarp = 32;

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "simt: %s (block %u, thread %u)\n", what, block_index.x, thread_index.x);
  std::abort();
}

// ---- fibers: two stacks, and a switch from one to the other ------------------------------------

#if defined(__x86_64__)
// Saves the callee-saved registers on this stack and takes them from the other; ucontext would make
// two system calls each time.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

struct Fiber {
  void* at = nullptr;
  void start(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStack) - 1;  // 8 mod 16, as after a call
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    at = top - 6;
  }
  static void go(Fiber& from, Fiber& to) { simt_switch(&from.at, to.at); }
};
#else
struct Fiber {
  ucontext_t at;
  void start(char* stack, void (*entry)()) {
    getcontext(&at);
    at.uc_stack = {.ss_sp = stack, .ss_flags = 0, .ss_size = kStack};
    at.uc_link = nullptr;
    makecontext(&at, entry, 0);
  }
  static void go(Fiber& from, Fiber& to) { swapcontext(&from.at, &to.at); }
};
#endif

// ---- threads and warps -------------------------------------------------------------------------

enum class State { kReady, kExchange, kBarrier, kDone };

struct Thread {
  Fiber fiber;
  State state;
  unsigned mask;       // of the exchange it waits in
  unsigned exchanges;  // completed: each must be the same one for all lanes
};

struct Warp {
  // Two, taken in turn: a lane may write the next exchange before another has read the last.
  uint64_t values[2][kWarp];
};

std::vector<Thread> threads;
std::vector<Warp> warps;
Fiber scheduler;
int current;
char* stacks = nullptr;
void (*kernel_of_grid)(const void*);
const void* context_of_grid;

void wait(State state) {
  Thread& self = threads[current];
  self.state = state;
  Fiber::go(self.fiber, scheduler);
}

void thread_main() {
  kernel_of_grid(context_of_grid);
  wait(State::kDone);
  die("a finished thread ran on");
}

void run_thread(int index) {
  current = index;
  thread_index.x = static_cast<unsigned>(index);
  Fiber::go(scheduler, threads[index].fiber);
}

// Lets go the lanes whose exchange all lanes of the mask have reached.
bool finish_exchanges(Thread* lanes, int count) {
  bool any = false;
  for (int l = 0; l < count; ++l) {
    if (lanes[l].state != State::kExchange) continue;
    const unsigned mask = lanes[l].mask;
    bool complete = true;
    for (int m = 0; m < count; ++m) {
      if (mask >> m & 1) complete &= lanes[m].state == State::kExchange && lanes[m].mask == mask;
    }
    if (!complete) continue;
    any = true;
    for (int m = 0; m < count; ++m) {
      if (mask >> m & 1) {
        if (lanes[m].exchanges != lanes[l].exchanges) die("lanes met in different shuffles");
      }
    }
    for (int m = 0; m < count; ++m) {
      if (mask >> m & 1) lanes[m].state = State::kReady;
    }
  }
  return any;
}

// Until every lane has finished or waits for the block.
void run_warp(int warp) {
  const int first = warp * kWarp;
  const int count = std::min<int>(kWarp, static_cast<int>(threads.size()) - first);
  for (;;) {
    bool ran = false, exchanging = false;
    for (int i = 0; i < count; ++i) {
      const int l = options.highest_first ? count - 1 - i : i;
      if (threads[first + l].state == State::kReady) {
        run_thread(first + l);
        ran = true;
      }
      exchanging |= threads[first + l].state == State::kExchange;
    }
    if (exchanging && !finish_exchanges(&threads[first], count) && !ran) {
      die("a shuffle waits for lanes that do not come");
    }
    if (!exchanging && !ran) return;
  }
}

__attribute__((no_sanitize("address"))) void poison_shared_memory() {
  for (volatile char* p = __start_simt_shared; p < __stop_simt_shared; ++p) *p = '\xff';  // NaN
}

void run_block(int count) {
  poison_shared_memory();
  threads.assign(count, Thread{});
  warps.assign((count + kWarp - 1) / kWarp, Warp{});
  for (int i = 0; i < count; ++i) threads[i].fiber.start(stacks + i * kStack, thread_main);

  const int warp_count = static_cast<int>(warps.size());
  for (;;) {
    for (int i = 0; i < warp_count; ++i) run_warp(options.highest_first ? warp_count - 1 - i : i);
    int done = 0;
    for (Thread& thread : threads) done += thread.state == State::kDone;
    if (done == count) return;
    if (done > 0) die("some threads ended while others wait at a barrier");
    for (Thread& thread : threads) thread.state = State::kReady;
  }
}

}  // namespace

int lane() { return current % kWarp; }

void block_barrier() { wait(State::kBarrier); }

uint64_t exchange(unsigned mask, uint64_t value, int from) {
  Thread& self = threads[current];
  if (!(mask >> lane() & 1)) die("a lane shuffles with a mask that leaves it out");
  if (!(mask >> from & 1)) die("a lane reads one that is not in the mask");
  uint64_t* values = warps[current / kWarp].values[self.exchanges % 2];
  values[lane()] = value;
  self.mask = mask;
  wait(State::kExchange);
  ++self.exchanges;
  return values[from];
}

void run_grid(int64_t blocks, int count, void (*kernel)(const void*), const void* context) {
  constexpr int kMostThreads = 1024;
  if (blocks <= 0 || blocks > INT32_MAX) die("a grid of no or too many blocks");
  if (count <= 0 || count > kMostThreads) die("a block of no or too many threads");
  if (stacks == nullptr) {
    stacks = static_cast<char*>(mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED) die("no memory for stacks");
  }
  kernel_of_grid = kernel;
  context_of_grid = context;
  block_dim.x = static_cast<unsigned>(count);
  grid_dim.x = static_cast<unsigned>(std::min(blocks, options.most_blocks));
  for (unsigned b = 0; b < grid_dim.x; ++b) {
    if (options.only_block >= 0 && b != options.only_block) continue;
    block_index.x = b;
    run_block(count);
  }
}

}  // namespace simt
