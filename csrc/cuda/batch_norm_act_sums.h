// Two sums of every channel and group, over several blocks, in one launch.
//
// A block leaves a pair for each of its channels; the last block of a range of channels adds up
// those of all, in double and in a fixed order.
#pragma once

#include "cuda/batch_norm_act.h"
#include "cuda/tickets.h"

namespace magsd::MAGSD_ISA::batch_norm_act {

constexpr int kGroupsAtOnce = 4;  // whose sums the last block reads together

// Two sums of a channel, over a part of it.
struct alignas(16) Pair {
  double first, second;

  __device__ __forceinline__ Pair operator+(const Pair& other) const {
    return {first + other.first, second + other.second};
  }
};

// The counters of a call in which the last block of a range finishes what all left.
inline TicketBook tickets_of(const DeviceScope& scope, const Partition& partition) {
  return tickets_for(scope, partition.parts() > 1 ? partition.ranges : 0);
}

// Memory for the pairs of every group, split and channel.
inline Tensor parts_of(const Partition& partition) {
  static_assert(sizeof(Pair) == 2 * sizeof(double));
  return uninitialized({2 * partition.parts() * partition.channels}, ScalarType::Double);
}

// Adds up the pairs of the warps of a block, which the first kLanes lanes of each hand in, and
// leaves them for the last block. Every thread of the block comes here.
template <typename G>
__device__ __forceinline__ void leave_part(const Partition& p, const Place<G>& place,
                                           const Pair (&pairs)[G::kOwn], Pair* parts) {
  MAGSD_SHARED(Pair, of_warps, [kWarps][G::kOwn * G::kLanes]);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  if (lane < G::kLanes) {
#pragma unroll
    for (int k = 0; k < G::kOwn; ++k) of_warps[thread / kWarp][lane * G::kOwn + k] = pairs[k];
  }
  __syncthreads();
  const int64_t channel = place.range * p.block_channels + thread;
  if (thread >= p.block_channels || channel >= p.channels) return;
  Pair sum{0, 0};
  const int first = G::kLast ? 0 : thread * p.team, warps = G::kLast ? kWarps : p.team;
#pragma unroll 4
  for (int w = 0; w < warps; ++w) sum = sum + of_warps[first + w][G::kLast ? thread : 0];
  parts[(int64_t{place.group} * p.splits + place.split) * p.channels + channel] = sum;
}

// By the last block of a range: calls finish(group, loaded, sums) for every group of `channel`, in
// order, in one thread, the one to which is_finisher() is true; loaded = load(group) is asked for
// while the parts are under way.
template <typename G>
struct Totals {
  static constexpr int kTotalLanes = kThreads / G::kChannels;
  const Partition& p;
  int own, lane;
  int64_t channel;
  bool exists;

  __device__ Totals(const Partition& partition, int64_t range)
      : p(partition),
        own(static_cast<int>(threadIdx.x) % G::kChannels),
        lane(static_cast<int>(threadIdx.x) / G::kChannels),
        channel(range * p.block_channels + own),
        exists(own < p.block_channels && channel < p.channels) {}

  __device__ bool is_finisher() const { return exists && lane == 0; }

  template <typename Load, typename Finish>
  __device__ __forceinline__ void visit(const Pair* parts, const Load& load,
                                        const Finish& finish) const {
    MAGSD_SHARED(Pair, sums, [kGroupsAtOnce][kTotalLanes][G::kChannels]);
    for (int from = 0; from < p.groups; from += kGroupsAtOnce) {
      const int groups = p.groups - from < kGroupsAtOnce ? p.groups - from : kGroupsAtOnce;
      decltype(load(0)) loaded[kGroupsAtOnce] = {};
#pragma unroll
      for (int g = 0; g < kGroupsAtOnce; ++g) {
        if (g < groups && is_finisher()) loaded[g] = load(from + g);
      }
      if (exists) {
        Pair own_sums[kGroupsAtOnce] = {};
        const Pair* at = parts + int64_t{from} * p.splits * p.channels + channel;
#pragma unroll 3
        for (int split = lane; split < p.splits; split += kTotalLanes) {
#pragma unroll
          for (int g = 0; g < kGroupsAtOnce; ++g) {
            if (g < groups) {
              own_sums[g] = own_sums[g] + at[(int64_t{g} * p.splits + split) * p.channels];
            }
          }
        }
#pragma unroll
        for (int g = 0; g < kGroupsAtOnce; ++g) sums[g][lane][own] = own_sums[g];
      }
      __syncthreads();
      if (is_finisher()) {
#pragma unroll
        for (int g = 0; g < kGroupsAtOnce; ++g) {
          if (g >= groups) break;
          Pair sum{0, 0};
#pragma unroll
          for (int i = 0; i < kTotalLanes; ++i) sum = sum + sums[g][i][own];
          finish(from + g, loaded[g], sum);
        }
      }
      __syncthreads();
    }
  }
};

}  // namespace magsd::MAGSD_ISA::batch_norm_act
