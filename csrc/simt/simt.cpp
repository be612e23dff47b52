// The scheduler of the fibers; see simt.h.
#include "simt/simt.h"

#include <ucontext.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define MAGSD_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MAGSD_ASAN
#endif
#endif
#if defined(MAGSD_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

constexpr std::size_t kStackBytes = 256 * 1024;
constexpr std::size_t kMostShared = 227 * 1024;
constexpr std::size_t kMostStaticShared = 48 * 1024;
constexpr int kMostThreads = 1024;

enum class State { kReady, kAtBarrier, kAtExchange, kDone };

// One direction of a change of context, told to AddressSanitizer where it watches.
void change_context([[maybe_unused]] void** fake_stack, ucontext_t* from, ucontext_t* to,
                    [[maybe_unused]] const void* stack, [[maybe_unused]] std::size_t bytes) {
#if defined(MAGSD_ASAN)
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#endif
  swapcontext(from, to);
#if defined(MAGSD_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack == nullptr ? nullptr : *fake_stack, nullptr, nullptr);
#endif
}

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  State state;
  void* fake_stack;
};

// What the lanes of a warp give each other; two sets of slots, so that a lane may go on to the next
// exchange while others still read this one.
struct Warp {
  alignas(16) unsigned char slots[2][kLanes * kExchangeBytes];
  unsigned generation = 0;
  int arrived = 0, kind = 0;
  std::size_t bytes = 0;
};

class Block {
 public:
  // Stacks serve one block after another.
  void run(const Position& where, std::size_t shared_bytes, const std::function<void()>& body,
           std::uint64_t seed);

  Position at;
  std::size_t running = 0;
  const std::function<void()>* body = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<const void*, std::pair<void*, std::size_t>> arrays;
  void* dynamic = nullptr;
  std::size_t static_bytes = 0;
  bool any = false, any_before = false;
  std::string error;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_bytes = 0;

  void wait(State state);
  void start(std::size_t count);
  void resume(std::size_t i);
  void release_barrier();
  void free_shared();
};

thread_local Block* block = nullptr;

void enter() {
#if defined(MAGSD_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_bytes);
#endif
  (*block->body)();
  block->fibers[block->running].state = State::kDone;
#if defined(MAGSD_ASAN)
  // Null: this fiber's fake stack is not needed again.
  __sanitizer_start_switch_fiber(nullptr, block->scheduler_stack, block->scheduler_bytes);
#endif
  setcontext(&block->scheduler);
}

void* allocate(std::size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max<std::size_t>(bytes, 1)) != 0) throw std::bad_alloc();
  std::memset(memory, 0xff, bytes);
  return memory;
}

void Block::wait(State state) {
  Fiber& fiber = fibers[running];
  fiber.state = state;
  change_context(&fiber.fake_stack, &fiber.context, &scheduler, scheduler_stack, scheduler_bytes);
}

void Block::start(std::size_t count) {
  while (fibers.size() < count) {
    fibers.emplace_back();
    fibers.back().stack.reset(new unsigned char[kStackBytes]);
  }
  for (std::size_t i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.state = State::kReady;
    fiber.fake_stack = nullptr;
  }
}

void Block::resume(std::size_t i) {
  running = i;
  at.thread = {static_cast<unsigned>(i), 0, 0};
  change_context(&scheduler_fake_stack, &scheduler, &fibers[i].context, fibers[i].stack.get(),
                 kStackBytes);
}

void Block::release_barrier() {
  any_before = any;
  any = false;
  for (Fiber& fiber : fibers) {
    if (fiber.state == State::kAtBarrier) fiber.state = State::kReady;
  }
}

void Block::free_shared() {
  for (auto& [site, array] : arrays) std::free(array.first);
  arrays.clear();
  std::free(dynamic);
  dynamic = nullptr;
  static_bytes = 0;
}

