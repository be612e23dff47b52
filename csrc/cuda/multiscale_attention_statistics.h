// Statistics of every channel of every scale, in one launch: the first pass of training.
//
// A thread adds up differences from the first value that it meets, a block differences from its own
// mean, and the last block of a group of channels combines the parts by the formula of Chan et al.
// 1983, all in a fixed order: neither a large common mean nor a value far off takes the others'
// digits. The number of parts depends on the sizes and on the number of multiprocessors; results
// are the same from call to call.
#pragma once

#include <cmath>
#include <vector>

#include "cuda/multiscale_attention.h"

namespace magsd::MAGSD_ISA::multiscale_attention {

// Statistics of a part of a channel: its mean is pivot + rest, and deviation the sum of the squared
// differences from it.
template <typename A>
struct alignas(4 * sizeof(A)) Part {
  A count, pivot, rest, deviation;
};

// What is taken of a scale, and what is left of it.
template <typename T>
struct StatisticsScale {
  MapView<const T> map;
  Partition partition;
  Parameter running_mean, running_var;
  int64_t count;                 // values of a channel
  Part<accumulate_t<T>>* parts;  // (channels, splits)
};

template <typename T>
struct Statistics {
  using A = accumulate_t<T>;
  StatisticsScale<T> scales[kMostMaps];
  int64_t starts[kMostMaps + 1];
  int64_t channels, groups;
  A *mean, *rstd;  // (scales, channels)
  double momentum;
  A eps;
  Tickets tickets;  // of every scale and group
};

// What a thread adds up of its channels: differences from the first value that it meets.
template <typename T, bool kLast>
struct ThreadSums {
  using A = accumulate_t<T>;
  using G = Grain<T, kLast>;
  A shift[G::kOwn] = {}, sum[G::kOwn] = {}, squares[G::kOwn] = {};
  int seen = 0;  // values of a channel

  __device__ __forceinline__ void add(const A (&items)[G::kItems], int count) {
#pragma unroll
    for (int k = 0; k < G::kItems; ++k) {
      const int own = kLast ? k : 0;
      if (seen == 0 && own == k) shift[own] = items[k];
      const A apart = kLast || k < count ? items[k] - shift[own] : A{0};
      sum[own] += apart;
      squares[own] += apart * apart;
    }
    seen += kLast ? 1 : count;
  }

  template <bool kVectorized>
  __device__ __forceinline__ void add_part(const MapView<const T>& map, const Partition& partition,
                                           int split, const ThreadPosition<T, kLast>& position) {
    const T* values = map.values + position.channel * map.step_c;
    for_pixels(partition, split, position.lane, [&](int64_t pixel, const Images& images) {
      const T* at = values + pixel * map.step_p;
#pragma unroll 4
      for (int64_t b = images.first; b < images.stop; b += images.step) {
        const int count = items_at(position, partition, b, images.stop);
        A items[G::kItems];
        load_items<kVectorized>(at + b * map.step_b, map.step_item, count, items);
        add(items, count);
      }
    });
  }
};

template <typename A>
struct Moments {
  A mean, variance;  // the biased variance
};

// By a warp: the statistics of a channel.
template <typename A>
__device__ Moments<A> combined(const Part<A>* parts, int splits, A count) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const A pivot = parts[0].pivot;
  A rest = 0, deviation = 0;
  for (int i = lane; i < splits; i += kWarp) {
    rest += parts[i].count * (parts[i].pivot - pivot + parts[i].rest);
  }
  rest = warp_sum(rest) / count;
  for (int i = lane; i < splits; i += kWarp) {
    const A apart = parts[i].pivot - pivot + parts[i].rest - rest;
    deviation += parts[i].deviation + parts[i].count * apart * apart;
  }
  const A variance = warp_sum(deviation) / count;
  return {pivot + rest, variance < 0 ? A{0} : variance};  // NaN stays NaN.
}

// running <- (1 - momentum) running + momentum value, rounded once.
__device__ __forceinline__ void update_running(const Parameter& running, int64_t m, double momentum,
                                               double value) {
  const double old = read_parameter<double>(running, m);
  write_parameter(running, m, (1 - momentum) * old + momentum * value);
}

// By a warp: all that the call leaves of channel m's statistics.
template <typename T>
__device__ void leave_statistics(const Statistics<T>& call, int i, int64_t m) {
  using A = accumulate_t<T>;
  const StatisticsScale<T>& scale = call.scales[i];
  const int splits = scale.partition.splits;
  const Moments<A> moments =
      combined(scale.parts + m * splits, splits, static_cast<A>(scale.count));
  if (threadIdx.x % kWarp != 0) return;
  call.mean[i * call.channels + m] = moments.mean;
  call.rstd[i * call.channels + m] = A{1} / std::sqrt(moments.variance + call.eps);
  const double count = static_cast<double>(scale.count);
  const double unbiased = static_cast<double>(moments.variance) * count / (count - 1);
  update_running(scale.running_mean, m, call.momentum, static_cast<double>(moments.mean));
  update_running(scale.running_var, m, call.momentum, unbiased);
}

