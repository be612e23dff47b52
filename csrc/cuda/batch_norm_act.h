// What the kernels of batch_norm_act share: how a map is partitioned among blocks and threads,
// accesses of up to 16 bytes, the norm and the activation.
//
// All maps of a call are dense and of one memory format, so that one offset serves all of them. A
// position is kItems neighbors in memory:
//   channels last   of one pixel, kItems channels; a block serves 32 channels, and its lanes over
//                   positions go through the pixels of a group
//   contiguous      kItems pixels of one plane; 1 to 16 warps serve a channel, a block 16 to 1
// A launch has one large block a multiprocessor, whose threads have many loads under way: few
// blocks leave few parts for the last one to add up. Where the channels alone do not fill the
// device, each one's positions are split. Blocks of neighboring channels run beside each other. No
// loop over positions divides.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "common/batch_norm_act_arguments.h"
#include "common/resampling.h"  // quotient
#include "cuda/kernel.h"

namespace magsd::MAGSD_ISA::batch_norm_act {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

template <typename Type, bool kChannelsLast, int kCount>
struct Grain {
  using T = Type;
  using A = accumulate_t<T>;
  static constexpr bool kLast = kChannelsLast;
  static constexpr int kItems = kCount;
  static constexpr int kBytes = kItems * static_cast<int>(sizeof(T));  // of a load
  static constexpr int kOwn = kLast ? kItems : 1;                      // channels of a thread
  static constexpr int kChannels = kLast ? kWarp : kWarps;             // of a block, at most
  static constexpr int kLanes = kLast ? kChannels / kItems : 1;        // of a warp, to one pixel
};

// The positions of a channel in a group, shared out to the blocks of its channels.
struct Partition {
  int64_t channels, ranges;         // ranges of block_channels channels
  int64_t positions, share;         // of a channel in a group; of one split
  int64_t plane, per_plane, image;  // contiguous: values and positions of a plane, values of images
  int64_t jump, wrap, step;         // contiguous: see Cursor; channels last: jump alone
  int64_t group_values;
  double count;  // values of a channel in a group
  int32_t groups, splits;
  int32_t block_channels, team, lanes;  // team: warps of a channel; lanes over positions

  int64_t blocks() const { return int64_t{groups} * splits * ranges; }
  // Of a channel's sums, over all groups.
  MAGSD_HD int parts() const { return groups * splits; }
};

// Parts, at most `most`, in which `count` blocks are split to fill the device: in one turn, or in
// up to three where one would leave much of it idle.
inline int64_t splits_of(int64_t count, int64_t most) {
  const int64_t room = multiprocessors();
  int64_t best = 1;
  double best_use = 0;
  for (int64_t turns = 1; turns <= 3; ++turns) {
    const int64_t splits = std::max<int64_t>(std::min(turns * room / count, most), 1);
    const int64_t blocks = splits * count, slots = ceil_div(blocks, room) * room;
    const double use = static_cast<double>(blocks) / static_cast<double>(slots);
    if (use < best_use + 0.1) continue;
    best = splits;
    best_use = use;
  }
  return best;
}

template <typename G>
Partition partition_of(const NormShape& shape) {
  Partition p{};
  const int64_t room = multiprocessors(), most = kMostBlocksX;
  STD_TORCH_CHECK(shape.groups <= most, "at most ", most, " groups, got ", shape.groups);
  p.channels = shape.channels;
  p.groups = static_cast<int32_t>(shape.groups);
  p.count = static_cast<double>(shape.values());
  p.positions = G::kLast ? shape.values() : shape.values() / G::kItems;
  p.plane = shape.pixels;
  p.per_plane = shape.pixels / G::kItems;
  p.image = shape.channels * shape.pixels;
  p.group_values = shape.batch * p.image;
  p.team = kWarps;
  const auto ranges_with = [&](int warps) { return ceil_div<int64_t>(p.channels, kWarps / warps); };
  while (!G::kLast && p.team > 1 &&
         (p.groups * ranges_with(p.team) > room || p.positions <= kWarp * p.team)) {
    p.team /= 2;
  }
  p.block_channels = G::kLast ? G::kChannels : kWarps / p.team;
  p.lanes = G::kLast ? kThreads / G::kLanes : kWarp * p.team;
  p.ranges = ceil_div<int64_t>(p.channels, p.block_channels);
  const int64_t turns = ceil_div<int64_t>(p.positions, p.lanes);
  const int64_t taken = ceil_div(turns, splits_of(p.groups * p.ranges, turns));
  p.share = taken * p.lanes;
  p.splits = static_cast<int32_t>(std::max<int64_t>(taken > 0 ? ceil_div(turns, taken) : 1, 1));
  if (G::kLast) {
    p.jump = p.lanes * p.channels;
  } else {
    const int64_t planes = p.lanes / p.per_plane;
    p.step = p.lanes % p.per_plane;
    p.jump = planes * p.image + p.step * G::kItems;
    p.wrap = p.image - p.plane;
  }
  return p;
}

// What a thread serves.
template <typename G>
struct Place {
  int64_t range, channel;  // the first of kOwn channels
  int64_t first, group_start;
  int group, split;
  int own;   // its first channel, within the block
  int lane;  // among the lanes over positions
  int turns;
  bool exists;  // the channel

