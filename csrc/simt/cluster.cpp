// Blocks of a cluster: their turns, their barrier, what they read of one another; see simt.h.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "simt/scheduler.h"

namespace simt {

void Cluster::release_barrier() {
  arrived = 0;
  for (std::size_t b = 0; b < size; ++b) {
    for (Fiber& fiber : blocks[b]->fibers) {
      if (fiber.arrival == Arrival::kArrived) fiber.arrival = Arrival::kReleased;
      if (fiber.state == State::kAtClusterBarrier) fiber.state = State::kReady;
    }
  }
}

std::string Cluster::deadlock() const {
  std::size_t at_barrier = 0, at_exchange = 0, at_cluster = 0, done = 0;
  for (std::size_t b = 0; b < size; ++b) {
    at_barrier += blocks[b]->count(State::kAtBarrier);
    at_exchange += blocks[b]->count(State::kAtExchange);
    at_cluster += blocks[b]->count(State::kAtClusterBarrier);
    done += blocks[b]->count(State::kDone);
  }
  return "of " + std::to_string(threads()) + " threads of a " + (size > 1 ? "cluster " : "block ") +
         std::to_string(at_barrier) + " wait at __syncthreads, " + std::to_string(at_exchange) +
         " at a warp function, " +
         (size > 1 ? std::to_string(at_cluster) + " at the cluster's barrier, " : "") +
         std::to_string(done) + " have ended: they would wait for ever";
}

void Cluster::run(const Position& first, int count, std::size_t shared_bytes, std::uint64_t& seed) {
  size = static_cast<std::size_t>(count);
  arrived = 0;
  while (blocks.size() < size) blocks.push_back(std::make_unique<Block>(*this));
  std::vector<std::size_t> order(size);
  std::iota(order.begin(), order.end(), std::size_t{0});
  for (const std::size_t rank : order) {
    Position where = first;
    where.block.x += static_cast<unsigned>(rank);
    where.cluster_rank = static_cast<unsigned>(rank);
    where.cluster_size = static_cast<unsigned>(size);
    blocks[rank]->start(where, shared_bytes);
  }
  bool moved = true;
  while (moved && error.empty()) {
    moved = false;
    shuffle_order(order, seed);
    // As far as each can go alone: what it should have waited for has then not happened.
    for (const std::size_t rank : order) {
      while (error.empty() && blocks[rank]->take_turn(seed)) moved = true;
    }
  }
  std::size_t done = 0;
  for (std::size_t b = 0; b < size; ++b) done += blocks[b]->count(State::kDone);
  if (error.empty() && done < threads()) error = deadlock();
  for (std::size_t b = 0; b < size && error.empty(); ++b) {
    if (blocks[b]->has_arrivals()) error = "a thread arrives at its cluster's barrier and ends";
  }
  for (std::size_t b = 0; b < size; ++b) blocks[b]->free_shared();
}

void cluster_arrive(const Site& site) {
  Block& here = current();
  Cluster& cluster = here.cluster;
  Fiber& fiber = here.fibers[here.running];
  if (cluster.arrived == 0) cluster.barrier_site = site;
  here.require_same("the threads of a cluster", cluster.barrier_site, site);
  if (fiber.arrival != Arrival::kNone) {
    here.fail("a thread arrives twice at the barrier of its cluster");
  }
  fiber.arrival = Arrival::kArrived;
  if (++cluster.arrived == cluster.size * here.at.block_size.x) cluster.release_barrier();
}

void cluster_wait() {
  Block& here = current();
  Fiber& fiber = here.fibers[here.running];
  if (fiber.arrival == Arrival::kNone) {
    here.fail("a thread waits at the barrier of its cluster where it did not arrive");
  }
  if (fiber.arrival == Arrival::kArrived) here.wait(State::kAtClusterBarrier);
  fiber.arrival = Arrival::kNone;
}

void* peer_shared(void* mine, int rank) {
  Block& here = current();
  Cluster& cluster = here.cluster;
  if (rank < 0 || static_cast<std::size_t>(rank) >= cluster.size) {
    here.fail("block " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster.size));
  }
  Block& peer = *cluster.blocks[static_cast<std::size_t>(rank)];
  const auto offset_in = [mine](const Array& array) {
    return static_cast<unsigned char*>(mine) - array.memory;
  };
  if (here.dynamic.holds(mine)) return peer.dynamic.memory + offset_in(here.dynamic);
  for (const auto& [site, array] : here.arrays) {
    if (!array.holds(mine)) continue;
    return static_cast<unsigned char*>(peer.array_of(site, array.bytes)) + offset_in(array);
  }
  here.fail("what is asked of a peer does not lie in shared memory");
}

}  // namespace simt
