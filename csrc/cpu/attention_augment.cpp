// Boxes, crop and mix-up, patch, dim and drop, three views at once, and their gradients.
//
// Moves: the images read once from memory, each view written once (attention maps are small). First
// one task per image finds the boxes; then the cut is by image and, when the batch is small, by
// band of rows, and a row of the image is read once for all its views while it is in the first
// cache. Boxes and factors come from the guide (attention_guide.h); no mask, no upsampled map and
// no crop is stored. The backward gathers in a fixed order, so that it is deterministic.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "common/image_layout.h"
#include "cpu/attention_guide.h"
#include "cpu/crop_resize.h"
#include "cpu/parallel.h"
#include "cpu/stream.h"

namespace magsd::MAGSD_ISA {
namespace {

constexpr int64_t kViews = 3;
constexpr int64_t kPixelsPerTask = 16384;
constexpr int64_t kBlockBytes = 16384;          // of rows that all views read while they are near
constexpr int64_t kLargest = int64_t{1} << 30;  // pixels and channels along one dimension

// A column of a (B,) or (B, views) tensor, read in place.
template <typename T>
struct Column {
  const T* first;
  int64_t step;
  T operator[](int64_t b) const { return first[b * step]; }
};

template <typename T>
Column<T> column(const Tensor& tensor, int64_t view) {
  const int64_t shift = tensor.dim() == 2 ? view * tensor.stride(1) : 0;
  return {data<T>(tensor) + shift, tensor.stride(0)};
}

// What chooses the guides of one view: a threshold share and, unless there is one map, its rank.
struct Choice {
  Column<float> theta;
  std::optional<Column<int64_t>> index;

  void set(Guide& guide, const AttentionMaps& maps, int64_t b) const {
    guide.set(b, index ? nearest_map((*index)[b], maps.maps()) : 0, theta[b]);
  }
};

struct Offsets {
  const float* first;
  int64_t step_b, step_axis;
  float operator()(int64_t b, int axis) const { return first[b * step_b + axis * step_axis]; }
};

Offsets offsets_of(const Tensor& offsets) {
  return {data<float>(offsets), offsets.stride(0), offsets.stride(1)};
}

Choice choose(const Tensor& theta, const std::optional<Tensor>& index, int64_t view) {
  Choice choice{column<float>(theta, view), std::nullopt};
  if (index) choice.index = column<int64_t>(*index, view);
  return choice;
}

void check_guide(const Tensor& attention, const std::optional<Tensor>& index, const Tensor& theta,
                 int64_t batch, int64_t views) {
  check_tensor(attention, "attention", 4);
  check_floating(attention, "attention");
  check_sizes(attention, "attention", {batch, -1, -1, -1});
  for (int64_t d = 1; d < 4; ++d) {
    STD_TORCH_CHECK(attention.size(d) > 0, "attention must not be empty");
  }
  const auto check_columns = [&](const Tensor& tensor, const char* name, ScalarType dtype) {
    check_tensor(tensor, name, views > 0 ? 2 : 1);
    check_dtype(tensor, name, dtype);
    STD_TORCH_CHECK(tensor.size(0) == batch, name, " must have one row per image");
    STD_TORCH_CHECK(views == 0 || tensor.size(1) == views, name, " must have one column per view");
  };
  check_columns(theta, "theta", ScalarType::Float);
  if (index) check_columns(*index, "index", ScalarType::Long);
  STD_TORCH_CHECK(index || attention.size(1) == 1, "index must name a map per image");
}

void check_images(const Tensor& images, const char* name, int64_t dims) {
  check_tensor(images, name, dims);
  check_floating(images, name);
  for (int64_t d = dims - 3; d < dims; ++d) {
    STD_TORCH_CHECK(images.size(d) > 0, name, " must not be empty");
    STD_TORCH_CHECK(images.size(d) < kLargest, name, " is too large");
  }
}

void check_offsets(const Tensor& offsets, int64_t batch) {
  check_tensor(offsets, "offsets", 2);
  check_dtype(offsets, "offsets", ScalarType::Float);
  check_sizes(offsets, "offsets", {batch, 2});
}

void check_shares(double padding, double weight) {
  STD_TORCH_CHECK(padding >= 0, "padding must be at least 0");
  STD_TORCH_CHECK(weight >= 0 && weight <= 1, "weight must be in 0..1");
}

// Boxes (B, 4) int32 as a tensor receives them.
void write_box(const Box& box, int32_t* row) {
  row[0] = box.rows.start;
  row[1] = box.columns.start;
  row[2] = box.rows.stop;
  row[3] = box.columns.stop;
}

Box read_box(const int32_t* row) { return {{row[0], row[2]}, {row[1], row[3]}}; }

// The boxes of one view per entry of `choices`: (views, B, 4), dense.
void find_boxes(const AttentionMaps& maps, const std::vector<Choice>& choices, int64_t batch,
                double padding, int32_t* boxes) {
  const int64_t tasks = batch * static_cast<int64_t>(choices.size());
  const int64_t grain = 1 + kPixelsPerTask / (maps.height() * maps.width());
  parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
    Guide guide(maps);
    for (int64_t task = begin; task < end; ++task) {
      choices[task / batch].set(guide, maps, task % batch);
      write_box(guide.box(padding), boxes + task * 4);
    }
  });
}

