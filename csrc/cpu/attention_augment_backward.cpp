// Gradients of crop and mix-up, of patch, and of three views at once; dim is its own adjoint.
//
// Moves: the gradient of each view read once or, where a box's rows are gathered, a few times from
// the caches, that of the images written once. The cut is by image and, when the batch is small, by
// band of rows. The adjoint of a crop is separable: an input row first sums the output rows that
// sample it, then its columns. It gathers in a fixed order, so that it is deterministic.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/attention_augment_arguments.h"
#include "cpu/attention_guide.h"
#include "cpu/crop_resize.h"
#include "cpu/image_bands.h"
#include "cpu/large_result.h"

namespace magsd::MAGSD_ISA {
namespace {

// Boxes that came as an argument: dense, and inside the image.
Tensor checked_boxes(const Tensor& boxes, int64_t views, const ImageLayout& layout) {
  const Tensor rows = dense_boxes(boxes, views, layout.batch);
  const int32_t* row = data<int32_t>(rows);
  for (int64_t i = 0; i < boxes.numel() / 4; ++i, row += 4) {
    STD_TORCH_CHECK(0 <= row[0] && row[0] < row[2] && row[2] <= layout.height && 0 <= row[1] &&
                        row[1] < row[3] && row[3] <= layout.width,
                    "a box lies outside the image");
  }
  return rows;
}

// Gradients of the views of one batch; what is absent adds nothing.
template <typename T>
struct BackwardPlan {
  ImageLayout layout;  // of each view's gradient
  const T* mixed = nullptr;
  const T* dimmed = nullptr;
  const T* patched = nullptr;
  const int32_t* mix_boxes = nullptr;
  const int32_t* patch_boxes = nullptr;
  const AttentionMaps* maps = nullptr;
  Choice dim{};
  Offsets offsets{};
  double weight = 1, floor = 0;
  bool align_corners = false;
  T* grad = nullptr;
};

// For each row of the box, the outputs that read it as their lower neighbour: first[i]..first[i+1].
template <typename Real>
struct RowTable {
  void set(int64_t length, int64_t size, bool align_corners) {
    const Real step = sampling_step<Real>(length, size, align_corners);
    samples.clear();
    first.assign(length + 1, size);
    for (int64_t o = size - 1; o >= 0; --o) {
      samples.push_back(sample_at(o, length, step, align_corners));
      first[samples.back().lower] = o;
    }
    std::reverse(samples.begin(), samples.end());
    for (int64_t i = length - 1; i >= 0; --i) first[i] = std::min(first[i], first[i + 1]);
  }
  std::vector<Sample<Real>> samples;
  std::vector<int64_t> first;
};

// sum[0..row) = what the outputs give to row `i` of the box.
template <typename T>
void gather_rows(const RowTable<accumulate_t<T>>& rows, int64_t i, const ImageLayout& layout,
                 const T* grad, std::vector<accumulate_t<T>>& wide,
                 std::vector<accumulate_t<T>>& sum) {
  using Real = accumulate_t<T>;
  std::fill(sum.begin(), sum.end(), Real(0));
  for (int64_t o = rows.first[i > 0 ? i - 1 : 0]; o < rows.first[i + 1]; ++o) {
    const Real share = weight_of(rows.samples[o], i);
    load_row(grad + o * layout.step_y, layout.row, wide.data());
    const Real* MAGSD_RESTRICT from = wide.data();
    Real* MAGSD_RESTRICT to = sum.data();
    for (int64_t x = 0; x < layout.row; ++x) to[x] += share * from[x];
  }
}

template <typename T>
void add_patch(const BackwardPlan<T>& plan, const Box& box, const Corner& corner, int64_t y,
               const T* grad, accumulate_t<T>* total) {
  const ImageLayout& layout = plan.layout;
  const int64_t extent = box.columns.extent() * layout.inner;
  const T* row = grad + y * layout.step_y;
  const bool covered = y >= corner.row && y < corner.row + box.rows.extent();
  const int64_t hidden = corner.column * layout.inner;
  for (int64_t i = 0; i < layout.row; ++i) {
    if (!covered || i < hidden || i >= hidden + extent) total[i] += widen(row[i]);
  }
  if (!box.rows.holds(y)) return;
  const T* copy = grad + (y - box.rows.start + corner.row) * layout.step_y + hidden;
  accumulate_t<T>* into = total + box.columns.start * layout.inner;
  for (int64_t i = 0; i < extent; ++i) into[i] += widen(copy[i]);
}

template <typename T>
void make_gradient(const BackwardPlan<T>& plan) {
  using Real = accumulate_t<T>;
  const ImageLayout& layout = plan.layout;
  const int64_t image_size = layout.planes * layout.height * layout.row;
  expect_writes(plan.grad, layout.batch * image_size);
  for_bands(layout, [&](int64_t b, int64_t first, int64_t past) {
    ColumnTable<Real> columns(layout.width, layout.inner);
    RowTable<Real> rows;
    std::vector<Real> wide(layout.row), sum(layout.row), crop(layout.row), total(layout.row);
    std::vector<Real> factor(layout.row);
    std::optional<Guide> guide;
    Box mix{}, patch{};
    Corner corner{};
    int64_t box_width = 0;
    if (plan.mixed) {
      mix = read_box(plan.mix_boxes + 4 * b);
      box_width = mix.columns.extent();
      columns.set(box_width, plan.align_corners);
      rows.set(mix.rows.extent(), layout.height, plan.align_corners);
    }
    if (plan.dimmed) guide.emplace(*plan.maps).set(b, plan.dim);
    if (plan.patched) {
      patch = read_box(plan.patch_boxes + 4 * b);
      corner =
          paste_corner(patch, plan.offsets(b, 0), plan.offsets(b, 1), layout.height, layout.width);
    }
    const Real own = static_cast<Real>(1 - plan.weight), share = static_cast<Real>(plan.weight);
    for (int64_t y = first; y < past; ++y) {
      if (plan.dimmed) {
        guide->factors(y, static_cast<Real>(plan.floor), layout.inner, factor.data());
      }
      for (int64_t plane = 0; plane < layout.planes; ++plane) {
        const int64_t start = b * layout.step_b + plane * layout.step_plane;
        std::fill(total.begin(), total.end(), Real(0));
        if (plan.mixed) {
          const T* grad = plan.mixed + start;
          if (plan.weight != 1) {
            load_row(grad + y * layout.step_y, layout.row, wide.data());
            for (int64_t i = 0; i < layout.row; ++i) total[i] = own * wide[i];
          }
          if (mix.rows.holds(y)) {
            gather_rows(rows, y - mix.rows.start, layout, grad, wide, sum);
            columns.apply_adjoint(sum.data(), box_width, crop.data());
            Real* into = total.data() + mix.columns.start * layout.inner;
            for (int64_t i = 0; i < box_width * layout.inner; ++i) into[i] += share * crop[i];
          }
        }
        if (plan.dimmed) {
          load_row(plan.dimmed + start + y * layout.step_y, layout.row, wide.data());
          for (int64_t i = 0; i < layout.row; ++i) total[i] += wide[i] * factor[i];
        }
        if (plan.patched) {
          add_patch(plan, patch, corner, y, plan.patched + start, total.data());
        }
        const int64_t out = b * image_size + (plane * layout.height + y) * layout.row;
        store_row<T>(total.data(), layout.row, plan.grad + out);
      }
    }
  });
}

Tensor attention_mixup_backward(const Tensor& grad, const Tensor& boxes, double weight,
                                bool align_corners) {
  check_images(grad, "grad", 4);
  check_shares(0, weight);
  const Images input = readable(grad);
  const Tensor rows = checked_boxes(boxes, 0, input.layout);
  const Tensor result = empty_images(0, input.layout, grad.scalar_type());
  visit_floating(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    BackwardPlan<T> plan{input.layout, data<T>(input.tensor)};
    plan.mix_boxes = data<int32_t>(rows);
    plan.weight = weight;
    plan.align_corners = align_corners;
    plan.grad = mutable_data<T>(result);
    make_gradient(plan);
  });
  return result;
}

Tensor attention_patch_backward(const Tensor& grad, const Tensor& boxes, const Tensor& offsets) {
  check_images(grad, "grad", 4);
  check_offsets(offsets, grad.size(0));
  const Images input = readable(grad);
  const Tensor rows = checked_boxes(boxes, 0, input.layout);
  const Tensor result = empty_images(0, input.layout, grad.scalar_type());
  visit_floating(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    BackwardPlan<T> plan{input.layout};
    plan.patched = data<T>(input.tensor);
    plan.patch_boxes = data<int32_t>(rows);
    plan.offsets = offsets_of(offsets);
    plan.grad = mutable_data<T>(result);
    make_gradient(plan);
  });
  return result;
}

