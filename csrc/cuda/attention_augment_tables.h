// The tables by which a block makes its part of them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/attention_augment.h"

namespace magsd::MAGSD_ISA::attention_augment {

// A row of the block: where its part of the tile lies, and where it reads the box and the map.
template <typename T>
struct alignas(16) Row {
  const T* own;
  int64_t out;  // elements from a view's first
  const T* crop_lower;
  const T* crop_upper;
  const T* pasted;  // what is pasted into the row; null: nothing
  accumulate_t<T> crop_weight;
  LinearTaps<float, int> map;  // among the rows that the block keeps of it
};

// A block's tables in shared memory.
template <typename T, int N>
struct Tables {
  using Real = accumulate_t<T>;
  Row<T>* rows;
  Pack<Real, N>* weights;    // of the upper neighbors in the crop's rows
  Pack<unsigned, N>* lower;  // twice where the lower one lies; one more if the upper is another
  Pack<float, N>* map_rows;
  Real* blended;  // rows of the crop before its columns are, `stride` entries from one to the next
  int stride;

  static size_t bytes(const Partition& partition) {
    return blended_offset(partition) + sizeof(Real) * partition.rows * partition.blended;
  }
  __device__ Tables(unsigned char* memory, const Partition& partition)
      : rows(reinterpret_cast<Row<T>*>(memory)),
        weights(reinterpret_cast<Pack<Real, N>*>(rows + partition.rows)),
        lower(reinterpret_cast<Pack<unsigned, N>*>(weights + partition.width)),
        map_rows(reinterpret_cast<Pack<float, N>*>(lower + partition.width)),
        blended(reinterpret_cast<Real*>(memory + blended_offset(partition))),
        stride(partition.blended) {}

 private:
  MAGSD_HD static size_t blended_offset(const Partition& partition) {
    const size_t row = static_cast<size_t>(partition.width) * N;
    const size_t end = partition.rows * sizeof(Row<T>) +
                       row * (sizeof(Real) + sizeof(unsigned) + partition.map_rows * sizeof(float));
    return (end + 7) / 8 * 8;
  }
};

// What the whole block knows of its image.
template <typename T>
struct ImagePart {
  const T* plane;
  Box mix{}, patch{};
  Corner corner{};
  int blended = 0;  // the first entry of the rows that `blend_rows` makes
};

// All threads note where the tile's elements read the box's columns.
template <typename T, int N>
__device__ void tabulate_columns(const Plan<T>& plan, const BlockPosition& position,
                                 const Interval& box, const Tables<T, N>& tables) {
  using Real = accumulate_t<T>;
  const int inner = static_cast<int>(plan.layout.inner);
  const Resize<Real> columns =
      resize_of<Real>(box.extent(), static_cast<int>(plan.layout.width), plan.align_corners);
  const int first = position.first_vector * N, count = position.past_vector * N - first;
  for (int e = threadIdx.x; e < count; e += kAugmentThreads) {
    const int x = (first + e) / inner;
    const LinearTaps<Real, int> at = columns.at(x);
    const int lower = (box.start + at.lower - x) * inner + first + e;
    tables.lower[e / N].at[e % N] = 2u * static_cast<unsigned>(lower) + (at.upper > at.lower);
    tables.weights[e / N].at[e % N] = at.weight;
  }
}

// One thread per row of the block.
template <typename T, int N>
__device__ void tabulate_rows(const Plan<T>& plan, const BlockPosition& position,
                              const ImagePart<T>& part, const MapRows<N>& map_rows,
                              const Tables<T, N>& tables) {
  using Real = accumulate_t<T>;
  const ImageLayout& layout = plan.layout;
  const int r = static_cast<int>(threadIdx.x), y = position.first_row + r;
  if (y >= position.past_row) return;
  const int64_t first = position.first_vector * N;
  Row<T> row{};
  row.own = part.plane + y * layout.step_y + first;
  row.out =
      ((position.b * layout.planes + position.plane) * layout.height + y) * layout.row + first;
  if (plan.mixed != nullptr) {
    const Resize<Real> rows = resize_of<Real>(part.mix.rows.extent(),
                                              static_cast<int>(layout.height), plan.align_corners);
    const LinearTaps<Real, int> at = rows.at(y);
    const T* box = part.plane + part.mix.rows.start * layout.step_y;
    row.crop_lower = box + at.lower * layout.step_y;
    row.crop_upper = box + at.upper * layout.step_y;
    row.crop_weight = at.weight;
  }
  if (plan.dimmed != nullptr) row.map = map_rows.taps(plan.maps, y, r);
  const int64_t inside = y - part.corner.row;
  if (plan.patched != nullptr && inside >= 0 && inside < part.patch.rows.extent()) {
    row.pasted = part.plane + (part.patch.rows.start + inside) * layout.step_y +
                 part.patch.columns.start * layout.inner;
  }
  tables.rows[r] = row;
}

// An entry of a crop between the two rows that it reads.
template <typename T>
__device__ __forceinline__ accumulate_t<T> blend(const Row<T>& row, unsigned at) {
  const accumulate_t<T> first = upcast(load<1>(row.crop_lower + at).at[0]);
  const accumulate_t<T> second = upcast(load<1>(row.crop_upper + at).at[0]);
  return first + row.crop_weight * (second - first);
}

// The warps blend what the tile reads of every row: two loads an entry of the box, where each
// output would take four. The tables are made; the rows are to be used behind a barrier.
template <typename T, int N>
__device__ void blend_rows(const Plan<T>& plan, const BlockPosition& position, ImagePart<T>& part,
                           const Tables<T, N>& tables) {
  using Real = accumulate_t<T>;
  const int inner = static_cast<int>(plan.layout.inner);
  const Interval& box = part.mix.columns;
  const Resize<Real> columns =
      resize_of<Real>(box.extent(), static_cast<int>(plan.layout.width), plan.align_corners);
  const int first = columns.at(position.first_vector * N / inner).lower;
  const int last = columns.at((position.past_vector * N - 1) / inner).upper;
  const int count = (last + 1 - first) * inner;
  part.blended = (box.start + first) * inner;
  for (int r = threadIdx.x / kWarp; r < position.past_row - position.first_row;
       r += kAugmentWarps) {
    const Row<T>& row = tables.rows[r];
    Real* to = tables.blended + r * tables.stride;
#pragma unroll 2
    for (int e = threadIdx.x % kWarp; e < count; e += kWarp) {
      to[spread(e)] = blend(row, static_cast<unsigned>(part.blended + e));
    }
  }
}

}  // namespace magsd::MAGSD_ISA::attention_augment
