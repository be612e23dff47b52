// What both directions of bilinear pooling share on a GPU: the call, the features and the attention
// in shared memory, the pooled matrix of a warp.
//
// A warp takes kChannels channels and kMaps maps of an image and goes over the pixels in stages.
// Lane 4 g + t owns, of D (channels x maps) in fragments of m16n8k8 (see mma.h), the 8 channels
// that follow one another from 8 chunk_of(g) on, and maps 8 n + 2 t + e: whoever computes D, on
// tensor cores or not, reads and writes matrices of (maps x channels) in whole sectors of 16 bytes
// a lane.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/bilinear_pool_arguments.h"
#include "common/feature_map.h"
#include "common/resampling.h"
#include "cuda/async_copy.h"
#include "cuda/kernel.h"
#include "cuda/mma.h"

namespace magsd::MAGSD_ISA::bilinear_pool {

// How products are made: on tensor cores (exact for half precision, TF32 for float), by fused
// multiplications and additions, or not added up at all but compared.
enum class Product { kTensor, kFused, kMaximum };

constexpr int kChannels = 64;         // of a warp
constexpr int kStageBytes = 64 * 80;  // of shared memory, for kStage pixels of kChannels channels
constexpr int kRowBytes = 80;         // of a channel's row in it: 64 and a misaligned beginning

template <typename T, Product kProduct>
struct Partition {
  using A = accumulate_t<T>;
  static constexpr bool kRounds = kProduct == Product::kTensor && std::is_same_v<T, float>;
  static constexpr int kMaps = kProduct == Product::kMaximum || sizeof(A) == 8 ? 16 : 32;
  static constexpr int kEighths = kMaps / 8;
  static constexpr int kSlots = kMaps / 4;  // maps of a lane; slot 2 n + e is map 8 n + 2 t + e
  static constexpr int kPitch = kMaps + 8;  // of a row of maps
  static constexpr int kStage = 64 / sizeof(T);        // pixels
  static constexpr int kBlocks = kMaps == 32 ? 2 : 1;  // on an SM at least: bounds the registers
  static constexpr int kKept = 384 / sizeof(A);        // pixels whose attention is kept

  // Where a row holds map m of a group. Tensor cores take operands one by one; otherwise maps
  // 8 n + i lie side by side for all n, and a lane reads what it needs of them at once.
  MAGSD_HD static int position_of(int m) {
    return kProduct == Product::kTensor ? m : m % 8 * kEighths + m / 8;
  }
};

// By value, unlike std::min, so that constants need no address on the device.
template <typename Value>
MAGSD_HD Value smaller(Value a, Value b) {
  return b < a ? b : a;
}
template <typename Value>
MAGSD_HD Value larger(Value a, Value b) {
  return a < b ? b : a;
}

// First of the 8 channels that lane group g owns is 8 chunk_of(g). Neighboring groups lie 4 chunks
// apart, so that the two chunks of a lane of a product with channels as columns fill sectors.
__device__ __forceinline__ int chunk_of(int g) { return g / 2 + g % 2 * 4; }
__device__ __forceinline__ int group_of(int chunk) { return chunk % 4 * 2 + chunk / 4; }

// ------------------------------------------------------------------------------- 16 bytes at once

// Neighbors in memory, aligned to their size of 8 or 16 bytes.
template <typename Value, int kCount>
__device__ __forceinline__ void load_aligned(const Value* from, Value (&values)[kCount]) {
  static_assert(sizeof(values) == 8 || sizeof(values) == 16);
#if defined(MAGSD_SIMT)
  if (reinterpret_cast<uintptr_t>(from) % sizeof(values) != 0) simt::fail("a misaligned read");
  std::memcpy(values, from, sizeof(values));
#else
  using Word = std::conditional_t<sizeof(values) == 16, uint4, uint2>;
  const Word word = *reinterpret_cast<const Word*>(from);
  std::memcpy(values, &word, sizeof(values));
#endif
}

// 16 bytes past the first-level cache, first to leave the second: nobody reads them soon.
__device__ __forceinline__ void stream_16(void* to, uint4 word) {
#if defined(MAGSD_SIMT)
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) simt::fail("a misaligned write");
  std::memcpy(to, &word, sizeof(word));
#else
  __stcs(static_cast<uint4*>(to), word);
#endif
}