Tensor attention_views_backward(const Tensor& grad, const Tensor& attention, const Tensor& index,
                                const Tensor& theta, const std::optional<Tensor>& offsets,
                                const Tensor& boxes, double weight, double floor,
                                bool align_corners) {
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
  const Tensor rows = checked_boxes(boxes, count - 1, layout);
  const AttentionMaps maps(attention, layout.height, layout.width, align_corners);
  const Tensor result = empty_images(0, layout, grad.scalar_type());
  visit_floating(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    BackwardPlan<T> plan{layout, data<T>(input[0].tensor), data<T>(input[1].tensor)};
    plan.mix_boxes = data<int32_t>(rows);
    if (offsets) {
      plan.patched = data<T>(input[2].tensor);
      plan.patch_boxes = plan.mix_boxes + 4 * layout.batch;
      plan.offsets = offsets_of(*offsets);
    }
    plan.maps = &maps;
    plan.dim = choose(theta, index, 1);
    plan.weight = weight;
    plan.floor = floor;
    plan.align_corners = align_corners;
    plan.grad = mutable_data<T>(result);
    make_gradient(plan);
  });
  return result;
}

}  // namespace
}  // namespace magsd::MAGSD_ISA

MAGSD_OPERATORS(attention_augment_backward, library) {
  library.impl("attention_mixup_backward", TORCH_BOX(&attention_mixup_backward));
  library.impl("attention_patch_backward", TORCH_BOX(&attention_patch_backward));
  library.impl("attention_views_backward", TORCH_BOX(&attention_views_backward));
}
