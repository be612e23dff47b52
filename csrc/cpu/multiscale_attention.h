// What the forward and the backward of multiscale attention share: a scale and its batch norm.
#pragma once

#include <cstdint>
#include <vector>

#include "common/feature_map.h"
#include "common/tensor.h"
#include "cpu/axis.h"
#include "cpu/cell_sums.h"
#include "cpu/parameters.h"

namespace magsd::MAGSD_ISA::multiscale_attention {

// The published number of maps. Loops over the maps of a pixel are compiled for it, without the
// entry and the tail that a loop of unknown length has; kMaps 0 stands for any other number.
constexpr int64_t kPublishedMaps = 32;

// One channel of a batch norm: n = (x - mean) factor + bias, factor = weight rstd.
template <typename A>
struct Norm {
  std::vector<A> mean, rstd, factor, bias;

  explicit Norm(int64_t channels)
      : mean(channels), rstd(channels), factor(channels), bias(channels) {}
};

// One scale: its map, its norm (none for resample_attention), and its tables if it
// needs any.
template <typename T>
struct Scale {
  using A = accumulate_t<T>;
  const T* values;
  MapSteps steps;
  const Norm<A>* norm;
  Axis<A> rows, columns;
  bool identity;  // The map has the size of the result.
  Cells cells;    // Where a pixel of the result is the mean of whole pixels: of these.
};

// sum[m] += weight * pixel[m], the maps of one pixel.
template <int64_t kMaps, typename T, typename A>
void add_pixel(const T* MAGSD_RESTRICT pixel, int64_t count, A weight, A* MAGSD_RESTRICT sum) {
  const int64_t channels = kMaps > 0 ? kMaps : count;
  for (int64_t m = 0; m < channels; ++m) sum[m] += weight * static_cast<A>(pixel[m]);
}

}  // namespace magsd::MAGSD_ISA::multiscale_attention
