// Gradients of crop and mix-up, of patch, and of three views at once; dim is its own adjoint.
//
// Moves: the gradient of each view read once from memory, that of the images written once. One
// launch; a block takes some rows of one plane, as many at a time as give each thread one vector.
// The adjoint of a crop is separable and gathers, so that its order is fixed: for every row of the
// box the threads first sum, for each output column, the output rows that read it (these follow
// one another; an output row serves two input rows, the second time from the caches) into shared
// memory, then each thread sums the columns that read its elements. Output columns go through
// shared memory in pieces, so that rows may be of any length. Boxes come from outside and are
// clamped to the image.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "cuda/attention_augment.h"

namespace magsd::MAGSD_ISA::attention_augment {
namespace {

constexpr int kPasses = 4;            // over a block's rows
constexpr int kSumBytes = 16 * 1024;  // of sums in shared memory

// How a block's rows and the room for its sums are partitioned.
struct Pass {
  int rows;    // at a time
  int room;    // sums in shared memory
  int pixels;  // entries of the table of columns
};

// The part of one thread and what its block knows of the box.
template <typename Real>
struct CropPart {
  Box box;
  Resize<Real> rows, columns;
  int first_pixel;  // of the block's tile
  int past_pixel;
  const int* column_first;  // [x - first_pixel]: the first output that reads column x - 1 or later
  int* row_first;           // [r]: the first output that reads row r - 1 of the pass or later
  Real* sums;
};

// All threads make the table of columns, to be used behind a barrier.
template <typename Real>
__device__ CropPart<Real> crop_part(const Box& box, const ImageLayout& layout, int first_element,
                                    int past_element, bool align_corners, Real* sums,
                                    int* column_first, int* row_first) {
  const int inner = static_cast<int>(layout.inner);
  CropPart<Real> part{
      box,
      resize_of<Real>(box.rows.extent(), static_cast<int>(layout.height), align_corners),
      resize_of<Real>(box.columns.extent(), static_cast<int>(layout.width), align_corners),
      first_element / inner,
      (past_element - 1) / inner + 1,
      column_first,
      row_first,
      sums};
  for (int i = threadIdx.x; i < part.past_pixel - part.first_pixel + 2; i += kAugmentThreads) {
    column_first[i] = part.columns.first_output(part.first_pixel + i - 1 - box.columns.start);
  }
  return part;
}

// A box from outside, clamped to the image.
__device__ inline Box box_inside(const int32_t* row, const ImageLayout& layout) {
  const Box box = read_box(row);
  return {inside(box.rows, static_cast<int32_t>(layout.height)),
          inside(box.columns, static_cast<int32_t>(layout.width))};
}

// sums[r * count + e] = what the outputs give to row first_row + r of the image, at their elements
// first..first + count - 1.
template <typename T, int N>
__device__ void sum_rows(const Plan<const T>& plan, const CropPart<accumulate_t<T>>& part,
                         const T* grad, int first_row, int rows, int first, int count) {
  using Real = accumulate_t<T>;
  const int vectors = count / N;
  for (int item = threadIdx.x; item < rows * vectors; item += kAugmentThreads) {
    const int r = item / vectors, e = item % vectors * N;
    if (!part.box.rows.holds(first_row + r)) continue;
    const int row = first_row + r - part.box.rows.start;
    Real sum[N] = {};
    for (int o = part.row_first[r]; o < part.row_first[r + 2]; ++o) {
      const Real weight = weight_of(part.rows.at(o), row);
      const Pack<T, N> from = load<N>(grad + o * plan.layout.step_y + first + e);
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] += weight * upcast(from.at[k]);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) part.sums[r * count + e + k] = sum[k];
  }
}

// What the outputs of elements first..first + count - 1 give to `element` of the image.
template <typename Real>
__device__ Real sum_columns(const CropPart<Real>& part, const Real* sums, int inner, int element,
                            int first, int count) {
  const int x = element / inner, c = element % inner;
  if (!part.box.columns.holds(x)) return 0;
  const int* reads = part.column_first + (x - part.first_pixel);
  // Outputs whose element of this channel lies in the piece.
  const int from = first > c ? ceil_div(first - c, inner) : 0;
  const int to = first + count > c ? ceil_div(first + count - c, inner) : 0;
  const int begin = reads[0] > from ? reads[0] : from, past = reads[2] < to ? reads[2] : to;
  Real sum = 0;
  for (int o = begin; o < past; ++o) {
    sum += weight_of(part.columns.at(o), x - part.box.columns.start) * sums[o * inner + c - first];
  }
  return sum;
}

// Adds to each thread's vector what a crop's outputs give to it. All threads call.
template <typename T, int N>
__device__ void add_crop(const Plan<const T>& plan, const CropPart<accumulate_t<T>>& part,
                         const T* grad, const Pass& pass, int first_row, int past_row, int r,
                         int element, bool mine, accumulate_t<T>* total) {
  using Real = accumulate_t<T>;
  const int inner = static_cast<int>(plan.layout.inner);
  const int left = part.box.columns.start, right = part.box.columns.stop;
  const int first_pixel = part.first_pixel > left ? part.first_pixel : left;
  const int past_pixel = part.past_pixel < right ? part.past_pixel : right;
  if (first_pixel >= past_pixel || past_row <= part.box.rows.start ||
      first_row >= part.box.rows.stop) {
    return;
  }
  const int rows = past_row - first_row;
  for (int i = threadIdx.x; i < rows + 2; i += kAugmentThreads) {
    part.row_first[i] = part.rows.first_output(first_row + i - 1 - part.box.rows.start);
  }
  __syncthreads();
  const int first = part.column_first[first_pixel - part.first_pixel] * inner / N * N;
  const int past = part.column_first[past_pixel + 1 - part.first_pixel] * inner;
  const int piece = pass.room / rows / N * N;
  Real sum[N] = {};
  for (int begin = first; begin < past; begin += piece) {
    const int rest = ceil_div(past - begin, N) * N, count = rest < piece ? rest : piece;
    sum_rows<T, N>(plan, part, grad, first_row, rows, begin, count);
    __syncthreads();
    if (mine && part.box.rows.holds(first_row + r)) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        sum[k] += sum_columns(part, part.sums + r * count, inner, element + k, begin, count);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < N; ++k) total[k] += plan.share * sum[k];
}

// Adds a vector of a view's gradient, element by element times a factor.
template <typename T, int N>
__device__ void add_scaled(const T* grad, const Pack<accumulate_t<T>, N>& factor,
                           accumulate_t<T>* total) {
  const Pack<T, N> own = load<N>(grad);
#pragma unroll
  for (int k = 0; k < N; ++k) total[k] += upcast(own.at[k]) * factor.at[k];
}

// Adds what a row of the patched view gives to elements element..element + N - 1 of row y.
template <typename T, int N>
__device__ void add_patch(const Plan<const T>& plan, const Box& box, const Corner& corner,
                          const T* grad, int y, int element, accumulate_t<T>* total) {
  const int inner = static_cast<int>(plan.layout.inner);
  const int extent = box.columns.extent() * inner;
  const int hidden = static_cast<int>(corner.column) * inner;
  const int copied = box.columns.start * inner;
  const bool covered = y >= corner.row && y < corner.row + box.rows.extent();
  const Pack<T, N> own = load<N>(grad + y * plan.layout.step_y + element);
  const T* copy = grad + (y - box.rows.start + corner.row) * plan.layout.step_y + hidden;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const int at = element + k;
    if (!covered || at < hidden || at >= hidden + extent) total[k] += upcast(own.at[k]);
    if (box.rows.holds(y) && at >= copied && at < copied + extent) {
      total[k] += upcast(load<1>(copy + (at - copied)).at[0]);
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kAugmentThreads, N > 4 ? 2 : 3)
    backward_kernel(const Plan<const T> plan, const Partition partition, const Pass pass) {
  using Real = accumulate_t<T>;
  MAGSD_DYNAMIC_SHARED(unsigned char, memory);
  MAGSD_SHARED(float, partial, [kAugmentWarps]);
  MAGSD_SHARED(int, row_first, [kMostRows + 2]);
  const ImageLayout& layout = plan.layout;
  const BlockPosition position(partition, layout);
  const int64_t start = position.b * layout.step_b + position.plane * layout.step_plane;
  Real* sums = reinterpret_cast<Real*>(memory);
  MapRows<N> map_rows(reinterpret_cast<Pack<float, N>*>(sums + pass.room), plan.maps, position,
                      partition);
  int* column_first = reinterpret_cast<int*>(map_rows.rows + partition.map_rows * partition.width);

  CropPart<Real> part{};
  if (plan.mixed != nullptr) {
    part = crop_part(box_inside(plan.mix_boxes + 4 * position.b, layout), layout,
                     position.first_vector * N, position.past_vector * N, plan.align_corners, sums,
                     column_first, row_first);
  }
  Box patch{};
  Corner corner{};
  if (plan.patched != nullptr) {
    patch = box_inside(plan.patch_boxes + 4 * position.b, layout);
    corner = paste_corner(patch, plan.offsets(position.b, 0), plan.offsets(position.b, 1),
                          layout.height, layout.width);
  }
  Guide guide(plan.maps);
  if (plan.dimmed != nullptr) {
    guide.choose(plan.dim, position.b);
    map_rows.fill(guide, position, static_cast<int>(layout.inner));
    guide.find_threshold(partial);
  }
  __syncthreads();

  const int r = static_cast<int>(threadIdx.x) / partition.width;
  const int vector = position.first_vector + static_cast<int>(threadIdx.x) % partition.width;
  const int element = vector * N;
  T* grad = plan.grad + (position.b * layout.planes + position.plane) * layout.height * layout.row;
  for (int first_row = position.first_row; first_row < position.past_row; first_row += pass.rows) {
    const int past_row =
        first_row + pass.rows < position.past_row ? first_row + pass.rows : position.past_row;
    const int y = first_row + r;
    const bool mine = y < past_row && vector < position.past_vector;
    Real total[N] = {};
    if (plan.mixed != nullptr) {
      if (mine && plan.own != 0) {
        Pack<Real, N> own;
        for (Real& factor : own.at) factor = plan.own;
        add_scaled(plan.mixed + start + y * layout.step_y + element, own, total);
      }
      add_crop<T, N>(plan, part, plan.mixed + start, pass, first_row, past_row, r, element, mine,
                     total);
    }
    if (!mine) continue;
    if (plan.dimmed != nullptr) {
      const LinearTaps<float, int> row = map_rows.taps(plan.maps, y, y - position.first_row);
      add_scaled(plan.dimmed + start + y * layout.step_y + element,
                 map_rows.factors(row, vector - position.first_vector, guide.threshold, plan.floor),
                 total);
    }
    if (plan.patched != nullptr) {
      add_patch<T, N>(plan, patch, corner, plan.patched + start, y, element, total);
    }
    Pack<T, N> result;
#pragma unroll
    for (int k = 0; k < N; ++k) result.at[k] = downcast<T>(total[k]);
    store_past_caches(grad + y * layout.row + element, result);
  }
}

template <typename T, int N>
void launch_gradient(const DeviceScope& scope, const Plan<const T>& plan) {
  using Real = accumulate_t<T>;
  const Partition partition = partition_of(
      plan.layout,
      {N, kPasses * kAugmentThreads, plan.dimmed != nullptr ? &plan.maps : nullptr, 0});
  Pass pass{std::min(kAugmentThreads / partition.width, partition.rows), 0, 0};
  size_t bytes = static_cast<size_t>(partition.map_rows) * partition.width * N * sizeof(float);
  if (plan.mixed != nullptr) {
    pass.room = kSumBytes / sizeof(Real);
    pass.pixels = static_cast<int>(partition.width * N / plan.layout.inner) + 4;
    bytes += kSumBytes + pass.pixels * sizeof(int);
  }
  launch(scope, {grid_for(partition, plan.layout), kAugmentThreads, bytes}, backward_kernel<T, N>,
         plan, partition, pass);
}

struct Backend {
  using Maps = AttentionMaps;

  static void check_boxes(const Tensor&, const ImageLayout&) {}  // the kernel clamps them

  template <typename T>
  static void make_gradient(const DeviceScope& scope, const Views<const T, AttentionMaps>& views) {
    if (views.layout.batch == 0) return;
    const Plan<const T> plan(views);
    if (has_vectors<T>(plan.layout, {plan.mixed, plan.dimmed, plan.patched, plan.grad})) {
      launch_gradient<T, 16 / sizeof(T)>(scope, plan);
    } else {
      launch_gradient<T, 1>(scope, plan);
    }
  }
};
using Operators = GradientOperators<Backend>;

}  // namespace

MAGSD_OPERATORS(library) {
  library.impl("attention_mixup_backward", TORCH_BOX(&Operators::attention_mixup_backward));
  library.impl("attention_patch_backward", TORCH_BOX(&Operators::attention_patch_backward));
  library.impl("attention_views_backward", TORCH_BOX(&Operators::attention_views_backward));
}

}  // namespace magsd::MAGSD_ISA::attention_augment
