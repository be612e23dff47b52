// The scheduler of the fibers; see simt.h.
#include "simt/simt.h"

#include <atomic>
#include <cstdlib>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "simt/context.h"

namespace simt {
namespace {

constexpr std::size_t kMostShared = 227 * 1024;
constexpr std::size_t kMostStaticShared = 48 * 1024;
constexpr int kMostThreads = 1024;
constexpr unsigned kMostBlocksX = 2147483647, kMostBlocksYZ = 65535;

enum class State { kReady, kAtBarrier, kAtExchange, kDone };

struct Fiber {
  Context context;
  State state = State::kReady;
};

// What the lanes of a warp give each other; two sets of slots, so that a lane may go on to the next
// exchange while others still read this one.
struct Warp {
  alignas(16) unsigned char slots[2][kLanes * kExchangeBytes];
  unsigned generation = 0;
  int arrived = 0;
  Site site{};
  std::size_t bytes = 0;
};

// Stacks serve one block after another.
class Block {
 public:
  void run(const Position& where, std::size_t shared_bytes, const std::function<void()>& task,
           std::uint64_t& seed);
  void wait(State state);
  void finish();
  [[noreturn]] void fail(const std::string& why);
  void require_same(const char* who, const Site& first, const Site& here);

  Position at;
  std::size_t running = 0;
  const std::function<void()>* body = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<const void*, void*> arrays;
  void* dynamic = nullptr;
  std::size_t static_bytes = 0, dynamic_bytes = 0;
  std::size_t at_barrier = 0;
  Site barrier_site{};
  bool any = false, any_before = false;
  std::string error;
  Context scheduler;

 private:
  void resume(std::size_t i);
  void release_barrier();
  void free_shared();
  std::string deadlock() const;
};

thread_local Block* block = nullptr;
std::atomic<std::uint64_t> launches{0}, blocks{0};
std::atomic<int> emulated_multiprocessors{2};

Block& current() {
  if (block == nullptr) throw std::runtime_error("a kernel was called outside simt::launch");
  return *block;
}

void enter() {
  Context::arrived(block->scheduler);
  (*block->body)();
  block->finish();
}

void* allocate(std::size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max<std::size_t>(bytes, 1)) != 0) throw std::bad_alloc();
  std::memset(memory, 0xff, bytes);
  return memory;
}

std::uint64_t next(std::uint64_t& seed) {
  seed = seed * 6364136223846793005ull + 1442695040888963407ull;
  return seed >> 33;
}

void Block::wait(State state) {
  Fiber& fiber = fibers[running];
  fiber.state = state;
  fiber.context.change_to(scheduler);
}

void Block::finish() {
  Fiber& fiber = fibers[running];
  fiber.state = State::kDone;
  fiber.context.change_to(scheduler, true);
}

void Block::fail(const std::string& why) {
  if (error.empty()) error = why;
  wait(State::kDone);
  std::abort();  // A fiber that failed is not resumed.
}

void Block::require_same(const char* who, const Site& first, const Site& here) {
  if (first.line == here.line && std::strcmp(first.function, here.function) == 0) return;
  const auto name = [](const Site& site) {
    return std::string(site.function) + " in line " + std::to_string(site.line);
  };
  fail(std::string(who) + " stand at different places: " + name(first) + " and " + name(here));
}

void Block::resume(std::size_t i) {
  running = i;
  at.thread = {static_cast<unsigned>(i), 0, 0};
  scheduler.change_to(fibers[i].context);
}

void Block::release_barrier() {
  at_barrier = 0;
  any_before = any;
  any = false;
  for (Fiber& fiber : fibers) {
    if (fiber.state == State::kAtBarrier) fiber.state = State::kReady;
  }
}

void Block::free_shared() {
  for (auto& [site, array] : arrays) std::free(array);
  arrays.clear();
  std::free(dynamic);
  dynamic = nullptr;
  static_bytes = 0;
}

std::string Block::deadlock() const {
  std::size_t done = 0;
  for (std::size_t i = 0; i < at.block_size.x; ++i) done += fibers[i].state == State::kDone;
  return "of " + std::to_string(at.block_size.x) + " threads of a block " +
         std::to_string(at_barrier) + " wait at __syncthreads, " +
         std::to_string(at.block_size.x - done - at_barrier) + " at a warp function, " +
         std::to_string(done) + " have ended: they would wait for ever";
}

