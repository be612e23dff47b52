// Draws attention maps with probability proportional to the root of their sum.
//
// Reads every map once (B M h w elements), writes B K indices. Work is split by image: one task
// sums the M maps of an image and draws from them. Sums run in double, in the four interleaved
// chains that hide the latency of an addition, so that the order of adding does not decide a draw;
// each chain's order is fixed, so results do not depend on the number of threads. Any strides are
// read in place.
#include "cpu/attention_sampling.h"

#include <cstdint>
#include <vector>

#include "common/attention_sampling_arguments.h"
#include "common/map_sampling.h"
#include "common/tensor.h"
#include "cpu/parallel.h"

namespace magsd::MAGSD_ISA::attention_sampling {
namespace {

// Sum of a map of any strides.
template <typename T>
double map_sum(const T* map, int64_t height, int64_t width, int64_t step_y, int64_t step_x) {
  constexpr int kChains = 4;
  double chains[kChains] = {0, 0, 0, 0};
  for (int64_t y = 0; y < height; ++y) {
    const T* row = map + y * step_y;
    int64_t x = 0;
    for (; x + kChains <= width; x += kChains) {
      for (int c = 0; c < kChains; ++c) chains[c] += static_cast<double>(row[(x + c) * step_x]);
    }
    for (; x < width; ++x) chains[0] += static_cast<double>(row[x * step_x]);
  }
  return (chains[0] + chains[1]) + (chains[2] + chains[3]);
}

template <typename T>
void draw(const Tensor& attention, const Tensor& uniforms, double eps, const Tensor& index) {
  const int64_t maps = attention.size(1), height = attention.size(2), width = attention.size(3);
  const int64_t step_b = attention.stride(0), step_m = attention.stride(1);
  const int64_t step_y = attention.stride(2), step_x = attention.stride(3);
  const int64_t draws = uniforms.size(1);
  const T* map = data<T>(attention);
  const float* uniform = data<float>(uniforms);
  int64_t* drawn = mutable_data<int64_t>(index);
  const int64_t grain = 1 + 16384 / std::max<int64_t>(maps * height * width, 1);
  parallel_for(attention.size(0), grain, [&](int64_t begin, int64_t end) {
    std::vector<double> cumulative(maps);
    for (int64_t b = begin; b < end; ++b) {
      double total = 0;
      for (int64_t m = 0; m < maps; ++m) {
        const T* pixels = map + b * step_b + m * step_m;
        total += map_weight(map_sum(pixels, height, width, step_y, step_x), eps);
        cumulative[m] = total;
      }
      for (double& entry : cumulative) entry /= total;
      for (int64_t k = 0; k < draws; ++k) {
        drawn[b * draws + k] = sampled_map(cumulative.data(), maps, uniform[b * draws + k]);
      }
    }
  });
}

}  // namespace

Tensor sample_attention(const Tensor& attention, const Tensor& uniforms, double eps) {
  const Tensor index = empty_draws(attention, uniforms);
  const Tensor rows = dense(uniforms);
  visit_floating(attention.scalar_type(),
                 [&](auto type) { draw<decltype(type)>(attention, rows, eps, index); });
  return index;
}

MAGSD_OPERATORS(attention_sampling, library) {
  library.impl("sample_attention", TORCH_BOX(&sample_attention));
}

}  // namespace magsd::MAGSD_ISA::attention_sampling
