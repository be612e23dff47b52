// What the kernels of the guided views share: an image's guide, the cut of images among blocks,
// elements read and written several at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "common/attention_augment_arguments.h"
#include "common/boxes.h"
#include "common/image_layout.h"
#include "common/resize.h"
#include "cuda/attention_sampling.h"
#include "cuda/kernel.h"

namespace magsd::MAGSD_ISA {

// Kernels also state how many blocks are to share a multiprocessor: left to itself, the compiler
// spills registers to make room for one more.
constexpr int kAugmentThreads = 256;
constexpr int kAugmentWarps = kAugmentThreads / kWarp;
constexpr int kMostRows = 32;  // in a block's part

// One axis of a bilinear resize: `size` outputs sample `length` inputs.
template <typename Real>
struct Resize {
  int length, size;
  bool align_corners;
  Real step;

  MAGSD_HD Sample<Real, int> at(int o) const {
    return sample_at<Real, int>(o, length, step, align_corners);
  }
  MAGSD_HD int first_output(int i) const {
    return magsd::first_output<Real, int>(i, length, size, step, align_corners);
  }
};

template <typename Real>
MAGSD_HD Resize<Real> resize_of(int length, int size, bool align_corners) {
  return {length, size, align_corners, sampling_step<Real>(length, size, align_corners)};
}

// Attention maps as an operator receives them, of any dtype and strides, and how an image's pixels
// sample them.
struct AttentionMaps {
  const void* data;
  ScalarType dtype;
  int64_t count, step_b, step_m, step_y, step_x;
  Resize<float> rows, columns;

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

inline AttentionMaps maps_of(const Tensor& attention, int64_t height, int64_t width,
                             bool align_corners) {
  const auto axis = [&](int dim, int64_t size) {
    return resize_of<float>(static_cast<int>(attention.size(dim)), static_cast<int>(size),
                            align_corners);
  };
  return {attention.const_data_ptr(), attention.scalar_type(), attention.size(1),
          attention.stride(0),        attention.stride(1),     attention.stride(2),
          attention.stride(3),        axis(2, height),         axis(3, width)};
}

// A thread's way through the entries of rows, every kAugmentThreads-th, without a division a step.
struct Walk {
  int row, column;
  int width, down, right;

