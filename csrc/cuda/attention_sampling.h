// How a block draws attention maps: the weights of an image's maps, and the map that a uniform
// picks.
#pragma once

#include <cstdint>

#include "common/map_sampling.h"
#include "common/uniforms.h"
#include "cuda/kernel.h"

namespace magsd::MAGSD_ISA::attention_sampling {

constexpr int kSamplingThreads = 256;

// The maps of a batch. A map whose rows follow one another, as in NCHW and channels_last, is one
// row.
struct MapSizes {
  int64_t maps, height, width;
  int64_t step_b, step_m, step_y, step_x;
};

inline MapSizes map_sizes(const Tensor& attention) {
  MapSizes sizes{attention.size(1),   attention.size(2),   attention.size(3),  attention.stride(0),
                 attention.stride(1), attention.stride(2), attention.stride(3)};
  if (sizes.step_y == sizes.width * sizes.step_x) {
    sizes.width *= sizes.height;
    sizes.height = 1;
  }
  return sizes;
}

// All threads of a block make the inclusive cumulative weights of an image's maps, divided by their
// last. Each warp sums every eighth map in double, so that the order of adding does not decide a
// draw; thread 0 adds up the weights in order, as the CPU does.
template <typename T>
__device__ void weigh_maps(const T* image, const MapSizes& sizes, double eps, double* weights) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t m = warp; m < sizes.maps; m += kSamplingThreads / kWarp) {
    const T* map = image + m * sizes.step_m;
    double sum = 0;
    for (int64_t y = 0; y < sizes.height; ++y) {
      const T* row = map + y * sizes.step_y;
      for (int64_t x = lane; x < sizes.width; x += kWarp) {
        sum += static_cast<double>(upcast(row[x * sizes.step_x]));
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) weights[m] = map_weight(sum, eps);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int64_t m = 1; m < sizes.maps; ++m) weights[m] += weights[m - 1];
  }
  __syncthreads();
  const double total = weights[sizes.maps - 1];
  __syncthreads();  // before the total itself is divided
  for (int64_t m = threadIdx.x; m < sizes.maps; m += kSamplingThreads) weights[m] /= total;
  __syncthreads();
}

// sampled_map, counted by the lanes of a warp together.
__device__ inline int64_t warp_sampled_map(const double* cumulative, int64_t count, float u) {
  int64_t below = 0;
  for (int64_t first = 0; first < count; first += kWarp) {
    const int64_t m = first + threadIdx.x % kWarp;
    const bool passed = m < count && cumulative[m] <= static_cast<double>(u);
    below += __popc(__ballot_sync(kAllLanes, passed));
  }
  return below < count ? below : count - 1;
}

}  // namespace magsd::MAGSD_ISA::attention_sampling