template <typename T, bool kLast>
__global__ void __launch_bounds__(kThreads, kBlocks)
    statistics_kernel(const __grid_constant__ Statistics<T> call) {
  using A = accumulate_t<T>;
  using G = Grain<T, kLast>;
  const Share share = share_of(call.starts, call.groups);
  const StatisticsScale<T>& scale = call.scales[share.scale];
  const Partition& partition = scale.partition;
  const ThreadPosition<T, kLast> position(share.group, call.channels);
  ThreadSums<T, kLast> own;
  if (position.channels > 0) {
    if (scale.map.vectorized) {
      own.template add_part<true>(scale.map, partition, share.split, position);
    } else {
      own.template add_part<false>(scale.map, partition, share.split, position);
    }
  }
  const A seen = static_cast<A>(own.seen > 0 ? own.seen : 1);
  const A count = static_cast<A>(partition.count(share.split));
  A pivot[G::kOwn], rest[G::kOwn], deviation[G::kOwn];
#pragma unroll
  for (int k = 0; k < G::kOwn; ++k) {
    pivot[k] = own.seen > 0 ? own.shift[k] * seen + own.sum[k] : A{0};
  }
  block_sums<G::kLanes>(pivot);
#pragma unroll
  for (int k = 0; k < G::kOwn; ++k) {
    pivot[k] /= count;
    const A mean = own.sum[k] / seen, apart = own.shift[k] - pivot[k] + mean;
    rest[k] = own.seen > 0 ? apart * seen : A{0};
    deviation[k] = own.squares[k] - own.sum[k] * mean + rest[k] * apart;
  }
  block_sums<G::kLanes>(rest);
  block_sums<G::kLanes>(deviation);
  if (threadIdx.x < G::kLanes) {
#pragma unroll
    for (int k = 0; k < G::kOwn; ++k) {
      if (k >= position.channels) break;
      rest[k] /= count;
      scale.parts[(position.channel + k) * partition.splits + share.split] = {
          count, pivot[k], rest[k], deviation[k] - rest[k] * rest[k] * count};
    }
  }
  const int64_t ticket = share.scale * call.groups + share.group;
  if (!is_last_block(call.tickets, ticket, partition.splits)) return;
  for (int own = static_cast<int>(threadIdx.x) / kWarp; own < G::kChannels; own += kWarps) {
    const int64_t m = share.group * G::kChannels + own;
    if (m < call.channels) leave_statistics(call, share.scale, m);
  }
}

// Completes `call`, whose scales know their running statistics, for these maps, and launches it.
template <typename T, bool kLast>
void take_statistics(const DeviceScope& scope, const std::vector<FeatureMap>& maps,
                     Statistics<T> call) {
  using G = Grain<T, kLast>;
  using A = accumulate_t<T>;
  call.channels = maps[0].steps.channels;
  call.groups = G::groups(call.channels);
  const int64_t batch = maps[0].steps.batch;
  int64_t whole = 0;
  for (const FeatureMap& map : maps) whole += map.steps.pixels();
  const int images = kLast ? 1 : images_at_once(G::kItems, batch * whole * call.channels);
  std::vector<Task> tasks;
  for (size_t i = 0; i < maps.size(); ++i) {
    const MapSteps& steps = maps[i].steps;
    MapView<const T>& view = call.scales[i].map;
    view = view_of<kLast>(data<T>(maps[i].tensor), steps);
    call.scales[i].count = batch * steps.pixels();
    // Contiguous planes that keep to 16 bytes are read along their pixels.
    const auto even = [](int64_t step) { return step % G::kItems == 0; };
    const bool by_pixels = !kLast && even(steps.pixels()) && even(steps.step_b) &&
                           reinterpret_cast<uintptr_t>(view.values) % 16 == 0;
    if (by_pixels) {
      view.step_p = G::kItems;
      view.step_item = 1;
      view.vectorized = true;
      tasks.push_back({steps.pixels() / G::kItems, 1, 1});
    } else {
      tasks.push_back({steps.pixels(), images, view.vectorized ? 1 : (kLast ? G::kOwn : images)});
    }
  }
  const std::vector<Partition> partitions =
      partitions_of(tasks, batch, G::kPixelLanes, call.groups);
  int64_t splits = 0;
  for (size_t i = 0; i < maps.size(); ++i) {
    call.scales[i].partition = partitions[i];
    if (!kLast && call.scales[i].map.vectorized) call.scales[i].partition.width = G::kItems;
    call.starts[i + 1] = call.starts[i] + partitions[i].splits * call.groups;
    splits += partitions[i].splits;
  }
  constexpr int64_t kPartValues = 4;
  static_assert(sizeof(Part<A>) == kPartValues * sizeof(A));
  const Tensor memory = uninitialized({splits * call.channels * kPartValues},
                                      accumulation_dtype(maps[0].tensor.scalar_type()));
  auto* parts = static_cast<Part<A>*>(memory.mutable_data_ptr());
  for (size_t i = 0; i < maps.size(); ++i) {
    call.scales[i].parts = parts;
    parts += partitions[i].splits * call.channels;
  }
  const TicketBook book = tickets_for(scope, counters_of(partitions, call.groups));
  call.tickets = book.tickets;
  launch(scope, {grid_of(call.starts[maps.size()]), kThreads}, statistics_kernel<T, kLast>, call);
}

}  // namespace magsd::MAGSD_ISA::multiscale_attention
