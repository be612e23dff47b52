// What the kernels of the guided views share: an image's guide, the partition of images among
// blocks, elements read and written several at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "common/attention_augment_operators.h"
#include "common/boxes.h"
#include "common/image_layout.h"
#include "common/resampling.h"
#include "cuda/attention_sampling.h"
#include "cuda/kernel.h"

namespace magsd::MAGSD_ISA::attention_augment {

using attention_sampling::MapSizes;

// Kernels also state how many blocks are to share a multiprocessor: left to itself, the compiler
// spills registers to make room for one more.
constexpr int kAugmentThreads = 256;
constexpr int kAugmentWarps = kAugmentThreads / kWarp;
constexpr int kMostRows = 32;  // in a block's part

// One axis of a bilinear resize: `size` outputs read `length` inputs.
template <typename Real>
struct Resize {
  int length, size;
  bool align_corners;
  Real step;

  MAGSD_HD LinearTaps<Real, int> at(int o) const {
    return linear_taps<Real, int>(o, length, step, align_corners);
  }
  MAGSD_HD int first_output(int i) const {
    return magsd::first_output<Real, int>(i, length, size, step, align_corners);
  }
};

template <typename Real>
MAGSD_HD Resize<Real> resize_of(int length, int size, bool align_corners) {
  return {length, size, align_corners, resize_step<Real>(length, size, align_corners)};
}

// Attention maps as an operator receives them, of any dtype and strides, and how an image's pixels
// read them.
struct AttentionMaps {
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t count = 0, step_b = 0, step_m = 0, step_y = 0, step_x = 0;
  Resize<float> rows{}, columns{};

  AttentionMaps() = default;
  AttentionMaps(const Tensor& attention, int64_t height, int64_t width, bool align_corners)
      : data(attention.const_data_ptr()),
        dtype(attention.scalar_type()),
        count(attention.size(1)),
        step_b(attention.stride(0)),
        step_m(attention.stride(1)),
        step_y(attention.stride(2)),
        step_x(attention.stride(3)),
        rows(resize_of<float>(static_cast<int>(attention.size(2)), static_cast<int>(height),
                              align_corners)),
        columns(resize_of<float>(static_cast<int>(attention.size(3)), static_cast<int>(width),
                                 align_corners)) {}

  // Calls visitor(entries) with a pointer of the maps' type: they are no reason for more kernels.
  template <typename Visitor>
  __device__ void visit(const Visitor& visitor) const {
    switch (dtype) {
      case ScalarType::Double:
        return visitor(static_cast<const double*>(data));
      case ScalarType::BFloat16:
        return visitor(static_cast<const BFloat16*>(data));
      case ScalarType::Half:
        return visitor(static_cast<const Half*>(data));
      default:
        return visitor(static_cast<const float*>(data));
    }
  }
};

// A thread's way through the entries of rows, every kAugmentThreads-th, without a division a step.
struct StridedIter {
  int row, column;
  int width, down, right;

  __device__ explicit StridedIter(int row_width)
      : row(static_cast<int>(threadIdx.x) / row_width),
        column(static_cast<int>(threadIdx.x) % row_width),
        width(row_width),
        down(kAugmentThreads / row_width),
        right(kAugmentThreads % row_width) {}

  __device__ void step() {
    row += down;
    column += right;
    if (column < width) return;
    column -= width;
    ++row;
  }
};

// The guide of one image: its map and its threshold.
struct Guide {
  const AttentionMaps& maps;
  int64_t map = 0;  // its first entry
  float theta = 0;
  float threshold = 0;

  __device__ explicit Guide(const AttentionMaps& all) : maps(all) {}

  __device__ void choose(const Choice& choice, int64_t b) {
    choose(b, choice.map(b, maps.count), choice.theta[b]);
  }
  __device__ void choose(int64_t b, int64_t rank, float share) {
    map = b * maps.step_b + rank * maps.step_m;
    theta = share;
  }
  __device__ int64_t entry(int i, int j) const { return map + i * maps.step_y + j * maps.step_x; }

