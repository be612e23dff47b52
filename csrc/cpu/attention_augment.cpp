// Boxes, crop and mix-up, patch, dim and drop, and two or three views at once.
//
// Moves: the images read once from memory, each view written once (attention maps are small). First
// one task per image and view finds a box; then the cut is by image and, when the batch is small,
// by band of rows, and a row of the image is read once for all its views while it is in the first
// cache. Boxes and factors come from the guide (attention_guide.h); no mask, no upsampled map and
// no crop is stored.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/attention_augment_arguments.h"
#include "cpu/attention_guide.h"
#include "cpu/attention_sampling.h"
#include "cpu/crop_resize.h"
#include "cpu/image_bands.h"
#include "cpu/large_result.h"
#include "cpu/parallel.h"
#include "cpu/stream.h"

namespace magsd::MAGSD_ISA {
namespace {

constexpr int64_t kBlockBytes = 16384;  // of rows that all views read while they are near

// The boxes of one view per entry of `choices`: (views, B, 4), dense.
void find_boxes(const AttentionMaps& maps, const std::vector<Choice>& choices, int64_t batch,
                double padding, int32_t* boxes) {
  const int64_t tasks = batch * static_cast<int64_t>(choices.size());
  const int64_t grain = 1 + kPixelsPerTask / (maps.height() * maps.width());
  parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
    Guide guide(maps);
    for (int64_t task = begin; task < end; ++task) {
      guide.set(task % batch, choices[task / batch]);
      write_box(guide.box(padding), boxes + task * 4);
    }
  });
}

// Which views to make, and with what; what is absent is not made.
template <typename T>
struct Plan {
  using Real = accumulate_t<T>;
  ImageLayout layout;
  const T* images;
  T* mixed = nullptr;
  T* dimmed = nullptr;
  T* patched = nullptr;
  const int32_t* mix_boxes = nullptr;
  const int32_t* patch_boxes = nullptr;
  const AttentionMaps* maps = nullptr;
  Choice dim{};
  Offsets offsets{};
  double weight = 1, floor = 0;
  bool align_corners = false;
  bool streamed = false;
};

// Memory that a task uses again from row to row.
template <typename T>
struct Scratch {
  using Real = accumulate_t<T>;
  explicit Scratch(const ImageLayout& layout)
      : columns(layout.width, layout.inner),
        pairs(layout.planes, RowPair<T>(std::is_same_v<T, Real> ? 0 : layout.row)),
        box_row(layout.row + 2 * layout.inner + 2 * kLanes),
        result(layout.row),
        wide(layout.row),
        factor(layout.row),
        narrow(layout.row) {}
  ColumnTable<Real> columns;
  std::vector<RowPair<T>> pairs;
  std::vector<Real> box_row, result, wide, factor;
  std::vector<T> narrow;
};

// Rounds scratch.result and writes it.
template <typename T>
void write_result(const Plan<T>& plan, Scratch<T>& scratch, T* out) {
  const int64_t count = plan.layout.row;
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    write_row(scratch.result.data(), count, out, plan.streamed);
  } else {
    store_row<T>(scratch.result.data(), count, scratch.narrow.data());
    write_row(scratch.narrow.data(), count, out, plan.streamed);
  }
}

template <typename T>
void mix_row(const Plan<T>& plan, const Box& box, int64_t plane, int64_t y, const T* image,
             const T* row, T* out, Scratch<T>& scratch) {
  using Real = accumulate_t<T>;
  const ImageLayout& layout = plan.layout;
  const int64_t box_height = box.rows.extent();
  const int64_t count = box.columns.extent() * layout.inner;
  const Real step = sampling_step<Real>(box_height, layout.height, plan.align_corners);
  const Sample<Real> at = sample_at(y, box_height, step, plan.align_corners);
  const T* corner = image + box.rows.start * layout.step_y + box.columns.start * layout.inner;
  Real* MAGSD_RESTRICT box_row = scratch.box_row.data();
  scratch.pairs[plane].mix(corner + at.lower * layout.step_y, corner + at.upper * layout.step_y,
                           at.weight, count, box_row);
  std::copy(box_row + count - layout.inner, box_row + count, box_row + count);
  const Real* own_row = nullptr;
  if (plan.weight != 1) {
    if constexpr (std::is_same_v<T, Real>) {
      own_row = row;
    } else {
      load_row(row, layout.row, scratch.wide.data());
      own_row = scratch.wide.data();
    }
  }
  scratch.columns.apply(box_row, own_row, static_cast<Real>(1 - plan.weight),
                        static_cast<Real>(plan.weight), scratch.result.data());
  write_result(plan, scratch, out);
}

