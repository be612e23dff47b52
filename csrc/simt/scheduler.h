// What runs: fibers, in the blocks of a cluster. See simt.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "simt/context.h"
#include "simt/simt.h"

namespace simt {

enum class State { kReady, kAtBarrier, kAtExchange, kAtClusterBarrier, kDone };

// At the cluster's barrier: released once all threads have arrived, none after the wait.
enum class Arrival { kNone, kArrived, kReleased };

struct Fiber {
  Context context;
  State state = State::kReady;
  Arrival arrival = Arrival::kNone;
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

struct Array {
  unsigned char* memory = nullptr;
  std::size_t bytes = 0;

  void allocate(std::size_t count);
  void poison() { std::memset(memory, 0xff, bytes); }
  bool holds(const void* address) const {
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    const auto first = reinterpret_cast<std::uintptr_t>(memory);
    return at >= first && at < first + bytes;
  }
};

class Cluster;

// Stacks serve one block after another.
class Block {
 public:
  explicit Block(Cluster& of) : cluster(of) {}

  void start(const Position& where, std::size_t shared_bytes);
  bool take_turn(std::uint64_t& seed);
  void wait(State state);
  void finish();
  bool has_arrivals() const;
  [[noreturn]] void fail(const std::string& why);
  void require_same(const char* who, const Site& first, const Site& here);
  void* array_of(const void* site, std::size_t bytes);
  std::size_t count(State state) const;
  void free_shared();

  Cluster& cluster;
  Position at;
  std::size_t running = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<const void*, Array> arrays;
  Array dynamic;
  std::size_t static_bytes = 0;
  std::size_t at_barrier = 0;
  Site barrier_site{};
  bool any = false, any_before = false;
  Context scheduler;

 private:
  void resume(std::size_t i);
  void release_barrier();

  std::vector<std::size_t> order_;
  bool ended_ = false;
};

// Blocks that run side by side.
class Cluster {
 public:
  void run(const Position& first, int size, std::size_t shared_bytes, std::uint64_t& seed);
  void release_barrier();

  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Block>> blocks;
  std::size_t size = 0, arrived = 0;
  Site barrier_site{};
  std::string error;

 private:
  std::size_t threads() const { return size * blocks[0]->at.block_size.x; }
  std::string deadlock() const;
};

// The block that runs; an error where none does.
Block& current();

inline std::uint64_t next(std::uint64_t& seed) {
  seed = seed * 6364136223846793005ull + 1442695040888963407ull;
  return seed >> 33;
}

inline void shuffle_order(std::vector<std::size_t>& order, std::uint64_t& seed) {
  for (std::size_t i = order.size(); i-- > 1;) std::swap(order[i], order[next(seed) % (i + 1)]);
}

}  // namespace simt
