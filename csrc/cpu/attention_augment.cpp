// Boxes, crop and mix-up, patch, dim and drop, and two or three views at once.
//
// Moves: the images read once from memory, each view written once (attention maps are small). First
// one task per image and view finds a box; then work is split by image and, when the batch is
// small, by band of rows, and a row of the image is read once for all its views while it is in the
// first cache. Boxes and factors come from the guide (attention_guide.h); no mask, no upsampled map
// and no crop is stored.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/attention_augment_operators.h"
#include "cpu/attention_guide.h"
#include "cpu/attention_sampling.h"
#include "cpu/crop_resize.h"
#include "cpu/image_bands.h"
#include "cpu/large_result.h"
#include "cpu/parallel.h"
#include "cpu/stream.h"

namespace magsd::MAGSD_ISA::attention_augment {
namespace {

constexpr int64_t kBlockBytes = 16384;  // of rows that all views read while they are near

// The views to make, and how they are written.
template <typename T>
struct Plan : Views<T, AttentionMaps> {
  bool streamed;
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
        upcast_row(layout.row),
        factor(layout.row),
        downcast(layout.row) {}
  ColumnTable<Real> columns;
  std::vector<RowPair<T>> pairs;
  std::vector<Real> box_row, result, upcast_row, factor;
  std::vector<T> downcast;
};

// Rounds scratch.result and writes it.
template <typename T>
void write_result(const Plan<T>& plan, Scratch<T>& scratch, T* out) {
  const int64_t count = plan.layout.row;
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    write_row(scratch.result.data(), count, out, plan.streamed);
  } else {
    store_row<T>(scratch.result.data(), count, scratch.downcast.data());
    write_row(scratch.downcast.data(), count, out, plan.streamed);
  }
}

template <typename T>
void mix_row(const Plan<T>& plan, const Box& box, int64_t plane, int64_t y, const T* image,
             const T* row, T* out, Scratch<T>& scratch) {
  using Real = accumulate_t<T>;
  const ImageLayout& layout = plan.layout;
  const int64_t box_height = box.rows.extent();
  const int64_t count = box.columns.extent() * layout.inner;
  const Real step = resize_step<Real>(box_height, layout.height, plan.align_corners);
  const LinearTaps<Real> at = linear_taps(y, box_height, step, plan.align_corners);
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
      load_row(row, layout.row, scratch.upcast_row.data());
      own_row = scratch.upcast_row.data();
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
  for (int64_t i = 0; i < plan.layout.row; ++i) result[i] = upcast(row[i]) * factor[i];
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
  T* copy = scratch.downcast.data();
  const T* source = image + (box.rows.start + inside) * layout.step_y;
  std::memcpy(copy, row, layout.row * sizeof(T));
  std::memcpy(copy + corner.column * layout.inner, source + box.columns.start * layout.inner,
              box.columns.extent() * layout.inner * sizeof(T));
  write_row(copy, layout.row, out, plan.streamed);
}

template <typename T>
int64_t views_bytes(const Views<T, AttentionMaps>& views) {
  const ImageLayout& layout = views.layout;
  const int64_t count =
      (views.mixed != nullptr) + (views.dimmed != nullptr) + (views.patched != nullptr);
  return count * layout.batch * layout.planes * layout.height * layout.row * int64_t{sizeof(T)};
}

template <typename T>
void write_views(const Plan<T>& plan) {
  using Real = accumulate_t<T>;
  const ImageLayout& layout = plan.layout;
  const int64_t image_size = layout.planes * layout.height * layout.row;
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

struct Backend {
  using Maps = AttentionMaps;
  struct Draws {};  // maps are drawn before
  static constexpr bool kFindsThresholds = false;

  static void find_boxes(const DeviceScope&, const BoxesCall<Backend>& call) {
    const int64_t tasks = call.batch * static_cast<int64_t>(call.boxed.size());
    const int64_t grain = 1 + kPixelsPerTask / (call.maps.height() * call.maps.width());
    parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
      Guide guide(call.maps);
      for (int64_t task = begin; task < end; ++task) {
        guide.set(task % call.batch, call.boxed[task / call.batch]);
        write_box(guide.box(call.padding), call.boxes + task * 4);
      }
    });
  }

  template <typename T>
  static void make_views(const DeviceScope&, const Views<T, AttentionMaps>& views) {
    const int64_t bytes = views_bytes(views);
    T* first = views.mixed ? views.mixed : views.dimmed ? views.dimmed : views.patched;
    expect_writes(first, bytes / int64_t{sizeof(T)});
    write_views(Plan<T>{views, bytes >= kStreamedBytes});
  }
};
using Operators = ViewOperators<Backend>;

std::tuple<Tensor, Tensor, Tensor> sampled_views(const Tensor& images, const Tensor& attention,
                                                 const Tensor& uniforms, const Tensor& theta,
                                                 const std::optional<Tensor>& offsets, double eps,
                                                 double padding, double weight, double floor,
                                                 bool align_corners) {
  const DeviceScope scope(images);
  const Tensor index = attention_sampling::sample_attention(attention, uniforms, eps);
  const auto [views, boxes] = Operators::guided_views(
      scope, images, attention, index, theta, offsets, {padding, weight, floor, align_corners}, {});
  return {views, index, boxes};
}

}  // namespace

MAGSD_OPERATORS(attention_augment, library) {
  library.impl("attention_boxes", TORCH_BOX(&Operators::attention_boxes));
  library.impl("attention_mixup", TORCH_BOX(&Operators::attention_mixup));
  library.impl("attention_patch", TORCH_BOX(&Operators::attention_patch));
  library.impl("attention_dim", TORCH_BOX(&Operators::attention_dim));
  library.impl("attention_views", TORCH_BOX(&Operators::attention_views));
  library.impl("sampled_views", TORCH_BOX(&sampled_views));
}

}  // namespace magsd::MAGSD_ISA::attention_augment
