// (B, C, H, W) tensors read and written in place, contiguous or channels last.
//
// The memory format of a result is that of magsd_kernels/_layout.py, in which the fakes are too.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/macros.h"
#include "common/tensor.h"

namespace magsd::MAGSD_ISA {

struct MapSize {
  int64_t batch, channels, height, width;
};

// Dense uninitialized (B, C, H, W) tensor.
inline Tensor empty_map(const MapSize& size, ScalarType dtype, bool channels_last) {
  const std::array<int64_t, 4> sizes = {size.batch, size.channels, size.height, size.width};
  const auto at_least_1 = [](int64_t n) { return n > 0 ? n : 1; };  // as torch counts strides
  const int64_t channels = at_least_1(size.channels), width = at_least_1(size.width);
  const int64_t pixels = at_least_1(size.height) * width;
  const std::array<int64_t, 4> strides = {
      channels * pixels, channels_last ? 1 : pixels, channels_last ? width * channels : width,
      channels_last ? channels : 1};
  return empty_strided(4, sizes.data(), strides.data(), dtype);
}

inline Tensor empty_map_like(const Tensor& images) {
  return empty_map({images.size(0), images.size(1), images.size(2), images.size(3)},
                   images.scalar_type(), is_channels_last(images));
}

// Where the elements of a map lie; pixels are counted row by row, `step_p` apart.
struct MapSteps {
  int64_t batch, channels, height, width;
  int64_t step_b, step_c, step_p;
  int64_t pixels() const { return height * width; }
};

// A map whose pixels or channels lie side by side; others are copied first.
struct FeatureMap {
  Tensor tensor;
  MapSteps steps;
  bool channels_last;

  explicit FeatureMap(const Tensor& images) : FeatureMap(images, is_channels_last(images)) {}

  // In the memory format that is asked for.
  FeatureMap(const Tensor& images, bool last) : tensor(images), channels_last(last) {
    const auto sizes = images.sizes();
    const int64_t pixels = sizes[2] * sizes[3];
    if (!last) {
      tensor = dense(images);
      steps = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[1] * pixels, pixels, 1};
      return;
    }
    const auto given = images.strides();
    const bool in_rows = sizes[2] == 1 || sizes[3] == 1 || given[2] == sizes[3] * given[3];
    if (is_channels_last(images) && in_rows) {
      // The step of a dimension of one entry means nothing.
      const int64_t step_p = sizes[3] > 1 ? given[3] : (sizes[2] > 1 ? given[2] : sizes[1]);
      steps = {sizes[0], sizes[1], sizes[2], sizes[3], given[0], 1, step_p};
      return;
    }
    tensor = torch::stable::contiguous(images, torch::headeronly::MemoryFormat::ChannelsLast);
    steps = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[1] * pixels, 1, sizes[1]};
  }
};

// Steps of a dense result, as `empty_map` lays it out.
inline MapSteps dense_steps(const Tensor& images, bool last) {
  const int64_t channels = images.size(1), pixels = images.size(2) * images.size(3);
  return {images.size(0),    channels,          images.size(2),     images.size(3),
          channels * pixels, last ? 1 : pixels, last ? channels : 1};
}

// Converts `count` elements.
template <typename To, typename From>
void convert(const From* MAGSD_RESTRICT from, int64_t count, To* MAGSD_RESTRICT to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

}  // namespace magsd::MAGSD_ISA
