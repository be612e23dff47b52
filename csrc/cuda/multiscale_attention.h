// What the kernels of multiscale attention share: how maps are partitioned among blocks and
// threads, 16-byte accesses, gathers along a resize, sums over a block, parameters of any dtype.
//
// A launch has no more blocks than the device runs at once, so that what a block does but once (its
// reduction, its tables) is paid once, and partitions every map so that its threads have as many
// loads as those of the others. A thread stays at one pixel and goes over images, so that what
// depends on the pixel alone (the division of its index, the entries that a resize weighs) is found
// once; no loop over images divides. It takes kItems = 16 / sizeof(T) values at once:
//   channels last   the channels of a pixel, one 16-byte access where they are aligned; a block
//                   serves 16 channels, whole 32-byte sectors, and kPixelLanes pixels
//   contiguous      up to kItems images of one channel, whose pixels lie along the lanes; a block
//                   serves one channel, and reads the norm of that one only
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/multiscale_attention_arguments.h"
#include "cuda/kernel.h"
#include "cuda/tickets.h"

namespace magsd::MAGSD_ISA::multiscale_attention {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocks = 2;  // of a multiprocessor, at least: leaves a thread 128 registers

template <typename T, bool kLast>
struct Grain {
  static constexpr int kItems = 16 / static_cast<int>(sizeof(T));
  static constexpr int kChannels = kLast ? 16 : 1;       // of a block
  static constexpr int kOwn = kLast ? kItems : 1;        // of a thread
  static constexpr int kLanes = kChannels / kOwn;        // threads of a pixel
  static constexpr int kPixelLanes = kThreads / kLanes;  // pixels of a block, at once
  static_assert(kWarp % kLanes == 0, "the channels of a pixel lie in one warp");

  static int64_t groups(int64_t maps) { return ceil_div<int64_t>(maps, kChannels); }
};

// The pixels and the images of a map, shared out to the blocks of a group of channels. A block
// takes every tile_splits-th tile of pixels, and of those `images` images in a row.
struct Partition {
  int64_t pixels, tiles, batch, images;
  int32_t tile, image_lanes;  // a block takes so many pixels and images at once
  int32_t items;              // images of a thread at once
  int32_t width;              // values that count as one pixel
  int32_t tile_splits, splits;