template <typename T>
void dim_row(const Plan<T>& plan, const T* row, T* out, Scratch<T>& scratch) {
  using Real = accumulate_t<T>;
  const Real* MAGSD_RESTRICT factor = scratch.factor.data();
  Real* MAGSD_RESTRICT result = scratch.result.data();
  for (int64_t i = 0; i < plan.layout.row; ++i) result[i] = widen(row[i]) * factor[i];
  write_result(plan, scratch, out);
}

template <typename T>
void patch_row(const Plan<T>& plan, const Box& box, const Corner& corner, int64_t y, const T* image,
               const T* row, T* out, Scratch<T>& scratch) {
  const ImageLayout& layout = plan.layout;
  const int64_t inside = y - corner.row;
  if (inside < 0 || inside >= box.rows.extent()) {
    return write_row(row, layout.row, out, plan.streamed);
  }
  T* narrow = scratch.narrow.data();
  const T* source = image + (box.rows.start + inside) * layout.step_y;
  std::memcpy(narrow, row, layout.row * sizeof(T));
  std::memcpy(narrow + corner.column * layout.inner, source + box.columns.start * layout.inner,
              box.columns.extent() * layout.inner * sizeof(T));
  write_row(narrow, layout.row, out, plan.streamed);
}

template <typename T>
int64_t views_bytes(const Plan<T>& plan) {
  const ImageLayout& layout = plan.layout;
  const int64_t views =
      (plan.mixed != nullptr) + (plan.dimmed != nullptr) + (plan.patched != nullptr);
  return views * layout.batch * layout.planes * layout.height * layout.row * int64_t{sizeof(T)};
}

template <typename T>
void make_views(Plan<T>& plan) {
  using Real = accumulate_t<T>;
  const ImageLayout& layout = plan.layout;
  const int64_t image_size = layout.planes * layout.height * layout.row;
  plan.streamed = views_bytes(plan) >= kStreamedBytes;
  T* views = plan.mixed ? plan.mixed : plan.dimmed ? plan.dimmed : plan.patched;
  expect_writes(views, views_bytes(plan) / int64_t{sizeof(T)});
  for_bands(layout, [&](int64_t b, int64_t first, int64_t past) {
    Scratch<T> scratch(layout);
    std::optional<Guide> guide;
    Box mix{}, patch{};
    Corner corner{};
    if (plan.mixed) {
      mix = read_box(plan.mix_boxes + 4 * b);
      scratch.columns.set(mix.columns.extent(), plan.align_corners);
    }
    if (plan.dimmed) guide.emplace(*plan.maps).set(b, plan.dim);
    if (plan.patched) {
      patch = read_box(plan.patch_boxes + 4 * b);
      corner =
          paste_corner(patch, plan.offsets(b, 0), plan.offsets(b, 1), layout.height, layout.width);
    }
    // A few rows of one view after another: fewer streams are written at a time, and the rows are
    // still in the first cache when the next view reads them.
    const int64_t step = std::max<int64_t>(1, kBlockBytes / (layout.row * int64_t{sizeof(T)}));
    const auto for_rows = [&](int64_t begin, int64_t end, const auto& body) {
      for (int64_t plane = 0; plane < layout.planes; ++plane) {
        const T* image = plan.images + b * layout.step_b + plane * layout.step_plane;
        for (int64_t y = begin; y < end; ++y) {
          const int64_t out = b * image_size + (plane * layout.height + y) * layout.row;
          body(plane, y, image, image + y * layout.step_y, out);
        }
      }
    };
    for (int64_t begin = first; begin < past; begin += step) {
      const int64_t end = std::min(begin + step, past);
      if (plan.mixed) {
        for_rows(begin, end,
                 [&](int64_t plane, int64_t y, const T* image, const T* row, int64_t out) {
                   mix_row(plan, mix, plane, y, image, row, plan.mixed + out, scratch);
                 });
      }
      if (plan.dimmed) {
        for (int64_t y = begin; y < end; ++y) {
          guide->factors(y, static_cast<Real>(plan.floor), layout.inner, scratch.factor.data());
          for_rows(y, y + 1, [&](int64_t, int64_t, const T*, const T* row, int64_t out) {
            dim_row(plan, row, plan.dimmed + out, scratch);
          });
        }
      }
      if (plan.patched) {
        for_rows(begin, end, [&](int64_t, int64_t y, const T* image, const T* row, int64_t out) {
          patch_row(plan, patch, corner, y, image, row, plan.patched + out, scratch);
        });
      }
    }
    finish_rows(plan.streamed);
  });
}

