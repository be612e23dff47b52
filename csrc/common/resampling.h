// Area and nearest resampling in one dimension; bilinear stands in resize.h.
//
// Source: torch.nn.functional.adaptive_avg_pool2d ("area") and interpolate ("nearest").
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace magsd {

enum class Resampling { kArea, kBilinear, kNearest };

// First input of output o under area, and one past its last.
MAGSD_HD int64_t area_begin(int64_t o, int64_t size_in, int64_t size_out) {
  return o * size_in / size_out;
}
MAGSD_HD int64_t area_end(int64_t o, int64_t size_in, int64_t size_out) {
  return ((o + 1) * size_in + size_out - 1) / size_out;
}

// Input of output o under nearest. torch computes it in float for every dtype.
MAGSD_HD int64_t nearest_index(int64_t o, int64_t size_in, int64_t size_out) {
  const float scale = static_cast<float>(size_in) / static_cast<float>(size_out);
  const int64_t index = static_cast<int64_t>(std::floor(static_cast<float>(o) * scale));
  return index < size_in ? index : size_in - 1;
}

}  // namespace magsd