// Eight numbers of shared memory, upcast; 0 unless they exist.
template <typename T>
__device__ __forceinline__ void load_eight(const T* from, bool exist,
                                           accumulate_t<T> (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 16 / sizeof(T)) {
    unsigned words[4];
    load_aligned(reinterpret_cast<const unsigned*>(from + i), words);
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const unsigned word = exist ? words[k] : 0;
        if constexpr (std::is_same_v<T, BFloat16>) {
          values[2 * k] = __uint_as_float(word << 16);
          values[2 * k + 1] = __uint_as_float(word & 0xffff0000u);
        } else {
          T two[2];
          std::memcpy(two, &word, sizeof(two));
          values[2 * k] = upcast(two[0]);
          values[2 * k + 1] = upcast(two[1]);
        }
      }
    } else {
      std::memcpy(values + i, words, sizeof(words));
#pragma unroll
      for (int k = i; k < i + 16 / static_cast<int>(sizeof(T)); ++k) {
        values[k] = exist ? values[k] : T{0};
      }
    }
  }
}

// Up to 8 entries of a row in global memory; whole: there are 8 and the row is aligned.
template <typename T>
__device__ __forceinline__ void load_row(const T* from, int count, bool whole, T (&values)[8]) {
  constexpr int kEach = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < 8; i += kEach) {
    T part[kEach];
    if (whole) load_aligned(from + i, part);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (!whole) part[k] = i + k < count ? from[i + k] : T{};
      values[i + k] = part[k];
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_row(const accumulate_t<T> (&values)[8], T* to, int count,
                                          bool whole) {
  constexpr int kEach = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < 8; i += kEach) {
    uint4 word;
    if constexpr (sizeof(T) == 2) {
      word = {downcast_two<T>(values[0], values[1]), downcast_two<T>(values[2], values[3]),
              downcast_two<T>(values[4], values[5]), downcast_two<T>(values[6], values[7])};
    } else {
      std::memcpy(&word, values + i, sizeof(word));
    }
    if (whole) {
      stream_16(to + i, word);
      continue;
    }
    T part[kEach];
    std::memcpy(part, &word, sizeof(word));
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (i + k < count) to[i + k] = part[k];
    }
  }
}

// Roots of float to 2 in 2^23, in a third of the instructions of correctly rounded ones. Of numbers
// below 2^-126 the root is 0.
__device__ __forceinline__ float quick_root(float value) {
#if defined(MAGSD_SIMT)
  return std::sqrt(value);
#else
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
#endif
}
__device__ __forceinline__ double quick_root(double value) { return std::sqrt(value); }

__device__ __forceinline__ float quick_inverse_root(float value) {
#if defined(MAGSD_SIMT)
  return 1.0f / std::sqrt(value);
#else
  return rsqrtf(value);
#endif
}
__device__ __forceinline__ double quick_inverse_root(double value) { return 1 / std::sqrt(value); }

// --------------------------------------------------------------------------------------- the call

// Features in place, dense or with channels side by side.
template <typename T>
struct Features {
  const T* data;
  int64_t count;  // from the first to past the last
  int64_t step_b, step_c, step_p;
  int misaligned;  // entries from a boundary of 16 bytes to the first
  bool channels_last, aligned_pixels;

  explicit Features(const FeatureMap& map)
      : data(magsd::MAGSD_ISA::data<T>(map.tensor)),
        step_b(map.steps.step_b),
        step_c(map.steps.step_c),
        step_p(map.steps.step_p),
        channels_last(map.steps.step_c == 1 && map.steps.step_p != 1) {
    const MapSteps& steps = map.steps;
    count = 1 + (steps.batch - 1) * step_b + (steps.channels - 1) * step_c +
            (steps.pixels() - 1) * step_p;
    constexpr int64_t kEach = 16 / sizeof(T);
    misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(data) / sizeof(T) % kEach);
    aligned_pixels = misaligned == 0 && step_p % kEach == 0 && step_b % kEach == 0;
  }
};

// Attention maps in place, whatever their strides, and their resize to `width` columns of features.
template <typename T>
struct AttentionMaps {
  const T* data;
  int64_t step_b, step_m, step_y, step_x;
  int height, width, to_width;
  accumulate_t<T> rows_apart, columns_apart;  // of attention, between pixels of features
  bool resized;

