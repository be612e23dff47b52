// Statistics of every channel of every scale, in one launch: the first pass of training.
//
// A thread adds up differences from the first value that it meets, a block differences from its own
// mean, and the parts are combined by the formula of Chan et al. 1983, all in a fixed order:
// neither a large common mean nor a value far off takes the others' digits. The number of parts
// depends on the sizes and on the number of multiprocessors; results are the same from call to
// call.
#pragma once

#include <vector>

#include "cuda/multiscale_attention.h"

namespace magsd::MAGSD_ISA {

constexpr int64_t kStatisticsBlocks = 4;  // for every multiprocessor

// Statistics of a part of a channel: its mean is pivot + rest, and deviation the sum of the squared
// differences from it.
template <typename A>
struct alignas(4 * sizeof(A)) Part {
  A count, pivot, rest, deviation;
};

template <typename T>
struct Statistics {
  MapView<const T> maps[kMostMaps];
  Cut cuts[kMostMaps];
  int64_t starts[kMostMaps + 1];
  int64_t channels, groups;
  Part<accumulate_t<T>>* parts;  // (scales, channels, kMostSplits)
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

  template <bool kWide>
  __device__ __forceinline__ void add_part(const MapView<const T>& map, const Cut& cut, int split,
                                           const Place<T, kLast>& place) {
    const T* values = map.values + place.channel * map.step_c;
    for_pixels(cut, split, place.lane, [&](int64_t pixel, const Images& images) {
      const T* at = values + pixel * map.step_p;
#pragma unroll 4
      for (int64_t b = images.first; b < images.stop; b += images.step) {
        const int count = items_at(place, cut, b, images.stop);
        A items[G::kItems];
        load_items<kWide>(at + b * map.step_b, map.step_item, count, items);
        add(items, count);
      }
    });
  }
};

template <typename T, bool kLast>
__global__ void __launch_bounds__(kThreads, kBlocks)
    statistics_kernel(const __grid_constant__ Statistics<T> call) {
  using A = accumulate_t<T>;
  using G = Grain<T, kLast>;
  const Share share = share_of(call.starts, call.groups);
  const MapView<const T>& map = call.maps[share.scale];
  const Cut& cut = call.cuts[share.scale];
  const Place<T, kLast> place(share.group, call.channels);
  ThreadSums<T, kLast> own;
  if (place.channels > 0) {
    if (map.wide) {
      own.template add_part<true>(map, cut, share.split, place);
    } else {
      own.template add_part<false>(map, cut, share.split, place);
    }
  }
  const A seen = static_cast<A>(own.seen > 0 ? own.seen : 1);
  const A count = static_cast<A>(cut.count(share.split));
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
  if (threadIdx.x >= G::kLanes) return;
#pragma unroll
  for (int k = 0; k < G::kOwn; ++k) {
    if (k >= place.channels) break;
    const int64_t channel = share.scale * call.channels + place.channel + k;
    rest[k] /= count;
    call.parts[channel * kMostSplits + share.split] = {count, pivot[k], rest[k],
                                                       deviation[k] - rest[k] * rest[k] * count};
  }
}

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

// Leaves the statistics of every part in `parts`, and the number of parts of every scale in
// `splits`.
template <typename T, bool kLast>
void take_statistics(const DeviceScope& scope, const std::vector<FeatureMap>& maps,
                     Part<accumulate_t<T>>* parts, int* splits) {
  using G = Grain<T, kLast>;
  Statistics<T> call{};
  call.channels = maps[0].steps.channels;
  call.groups = G::groups(call.channels);
  call.parts = parts;
  const int64_t batch = maps[0].steps.batch;
  int64_t whole = 0;
  for (const FeatureMap& map : maps) whole += map.steps.pixels();
  const int images = kLast ? 1 : images_at_once(G::kItems, batch * whole * call.channels);
  for (size_t i = 0; i < maps.size(); ++i) {
    const MapSteps& steps = maps[i].steps;
    MapView<const T>& view = call.maps[i];
    Cut& cut = call.cuts[i];
    view = view_of<kLast>(data<T>(maps[i].tensor), steps);
    // Contiguous planes that keep to 16 bytes are read along their pixels.
    const auto even = [](int64_t step) { return step % G::kItems == 0; };
    const bool along = !kLast && even(steps.pixels()) && even(steps.step_b) &&
                       reinterpret_cast<uintptr_t>(view.values) % 16 == 0;
    const int width = along ? G::kItems : 1;
    const int64_t most = blocks_for(kStatisticsBlocks, steps.pixels(), whole, call.groups);
    cut = cut_of(steps.pixels() / width, batch, G::kPixelLanes, along ? 1 : images,
                 std::min<int64_t>(most, kMostSplits));
    if (along) {
      cut.width = width;
      view.step_p = width;
      view.step_item = 1;
      view.wide = true;
    }
    call.starts[i + 1] = call.starts[i] + cut.splits * call.groups;
    splits[i] = cut.splits;
  }
  launch(scope, grid_of(call.starts[maps.size()]), kThreads, 0, statistics_kernel<T, kLast>, call);
}

}  // namespace magsd::MAGSD_ISA