Tensor attention_boxes(const Tensor& attention, const std::optional<Tensor>& index,
                       const Tensor& theta, const std::vector<int64_t>& size, double padding,
                       bool align_corners) {
  check_tensor(attention, "attention", 4);
  const int64_t batch = attention.size(0);
  check_guide(attention, index, theta, batch, 0);
  check_shares(padding, 1);
  check_size(size);
  const AttentionMaps maps(attention, size[0], size[1], align_corners);
  const Tensor boxes = uninitialized({batch, 4}, ScalarType::Int);
  find_boxes(maps, {choose(theta, index, 0)}, batch, padding, mutable_data<int32_t>(boxes));
  return boxes;
}

// What mix-up and patch alike start with: images that can be read, their boxes, room for the view.
struct BoxedView {
  Images input;
  Tensor boxes, view;
};

BoxedView boxed_view(const Tensor& images, const Tensor& attention,
                     const std::optional<Tensor>& index, const Tensor& theta, double padding,
                     bool align_corners) {
  check_images(images, "images", 4);
  check_guide(attention, index, theta, images.size(0), 0);
  check_shares(padding, 1);
  Images input = readable(images);
  const ImageLayout& layout = input.layout;
  const AttentionMaps maps(attention, layout.height, layout.width, align_corners);
  const Tensor boxes = uninitialized({layout.batch, 4}, ScalarType::Int);
  find_boxes(maps, {choose(theta, index, 0)}, layout.batch, padding, mutable_data<int32_t>(boxes));
  const Tensor view = empty_images(0, layout, images.scalar_type());
  return {std::move(input), boxes, view};
}

std::tuple<Tensor, Tensor> attention_mixup(const Tensor& images, const Tensor& attention,
                                           const std::optional<Tensor>& index, const Tensor& theta,
                                           double padding, double weight, bool align_corners) {
  check_shares(padding, weight);
  const BoxedView made = boxed_view(images, attention, index, theta, padding, align_corners);
  visit_floating(images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Plan<T> plan{made.input.layout, data<T>(made.input.tensor)};
    plan.mixed = mutable_data<T>(made.view);
    plan.mix_boxes = data<int32_t>(made.boxes);
    plan.weight = weight;
    plan.align_corners = align_corners;
    make_views(plan);
  });
  return {made.view, made.boxes};
}

std::tuple<Tensor, Tensor> attention_patch(const Tensor& images, const Tensor& attention,
                                           const std::optional<Tensor>& index, const Tensor& theta,
                                           const Tensor& offsets, double padding,
                                           bool align_corners) {
  const BoxedView made = boxed_view(images, attention, index, theta, padding, align_corners);
  check_offsets(offsets, images.size(0));
  visit_floating(images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Plan<T> plan{made.input.layout, data<T>(made.input.tensor)};
    plan.patched = mutable_data<T>(made.view);
    plan.patch_boxes = data<int32_t>(made.boxes);
    plan.offsets = offsets_of(offsets);
    make_views(plan);
  });
  return {made.view, made.boxes};
}

