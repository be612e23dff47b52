// Arguments of the guided views' operators: their checks, and how kernels read them in place.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>

#include "common/boxes.h"
#include "common/image_layout.h"
#include "common/macros.h"
#include "common/tensor.h"
#include "common/uniforms.h"

namespace magsd::MAGSD_ISA::attention_augment {

constexpr int64_t kViews = 3;
constexpr int64_t kLargest = int64_t{1} << 30;  // entries along one dimension, elements of a row

// A column of a (B,) or (B, views) tensor.
template <typename T>
struct Column {
  const T* first;
  int64_t step;
  MAGSD_HD T operator[](int64_t b) const { return first[b * step]; }
};

template <typename T>
Column<T> column(const Tensor& tensor, int64_t view) {
  const int64_t shift = tensor.dim() == 2 ? view * tensor.stride(1) : 0;
  return {data<T>(tensor) + shift, tensor.stride(0)};
}

// What chooses the guides of one view: a threshold's share of the maximum and, unless there is one
// map, the map's rank.
struct Choice {
  Column<float> theta;
  Column<int64_t> index;
  bool indexed;

  MAGSD_HD int64_t map(int64_t b, int64_t maps) const {
    return indexed ? nearest_map(index[b], maps) : 0;
  }
};

inline Choice choose(const Tensor& theta, const std::optional<Tensor>& index, int64_t view) {
  Choice choice{column<float>(theta, view), {nullptr, 0}, index.has_value()};
  if (index) choice.index = column<int64_t>(*index, view);
  return choice;
}

// `views` columns of theta and index, or none for views = 0.
inline void check_guide(const Tensor& attention, const std::optional<Tensor>& index,
                        const Tensor& theta, int64_t batch, int64_t views) {
  check_tensor(attention, "attention", 4);
  check_floating(attention, "attention");
  check_sizes(attention, "attention", {batch, -1, -1, -1});
  for (int64_t d = 1; d < 4; ++d) {
    STD_TORCH_CHECK(attention.size(d) > 0, "attention must not be empty");
    STD_TORCH_CHECK(attention.size(d) < kLargest, "attention is too large");
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

inline void check_images(const Tensor& images, const char* name, int64_t dims) {
  check_tensor(images, name, dims);
  check_floating(images, name);
  for (int64_t d = dims - 3; d < dims; ++d) {
    STD_TORCH_CHECK(images.size(d) > 0, name, " must not be empty");
    STD_TORCH_CHECK(images.size(d) < kLargest, name, " is too large");
  }
}

inline void check_size(const std::vector<int64_t>& size) {
  STD_TORCH_CHECK(
      size.size() == 2 && size[0] > 0 && size[1] > 0 && size[0] < kLargest && size[1] < kLargest,
      "size must be two positive numbers");
}

inline void check_offsets(const Tensor& offsets, int64_t batch) {
  check_tensor(offsets, "offsets", 2);
  check_dtype(offsets, "offsets", ScalarType::Float);
  check_sizes(offsets, "offsets", {batch, 2});
}

inline void check_shares(double padding, double weight) {
  STD_TORCH_CHECK(padding >= 0, "padding must be at least 0");
  STD_TORCH_CHECK(weight >= 0 && weight <= 1, "weight must be in 0..1");
}

// Boxes (B, 4), or (views, B, 4) for views > 0, made dense. What they hold is not looked at.
inline Tensor dense_boxes(const Tensor& boxes, int64_t views, int64_t batch) {
  check_tensor(boxes, "boxes", views > 0 ? 3 : 2);
  check_dtype(boxes, "boxes", ScalarType::Int);
  if (views > 0) {
    check_sizes(boxes, "boxes", {views, batch, 4});
  } else {
    check_sizes(boxes, "boxes", {batch, 4});
  }
  return dense(boxes);
}

// A box as a tensor holds it.
MAGSD_HD Box read_box(const int32_t* row) { return {{row[0], row[2]}, {row[1], row[3]}}; }

MAGSD_HD void write_box(const Box& box, int32_t* row) {
  row[0] = box.rows.start;
  row[1] = box.columns.start;
  row[2] = box.rows.stop;
  row[3] = box.columns.stop;
}

// Images in place, or as a dense copy where their rows cannot be read in place.
struct Images {
  Tensor tensor;
  ImageLayout layout;
};

inline Images readable(const Tensor& images) {
  const bool last = is_channels_last(images);
  Tensor tensor = with_dense_rows(images, last);
  const ImageLayout layout = layout_of(tensor, last);
  STD_TORCH_CHECK(layout.row < kLargest, "a row of the images is too long");
  return {std::move(tensor), layout};
}

}  // namespace magsd::MAGSD_ISA::attention_augment