  // All threads find t = theta * (maximum of the map), and copy the map to `copy` unless that is
  // null; `partial` holds a float per warp. What was written before is seen by all behind it.
  __device__ void find_threshold(float* partial, float* copy = nullptr) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, width = maps.columns.length;
    float peak = -INFINITY;
    maps.visit([&](const auto* entries) {
#pragma unroll 2
      for (StridedIter at(width); at.row < maps.rows.length; at.step()) {
        const float value = static_cast<float>(upcast(entries[entry(at.row, at.column)]));
        if (copy != nullptr) copy[at.row * width + at.column] = value;
        peak = larger(peak, value);
      }
    });
    peak = warp_reduce(peak, [](float a, float b) { return larger(a, b); });
    if (lane == 0) partial[warp] = peak;
    __syncthreads();
    for (int w = 0; w < kAugmentWarps; ++w) peak = larger(peak, partial[w]);
    threshold = theta * peak;
  }
};

// What draws the maps of an image's views, instead of an index that names them.
struct Draws {
  Uniforms uniforms{};
  MapSizes sizes{};
  double eps = 0;
  int views = 0;
  int64_t* index = nullptr;    // (B, views), written; null: nothing is drawn
  double* overflow = nullptr;  // weights that have no room in shared memory
};

// Boxes (views, B, 4) of one or two views, and thresholds (B,) of a third; one launch.
struct BoxesPlan {
  AttentionMaps maps;
  int64_t batch;
  double padding;
  Choice first{}, second{}, third{};
  int boxes = 0;  // views that want one
  int32_t* found = nullptr;
  float* thresholds = nullptr;  // of the third view
  Draws draws{};                // from uniforms of the columns 0, 2 and 1
};
void find_boxes(const DeviceScope& scope, BoxesPlan plan);

// The views of a launch, as kernels take them.
template <typename View>
struct Plan {
  using T = std::remove_const_t<View>;
  using Real = accumulate_t<T>;
  ImageLayout layout;
  const T* images;
  T* grad;
  View *mixed, *dimmed, *patched;
  const int32_t *mix_boxes, *patch_boxes;
  const float* thresholds;
  AttentionMaps maps;
  Choice dim;
  Uniforms offsets;
  Real own, share;  // of the image and of the crop in mix-up
  Real floor;
  bool align_corners;

  explicit Plan(const Views<View, AttentionMaps>& views)
      : layout(views.layout),
        images(views.images),
        grad(views.grad),
        mixed(views.mixed),
        dimmed(views.dimmed),
        patched(views.patched),
        mix_boxes(views.mix_boxes),
        patch_boxes(views.patch_boxes),
        thresholds(views.thresholds),
        maps(views.maps != nullptr ? *views.maps : AttentionMaps()),
        dim(views.dim),
        offsets(views.offsets),
        own(static_cast<Real>(1 - views.weight)),
        share(static_cast<Real>(views.weight)),
        floor(static_cast<Real>(views.floor)),
        align_corners(views.align_corners) {}
};

// N elements side by side, at most 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};
template <size_t kBytes>
using Bits = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2,
                       std::conditional_t<kBytes == 4, unsigned, unsigned short>>>;

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
  const auto bits = __ldg(reinterpret_cast<const Bits<sizeof(Pack<T, N>)>*>(from));
  Pack<T, N> pack;
  memcpy(&pack, &bits, sizeof(pack));
  return pack;
}

// Results larger than the caches are not to push the images out of them.
template <int N, typename T>
__device__ __forceinline__ void store_past_caches(T* to, const Pack<T, N>& pack) {
  Bits<sizeof(pack)> bits;
  memcpy(&bits, &pack, sizeof(pack));
  __stcs(reinterpret_cast<Bits<sizeof(pack)>*>(to), bits);
}

