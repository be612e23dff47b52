// Images as planes of rows, whatever their memory format.
//
// NCHW: C planes whose rows hold W elements. NHWC: one plane whose rows hold W C elements, in which
// the neighbor to the right lies C elements on. A kernel written for `planes`, `row` and `inner`
// serves both without copying.
#pragma once

#include <array>

#include "common/tensor.h"

namespace magsd::MAGSD_ISA {

struct ImageLayout {
  int64_t batch, height, width;
  int64_t planes;                      // planes of an image
  int64_t inner;                       // elements of a pixel within a row
  int64_t row;                         // elements of a row: width * inner
  int64_t step_b, step_plane, step_y;  // elements from one to the next
};

// Whether rows can be read in place in that format.
inline bool has_dense_rows(const Tensor& images, bool channels_last) {
  const auto size = images.sizes();
  const auto step = images.strides();
  if (channels_last) return size[3] == 1 || step[3] == size[1];
  return size[3] == 1 || step[3] == 1;
}

inline ImageLayout layout_of(const Tensor& images, bool channels_last) {
  const auto size = images.sizes();
  const auto step = images.strides();
  if (channels_last) {
    return {size[0], size[2], size[3], 1, size[1], size[3] * size[1], step[0], 0, step[2]};
  }
  return {size[0], size[2], size[3], size[1], 1, size[3], step[0], step[1], step[2]};
}

// The images themselves where rows can be read in place, else a dense copy in the same format.
inline Tensor with_dense_rows(const Tensor& images, bool channels_last) {
  if (has_dense_rows(images, channels_last)) return images;
  return torch::stable::contiguous(images, channels_last
                                               ? torch::headeronly::MemoryFormat::ChannelsLast
                                               : torch::headeronly::MemoryFormat::Contiguous);
}

// Uninitialized (B, C, H, W), or (views, B, C, H, W) for views > 0, dense, in the format asked for.
inline Tensor empty_images(int64_t views, const ImageLayout& layout, ScalarType dtype) {
  const int64_t channels = layout.planes * layout.inner;
  const int64_t pixels = layout.height * layout.width;
  const bool last = layout.inner > 1;
  const std::array<int64_t, 5> sizes = {views, layout.batch, channels, layout.height, layout.width};
  const std::array<int64_t, 5> strides = {
      layout.batch * channels * pixels, channels * pixels, last ? 1 : pixels,
      last ? layout.width * channels : layout.width, last ? channels : 1};
  const int64_t skip = views > 0 ? 0 : 1;
  return empty_strided(5 - skip, sizes.data() + skip, strides.data() + skip, dtype);
}

}  // namespace magsd::MAGSD_ISA
