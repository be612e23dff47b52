// Gradients of crop and mix-up, of patch, and of three views at once; dim is its own adjoint.
//
// Moves: the gradient of each view read once or, where a box's rows are gathered, a few times from
// the caches, that of the images written once. Work is split by image and, when the batch is small,
// by band of rows. The adjoint of a crop is separable: an input row first sums the output rows that
// read it, then its columns. It gathers in a fixed order, so that it is deterministic.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/attention_augment_operators.h"
#include "cpu/attention_guide.h"
#include "cpu/crop_resize.h"
#include "cpu/image_bands.h"
#include "cpu/large_result.h"

namespace magsd::MAGSD_ISA::attention_augment {
namespace {

template <typename T>
using Gradients = Views<const T, AttentionMaps>;

// For each row of the box, the outputs that read it as their lower neighbor: first[i]..first[i+1].
template <typename Real>
struct RowTable {
  void set(int64_t length, int64_t size, bool align_corners) {
    const Real step = resize_step<Real>(length, size, align_corners);
    taps.clear();
    first.assign(length + 1, size);
    for (int64_t o = size - 1; o >= 0; --o) {
      taps.push_back(linear_taps(o, length, step, align_corners));
      first[taps.back().lower] = o;
    }
    std::reverse(taps.begin(), taps.end());
    for (int64_t i = length - 1; i >= 0; --i) first[i] = std::min(first[i], first[i + 1]);
  }
  std::vector<LinearTaps<Real>> taps;
  std::vector<int64_t> first;
};

// sum[0..row) = what the outputs give to row `i` of the box.
template <typename T>
void gather_rows(const RowTable<accumulate_t<T>>& rows, int64_t i, const ImageLayout& layout,
                 const T* grad, std::vector<accumulate_t<T>>& upcast_row,
                 std::vector<accumulate_t<T>>& sum) {
  using Real = accumulate_t<T>;
  std::fill(sum.begin(), sum.end(), Real(0));
  for (int64_t o = rows.first[i > 0 ? i - 1 : 0]; o < rows.first[i + 1]; ++o) {
    const Real share = weight_of(rows.taps[o], i);
    load_row(grad + o * layout.step_y, layout.row, upcast_row.data());
    const Real* MAGSD_RESTRICT from = upcast_row.data();
    Real* MAGSD_RESTRICT to = sum.data();
    for (int64_t x = 0; x < layout.row; ++x) to[x] += share * from[x];
  }
}

template <typename T>
void add_patch(const Gradients<T>& plan, const Box& box, const Corner& corner, int64_t y,
               const T* grad, accumulate_t<T>* total) {
  const ImageLayout& layout = plan.layout;
  const int64_t extent = box.columns.extent() * layout.inner;
  const T* row = grad + y * layout.step_y;
  const bool covered = y >= corner.row && y < corner.row + box.rows.extent();
  const int64_t hidden = corner.column * layout.inner;
  for (int64_t i = 0; i < layout.row; ++i) {
    if (!covered || i < hidden || i >= hidden + extent) total[i] += upcast(row[i]);
  }
  if (!box.rows.holds(y)) return;
  const T* copy = grad + (y - box.rows.start + corner.row) * layout.step_y + hidden;
  accumulate_t<T>* into = total + box.columns.start * layout.inner;
  for (int64_t i = 0; i < extent; ++i) into[i] += upcast(copy[i]);
}

template <typename T>
void write_gradient(const Gradients<T>& plan) {
  using Real = accumulate_t<T>;
  const ImageLayout& layout = plan.layout;
  const int64_t image_size = layout.planes * layout.height * layout.row;
  expect_writes(plan.grad, layout.batch * image_size);
  for_bands(layout, [&](int64_t b, int64_t first, int64_t past) {
    ColumnTable<Real> columns(layout.width, layout.inner);
    RowTable<Real> rows;
    std::vector<Real> upcast_row(layout.row), sum(layout.row), crop(layout.row), total(layout.row);
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
            load_row(grad + y * layout.step_y, layout.row, upcast_row.data());
            for (int64_t i = 0; i < layout.row; ++i) total[i] = own * upcast_row[i];
          }
          if (mix.rows.holds(y)) {
            gather_rows(rows, y - mix.rows.start, layout, grad, upcast_row, sum);
            columns.apply_adjoint(sum.data(), box_width, crop.data());
            Real* into = total.data() + mix.columns.start * layout.inner;
            for (int64_t i = 0; i < box_width * layout.inner; ++i) into[i] += share * crop[i];
          }
        }
        if (plan.dimmed) {
          load_row(plan.dimmed + start + y * layout.step_y, layout.row, upcast_row.data());
          for (int64_t i = 0; i < layout.row; ++i) total[i] += upcast_row[i] * factor[i];
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

struct Backend {
  using Maps = AttentionMaps;

  static void check_boxes(const Tensor& boxes, const ImageLayout& layout) {
    const int32_t* row = data<int32_t>(boxes);
    for (int64_t i = 0; i < boxes.numel() / 4; ++i, row += 4) {
      STD_TORCH_CHECK(0 <= row[0] && row[0] < row[2] && row[2] <= layout.height && 0 <= row[1] &&
                          row[1] < row[3] && row[3] <= layout.width,
                      "a box lies outside the image");
    }
  }

  template <typename T>
  static void make_gradient(const DeviceScope&, const Views<const T, AttentionMaps>& views) {
    write_gradient<T>(views);
  }
};
using Operators = GradientOperators<Backend>;

}  // namespace

MAGSD_OPERATORS(attention_augment_backward, library) {
  library.impl("attention_mixup_backward", TORCH_BOX(&Operators::attention_mixup_backward));
  library.impl("attention_patch_backward", TORCH_BOX(&Operators::attention_patch_backward));
  library.impl("attention_views_backward", TORCH_BOX(&Operators::attention_views_backward));
}

}  // namespace magsd::MAGSD_ISA::attention_augment