Tensor attention_dim(const Tensor& images, const Tensor& attention,
                     const std::optional<Tensor>& index, const Tensor& theta, double floor,
                     bool align_corners) {
  check_images(images, "images", 4);
  check_guide(attention, index, theta, images.size(0), 0);
  const Images input = readable(images);
  const AttentionMaps maps(attention, input.layout.height, input.layout.width, align_corners);
  const Tensor dimmed = empty_images(0, input.layout, images.scalar_type());
  visit_floating(images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Plan<T> plan{input.layout, data<T>(input.tensor)};
    plan.dimmed = mutable_data<T>(dimmed);
    plan.maps = &maps;
    plan.dim = choose(theta, index, 0);
    plan.floor = floor;
    make_views(plan);
  });
  return dimmed;
}

// Mix-up and dim and, with offsets, patch; boxes of all but dim.
std::tuple<Tensor, Tensor> guided_views(const Tensor& images, const Tensor& attention,
                                        const Tensor& index, const Tensor& theta,
                                        const std::optional<Tensor>& offsets, double padding,
                                        double weight, double floor, bool align_corners) {
  const int64_t count = offsets ? kViews : kViews - 1;
  check_images(images, "images", 4);
  check_guide(attention, index, theta, images.size(0), count);
  if (offsets) check_offsets(*offsets, images.size(0));
  check_shares(padding, weight);
  const Images input = readable(images);
  const ImageLayout& layout = input.layout;
  const AttentionMaps maps(attention, layout.height, layout.width, align_corners);
  const Tensor boxes = uninitialized({count - 1, layout.batch, 4}, ScalarType::Int);
  int32_t* box = mutable_data<int32_t>(boxes);
  std::vector<Choice> boxed = {choose(theta, index, 0)};
  if (offsets) boxed.push_back(choose(theta, index, 2));
  find_boxes(maps, boxed, layout.batch, padding, box);
  const Tensor views = empty_images(count, layout, images.scalar_type());
  visit_floating(images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const int64_t view = layout.batch * layout.planes * layout.height * layout.row;
    Plan<T> plan{layout, data<T>(input.tensor)};
    plan.mixed = mutable_data<T>(views);
    plan.dimmed = plan.mixed + view;
    plan.mix_boxes = box;
    if (offsets) {
      plan.patched = plan.dimmed + view;
      plan.patch_boxes = box + 4 * layout.batch;
      plan.offsets = offsets_of(*offsets);
    }
    plan.maps = &maps;
    plan.dim = choose(theta, index, 1);
    plan.weight = weight;
    plan.floor = floor;
    plan.align_corners = align_corners;
    make_views(plan);
  });
  return {views, boxes};
}

std::tuple<Tensor, Tensor> attention_views(const Tensor& images, const Tensor& attention,
                                           const Tensor& index, const Tensor& theta,
                                           const Tensor& offsets, double padding, double weight,
                                           double floor, bool align_corners) {
  return guided_views(images, attention, index, theta, offsets, padding, weight, floor,
                      align_corners);
}

std::tuple<Tensor, Tensor, Tensor> sampled_views(const Tensor& images, const Tensor& attention,
                                                 const Tensor& uniforms, const Tensor& theta,
                                                 const std::optional<Tensor>& offsets, double eps,
                                                 double padding, double weight, double floor,
                                                 bool align_corners) {
  const Tensor index = sample_attention(attention, uniforms, eps);
  const auto [views, boxes] = guided_views(images, attention, index, theta, offsets, padding,
                                           weight, floor, align_corners);
  return {views, index, boxes};
}

}  // namespace
}  // namespace magsd::MAGSD_ISA

MAGSD_OPERATORS(attention_augment, library) {
  library.impl("attention_boxes", TORCH_BOX(&attention_boxes));
  library.impl("attention_mixup", TORCH_BOX(&attention_mixup));
  library.impl("attention_patch", TORCH_BOX(&attention_patch));
  library.impl("attention_dim", TORCH_BOX(&attention_dim));
  library.impl("attention_views", TORCH_BOX(&attention_views));
  library.impl("sampled_views", TORCH_BOX(&sampled_views));
}