// How planes are partitioned among blocks: `rows` rows of a tile of `width` vectors to a block.
struct Partition {
  int vectors;  // of a whole row
  int width, tiles;
  int rows, chunks;
  int map_rows;  // most rows of a map that a block keeps
  int blended;   // most entries of a row of a crop that a block keeps; 0: it keeps none
};

// Where entry e of a row lies in shared memory. Lanes that read every second, fourth or eighth
// entry would meet in a few of its 32 banks; with a gap behind every 32 they do not.
MAGSD_HD int spread(int e) { return e + e / kWarp; }

// Most entries of a crop's row that a tile reads, spread; 0 where positions are rounded to more
// than a pixel.
inline int64_t blended_entries(const ImageLayout& layout, int64_t tile) {
  constexpr int64_t kExact = 1 << 16;
  if (layout.width > kExact) return 0;
  return std::min(layout.row, tile + 4 * layout.inner) * (kWarp + 1) / kWarp + 1;
}

// What a block of a partition shall hold.
struct BlockContents {
  int elements;               // of a vector
  int vectors;                // about so many
  const AttentionMaps* maps;  // of which it keeps rows; null: it keeps none
  int blended_size;           // bytes of an entry of a crop's rows that it keeps; 0: it keeps none
};

// Tiles of at most 1024 elements and kAugmentThreads vectors. Blocks are so low that what they keep
// has room in shared memory.
inline Partition partition_of(const ImageLayout& layout, const BlockContents& block) {
  const int elements = block.elements, blended_size = block.blended_size;
  const AttentionMaps* maps = block.maps;
  constexpr int kMostElements = 1024, kMostMapEntries = 5120, kMostBlendedBytes = 18 * 1024;
  Partition partition{};
  partition.vectors = static_cast<int>(layout.row) / elements;
  partition.tiles =
      ceil_div(partition.vectors, std::min(kAugmentThreads, kMostElements / elements));
  partition.width = ceil_div(partition.vectors, partition.tiles);
  const int64_t blended =
      blended_size > 0 ? blended_entries(layout, int64_t{partition.width} * elements) : 0;
  if (blended * blended_size <= kMostBlendedBytes) partition.blended = static_cast<int>(blended);
  const int height = static_cast<int>(layout.height);
  for (partition.rows = std::clamp(block.vectors / partition.width, 1, std::min(height, kMostRows));
       ; partition.rows /= 2) {
    partition.chunks = ceil_div(height, partition.rows);
    partition.rows = ceil_div(height, partition.chunks);
    bool fits = partition.rows * partition.blended * blended_size <= kMostBlendedBytes;
    if (maps != nullptr) {
      // Beyond this, positions are rounded to more than a row.
      constexpr int kExact = 1 << 16;
      const double reach =
          std::ceil((partition.rows - 1) * static_cast<double>(maps->rows.step)) + 3;
      partition.map_rows = maps->rows.length > kExact
                               ? 2 * partition.rows
                               : static_cast<int>(std::min<double>(reach, 2 * partition.rows));
      fits &= partition.map_rows * partition.width * elements <= kMostMapEntries;
    }
    if (partition.rows == 1 || fits) break;
  }
  return partition;
}

inline dim3 grid_for(const Partition& partition, const ImageLayout& layout) {
  return grid_of(layout.batch * layout.planes * partition.chunks * partition.tiles);
}

// A block's part.
struct BlockPosition {
  int64_t b, plane;
  int first_row, past_row;
  int first_vector, past_vector;

