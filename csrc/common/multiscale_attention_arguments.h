// Arguments of the multiscale operators: what the CPU and the CUDA kernels check and prepare alike.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "common/feature_map.h"
#include "common/resampling.h"
#include "common/tensor.h"

namespace magsd::MAGSD_ISA::multiscale_attention {

constexpr int64_t kMostMaps = 8;

using Tensors = std::vector<Tensor>;
using Gradients = std::tuple<Tensors, Tensors, Tensors>;  // of projections, weights and biases

inline Resampling mode_of(const std::string& name) {
  if (name == "area") return Resampling::kArea;
  if (name == "bilinear") return Resampling::kBilinear;
  STD_TORCH_CHECK(name == "nearest", "resampling must be area, bilinear or nearest, got ", name);
  return Resampling::kNearest;
}

// The first of 1 to 8 tensors.
inline const Tensor& first_of(const Tensors& maps, const char* name) {
  const int64_t count = static_cast<int64_t>(maps.size());
  STD_TORCH_CHECK(count >= 1 && count <= kMostMaps, name, " must have 1 to 8 entries, got ", count);
  return maps[0];
}

inline void check_size(const char* name, int64_t height, int64_t width) {
  constexpr int64_t kMost = int64_t{1} << 24;
  STD_TORCH_CHECK(height > 0 && width > 0 && height <= kMost && width <= kMost, name,
                  " must have a size of 1 to 2^24, got ", height, " x ", width);
}

inline void check_size(const std::vector<int64_t>& size) {
  STD_TORCH_CHECK(size.size() == 2, "size must have 2 entries, got ", size.size());
  check_size("size", size[0], size[1]);
}

// 1 to 8 floating maps of one batch, number of channels and dtype.
inline void check_maps(const Tensors& maps, const char* name) {
  const Tensor& first = first_of(maps, name);
  for (const Tensor& map : maps) {
    check_tensor(map, name, 4);
    check_floating(map, name);
    check_dtype(map, name, first.scalar_type());
    check_sizes(map, name, {first.size(0), first.size(1), -1, -1});
    STD_TORCH_CHECK(map.size(1) > 0, name, " must have channels");
    check_size(name, map.size(2), map.size(3));
  }
}

// (M,) floating tensors, one a scale.
inline void check_parameters(const Tensors& values, const char* name, const Tensors& projections) {
  STD_TORCH_CHECK(values.size() == projections.size(), name, " must have one entry per scale");
  for (const Tensor& value : values) {
    check_tensor(value, name, 1);
    check_floating(value, name);
    check_sizes(value, name, {projections[0].size(1)});
  }
}

inline void check_resample_backward(const Tensor& grad, const std::vector<int64_t>& heights,
                                    const std::vector<int64_t>& widths) {
  check_maps({grad}, "grad");
  STD_TORCH_CHECK(!heights.empty() && heights.size() <= static_cast<size_t>(kMostMaps) &&
                      heights.size() == widths.size(),
                  "heights and widths must have the same 1 to 8 entries");
  for (size_t i = 0; i < heights.size(); ++i) check_size("a map", heights[i], widths[i]);
}

inline void check_multiscale(const Tensors& projections, const Tensors& weights,
                             const Tensors& biases, const Tensors& running_means,
                             const Tensors& running_vars, const std::vector<int64_t>& size) {
  check_maps(projections, "projections");
  check_parameters(weights, "weights", projections);
  check_parameters(biases, "biases", projections);
  check_parameters(running_means, "running_means", projections);
  check_parameters(running_vars, "running_vars", projections);
  check_size(size);
}

inline void check_multiscale_backward(const Tensor& grad, const Tensors& projections,
                                      const Tensors& weights, const Tensors& biases,
                                      const Tensor& mean, const Tensor& rstd) {
  check_maps(projections, "projections");
  check_maps({grad}, "grad");
  const Tensor& main = projections[0];
  check_dtype(grad, "grad", main.scalar_type());
  check_sizes(grad, "grad", {main.size(0), main.size(1), -1, -1});
  check_parameters(weights, "weights", projections);
  check_parameters(biases, "biases", projections);
  for (const Tensor* statistics : {&mean, &rstd}) {
    check_tensor(*statistics, "mean and rstd", 2);
    check_dtype(*statistics, "mean and rstd", accumulation_dtype(main.scalar_type()));
    check_sizes(*statistics, "mean and rstd",
                {static_cast<int64_t>(projections.size()), main.size(1)});
  }
}

// The maps in one memory format; only those of another, or of odd strides, are copied.
inline std::vector<FeatureMap> feature_maps(const Tensors& maps, bool channels_last) {
  std::vector<FeatureMap> result;
  result.reserve(maps.size());
  for (const Tensor& map : maps) result.emplace_back(map, channels_last);
  return result;
}

// Uninitialized result of a forward, in the memory format of the first map.
inline Tensor empty_attention(const Tensors& maps, const std::vector<int64_t>& size) {
  const Tensor& main = maps[0];
  return empty_map({main.size(0), main.size(1), size[0], size[1]}, main.scalar_type(),
                   is_channels_last(main));
}

// Uninitialized results of multiscale_attention.
struct ForwardResults {
  Tensor attention, mean, rstd;

  ForwardResults(const Tensors& projections, const std::vector<int64_t>& size)
      : attention(empty_attention(projections, size)),
        mean(empty_statistics(projections)),
        rstd(empty_statistics(projections)) {}

 private:
  static Tensor empty_statistics(const Tensors& projections) {
    return uninitialized({static_cast<int64_t>(projections.size()), projections[0].size(1)},
                         accumulation_dtype(projections[0].scalar_type()));
  }
};

// Uninitialized results of resample_attention_backward.
inline Tensors empty_maps(const Tensor& grad, const std::vector<int64_t>& heights,
                          const std::vector<int64_t>& widths) {
  Tensors results;
  for (size_t i = 0; i < heights.size(); ++i) {
    results.push_back(empty_map({grad.size(0), grad.size(1), heights[i], widths[i]},
                                grad.scalar_type(), is_channels_last(grad)));
  }
  return results;
}

// Uninitialized results of multiscale_attention_backward.
inline Gradients empty_gradients(const Tensors& projections, const Tensors& weights,
                                 const Tensors& biases) {
  Gradients grads;
  for (size_t i = 0; i < projections.size(); ++i) {
    std::get<0>(grads).push_back(empty_map_like(projections[i]));
    std::get<1>(grads).push_back(uninitialized({weights[i].size(0)}, weights[i].scalar_type()));
    std::get<2>(grads).push_back(uninitialized({biases[i].size(0)}, biases[i].scalar_type()));
  }
  return grads;
}

}  // namespace magsd::MAGSD_ISA::multiscale_attention