  // Values of one channel in a block's part.
  MAGSD_HD int64_t count(int split) const {
    const int64_t first = split % tile_splits,
                  taken = ceil_div(tiles - first, int64_t{tile_splits});
    const bool holds_last = (tiles - 1) % tile_splits == first;
    const int64_t own = taken * tile - (holds_last ? tiles * tile - pixels : 0);
    const int64_t before = split / tile_splits * images;
    return own * width * (before + images < batch ? images : batch - before);
  }
};

// A map to be partitioned: its pixels, the images that a thread takes at once, and the loads these
// cost it.
struct Task {
  int64_t pixels;
  int items, loads;
};

// Parts in which a thread has at most `most` loads, or one pixel and its images at once.
inline Partition partition_of(const Task& task, int64_t batch, int pixel_lanes, int64_t most) {
  Partition partition{};
  partition.pixels = task.pixels;
  partition.batch = batch;
  partition.tiles = ceil_div<int64_t>(task.pixels, pixel_lanes);
  partition.tile = static_cast<int32_t>(ceil_div(task.pixels, partition.tiles));
  partition.image_lanes = pixel_lanes / partition.tile;
  partition.items = task.items;
  partition.width = 1;
  const int64_t step = int64_t{partition.image_lanes} * task.items;
  const int64_t steps = std::max<int64_t>(ceil_div(batch, step), 1);
  const int64_t taken = std::max<int64_t>(most / task.loads, 1);  // steps of a thread
  partition.tile_splits =
      static_cast<int32_t>(ceil_div(partition.tiles, std::max<int64_t>(taken / steps, 1)));
  partition.images = ceil_div(steps, ceil_div(steps, std::min(taken, steps))) * step;
  partition.splits = static_cast<int32_t>(partition.tile_splits *
                                          std::max<int64_t>(ceil_div(batch, partition.images), 1));
  return partition;
}

// Partitions the maps of a launch alike: into as many blocks of `groups` groups of channels as the
// device runs at once, with the fewest loads for a thread. If even one block a map and group is too
// many, by loads alone.
inline std::vector<Partition> partitions_of(const std::vector<Task>& tasks, int64_t batch,
                                            int pixel_lanes, int64_t groups) {
  const int64_t room = int64_t{kBlocks} * multiprocessors();
  const auto partitions_with = [&](int64_t most) {
    std::vector<Partition> partitions;
    for (const Task& task : tasks)
      partitions.push_back(partition_of(task, batch, pixel_lanes, most));
    return partitions;
  };
  const auto fits = [&](int64_t most) {
    int64_t blocks = 0;
    for (const Partition& partition : partitions_with(most)) blocks += partition.splits * groups;
    return blocks <= room;
  };
  int64_t whole = 0, longest = 1;
  for (const Task& task : tasks) {
    const Partition partition = partition_of(task, batch, pixel_lanes, 1);
    const int64_t step = int64_t{partition.image_lanes} * partition.items;
    const int64_t loads =
        partition.tiles * std::max<int64_t>(ceil_div(batch, step), 1) * task.loads;
    whole += loads;
    longest = std::max(longest, loads);
  }
  const int64_t equal = std::max<int64_t>(ceil_div(whole * groups, room), 1);
  if (!fits(longest)) return partitions_with(equal);
  int64_t most = std::min(equal, longest), enough = longest;
  while (most < enough) {
    const int64_t middle = most + (enough - most) / 2;
    if (fits(middle)) {
      enough = middle;
    } else {
      most = middle + 1;
    }
  }
  return partitions_with(enough);
}

// Tickets of every map and group, where a channel has several parts.
inline int64_t counters_of(const std::vector<Partition>& partitions, int64_t groups) {
  const auto parted = [](const Partition& partition) { return partition.splits > 1; };
  const bool any = std::any_of(partitions.begin(), partitions.end(), parted);
  return any ? static_cast<int64_t>(partitions.size()) * groups : 0;
}

// Images that a thread of a contiguous map takes at once: many, while the device stays full.
inline int images_at_once(int most, int64_t values) {
  const int64_t threads = int64_t{2} * kThreads * multiprocessors();
  while (most > 1 && values < most * threads) most /= 2;
  return most;
}

// A map as threads read or write it, kItems values step_item apart at once.
template <typename T>
struct MapView {
  T* values;
  int64_t step_b, step_c, step_y, step_p, step_item;
  bool vectorized;  // by one 16-byte access
};

template <bool kLast, typename T>
MapView<T> view_of(T* values, const MapSteps& steps) {
  constexpr int64_t kItems = Grain<T, kLast>::kItems;
  const auto even = [](int64_t step) { return step % kItems == 0; };
  const bool vectorized = kLast && steps.step_c == 1 && even(steps.channels) &&
                          even(steps.step_p) && even(steps.step_b) &&
                          reinterpret_cast<uintptr_t>(values) % 16 == 0;
  return {values,       steps.step_b,
          steps.step_c, steps.width * steps.step_p,
          steps.step_p, kLast ? steps.step_c : steps.step_b,
          vectorized};
}

// (M,) values of any floating dtype and stride.
struct Parameter {
  void* values;
  int64_t step;
  ScalarType dtype;
};

inline Parameter parameter_of(const Tensor& tensor, bool written = false) {
  void* values = written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  return {values, tensor.stride(0), tensor.scalar_type()};
}

// Calls visitor(T{}, std::bool_constant<channels last>{}).
template <typename Visitor>
void visit_layout(ScalarType dtype, bool channels_last, const Visitor& visitor) {
  visit_floating(dtype, [&](auto type) {
    if (channels_last) return visitor(type, std::true_type{});
    return visitor(type, std::false_type{});
  });
}

// What a block serves: blocks are counted through scale by scale, the groups of channels of a part
// side by side. starts[i] is the first block of scale i.
struct Share {
  int scale, split;
  int64_t group;
};

__device__ __forceinline__ Share share_of(const int64_t* starts, int64_t groups) {
  int scale = 0;
  while (blockIdx.x >= starts[scale + 1]) ++scale;
  const int64_t rank = blockIdx.x - starts[scale], split = quotient(rank, groups);
  return {scale, static_cast<int>(split), rank - split * groups};
}

// A thread's position in its block: among the pixels, and its channels.
template <typename T, bool kLast>
struct ThreadPosition {
  using G = Grain<T, kLast>;
  int lane;         // among kPixelLanes
  int own;          // its first channel, within the group
  int64_t channel;  // the same, of all
  int channels;     // 0 to kOwn