// Boxes that came as an argument: dense, and inside the image.
Tensor checked_boxes(const Tensor& boxes, int64_t views, const ImageLayout& layout) {
  check_tensor(boxes, "boxes", views > 0 ? 3 : 2);
  check_dtype(boxes, "boxes", ScalarType::Int);
  STD_TORCH_CHECK(boxes.numel() == std::max<int64_t>(views, 1) * layout.batch * 4 &&
                      boxes.size(boxes.dim() - 1) == 4,
                  "boxes must have four numbers per image");
  const Tensor rows = dense(boxes);
  const int32_t* row = data<int32_t>(rows);
  for (int64_t i = 0; i < boxes.numel() / 4; ++i, row += 4) {
    STD_TORCH_CHECK(0 <= row[0] && row[0] < row[2] && row[2] <= layout.height && 0 <= row[1] &&
                        row[1] < row[3] && row[3] <= layout.width,
                    "a box lies outside the image");
  }
  return rows;
}

// Calls body(image, first row, past the last row) for bands of every image.
template <typename Body>
void for_bands(const ImageLayout& layout, const Body& body) {
  const int64_t image = layout.planes * layout.row * layout.height;
  const int64_t threads = torch::stable::get_num_threads();
  // Whole images when there are enough of them: tables and guides are prepared once per task.
  int64_t bands = 1;
  if (layout.batch < 4 * threads && threads > 1) {
    bands = std::clamp<int64_t>(image / kPixelsPerTask, 1, std::min(layout.height, 4 * threads));
  }
  const int64_t grain = 1 + kPixelsPerTask * bands / std::max<int64_t>(image, 1);
  parallel_for(layout.batch * bands, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end;) {
      const int64_t b = task / bands, first = task % bands;
      const int64_t count = std::min(end - task, bands - first);
      body(b, layout.height * first / bands, layout.height * (first + count) / bands);
      task += count;
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
  std::optional<Choice> dim = std::nullopt;
  std::optional<Offsets> offsets = std::nullopt;
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
  const int64_t box_height = box.rows.stop - box.rows.start;
  const int64_t count = (box.columns.stop - box.columns.start) * layout.inner;
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
void patch_row(const Plan<T>& plan, const Box& box, int64_t corner_y, int64_t corner_x, int64_t y,
               const T* image, const T* row, T* out, Scratch<T>& scratch) {
  const ImageLayout& layout = plan.layout;
  const int64_t inside = y - corner_y;
  if (inside < 0 || inside >= box.rows.stop - box.rows.start) {
    return write_row(row, layout.row, out, plan.streamed);
  }
  T* narrow = scratch.narrow.data();
  const T* source = image + (box.rows.start + inside) * layout.step_y;
  std::memcpy(narrow, row, layout.row * sizeof(T));
  std::memcpy(narrow + corner_x * layout.inner, source + box.columns.start * layout.inner,
              (box.columns.stop - box.columns.start) * layout.inner * sizeof(T));
  write_row(narrow, layout.row, out, plan.streamed);
}

// factor[i] of a row of elements, from those of its pixels.
template <typename Real>
void factor_row(const Guide& guide, int64_t y, Real floor, const ImageLayout& layout,
                std::vector<Real>& factor) {
  guide.factors(y, floor, factor.data());
  if (layout.inner == 1) return;
  for (int64_t x = layout.width - 1; x >= 0; --x) {
    std::fill_n(factor.data() + x * layout.inner, layout.inner, Real(factor[x]));
  }
}

template <typename T>
int64_t views_bytes(const Plan<T>& plan) {
  const ImageLayout& layout = plan.layout;
  const int64_t views = (plan.mixed != nullptr) + (plan.dimmed != nullptr) + (plan.patched != nullptr);
  return views * layout.batch * layout.planes * layout.height * layout.row * int64_t{sizeof(T)};
}

template <typename T>
void make_views(Plan<T>& plan) {
  using Real = accumulate_t<T>;
  const ImageLayout& layout = plan.layout;
  const int64_t image_size = layout.planes * layout.height * layout.row;
  plan.streamed = views_bytes(plan) >= kStreamedBytes;
  for_bands(layout, [&](int64_t b, int64_t first, int64_t past) {
    Scratch<T> scratch(layout);
    std::optional<Guide> guide;
    Box mix{}, patch{};
    int64_t corner_y = 0, corner_x = 0;
    if (plan.mixed) {
      mix = read_box(plan.mix_boxes + 4 * b);
      scratch.columns.set(mix.columns.stop - mix.columns.start, plan.align_corners);
    }
    if (plan.dimmed) plan.dim->set(guide.emplace(*plan.maps), *plan.maps, b);
    if (plan.patched) {
      patch = read_box(plan.patch_boxes + 4 * b);
      corner_y = paste_start((*plan.offsets)(b, 0), patch.rows.stop - patch.rows.start,
                             layout.height);
      corner_x = paste_start((*plan.offsets)(b, 1), patch.columns.stop - patch.columns.start,
                             layout.width);
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
        for_rows(begin, end, [&](int64_t plane, int64_t y, const T* image, const T* row, int64_t out) {
          mix_row(plan, mix, plane, y, image, row, plan.mixed + out, scratch);
        });
      }
      if (plan.dimmed) {
        for (int64_t y = begin; y < end; ++y) {
          factor_row(*guide, y, static_cast<Real>(plan.floor), layout, scratch.factor);
          for_rows(y, y + 1, [&](int64_t, int64_t, const T*, const T* row, int64_t out) {
            dim_row(plan, row, plan.dimmed + out, scratch);
          });
        }
      }
      if (plan.patched) {
        for_rows(begin, end, [&](int64_t, int64_t y, const T* image, const T* row, int64_t out) {
          patch_row(plan, patch, corner_y, corner_x, y, image, row, plan.patched + out, scratch);
        });
      }
    }
    finish_rows(plan.streamed);
  });
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
  std::optional<Choice> dim = std::nullopt;
  std::optional<Offsets> offsets = std::nullopt;
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

// sum[0..row) = what the outputs give to row `i` of a box of `length` rows.
template <typename T>
void gather_rows(const RowTable<accumulate_t<T>>& rows, int64_t i, int64_t length,
                 const ImageLayout& layout, const T* grad, std::vector<accumulate_t<T>>& wide,
                 std::vector<accumulate_t<T>>& sum) {
  using Real = accumulate_t<T>;
  std::fill(sum.begin(), sum.end(), Real(0));
  for (int64_t o = rows.first[i > 0 ? i - 1 : 0]; o < rows.first[i + 1]; ++o) {
    const Sample<Real>& at = rows.samples[o];
    Real share = at.lower == i ? 1 - at.weight : at.weight;
    if (at.lower == i && i == length - 1) share = 1;
    load_row(grad + o * layout.step_y, layout.row, wide.data());
    const Real* MAGSD_RESTRICT from = wide.data();
    Real* MAGSD_RESTRICT to = sum.data();
    for (int64_t x = 0; x < layout.row; ++x) to[x] += share * from[x];
  }
}

template <typename T>
void add_patch(const BackwardPlan<T>& plan, const Box& box, int64_t corner_y, int64_t corner_x,
               int64_t y, const T* grad, accumulate_t<T>* total) {
  const ImageLayout& layout = plan.layout;
  const int64_t height = box.rows.stop - box.rows.start;
  const int64_t extent = (box.columns.stop - box.columns.start) * layout.inner;
  const T* row = grad + y * layout.step_y;
  const bool covered = y >= corner_y && y < corner_y + height;
  const int64_t hidden = corner_x * layout.inner;
  for (int64_t i = 0; i < layout.row; ++i) {
    if (!covered || i < hidden || i >= hidden + extent) total[i] += widen(row[i]);
  }
  if (y < box.rows.start || y >= box.rows.stop) return;
  const T* copy = grad + (y - box.rows.start + corner_y) * layout.step_y + hidden;
  accumulate_t<T>* into = total + box.columns.start * layout.inner;
  for (int64_t i = 0; i < extent; ++i) into[i] += widen(copy[i]);
}

template <typename T>
void make_gradient(const BackwardPlan<T>& plan) {
  using Real = accumulate_t<T>;
  const ImageLayout& layout = plan.layout;
  const int64_t image_size = layout.planes * layout.height * layout.row;
  for_bands(layout, [&](int64_t b, int64_t first, int64_t past) {
    ColumnTable<Real> columns(layout.width, layout.inner);
    RowTable<Real> rows;
    std::vector<Real> wide(layout.row), sum(layout.row), crop(layout.row), total(layout.row);
    std::vector<Real> factor(layout.row);
    std::optional<Guide> guide;
    Box mix{}, patch{};
    int64_t corner_y = 0, corner_x = 0, box_height = 0, box_width = 0;
    if (plan.mixed) {
      mix = read_box(plan.mix_boxes + 4 * b);
      box_height = mix.rows.stop - mix.rows.start;
      box_width = mix.columns.stop - mix.columns.start;
      columns.set(box_width, plan.align_corners);
      rows.set(box_height, layout.height, plan.align_corners);
    }
    if (plan.dimmed) plan.dim->set(guide.emplace(*plan.maps), *plan.maps, b);
    if (plan.patched) {
      patch = read_box(plan.patch_boxes + 4 * b);
      corner_y = paste_start((*plan.offsets)(b, 0), patch.rows.stop - patch.rows.start,
                             layout.height);
      corner_x = paste_start((*plan.offsets)(b, 1), patch.columns.stop - patch.columns.start,
                             layout.width);
    }
    const Real own = static_cast<Real>(1 - plan.weight), share = static_cast<Real>(plan.weight);
    for (int64_t y = first; y < past; ++y) {
      if (plan.dimmed) factor_row(*guide, y, static_cast<Real>(plan.floor), layout, factor);
      for (int64_t plane = 0; plane < layout.planes; ++plane) {
        const int64_t start = b * layout.step_b + plane * layout.step_plane;
        std::fill(total.begin(), total.end(), Real(0));
        if (plan.mixed) {
          const T* grad = plan.mixed + start;
          if (plan.weight != 1) {
            load_row(grad + y * layout.step_y, layout.row, wide.data());
            for (int64_t i = 0; i < layout.row; ++i) total[i] = own * wide[i];
          }
          if (y >= mix.rows.start && y < mix.rows.stop) {
            gather_rows(rows, y - mix.rows.start, box_height, layout, grad, wide, sum);
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
          add_patch(plan, patch, corner_y, corner_x, y, plan.patched + start, total.data());
        }
        const int64_t out = b * image_size + (plane * layout.height + y) * layout.row;
        store_row<T>(total.data(), layout.row, plan.grad + out);
      }
    }
  });
}

// The images in place or as a dense copy, and how to read them.
struct Images {
  Tensor tensor;
  ImageLayout layout;
};

Images readable(const Tensor& images) {
  const bool last = is_channels_last(images);
  Tensor tensor = with_dense_rows(images, last);
  const ImageLayout layout = layout_of(tensor, last);
  STD_TORCH_CHECK(layout.row < kLargest, "a row of the images is too long");
  return {std::move(tensor), layout};
}

Tensor attention_boxes(const Tensor& attention, const std::optional<Tensor>& index,
                       const Tensor& theta, const std::vector<int64_t>& size, double padding,
                       bool align_corners) {
  check_tensor(attention, "attention", 4);
  const int64_t batch = attention.size(0);
  check_guide(attention, index, theta, batch, 0);
  check_shares(padding, 1);
  STD_TORCH_CHECK(size.size() == 2 && size[0] > 0 && size[1] > 0 && size[0] < kLargest &&
                      size[1] < kLargest,
                  "size must be two positive numbers");
  const AttentionMaps maps(attention, size[0], size[1], align_corners);
  const Tensor boxes = uninitialized({batch, 4}, ScalarType::Int);
  find_boxes(maps, {choose(theta, index, 0)}, batch, padding, mutable_data<int32_t>(boxes));
  return boxes;
}

std::tuple<Tensor, Tensor> attention_mixup(const Tensor& images, const Tensor& attention,
                                           const std::optional<Tensor>& index,
                                           const Tensor& theta, double padding, double weight,
                                           bool align_corners) {
  check_images(images, "images", 4);
  check_guide(attention, index, theta, images.size(0), 0);
  check_shares(padding, weight);
  const Images input = readable(images);
  const ImageLayout& layout = input.layout;
  const AttentionMaps maps(attention, layout.height, layout.width, align_corners);
  const Tensor boxes = uninitialized({layout.batch, 4}, ScalarType::Int);
  find_boxes(maps, {choose(theta, index, 0)}, layout.batch, padding, mutable_data<int32_t>(boxes));
  const Tensor mixed = empty_images(0, layout, images.scalar_type());
  visit_floating(images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Plan<T> plan{layout, data<T>(input.tensor)};
    plan.mixed = mutable_data<T>(mixed);
    plan.mix_boxes = data<int32_t>(boxes);
    plan.weight = weight;
    plan.align_corners = align_corners;
    make_views(plan);
  });
  return {mixed, boxes};
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

std::tuple<Tensor, Tensor> attention_patch(const Tensor& images, const Tensor& attention,
                                           const std::optional<Tensor>& index,
                                           const Tensor& theta, const Tensor& offsets,
                                           double padding, bool align_corners) {
  check_images(images, "images", 4);
  check_guide(attention, index, theta, images.size(0), 0);
  check_offsets(offsets, images.size(0));
  check_shares(padding, 1);
  const Images input = readable(images);
  const ImageLayout& layout = input.layout;
  const AttentionMaps maps(attention, layout.height, layout.width, align_corners);
  const Tensor boxes = uninitialized({layout.batch, 4}, ScalarType::Int);
  find_boxes(maps, {choose(theta, index, 0)}, layout.batch, padding, mutable_data<int32_t>(boxes));
  const Tensor patched = empty_images(0, layout, images.scalar_type());
  visit_floating(images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Plan<T> plan{layout, data<T>(input.tensor)};
    plan.patched = mutable_data<T>(patched);
    plan.patch_boxes = data<int32_t>(boxes);
    plan.offsets = offsets_of(offsets);
    make_views(plan);
  });
  return {patched, boxes};
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

std::tuple<Tensor, Tensor> attention_views(const Tensor& images, const Tensor& attention,
                                           const Tensor& index, const Tensor& theta,
                                           const Tensor& offsets, double padding, double weight,
                                           double floor, bool align_corners) {
  check_images(images, "images", 4);
  check_guide(attention, index, theta, images.size(0), kViews);
  check_offsets(offsets, images.size(0));
  check_shares(padding, weight);
  const Images input = readable(images);
  const ImageLayout& layout = input.layout;
  const AttentionMaps maps(attention, layout.height, layout.width, align_corners);
  const Tensor boxes = uninitialized({2, layout.batch, 4}, ScalarType::Int);
  int32_t* box = mutable_data<int32_t>(boxes);
  find_boxes(maps, {choose(theta, index, 0), choose(theta, index, 2)}, layout.batch, padding, box);
  const Tensor views = empty_images(kViews, layout, images.scalar_type());
  visit_floating(images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const int64_t view = layout.batch * layout.planes * layout.height * layout.row;
    Plan<T> plan{layout, data<T>(input.tensor)};
    plan.mixed = mutable_data<T>(views);
    plan.dimmed = plan.mixed + view;
    plan.patched = plan.dimmed + view;
    plan.mix_boxes = box;
    plan.patch_boxes = box + 4 * layout.batch;
    plan.maps = &maps;
    plan.dim = choose(theta, index, 1);
    plan.offsets = offsets_of(offsets);
    plan.weight = weight;
    plan.floor = floor;
    plan.align_corners = align_corners;
    make_views(plan);
  });
  return {views, boxes};
}

Tensor attention_views_backward(const Tensor& grad, const Tensor& attention, const Tensor& index,
                                const Tensor& theta, const Tensor& offsets, const Tensor& boxes,
                                double weight, double floor, bool align_corners) {
  check_images(grad, "grad", 5);
  check_sizes(grad, "grad", {kViews, -1, -1, -1, -1});
  check_guide(attention, index, theta, grad.size(1), kViews);
  check_offsets(offsets, grad.size(1));
  check_shares(0, weight);
  check_sizes(boxes, "boxes", {2});
  std::vector<Images> input;
  for (int64_t view = 0; view < kViews; ++view) {
    input.push_back(readable(torch::stable::select(grad, 0, view)));
  }
  const ImageLayout& layout = input[0].layout;
  const Tensor rows = checked_boxes(boxes, 2, layout);
  const AttentionMaps maps(attention, layout.height, layout.width, align_corners);
  const Tensor result = empty_images(0, layout, grad.scalar_type());
  visit_floating(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    BackwardPlan<T> plan{layout, data<T>(input[0].tensor), data<T>(input[1].tensor),
                         data<T>(input[2].tensor)};
    plan.mix_boxes = data<int32_t>(rows);
    plan.patch_boxes = plan.mix_boxes + 4 * layout.batch;
    plan.maps = &maps;
    plan.dim = choose(theta, index, 1);
    plan.offsets = offsets_of(offsets);
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

MAGSD_OPERATORS(attention_augment, library) {
  library.impl("attention_boxes", TORCH_BOX(&attention_boxes));
  library.impl("attention_mixup", TORCH_BOX(&attention_mixup));
  library.impl("attention_mixup_backward", TORCH_BOX(&attention_mixup_backward));
  library.impl("attention_patch", TORCH_BOX(&attention_patch));
  library.impl("attention_patch_backward", TORCH_BOX(&attention_patch_backward));
  library.impl("attention_dim", TORCH_BOX(&attention_dim));
  library.impl("attention_views", TORCH_BOX(&attention_views));
  library.impl("attention_views_backward", TORCH_BOX(&attention_views_backward));
}
