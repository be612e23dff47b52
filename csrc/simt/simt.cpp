// The threads of a block, and launches; see simt.h and, for clusters, cluster.cpp.
#include "simt/simt.h"

#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "simt/scheduler.h"

namespace simt {
namespace {

constexpr std::size_t kMostShared = 227 * 1024;
constexpr std::size_t kMostStaticShared = 48 * 1024;
constexpr unsigned kMostBlocksX = 2147483647, kMostBlocksYZ = 65535;

thread_local Block* block = nullptr;  // that runs
std::atomic<std::uint64_t> launches{0}, launched_blocks{0};
std::atomic<int> emulated_multiprocessors{2}, emulated_capability{90};

void enter() {
  Context::arrived(block->scheduler);
  (*block->cluster.body)();
  block->finish();
}

}  // namespace

Block& current() {
  if (block == nullptr) throw std::runtime_error("a kernel was called outside simt::launch");
  return *block;
}

void Array::allocate(std::size_t count) {
  void* address = nullptr;
  if (posix_memalign(&address, 128, std::max<std::size_t>(count, 1)) != 0) throw std::bad_alloc();
  memory = static_cast<unsigned char*>(address);
  bytes = count;
  poison();
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
  if (cluster.error.empty()) cluster.error = why;
  wait(State::kDone);
  std::abort();  // A fiber that failed is not resumed.
}

void Block::require_same(const char* who, const Site& first, const Site& here) {
  if (first.line == here.line && std::strcmp(first.function, here.function) == 0) return;
  const auto name = [](const Site& site) {
    return std::string(site.function) + " in line " + std::to_string(site.line);
  };
  fail(std::string(who) + " stand at different positions: " + name(first) + " and " + name(here));
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

void* Block::array_of(const void* site, std::size_t bytes) {
  Array& array = arrays[site];
  if (array.memory == nullptr) {
    array.allocate(bytes);
    static_bytes += bytes;
  }
  return array.memory;
}

void Block::free_shared() {
  for (auto& entry : arrays) std::free(entry.second.memory);
  arrays.clear();
  std::free(dynamic.memory);
  dynamic = {};
  static_bytes = 0;
}

std::size_t Block::count(State state) const {
  std::size_t found = 0;
  for (std::size_t i = 0; i < at.block_size.x; ++i) found += fibers[i].state == state;
  return found;
}

bool Block::has_arrivals() const {
  return std::any_of(fibers.begin(), fibers.begin() + static_cast<std::ptrdiff_t>(at.block_size.x),
                     [](const Fiber& fiber) { return fiber.arrival != Arrival::kNone; });
}

void Block::start(const Position& where, std::size_t shared_bytes) {
  at = where;
  at_barrier = 0;
  any = false;
  ended_ = false;
  const std::size_t threads = where.block_size.x;
  if (fibers.size() < threads) fibers.resize(threads);
  for (std::size_t i = 0; i < threads; ++i) {
    fibers[i].context.start(enter);
    fibers[i].state = State::kReady;
    fibers[i].arrival = Arrival::kNone;
  }
  warps.assign(threads / kLanes, Warp{});
  dynamic.allocate(shared_bytes);
  order_.resize(threads);
  std::iota(order_.begin(), order_.end(), std::size_t{0});
}

// Runs every fiber that can; whether there was one.
bool Block::take_turn(std::uint64_t& seed) {
  block = this;
  if (at_barrier == at.block_size.x) release_barrier();
  bool moved = false;
  shuffle_order(order_, seed);
  for (const std::size_t i : order_) {
    if (fibers[i].state != State::kReady || !cluster.error.empty()) continue;
    moved = true;
    resume(i);
  }
  if (!ended_ && count(State::kDone) == at.block_size.x) {
    ended_ = true;
    for (auto& entry : arrays) entry.second.poison();
    dynamic.poison();
  }
  return moved;
}

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
  void* array = here.array_of(site, bytes);
  if (here.static_bytes > kMostStaticShared) here.fail("a block declares more than 48 KB shared");
  if (here.static_bytes + here.dynamic.bytes > kMostShared) {
    here.fail("a block has more than 227 KB shared, declared and dynamic");
  }
  return array;
}

void fail(const char* why) {
  current().fail(why);
  std::abort();
}

int multiprocessors() { return emulated_multiprocessors; }

void* dynamic_shared() { return current().dynamic.memory; }

int capability() { return emulated_capability; }

void launch(const LaunchShape& shape, const std::function<void()>& body) {
  const dim3 grid = shape.grid;
  const int threads = shape.threads, cluster = shape.cluster;
  const auto require = [](bool holds, const std::string& why) {
    if (!holds) throw std::runtime_error("emulated kernel: " + why);
  };
  require(threads >= 1 && threads <= kMostThreads && threads % kLanes == 0,
          "a block must hold 32 to 1024 threads, a multiple of 32; got " + std::to_string(threads));
  const auto within = [](unsigned blocks, unsigned most) { return blocks >= 1 && blocks <= most; };
  require(within(grid.x, kMostBlocksX) && within(grid.y, kMostBlocksYZ) &&
              within(grid.z, kMostBlocksYZ),
          "a grid of no block, or of more than can be launched");
  require(shape.shared <= kMostShared, "too much dynamic shared memory");
  require(cluster == 1 || capability() >= 90, "this GPU has no clusters");
  require(
      cluster >= 1 && cluster <= kMostClusterBlocks && grid.x % static_cast<unsigned>(cluster) == 0,
      "a cluster must hold 1 to 8 blocks and divide the grid; got " + std::to_string(cluster) +
          " of " + std::to_string(grid.x));
  require(block == nullptr, "a kernel launches a kernel");
  static thread_local Cluster stacks;
  static thread_local std::uint64_t seed = 1;
  ++launches;
  stacks.body = &body;
  stacks.error.clear();
  const unsigned columns = grid.x / static_cast<unsigned>(cluster);
  const std::size_t count = std::size_t{columns} * grid.y * grid.z;
  launched_blocks += count * static_cast<unsigned>(cluster);
  // Steps through the clusters by a number without a common divisor.
  std::size_t step = 1 + next(seed) % count;
  while (std::gcd(step, count) != 1) ++step;
  std::size_t rank = next(seed) % count;
  for (std::size_t i = 0; i < count && stacks.error.empty(); ++i, rank = (rank + step) % count) {
    Position where{};
    where.block = {static_cast<unsigned>(rank % columns) * static_cast<unsigned>(cluster),
                   static_cast<unsigned>(rank / columns % grid.y),
                   static_cast<unsigned>(rank / columns / grid.y)};
    where.grid_size = grid;
    where.block_size = dim3(static_cast<unsigned>(threads));
    stacks.run(where, cluster, shape.shared, seed);
  }
  block = nullptr;
  const std::string error = stacks.error;
  // AddressSanitizer's marks of what was not left stay on the stacks.
  if (!error.empty()) stacks.blocks.clear();
  require(error.empty(), error);
}

}  // namespace simt

// Launches in this process so far, for tests that hold an operator to a number of them.
extern "C" __attribute__((visibility("default"))) std::uint64_t magsd_emulated_launches() {
  return simt::launches;
}

// Blocks of these launches, for tests of how work is spread.
extern "C" __attribute__((visibility("default"))) std::uint64_t magsd_emulated_blocks() {
  return simt::launched_blocks;
}

// Gives the emulated GPU so many multiprocessors, by which kernels size their grids; how many it
// had.
extern "C" __attribute__((visibility("default"))) int magsd_emulate_multiprocessors(int count) {
  return simt::emulated_multiprocessors.exchange(count);
}

// Makes the emulated GPU one of this compute capability, major and minor digit, for tests of what
// the kernels do on it.
extern "C" __attribute__((visibility("default"))) void magsd_emulate_capability(int capability) {
  simt::emulated_capability = capability;
}