  __device__ ThreadPosition(int64_t group, int64_t maps)
      : lane(static_cast<int>(threadIdx.x) / G::kLanes),
        own(static_cast<int>(threadIdx.x) % G::kLanes * G::kOwn),
        channel(group * G::kChannels + own),
        channels(static_cast<int>(maps - channel < G::kOwn ? (maps > channel ? maps - channel : 0)
                                                           : G::kOwn)) {}
};

// The images first, first + step, ... before `stop`.
struct Images {
  int64_t first, stop, step;
};

// Calls body(pixel, images) for every pixel of a thread.
template <typename Body>
__device__ __forceinline__ void for_pixels(const Partition& partition, int split, int lane,
                                           const Body& body) {
  const int image_lane = lane / partition.tile, at = lane % partition.tile;
  if (image_lane >= partition.image_lanes) return;
  const int64_t from = split / partition.tile_splits * partition.images,
                stop = from + partition.images;
  const Images images{from + image_lane * partition.items,
                      stop < partition.batch ? stop : partition.batch,
                      partition.image_lanes * partition.items};
  for (int64_t tile = split % partition.tile_splits; tile < partition.tiles;
       tile += partition.tile_splits) {
    const int64_t pixel = tile * partition.tile + at;
    if (pixel < partition.pixels) body(pixel, images);
  }
}

// Of the kItems values that a thread takes at image b, those that exist.
template <typename T, bool kLast>
__device__ __forceinline__ int items_at(const ThreadPosition<T, kLast>& position,
                                        const Partition& partition, int64_t b, int64_t stop) {
  if (kLast) return position.channels;
  if (partition.width > 1) return partition.width;
  return stop - b < partition.items ? static_cast<int>(stop - b) : partition.items;
}

// values[k] of an item past `count` is 0.
template <bool kVectorized, typename T, int kItems>
__device__ __forceinline__ void load_items(const T* at, int64_t step, int count,
                                           accumulate_t<T> (&values)[kItems]) {
  if constexpr (kVectorized) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(at));
    T items[kItems];
    std::memcpy(items, &raw, sizeof(raw));
#pragma unroll
    for (int k = 0; k < kItems; ++k) values[k] = upcast(items[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      values[k] = k < count ? upcast(at[k * step]) : accumulate_t<T>{0};
    }
  }
}

template <typename T, int kItems>
__device__ __forceinline__ void load_items(const MapView<const T>& map, const T* at, int count,
                                           accumulate_t<T> (&values)[kItems]) {
  if (map.vectorized) return load_items<true>(at, map.step_item, count, values);
  load_items<false>(at, map.step_item, count, values);
}

template <typename T, int kItems>
__device__ __forceinline__ void store_items(T* at, int64_t step, int count, bool vectorized,
                                            const accumulate_t<T> (&values)[kItems]) {
  if (vectorized) {
    T items[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) items[k] = downcast<T>(values[k]);
    uint4 raw;
    std::memcpy(&raw, items, sizeof(raw));
    *reinterpret_cast<uint4*>(at) = raw;
    return;
  }
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    if (k < count) at[k * step] = downcast<T>(values[k]);
  }
}

// The inputs that an output weighs. Weights past the second are those of area, all alike.
template <typename A>
struct InputTaps {
  A first, second;
  int32_t begin, count;

  InputTaps() = default;
  __device__ __forceinline__ InputTaps(const ResizeRule& rule, int64_t o) {
    const Span span = inputs_of(rule, o);
    begin = static_cast<int32_t>(span.first);
    count = static_cast<int32_t>(span.count);
    first = resize_weight<A>(rule, o, begin);
    second = count > 1 ? resize_weight<A>(rule, o, begin + 1) : first;
  }

  __device__ __forceinline__ A weight(int k) const { return k == 0 ? first : second; }
};