  __device__ explicit Walk(int row_width)
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
      for (Walk at(width); at.row < maps.rows.length; at.step()) {
        const float value = static_cast<float>(widen(entries[entry(at.row, at.column)]));
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

// How planes are cut among blocks: `rows` rows of a tile of `width` vectors to a block.
struct Cut {
  int vectors;  // of a whole row
  int width, tiles;
  int rows, chunks;
  int map_rows;  // most rows of a map that a block keeps
  int blended;   // most entries of a row of a crop that a block keeps; 0: it keeps none
};

// Where entry e of a row lies in shared memory. Lanes that read every second, fourth or eighth
// entry would meet in a few of its 32 banks; with a gap behind every 32 they do not.
MAGSD_HD int spread(int e) { return e + e / kWarp; }

// Most entries of a crop's row that a tile samples, spread; 0 where positions are rounded to more
// than a pixel.
inline int64_t blended_entries(const ImageLayout& layout, int64_t tile) {
  constexpr int64_t kExact = 1 << 16;
  if (layout.width > kExact) return 0;
  return std::min(layout.row, tile + 4 * layout.inner) * (kWarp + 1) / kWarp + 1;
}

// Tiles of at most 1024 elements and `most` vectors, blocks of about `items` vectors. With maps,
// blocks are so low that the map's rows have room in shared memory; with `blended_size`, the bytes
// of an entry, so that the rows of a crop have.
inline Cut cut_of(const ImageLayout& layout, int elements, int most, int items,
                  const AttentionMaps* maps, int blended_size = 0) {
  constexpr int kMostElements = 1024, kMostMapEntries = 5120, kMostBlendedBytes = 18 * 1024;
  Cut cut{};
  cut.vectors = static_cast<int>(layout.row) / elements;
  cut.tiles = ceil_div(cut.vectors, std::min(most, kMostElements / elements));
  cut.width = ceil_div(cut.vectors, cut.tiles);
  const int64_t blended =
      blended_size > 0 ? blended_entries(layout, int64_t{cut.width} * elements) : 0;
  if (blended * blended_size <= kMostBlendedBytes) cut.blended = static_cast<int>(blended);
  const int height = static_cast<int>(layout.height);
  for (cut.rows = std::clamp(items / cut.width, 1, std::min(height, kMostRows));; cut.rows /= 2) {
    cut.chunks = ceil_div(height, cut.rows);
    cut.rows = ceil_div(height, cut.chunks);
    bool fits = cut.rows * cut.blended * blended_size <= kMostBlendedBytes;
    if (maps != nullptr) {
      // Beyond this, positions are rounded to more than a row.
      constexpr int kExact = 1 << 16;
      const double reach = std::ceil((cut.rows - 1) * static_cast<double>(maps->rows.step)) + 3;
      cut.map_rows = maps->rows.length > kExact
                         ? 2 * cut.rows
                         : static_cast<int>(std::min<double>(reach, 2 * cut.rows));
      fits &= cut.map_rows * cut.width * elements <= kMostMapEntries;
    }
    if (cut.rows == 1 || fits) break;
  }
  return cut;
}

inline dim3 grid_of(const Cut& cut, const ImageLayout& layout) {
  return grid_of(layout.batch * layout.planes * cut.chunks * cut.tiles);
}

// A block's part.
struct Place {
  int64_t b, plane;
  int first_row, past_row;
  int first_vector, past_vector;

  __device__ Place(const Cut& cut, const ImageLayout& layout) {
    unsigned rest = blockIdx.x;
    first_vector = static_cast<int>(rest % cut.tiles) * cut.width;
    rest /= cut.tiles;
    first_row = static_cast<int>(rest % cut.chunks) * cut.rows;
    rest /= cut.chunks;
    plane = rest % static_cast<unsigned>(layout.planes);
    b = rest / static_cast<unsigned>(layout.planes);
    const int height = static_cast<int>(layout.height);
    past_row = first_row + cut.rows < height ? first_row + cut.rows : height;
    past_vector = first_vector + cut.width < cut.vectors ? first_vector + cut.width : cut.vectors;
  }
};

// Rows of a map, interpolated along x for a tile of elements, in shared memory: U interpolates
// between two of them. Those that a block's rows sample follow one another or, where the map is
// higher than the image, are kept two by two.
template <int N>
struct MapRows {
  Pack<float, N>* rows;
  int width;
  int first;
  bool consecutive;

  __device__ MapRows(Pack<float, N>* room, const AttentionMaps& maps, const Place& place,
                     const Cut& cut)
      : rows(room), width(cut.width), first(maps.rows.at(place.first_row).lower) {
    consecutive = maps.rows.at(place.past_row - 1).upper - first < cut.map_rows;
  }

  // All threads make the rows, to be used behind a barrier.
  __device__ void fill(const Guide& guide, const Place& place, int inner) {
    const AttentionMaps& maps = guide.maps;
    const int elements = (place.past_vector - place.first_vector) * N;
    const int past = maps.rows.at(place.past_row - 1).upper + 1;
    maps.visit([&](const auto* entries) {
      for (int e = threadIdx.x; e < elements; e += kAugmentThreads) {
        const Sample<float, int> x = maps.columns.at((place.first_vector * N + e) / inner);
        const auto make = [&](int slot, int i) {
          const float left = static_cast<float>(widen(entries[guide.entry(i, x.lower)]));
          const float right = static_cast<float>(widen(entries[guide.entry(i, x.upper)]));
          rows[slot * width + e / N].at[e % N] = interpolate(left, right, x.weight);
        };
        if (consecutive) {
#pragma unroll 2
          for (int i = first; i < past; ++i) make(i - first, i);
        } else {
#pragma unroll 1
          for (int y = place.first_row; y < place.past_row; ++y) {
            const Sample<float, int> at = maps.rows.at(y);
            make(2 * (y - place.first_row), at.lower);
            make(2 * (y - place.first_row) + 1, at.upper);
          }
        }
      }
    });
  }

  // Where row r of the block samples `rows`.
  __device__ Sample<float, int> sample(const AttentionMaps& maps, int y, int r) const {
    Sample<float, int> at = maps.rows.at(y);
    at.lower = consecutive ? at.lower - first : 2 * r;
    at.upper = consecutive ? at.upper - first : 2 * r + 1;
    return at;
  }

  // factor[k] = [U < t] + floor for vector v of the tile.
  template <typename Real>
  __device__ __forceinline__ Pack<Real, N> factors(const Sample<float, int>& at, int v,
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

}  // namespace magsd::MAGSD_ISA