  AttentionMaps(const Tensor& maps, int64_t to_height, int64_t to_columns)
      : data(magsd::MAGSD_ISA::data<T>(maps)),
        step_b(maps.stride(0)),
        step_m(maps.stride(1)),
        step_y(maps.stride(2)),
        step_x(maps.stride(3)),
        height(static_cast<int>(maps.size(2))),
        width(static_cast<int>(maps.size(3))),
        to_width(static_cast<int>(to_columns)),
        rows_apart(resize_step<accumulate_t<T>>(height, to_height, true)),
        columns_apart(resize_step<accumulate_t<T>>(width, to_columns, true)),
        resized(height != to_height || width != to_columns) {}

  __device__ accumulate_t<T> at(const T* map, int64_t y, int64_t x) const {
    return upcast(map[y * step_y + x * step_x]);
  }

  // Map m of image b at pixel p of the features.
  __device__ accumulate_t<T> value(int64_t b, int m, int p) const {
    using A = accumulate_t<T>;
    const T* map = data + b * step_b + m * step_m;
    const int y = p / to_width, x = p % to_width;
    if (!resized) return at(map, y, x);
    const LinearTaps<A> row = linear_taps(y, height, rows_apart, true);
    const LinearTaps<A> column = linear_taps(x, width, columns_apart, true);
    const A upper = (A{1} - column.weight) * at(map, row.lower, column.lower) +
                    column.weight * at(map, row.lower, column.upper);
    const A lower = (A{1} - column.weight) * at(map, row.upper, column.lower) +
                    column.weight * at(map, row.upper, column.upper);
    return (A{1} - row.weight) * upper + row.weight * lower;
  }
};

template <typename T>
struct PoolCall {
  using A = accumulate_t<T>;
  Features<T> features;
  AttentionMaps<T> attention;
  int batch, channels, maps, pixels;
  A factor, eps, scale;
  bool signed_sqrt, normalize;

  PoolCall(const FeatureMap& map, const Tensor& maps_of, const PoolShape& shape,
           const PoolSettings& settings)
      : features(map),
        attention(maps_of, map.steps.height, map.steps.width),
        batch(static_cast<int>(shape.batch)),
        channels(static_cast<int>(shape.channels)),
        maps(static_cast<int>(shape.maps)),
        pixels(static_cast<int>(shape.pixels)),
        factor(settings.maximum ? A{1} : A{1} / static_cast<A>(shape.pixels)),
        eps(static_cast<A>(settings.eps)),
        scale(static_cast<A>(settings.scale)),
        signed_sqrt(settings.signed_sqrt),
        normalize(settings.normalize) {
    constexpr int64_t kMost = int64_t{1} << 30;
    STD_TORCH_CHECK(shape.channels <= kMost && shape.maps <= kMost,
                    "more than 2^30 channels or maps cannot be pooled");
  }

  // Rows of a (maps x channels) matrix whose channels can be read 16 bytes at a time.
  bool has_aligned_rows(const T* matrix) const {
    return reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && channels * sizeof(T) % 16 == 0;
  }

  // From sums of products, or maxima, to pooled entries and, where asked for, their signed roots.
  __device__ void take_roots(const A (&sums)[8], A (&roots)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) roots[j] = sums[j] * factor;
    if (!signed_sqrt) return;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const A root = std::copysign(quick_root(std::abs(roots[j]) + eps), roots[j]);
      roots[j] = roots[j] == 0 ? A{0} : root;
    }
  }
};

// Calls function(std::integral_constant<Product, ...>) with how a call makes its products.
template <typename T, typename Function>
void visit_product(bool maximum, bool allow_tf32, const Function& function) {
  using P = Product;
  if (maximum) return function(std::integral_constant<P, P::kMaximum>());
  if constexpr (!std::is_same_v<T, accumulate_t<T>>) {
    return function(std::integral_constant<P, P::kTensor>());
  } else {
    if constexpr (std::is_same_v<T, float>) {
      if (allow_tf32) return function(std::integral_constant<P, P::kTensor>());
    }
    return function(std::integral_constant<P, P::kFused>());
  }
}

// Pools and adds up scale * root * grad over the maps and channels of every image: (B, shares)
// float64, the shares of an image to be added in order. Runs the products as the forward does.
template <typename T>
Tensor projection_sums(const DeviceScope& scope, const PoolCall<T>& call, bool maximum,
                       bool allow_tf32, const T* grad);

}  // namespace magsd::MAGSD_ISA::bilinear_pool