void Block::run(const Position& where, std::size_t shared_bytes, const std::function<void()>& task,
                std::uint64_t seed) {
  at = where;
  body = &task;
  const std::size_t count = where.block_size.x;
  start(count);
  warps.assign(count / kLanes, Warp{});
  dynamic = allocate(shared_bytes);
  std::vector<std::size_t> order(count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  while (error.empty()) {
    bool moved = false;
    for (std::size_t i = count - 1; i > 0; --i) {
      seed = seed * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(order[i], order[(seed >> 33) % (i + 1)]);
    }
    for (const std::size_t i : order) {
      if (fibers[i].state != State::kReady || !error.empty()) continue;
      moved = true;
      resume(i);
    }
    if (moved || !error.empty()) continue;
    std::size_t done = 0, at_barrier = 0;
    for (std::size_t i = 0; i < count; ++i) {
      done += fibers[i].state == State::kDone;
      at_barrier += fibers[i].state == State::kAtBarrier;
    }
    if (done == count) break;
    if (at_barrier == count) {
      release_barrier();
    } else {
      error = "of " + std::to_string(count) + " threads of a block " +
              std::to_string(at_barrier) + " wait at __syncthreads, " +
              std::to_string(count - done - at_barrier) + " at a warp function, " +
              std::to_string(done) + " have ended: they would wait for ever";
    }
  }
  free_shared();
}

Block& current() {
  if (block == nullptr) throw std::runtime_error("a kernel was called outside simt::launch");
  return *block;
}

}  // namespace

const Position& position() { return block->at; }

void fail(const char* why) {
  Block& here = current();
  if (here.error.empty()) here.error = why;
  here.wait(State::kDone);
  std::abort();  // A fiber that failed is not resumed.
}

void barrier() { current().wait(State::kAtBarrier); }

bool barrier_or(bool value) {
  current().any |= value;
  current().wait(State::kAtBarrier);
  return current().any_before;
}

const unsigned char* exchange(const void* value, std::size_t bytes, unsigned mask, int kind) {
  Block& here = current();
  if (mask != 0xffffffffu) fail("a warp function was called with a mask of less than a warp");
  const std::size_t index = here.running, lane = index % kLanes;
  Warp& warp = here.warps[index / kLanes];
  if (warp.arrived > 0 && (warp.kind != kind || warp.bytes != bytes)) {
    fail("the lanes of a warp stand at different warp functions");
  }
  warp.kind = kind;
  warp.bytes = bytes;
  unsigned char* slots = warp.slots[warp.generation % 2];
  std::memcpy(slots + lane * kExchangeBytes, value, bytes);
  if (++warp.arrived == kLanes) {
    warp.arrived = 0;
    ++warp.generation;
    const std::size_t first = index - lane;
    for (std::size_t i = first; i < first + kLanes; ++i) {
      if (here.fibers[i].state == State::kAtExchange) here.fibers[i].state = State::kReady;
    }
  } else {
    here.wait(State::kAtExchange);
  }
  return slots;
}

void* shared(const void* site, std::size_t bytes) {
  Block& here = current();
  auto& array = here.arrays[site];
  if (array.first == nullptr) {
    array = {allocate(bytes), bytes};
    here.static_bytes += bytes;
    if (here.static_bytes > kMostStaticShared) fail("a block declares more than 48 KB shared");
  }
  return array.first;
}

void* dynamic_shared() { return current().dynamic; }

void launch(dim3 grid, int threads, std::size_t shared_bytes, const std::function<void()>& body) {
  if (threads < 1 || threads > kMostThreads || threads % kLanes != 0) {
    throw std::runtime_error("a block must hold 32 to 1024 threads, a multiple of 32; got " +
                             std::to_string(threads));
  }
  if (shared_bytes > kMostShared) throw std::runtime_error("too much dynamic shared memory");
  static thread_local Block stacks;
  if (block != nullptr) throw std::runtime_error("a kernel launches a kernel");
  block = &stacks;
  stacks.error.clear();
  const std::size_t count = std::size_t{grid.x} * grid.y * grid.z;
  // Steps through the blocks by a number without a common divisor.
  std::size_t step = count / 2 + 1;
  while (std::gcd(step, count) != 1) ++step;
  std::size_t rank = count / 3;
  for (std::size_t i = 0; i < count && stacks.error.empty(); ++i, rank = (rank + step) % count) {
    Position where{};
    where.block = {static_cast<unsigned>(rank % grid.x),
                   static_cast<unsigned>(rank / grid.x % grid.y),
                   static_cast<unsigned>(rank / grid.x / grid.y)};
    where.grid_size = grid;
    where.block_size = dim3(static_cast<unsigned>(threads));
    stacks.run(where, shared_bytes, body, rank + 1);
  }
  block = nullptr;
  if (!stacks.error.empty()) throw std::runtime_error("emulated kernel: " + stacks.error);
}

}  // namespace simt