  __device__ BlockPosition(const Partition& partition, const ImageLayout& layout) {
    unsigned rest = blockIdx.x;
    first_vector = static_cast<int>(rest % partition.tiles) * partition.width;
    rest /= partition.tiles;
    first_row = static_cast<int>(rest % partition.chunks) * partition.rows;
    rest /= partition.chunks;
    plane = rest % static_cast<unsigned>(layout.planes);
    b = rest / static_cast<unsigned>(layout.planes);
    const int height = static_cast<int>(layout.height);
    past_row = first_row + partition.rows < height ? first_row + partition.rows : height;
    past_vector = first_vector + partition.width < partition.vectors
                      ? first_vector + partition.width
                      : partition.vectors;
  }
};

// Rows of a map, interpolated along x for a tile of elements, in shared memory: U interpolates
// between two of them. Those that a block's rows read follow one another or, where the map is
// higher than the image, are kept two by two.
template <int N>
struct MapRows {
  Pack<float, N>* rows;
  int width;
  int first;
  bool consecutive;

  __device__ MapRows(Pack<float, N>* room, const AttentionMaps& maps, const BlockPosition& position,
                     const Partition& partition)
      : rows(room), width(partition.width), first(maps.rows.at(position.first_row).lower) {
    consecutive = maps.rows.at(position.past_row - 1).upper - first < partition.map_rows;
  }

  // All threads make the rows, to be used behind a barrier.
  __device__ void fill(const Guide& guide, const BlockPosition& position, int inner) {
    const AttentionMaps& maps = guide.maps;
    const int elements = (position.past_vector - position.first_vector) * N;
    const int past = maps.rows.at(position.past_row - 1).upper + 1;
    maps.visit([&](const auto* entries) {
      for (int e = threadIdx.x; e < elements; e += kAugmentThreads) {
        const LinearTaps<float, int> x = maps.columns.at((position.first_vector * N + e) / inner);
        const auto make = [&](int slot, int i) {
          const float left = static_cast<float>(upcast(entries[guide.entry(i, x.lower)]));
          const float right = static_cast<float>(upcast(entries[guide.entry(i, x.upper)]));
          rows[slot * width + e / N].at[e % N] = interpolate(left, right, x.weight);
        };
        if (consecutive) {
#pragma unroll 2
          for (int i = first; i < past; ++i) make(i - first, i);
        } else {
#pragma unroll 1
          for (int y = position.first_row; y < position.past_row; ++y) {
            const LinearTaps<float, int> at = maps.rows.at(y);
            make(2 * (y - position.first_row), at.lower);
            make(2 * (y - position.first_row) + 1, at.upper);
          }
        }
      }
    });
  }

  // Where row r of the block reads `rows`.
  __device__ LinearTaps<float, int> taps(const AttentionMaps& maps, int y, int r) const {
    LinearTaps<float, int> at = maps.rows.at(y);
    at.lower = consecutive ? at.lower - first : 2 * r;
    at.upper = consecutive ? at.upper - first : 2 * r + 1;
    return at;
  }

  // factor[k] = [U < t] + floor for vector v of the tile.
  template <typename Real>
  __device__ __forceinline__ Pack<Real, N> factors(const LinearTaps<float, int>& at, int v,
                                                   float threshold, Real floor) const {
    const Pack<float, N> lower = rows[at.lower * width + v], upper = rows[at.upper * width + v];
    Pack<Real, N> factor;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float value = interpolate(lower.at[k], upper.at[k], at.weight);
      factor.at[k] = value < threshold ? Real(1) + floor : floor;
    }
    return factor;
  }
};

// Whether rows can be read and written 16 bytes at a time.
template <typename T>
bool has_vectors(const ImageLayout& layout, std::initializer_list<const T*> tensors) {
  constexpr int64_t kElements = 16 / sizeof(T);
  bool aligned = layout.row % kElements == 0 &&
                 (layout.batch == 1 || layout.step_b % kElements == 0) &&
                 (layout.planes == 1 || layout.step_plane % kElements == 0) &&
                 (layout.height == 1 || layout.step_y % kElements == 0);
  for (const T* tensor : tensors) aligned &= reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
  return aligned;
}

}  // namespace magsd::MAGSD_ISA::attention_augment