void Block::run(const Position& where, std::size_t shared_bytes, const std::function<void()>& task,
                std::uint64_t& seed) {
  at = where;
  body = &task;
  at_barrier = 0;
  any = false;
  const std::size_t count = where.block_size.x;
  if (fibers.size() < count) fibers.resize(count);
  for (std::size_t i = 0; i < count; ++i) {
    fibers[i].context.start(enter);
    fibers[i].state = State::kReady;
  }
  warps.assign(count / kLanes, Warp{});
  dynamic = allocate(shared_bytes);
  dynamic_bytes = shared_bytes;
  std::vector<std::size_t> order(count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  bool moved = true;
  while (moved && error.empty()) {
    if (at_barrier == count) release_barrier();
    moved = false;
    for (std::size_t i = count - 1; i > 0; --i) std::swap(order[i], order[next(seed) % (i + 1)]);
    for (const std::size_t i : order) {
      if (fibers[i].state != State::kReady || !error.empty()) continue;
      moved = true;
      resume(i);
    }
  }
  const auto done = [](const Fiber& fiber) { return fiber.state == State::kDone; };
  const auto last = fibers.begin() + static_cast<std::ptrdiff_t>(count);
  if (error.empty() && !std::all_of(fibers.begin(), last, done)) error = deadlock();
  free_shared();
}

}  // namespace

const Position& position() { return current().at; }

void barrier(const Site& site) {
  Block& here = current();
  if (here.at_barrier == 0) here.barrier_site = site;
  here.require_same("the threads of a block", here.barrier_site, site);
  ++here.at_barrier;
  here.wait(State::kAtBarrier);
}

bool barrier_or(bool value, const Site& site) {
  current().any |= value;
  barrier(site);
  return current().any_before;
}

const unsigned char* exchange(const void* value, std::size_t bytes, unsigned mask,
                              const Site& site) {
  Block& here = current();
  if (mask != 0xffffffffu) here.fail("a warp function was called with a mask of less than a warp");
  const std::size_t index = here.running, lane = index % kLanes;
  Warp& warp = here.warps[index / kLanes];
  if (warp.arrived == 0) {
    warp.site = site;
    warp.bytes = bytes;
  }
  here.require_same("the lanes of a warp", warp.site, site);
  if (warp.bytes != bytes) here.fail("the lanes of a warp exchange values of different types");
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
  void*& array = here.arrays[site];
  if (array == nullptr) {
    array = allocate(bytes);
    here.static_bytes += bytes;
    if (here.static_bytes > kMostStaticShared) here.fail("a block declares more than 48 KB shared");
    if (here.static_bytes + here.dynamic_bytes > kMostShared) {
      here.fail("a block has more than 227 KB shared, declared and dynamic");
    }
  }
  return array;
}

void fail(const char* why) {
  current().fail(why);
  std::abort();
}

int multiprocessors() { return emulated_multiprocessors; }

void* dynamic_shared() { return current().dynamic; }

void launch(dim3 grid, int threads, std::size_t shared_bytes, const std::function<void()>& body) {
  const auto require = [](bool holds, const std::string& why) {
    if (!holds) throw std::runtime_error("emulated kernel: " + why);
  };
  require(threads >= 1 && threads <= kMostThreads && threads % kLanes == 0,
          "a block must hold 32 to 1024 threads, a multiple of 32; got " + std::to_string(threads));
  const auto within = [](unsigned blocks, unsigned most) { return blocks >= 1 && blocks <= most; };
  require(within(grid.x, kMostBlocksX) && within(grid.y, kMostBlocksYZ) &&
              within(grid.z, kMostBlocksYZ),
          "a grid of no block, or of more than can be launched");
  require(shared_bytes <= kMostShared, "too much dynamic shared memory");
  require(block == nullptr, "a kernel launches a kernel");
  static thread_local Block stacks;
  static thread_local std::uint64_t seed = 1;
  ++launches;
  block = &stacks;
  stacks.error.clear();
  const std::size_t count = std::size_t{grid.x} * grid.y * grid.z;
  blocks += count;
  // Steps through the blocks by a number without a common divisor.
  std::size_t step = 1 + next(seed) % count;
  while (std::gcd(step, count) != 1) ++step;
  std::size_t rank = next(seed) % count;
  for (std::size_t i = 0; i < count && stacks.error.empty(); ++i, rank = (rank + step) % count) {
    Position where{};
    where.block = {static_cast<unsigned>(rank % grid.x),
                   static_cast<unsigned>(rank / grid.x % grid.y),
                   static_cast<unsigned>(rank / grid.x / grid.y)};
    where.grid_size = grid;
    where.block_size = dim3(static_cast<unsigned>(threads));
    stacks.run(where, shared_bytes, body, seed);
  }
  block = nullptr;
  // AddressSanitizer's marks of what was not left stay on the stacks.
  if (!stacks.error.empty()) stacks.fibers.clear();
  require(stacks.error.empty(), stacks.error);
}

}  // namespace simt

// Launches in this process so far, for tests that hold an operator to a number of them.
extern "C" __attribute__((visibility("default"))) std::uint64_t magsd_emulated_launches() {
  return simt::launches;
}

// Blocks of these launches, for tests of how work is spread.
extern "C" __attribute__((visibility("default"))) std::uint64_t magsd_emulated_blocks() {
  return simt::blocks;
}

// Gives the emulated GPU so many multiprocessors, by which kernels size their grids; how many it
// had.
extern "C" __attribute__((visibility("default"))) int magsd_emulate_multiprocessors(int count) {
  return simt::emulated_multiprocessors.exchange(count);
}
