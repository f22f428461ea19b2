// The scheduler of simt.h: fibers of one block, resumed in turn until all are done.
#include "simt.h"

#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

dim3 thread_index, block_index, block_size;
unsigned char* dynamic_shared = nullptr;
int shared_limit = kMostShared;
unsigned schedule = 0;
int64_t begun = 0;

void check_begun(int64_t threads) {
  if (begun != threads) throw std::runtime_error("a thread did not call begin_dependent()");
}

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kMostThreads = 1024;
constexpr int kWarpSize = 32;
constexpr unsigned char kPoison = 0xcd;  // shared memory is not zero when a block starts

enum class State : char { kReady, kAtBlockBarrier, kInWarpCollective, kDone };

// ---- switching --------------------------------------------------------------------------------
void fiber_main();

#if defined(__x86_64__)
// ucontext would ask the kernel for the signal mask at each switch; this is a hundred times faster.
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
void prepare(Context& context, char* stack) {
  auto** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // alignment: as after a call
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
void switch_to(Context& from, Context& to) { simt_switch(&from.stack_pointer, to.stack_pointer); }
#else
struct Context {
  ucontext_t context;
};
void prepare(Context& context, char* stack) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStackBytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, fiber_main, 0);
}
void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

struct Fiber {
  Context context;
  State state = State::kReady;
  std::unique_ptr<char[]> stack;
};

struct Warp {
  int waiting = 0;
  alignas(64) unsigned char slots[2][kWarpSize * kSlotBytes];
};

std::vector<Fiber> fibers(kMostThreads);
std::vector<Warp> warps(kMostThreads / kWarpSize);
std::vector<int> turns(kMostThreads);  // collectives each thread has entered: they alternate
                                       // between two sets of slots, so that one wait each is enough
Context scheduler;
const std::function<void()>* body = nullptr;
int current = 0, count = 0, at_barrier = 0, done = 0;
bool votes = false, voted = false;  // of the barrier that threads come to, of the one they left
const char* failure = nullptr;

void fiber_main() {
  (*body)();
  fibers[static_cast<size_t>(current)].state = State::kDone;
  ++done;
  switch_to(fibers[static_cast<size_t>(current)].context, scheduler);
}

void pause(State state) {
  Fiber& fiber = fibers[static_cast<size_t>(current)];
  fiber.state = state;
  switch_to(fiber.context, scheduler);
}

// Exceptions cannot leave a fiber: the scheduler throws on its behalf.
void fail(const char* what) {
  failure = what;
  pause(State::kDone);
}

void release(int begin, int end) {
  for (int i = begin; i < end; ++i) fibers[static_cast<size_t>(i)].state = State::kReady;
}

// Resumes the ready ones of 32 threads, and tells whether there were any.
bool resume_lanes(std::vector<int>::const_iterator threads) {
  bool any = false;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int i = threads[lane];
    Fiber& fiber = fibers[static_cast<size_t>(i)];
    if (fiber.state != State::kReady) continue;
    any = true;
    current = i;
    thread_index = dim3(static_cast<unsigned>(i));
    switch_to(scheduler, fiber.context);
    if (failure) throw std::runtime_error(failure);
  }
  return any;
}

// The threads of a block, warp by warp, in the order that they are resumed in.
std::vector<int> resume_order() {
  std::vector<int> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  if (schedule == 1) std::reverse(order.begin(), order.end());
  if (schedule > 1) {
    std::mt19937 random(schedule);
    std::vector<int> first(static_cast<size_t>(count / kWarpSize));
    std::iota(first.begin(), first.end(), 0);
    std::shuffle(first.begin(), first.end(), random);
    for (int i = 0; i < count; ++i) {
      order[static_cast<size_t>(i)] =
          first[static_cast<size_t>(i / kWarpSize)] * kWarpSize + i % kWarpSize;
    }
    for (auto warp = order.begin(); warp != order.end(); warp += kWarpSize) {
      std::shuffle(warp, warp + kWarpSize, random);
    }
  }
  return order;
}

void run_block(const std::vector<int>& order) {
  at_barrier = done = 0;
  votes = false;
  failure = nullptr;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[static_cast<size_t>(i)];
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    prepare(fiber.context, fiber.stack.get());
    fiber.state = State::kReady;
    turns[static_cast<size_t>(i)] = 0;
  }
  for (Warp& warp : warps) warp.waiting = 0;
  while (done < count) {
    bool progress = false;
    // Each warp runs as far as it gets before the next one starts: warps drift apart as much as
    // barriers allow, which is what shows a missing one.
    for (auto warp = order.begin(); warp != order.end(); warp += kWarpSize) {
      while (resume_lanes(warp)) progress = true;
    }
    if (!progress) {
      throw std::runtime_error("kernel deadlock: " + std::to_string(at_barrier) +
                               " threads at a block barrier, " + std::to_string(done) +
                               " done, of " + std::to_string(count));
    }
  }
}

}  // namespace

int lane() { return current % kWarpSize; }

void block_barrier() {
  if (++at_barrier == count) {  // all threads, none of them gone
    at_barrier = 0;
    release(0, count);
    fibers[static_cast<size_t>(current)].state = State::kReady;
    switch_to(fibers[static_cast<size_t>(current)].context, scheduler);
    return;
  }
  pause(State::kAtBlockBarrier);
}

bool block_barrier_or(bool vote) {
  votes = votes || vote;
  if (at_barrier + 1 == count) {  // the last one: its barrier is left by all with what they said
    voted = votes;
    votes = false;
  }
  block_barrier();
  return voted;
}

const unsigned char* exchange(unsigned mask, const void* value, int bytes) {
  if (mask != ~0u) fail("warp collective without all lanes");
  const int own = current, first = own / kWarpSize * kWarpSize;
  Warp& warp = warps[static_cast<size_t>(own / kWarpSize)];
  unsigned char* slots = warp.slots[turns[static_cast<size_t>(own)]++ & 1];
  std::memcpy(slots + (own - first) * kSlotBytes, value, static_cast<size_t>(bytes));
  if (++warp.waiting == kWarpSize) {
    warp.waiting = 0;
    release(first, first + kWarpSize);
    switch_to(fibers[static_cast<size_t>(own)].context, scheduler);
  } else {
    pause(State::kInWarpCollective);
  }
  return slots;
}

int run_grid(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (threads % kWarpSize || threads > kMostThreads) throw std::runtime_error("odd block size");
  if (shared_bytes > kMostShared) return 1;  // cudaErrorInvalidValue
  std::vector<unsigned char> memory(static_cast<size_t>(shared_bytes) + 128, kPoison);
  const auto misaligned = reinterpret_cast<uintptr_t>(memory.data()) % 128;
  dynamic_shared = memory.data() + (128 - misaligned);
  body = &kernel;
  count = threads;
  block_size = dim3(static_cast<unsigned>(threads));
  const std::vector<int> order = resume_order();
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned b = 0; b < blocks; ++b) {
    std::fill(memory.begin(), memory.end(), kPoison);
    block_index = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    run_block(order);
  }
  return 0;
}

}  // namespace simt