  __device__ explicit Place(const Partition& p) {
    const auto block = static_cast<unsigned>(blockIdx.x), ranges = static_cast<unsigned>(p.ranges);
    const unsigned part = block / ranges;
    range = block - part * ranges;
    group = static_cast<int>(part / static_cast<unsigned>(p.splits));
    split = static_cast<int>(part) - group * p.splits;
    const int thread = static_cast<int>(threadIdx.x);
    if (G::kLast) {
      own = thread % G::kLanes * G::kOwn;
      lane = thread / G::kLanes;
    } else {
      own = thread / p.lanes;
      lane = thread % p.lanes;
    }
    channel = range * p.block_channels + own;
    exists = channel < p.channels;
    group_start = group * p.group_values;
    first = split * p.share + lane;
    const int64_t end = (split + 1) * p.share;
    const int64_t left = (end < p.positions ? end : p.positions) - first;
    turns = exists && left > 0 ? static_cast<int>((left + p.lanes - 1) / p.lanes) : 0;
  }
};

// Offset of the first value of `channel`, from that of its group.
template <typename G>
__device__ __forceinline__ int64_t channel_start(const Partition& p, int64_t channel) {
  return G::kLast ? channel : channel * p.plane;
}

// Goes through the positions of a thread, kBack from the last to the first.
template <typename G, bool kBack>
struct Cursor {
  const Partition& p;
  int64_t offset, at;  // at: position in its plane

  __device__ __forceinline__ Cursor(const Partition& partition, const Place<G>& place)
      : p(partition) {
    const int64_t last = place.turns > 0 ? place.turns - 1 : 0;
    const int64_t position = place.first + (kBack ? last * p.lanes : 0);
    offset = place.group_start + channel_start<G>(p, place.channel);
    if (G::kLast) {
      offset += position * p.channels;
    } else {
      const int64_t image = quotient(position, p.per_plane);
      at = position - image * p.per_plane;
      offset += image * p.image + at * G::kItems;
    }
  }

  __device__ __forceinline__ void advance() {
    offset += kBack ? -p.jump : p.jump;
    if (G::kLast) return;
    at += kBack ? -p.step : p.step;
    if (kBack ? at < 0 : at >= p.per_plane) {
      at += kBack ? p.per_plane : -p.per_plane;
      offset += kBack ? -p.wrap : p.wrap;
    }
  }
};

// Calls load(u, offset) and then use(u, offset) for every position of a thread; kUnroll loads are
// under way at once, the first while `prepare` runs, which every thread of the block comes to.
template <typename G, int kUnroll, bool kBack, typename Prepare, typename Load, typename Use>
__device__ __forceinline__ void for_positions(const Partition& partition, const Place<G>& place,
                                              const Prepare& prepare, const Load& load,
                                              const Use& use) {
  Cursor<G, kBack> cursor(partition, place);
  int64_t offsets[kUnroll];
  const auto load_some = [&](int left) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      offsets[u] = cursor.offset;
      if (u < left) load(u, offsets[u]);
      cursor.advance();
    }
  };
  int left = place.turns;
  load_some(left);
  prepare();
  while (left > 0) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u < left) use(u, offsets[u]);
    }
    left -= kUnroll;
    load_some(left);
  }
}

template <int kBytes>
struct RawOf;
template <>
struct RawOf<16> {
  using type = uint4;
};
template <>
struct RawOf<8> {
  using type = uint2;
};
template <>
struct RawOf<4> {
  using type = unsigned;
};
template <>
struct RawOf<2> {
  using type = unsigned short;
};
// The values of a position as they lie in memory.
template <typename G>
using Raw = typename RawOf<G::kBytes>::type;

template <typename G>
__device__ __forceinline__ Raw<G> load_raw(const typename G::T* at) {
  return __ldg(reinterpret_cast<const Raw<G>*>(at));
}

template <typename G>
__device__ __forceinline__ void unpack(const Raw<G>& raw, typename G::A (&values)[G::kItems]) {
  typename G::T items[G::kItems];
  std::memcpy(items, &raw, sizeof(raw));
#pragma unroll
  for (int k = 0; k < G::kItems; ++k) values[k] = upcast(items[k]);
}

