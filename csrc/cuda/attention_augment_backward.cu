// Gradients of crop and mix-up, of patch, and of three views at once; dim is its own adjoint.
//
// Moves: the gradient of each view read once from memory, that of the images written once. One
// launch; a block takes some rows of one plane, as many at a time as give each thread one vector.
// The adjoint of a crop is separable and gathers, so that its order is fixed: for every row of the
// box the threads first sum, for each output column, the output rows that sample it (these follow
// one another; an output row serves two input rows, the second time from the caches) into shared
// memory, then each thread sums the columns that sample its elements. Output columns go through
// shared memory in pieces, so that rows may be of any length. Boxes come from outside and are
// clamped to the image.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "cuda/attention_augment.h"

namespace magsd::MAGSD_ISA {
namespace {

constexpr int kPasses = 4;            // over a block's rows
constexpr int kSumBytes = 16 * 1024;  // of sums in shared memory

// Gradients of the views of one batch; what is null adds nothing.
template <typename T>
struct Plan {
  using Real = accumulate_t<T>;
  ImageLayout layout;  // of each view's gradient
  const T* mixed = nullptr;
  const T* dimmed = nullptr;
  const T* patched = nullptr;
  const int32_t* mix_boxes = nullptr;
  const int32_t* patch_boxes = nullptr;
  AttentionMaps maps{};
  Choice dim{};
  Offsets offsets{};
  Real own = 0, share = 1;  // of the image and of the crop in mix-up
  Real floor = 0;
  bool align_corners = false;
  T* grad = nullptr;
};

// How a block's rows and the room for its sums are cut.
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
__device__ void sum_rows(const Plan<T>& plan, const CropPart<accumulate_t<T>>& part, const T* grad,
                         int first_row, int rows, int first, int count) {
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
      for (int k = 0; k < N; ++k) sum[k] += weight * widen(from.at[k]);
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
__device__ void add_crop(const Plan<T>& plan, const CropPart<accumulate_t<T>>& part, const T* grad,
                         const Pass& pass, int first_row, int past_row, int r, int element,
                         bool mine, accumulate_t<T>* total) {
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
  for (int k = 0; k < N; ++k) total[k] += widen(own.at[k]) * factor.at[k];
}

// Adds what a row of the patched view gives to elements element..element + N - 1 of row y.
template <typename T, int N>
__device__ void add_patch(const Plan<T>& plan, const Box& box, const Corner& corner, const T* grad,
                          int y, int element, accumulate_t<T>* total) {
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
    if (!covered || at < hidden || at >= hidden + extent) total[k] += widen(own.at[k]);
    if (box.rows.holds(y) && at >= copied && at < copied + extent) {
      total[k] += widen(load<1>(copy + (at - copied)).at[0]);
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kAugmentThreads, N > 4 ? 2 : 3)
    backward_kernel(const Plan<T> plan, const Cut cut, const Pass pass) {
  using Real = accumulate_t<T>;
  MAGSD_DYNAMIC_SHARED(unsigned char, memory);
  MAGSD_SHARED(float, partial, [kAugmentWarps]);
  MAGSD_SHARED(int, row_first, [kMostRows + 2]);
  const ImageLayout& layout = plan.layout;
  const Place place(cut, layout);
  const int64_t start = place.b * layout.step_b + place.plane * layout.step_plane;
  Real* sums = reinterpret_cast<Real*>(memory);
  MapRows<N> map_rows(reinterpret_cast<Pack<float, N>*>(sums + pass.room), plan.maps, place, cut);
  int* column_first = reinterpret_cast<int*>(map_rows.rows + cut.map_rows * cut.width);

  CropPart<Real> part{};
  if (plan.mixed != nullptr) {
    part =
        crop_part(box_inside(plan.mix_boxes + 4 * place.b, layout), layout, place.first_vector * N,
                  place.past_vector * N, plan.align_corners, sums, column_first, row_first);
  }
  Box patch{};
  Corner corner{};
  if (plan.patched != nullptr) {
    patch = box_inside(plan.patch_boxes + 4 * place.b, layout);
    corner = paste_corner(patch, plan.offsets(place.b, 0), plan.offsets(place.b, 1), layout.height,
                          layout.width);
  }
  Guide guide(plan.maps);
  if (plan.dimmed != nullptr) {
    guide.choose(plan.dim, place.b);
    map_rows.fill(guide, place, static_cast<int>(layout.inner));
    guide.find_threshold(partial);
  }
  __syncthreads();

  const int r = static_cast<int>(threadIdx.x) / cut.width;
  const int vector = place.first_vector + static_cast<int>(threadIdx.x) % cut.width;
  const int element = vector * N;
  T* grad = plan.grad + (place.b * layout.planes + place.plane) * layout.height * layout.row;
  for (int first_row = place.first_row; first_row < place.past_row; first_row += pass.rows) {
    const int past_row =
        first_row + pass.rows < place.past_row ? first_row + pass.rows : place.past_row;
    const int y = first_row + r;
    const bool mine = y < past_row && vector < place.past_vector;
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
      const Sample<float, int> row = map_rows.sample(plan.maps, y, y - place.first_row);
      add_scaled(plan.dimmed + start + y * layout.step_y + element,
                 map_rows.factors(row, vector - place.first_vector, guide.threshold, plan.floor),
                 total);
    }
    if (plan.patched != nullptr) {
      add_patch<T, N>(plan, patch, corner, plan.patched + start, y, element, total);
    }
    Pack<T, N> result;
#pragma unroll
    for (int k = 0; k < N; ++k) result.at[k] = narrow<T>(total[k]);
    store_past_caches(grad + y * layout.row + element, result);
  }
}

template <typename T, int N>
void launch_gradient(const DeviceScope& scope, const Plan<T>& plan) {
  using Real = accumulate_t<T>;
  const Cut cut = cut_of(plan.layout, N, kAugmentThreads, kPasses * kAugmentThreads,
                         plan.dimmed != nullptr ? &plan.maps : nullptr);
  Pass pass{std::min(kAugmentThreads / cut.width, cut.rows), 0, 0};
  size_t bytes = static_cast<size_t>(cut.map_rows) * cut.width * N * sizeof(float);
  if (plan.mixed != nullptr) {
    pass.room = kSumBytes / sizeof(Real);
    pass.pixels = static_cast<int>(cut.width * N / plan.layout.inner) + 4;
    bytes += kSumBytes + pass.pixels * sizeof(int);
  }
  launch(scope, grid_of(cut, plan.layout), kAugmentThreads, bytes, backward_kernel<T, N>, plan, cut,
         pass);
}

template <typename T>
void make_gradient(const DeviceScope& scope, const Plan<T>& plan) {
  if (plan.layout.batch == 0) return;
  if (has_vectors(plan.layout, {plan.mixed, plan.dimmed, plan.patched, plan.grad})) {
    launch_gradient<T, 16 / sizeof(T)>(scope, plan);
  } else {
    launch_gradient<T, 1>(scope, plan);
  }
}

Tensor attention_mixup_backward(const Tensor& grad, const Tensor& boxes, double weight,
                                bool align_corners) {
  const DeviceScope scope(grad);
  check_images(grad, "grad", 4);
  check_shares(0, weight);
  const Images input = readable(grad);
  const Tensor rows = dense_boxes(boxes, 0, input.layout.batch);
  const Tensor result = empty_images(0, input.layout, grad.scalar_type());
  visit_floating(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Plan<T> plan{input.layout, data<T>(input.tensor)};
    plan.mix_boxes = data<int32_t>(rows);
    plan.own = static_cast<accumulate_t<T>>(1 - weight);
    plan.share = static_cast<accumulate_t<T>>(weight);
    plan.align_corners = align_corners;
    plan.grad = mutable_data<T>(result);
    make_gradient(scope, plan);
  });
  return result;
}

Tensor attention_patch_backward(const Tensor& grad, const Tensor& boxes, const Tensor& offsets) {
  const DeviceScope scope(grad);
  check_images(grad, "grad", 4);
  check_offsets(offsets, grad.size(0));
  const Images input = readable(grad);
  const Tensor rows = dense_boxes(boxes, 0, input.layout.batch);
  const Tensor result = empty_images(0, input.layout, grad.scalar_type());
  visit_floating(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Plan<T> plan{input.layout};
    plan.patched = data<T>(input.tensor);
    plan.patch_boxes = data<int32_t>(rows);
    plan.offsets = offsets_of(offsets);
    plan.grad = mutable_data<T>(result);
    make_gradient(scope, plan);
  });
  return result;
}

Tensor attention_views_backward(const Tensor& grad, const Tensor& attention, const Tensor& index,
                                const Tensor& theta, const std::optional<Tensor>& offsets,
                                const Tensor& boxes, double weight, double floor,
                                bool align_corners) {
  const DeviceScope scope(grad);
  const int64_t count = offsets ? kViews : kViews - 1;
  check_images(grad, "grad", 5);
  check_sizes(grad, "grad", {count, -1, -1, -1, -1});
  check_guide(attention, index, theta, grad.size(1), count);
  if (offsets) check_offsets(*offsets, grad.size(1));
  check_shares(0, weight);
  std::vector<Images> input;
  for (int64_t view = 0; view < count; ++view) {
    input.push_back(readable(torch::stable::select(grad, 0, view)));
  }
  const ImageLayout& layout = input[0].layout;
  const Tensor rows = dense_boxes(boxes, count - 1, layout.batch);
  const Tensor result = empty_images(0, layout, grad.scalar_type());
  visit_floating(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Plan<T> plan{layout, data<T>(input[0].tensor), data<T>(input[1].tensor)};
    plan.mix_boxes = data<int32_t>(rows);
    if (offsets) {
      plan.patched = data<T>(input[2].tensor);
      plan.patch_boxes = plan.mix_boxes + 4 * layout.batch;
      plan.offsets = offsets_of(*offsets);
    }
    plan.maps = maps_of(attention, layout.height, layout.width, align_corners);
    plan.dim = choose(theta, index, 1);
    plan.own = static_cast<accumulate_t<T>>(1 - weight);
    plan.share = static_cast<accumulate_t<T>>(weight);
    plan.floor = static_cast<accumulate_t<T>>(floor);
    plan.align_corners = align_corners;
    plan.grad = mutable_data<T>(result);
    make_gradient(scope, plan);
  });
  return result;
}

}  // namespace
}  // namespace magsd::MAGSD_ISA

MAGSD_OPERATORS(library) {
  using namespace magsd::MAGSD_ISA;
  library.impl("attention_mixup_backward", TORCH_BOX(&attention_mixup_backward));
  library.impl("attention_patch_backward", TORCH_BOX(&attention_patch_backward));
  library.impl("attention_views_backward", TORCH_BOX(&attention_views_backward));
}