// The outputs that weigh an input. Weights past the second are found where they are needed.
template <typename A>
struct OutputTaps {
  const ResizeRule& rule;
  int32_t entry, begin, count;
  A first, second;

  __device__ __forceinline__ OutputTaps(const ResizeRule& resize, int64_t i)
      : rule(resize), entry(static_cast<int32_t>(i)) {
    const Span span = outputs_of(rule, i);
    begin = static_cast<int32_t>(span.first);
    count = static_cast<int32_t>(span.count);
    first = computed(0);
    second = count > 1 ? computed(1) : first;
  }

  __device__ __forceinline__ A computed(int k) const {
    return resize_weight<A>(rule, begin + k, entry);
  }
  __device__ __forceinline__ A weight(int k) const {
    if (k == 0) return first;
    return k > 1 ? computed(k) : second;
  }
};

// sum[k] += weighted sum of transform(value, k) over the entries of rows and columns. An adjoint
// seldom has more than one, and does not gain by kUnroll.
template <bool kVectorized, int kUnroll, typename T, typename Taps, int kItems, typename Transform>
__device__ __forceinline__ void gather(const MapView<const T>& map, const T* image,
                                       const Taps& rows, const Taps& columns, int count,
                                       accumulate_t<T> (&sum)[kItems], const Transform& transform) {
  using A = accumulate_t<T>;
  const T* row = image + rows.begin * map.step_y + columns.begin * map.step_p;
  for (int y = 0; y < rows.count; ++y, row += map.step_y) {
    const A of_row = rows.weight(y);
    const T* at = row;
#pragma unroll kUnroll
    for (int x = 0; x < columns.count; ++x, at += map.step_p) {
      const A weight = of_row * columns.weight(x);
      A values[kItems];
      load_items<kVectorized>(at, map.step_item, count, values);
#pragma unroll
      for (int k = 0; k < kItems; ++k) sum[k] += weight * transform(values[k], k);
    }
  }
}

// Replaces the values of every thread by their sums over the block's pixel lanes, added in a fixed
// order. Every thread of the block comes here.
template <int kLanes, typename A, int kOwn>
__device__ __forceinline__ void block_sums(A (&values)[kOwn]) {
  MAGSD_SHARED(A, sums, [kWarps][kLanes * kOwn]);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int own = lane % kLanes * kOwn;
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
#pragma unroll
    for (int step = kWarp / 2; step >= kLanes; step /= 2) {
      values[k] += __shfl_xor_sync(kAllLanes, values[k], step);
    }
    if (lane < kLanes) sums[warp][own + k] = values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kOwn; ++k) values[k] = 0;
#pragma unroll 2  // all of them would not fit in the registers
  for (int w = 0; w < kWarps; ++w) {
#pragma unroll
    for (int k = 0; k < kOwn; ++k) values[k] += sums[w][own + k];
  }
  __syncthreads();
}

template <typename A>
__device__ __forceinline__ A read_parameter(const Parameter& from, int64_t m) {
  const int64_t at = m * from.step;
  switch (from.dtype) {
    case ScalarType::Float:
      return static_cast<A>(static_cast<const float*>(from.values)[at]);
    case ScalarType::Double:
      return static_cast<A>(static_cast<const double*>(from.values)[at]);
    case ScalarType::Half:
      return static_cast<A>(upcast(static_cast<const Half*>(from.values)[at]));
    default:
      return static_cast<A>(upcast(static_cast<const BFloat16*>(from.values)[at]));
  }
}

__device__ __forceinline__ void write_parameter(const Parameter& to, int64_t m, double value) {
  const int64_t at = m * to.step;
  switch (to.dtype) {
    case ScalarType::Float:
      static_cast<float*>(to.values)[at] = static_cast<float>(value);
      return;
    case ScalarType::Double:
      static_cast<double*>(to.values)[at] = value;
      return;
    case ScalarType::Half:
      static_cast<Half*>(to.values)[at] = downcast<Half>(static_cast<float>(value));
      return;
    default:
      static_cast<BFloat16*>(to.values)[at] = downcast<BFloat16>(static_cast<float>(value));
  }
}

}  // namespace magsd::MAGSD_ISA::multiscale_attention