template <typename G>
__device__ __forceinline__ void store(typename G::T* at, const typename G::A (&values)[G::kItems]) {
  using T = typename G::T;
  Raw<G> raw;
  if constexpr (sizeof(T) == 2 && G::kItems > 1) {
    unsigned pairs[G::kItems / 2];
#pragma unroll
    for (int k = 0; k < G::kItems / 2; ++k) {
      pairs[k] = downcast_two<T>(values[2 * k], values[2 * k + 1]);
    }
    std::memcpy(&raw, pairs, sizeof(raw));
  } else {
    T items[G::kItems];
#pragma unroll
    for (int k = 0; k < G::kItems; ++k) items[k] = downcast<T>(values[k]);
    std::memcpy(&raw, items, sizeof(raw));
  }
  *reinterpret_cast<Raw<G>*>(at) = raw;
}

// (C,) values of any stride, of T or float32.
template <typename T>
struct Parameter {
  void* values;
  int64_t step;
  bool wide;  // float32

  using A = accumulate_t<T>;
  __device__ __forceinline__ A operator[](int64_t c) const {
    const int64_t at = c * step;
    return wide ? static_cast<A>(static_cast<const float*>(values)[at])
                : static_cast<A>(upcast(static_cast<const T*>(values)[at]));
  }
  // The value as `set` leaves it.
  __device__ __forceinline__ double rounded(double value) const {
    return wide ? static_cast<double>(static_cast<float>(value))
                : static_cast<double>(upcast(downcast<T>(static_cast<A>(value))));
  }
  __device__ __forceinline__ void set(int64_t c, double value) const {
    const int64_t at = c * step;
    if (wide) {
      static_cast<float*>(values)[at] = static_cast<float>(value);
    } else {
      static_cast<T*>(values)[at] = downcast<T>(static_cast<A>(value));
    }
  }
};

template <typename T>
Parameter<T> parameter_of(const Tensor& tensor, bool written = false) {
  void* values = written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  return {values, tensor.stride(0), tensor.scalar_type() == ScalarType::Float};
}

template <typename A>
struct Norm {
  A mean, factor, bias;

  // Forward and backward must agree about the sign of every value.
  __device__ __forceinline__ A operator()(A x) const { return (x - mean) * factor + bias; }
};

// 1 + exp(-z), and a / b. For results of 16 bits the fast ones of the GPU do.
template <typename T>
__device__ __forceinline__ accumulate_t<T> one_and_exp(accumulate_t<T> z) {
#if !defined(MAGSD_SIMT)
  if constexpr (sizeof(T) == 2) return 1 + __expf(-z);
#endif
  return 1 + std::exp(-z);
}
template <typename T>
__device__ __forceinline__ accumulate_t<T> divided(accumulate_t<T> a, accumulate_t<T> b) {
#if !defined(MAGSD_SIMT)
  if constexpr (sizeof(T) == 2) return __fdividef(a, b);
#endif
  return a / b;
}

// A map as the kernels read it: dense, in the memory format of the call.
inline FeatureMap dense_map(const FeatureMap& map) {
  const MapSteps &s = map.steps, d = dense_steps(map.tensor, map.channels_last);
  const bool is_dense = (s.step_p == d.step_p || s.pixels() == 1) &&
                        (s.step_b == d.step_b || s.batch <= 1) && s.step_c == d.step_c;
  if (is_dense) return map;
  return FeatureMap(
      torch::stable::contiguous(map.tensor, torch::headeronly::MemoryFormat::ChannelsLast), true);
}

// Calls visitor(Grain{}) with the longest accesses to which all maps are aligned.
template <typename T, typename Visitor>
void visit_grain(const NormShape& shape, bool last, std::initializer_list<const void*> maps,
                 const Visitor& visitor) {
  constexpr int kMost = 16 / static_cast<int>(sizeof(T)), kHalf = kMost / 2;
  const auto fit = [&](int items) {
    if ((last ? shape.channels : shape.pixels) % items != 0) return false;
    return std::all_of(maps.begin(), maps.end(), [&](const void* map) {
      return reinterpret_cast<uintptr_t>(map) % (items * sizeof(T)) == 0;
    });
  };
  if (last) {
    if (fit(kMost)) return visitor(Grain<T, true, kMost>{});
    return visitor(Grain<T, true, 1>{});
  }
  if (fit(kMost)) return visitor(Grain<T, false, kMost>{});
  if constexpr (sizeof(T) == 2) {
    if (fit(kHalf)) return visitor(Grain<T, false, kHalf>{});  // planes of 14 x 14
  }
  visitor(Grain<T, false, 1>{});
}

}  // namespace magsd::MAGSD_ISA::batch_norm_act
