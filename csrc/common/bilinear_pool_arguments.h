// Arguments of the bilinear pooling operators, checked for the CPU and the CUDA kernels alike, and
// the tensors that they return.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "common/feature_map.h"
#include "common/tensor.h"

namespace magsd::MAGSD_ISA {

// A smaller norm counts as this one.
constexpr double kSmallestNorm = 1e-12;

struct PoolSettings {
  bool maximum, signed_sqrt, normalize;
  double scale, eps;
};

struct PoolShape {
  int64_t batch, channels, maps, pixels;
  int64_t entries() const { return maps * channels; }
};

inline PoolSettings pool_settings(const std::string& pool, bool signed_sqrt, bool normalize,
                                  double scale, double eps) {
  STD_TORCH_CHECK(pool == "avg" || pool == "max", "pool must be avg or max, got ", pool);
  return {pool == "max", signed_sqrt, normalize, scale, eps};
}

inline PoolShape check_pool_inputs(const Tensor& features, const Tensor& attention) {
  check_tensor(features, "features", 4);
  check_floating(features, "features");
  check_tensor(attention, "attention", 4);
  check_dtype(attention, "attention", features.scalar_type());
  check_sizes(attention, "attention", {features.size(0), -1, -1, -1});
  const PoolShape shape{features.size(0), features.size(1), attention.size(1),
                        features.size(2) * features.size(3)};
  STD_TORCH_CHECK(shape.channels > 0 && shape.pixels > 0, "features must not be empty");
  STD_TORCH_CHECK(shape.maps > 0 && attention.size(2) > 0 && attention.size(3) > 0,
                  "attention must not be empty");
  STD_TORCH_CHECK(shape.pixels <= std::numeric_limits<int32_t>::max(),
                  "features must have fewer than 2^31 pixels");
  return shape;
}

// What the forward gave, and the gradient of its first result.
inline void check_pool_results(const Tensor& grad, const Tensor& output, const Tensor& norm,
                               const Tensor& argmax, const PoolShape& shape,
                               const PoolSettings& settings, ScalarType dtype,
                               const std::vector<bool>& needs) {
  STD_TORCH_CHECK(needs.size() == 2, "needs must have 2 entries, got ", needs.size());
  check_tensor(grad, "grad", 2);
  check_dtype(grad, "grad", dtype);
  check_sizes(grad, "grad", {shape.batch, shape.entries()});
  check_tensor(output, "output", 2);
  check_dtype(output, "output", dtype);
  check_sizes(output, "output", {shape.batch, shape.entries()});
  if (settings.normalize) {
    check_tensor(norm, "norm", 1);
    check_dtype(norm, "norm", accumulation_dtype(dtype));
    check_sizes(norm, "norm", {shape.batch});
  }
  if (settings.maximum) {
    check_tensor(argmax, "argmax", 3);
    check_dtype(argmax, "argmax", ScalarType::Int);
    check_sizes(argmax, "argmax", {shape.batch, shape.maps, shape.channels});
  }
}

struct PoolResults {
  Tensor output, norm, argmax;

  PoolResults(const PoolShape& shape, const PoolSettings& settings, ScalarType dtype)
      : output(uninitialized({shape.batch, shape.entries()}, dtype)),
        norm(uninitialized({settings.normalize ? shape.batch : 0}, accumulation_dtype(dtype))),
        argmax(settings.maximum
                   ? uninitialized({shape.batch, shape.maps, shape.channels}, ScalarType::Int)
                   : uninitialized({0}, ScalarType::Int)) {}
};

// Gradients; an empty tensor for one that is not needed.
struct PoolGradients {
  Tensor features, attention;

  PoolGradients(const Tensor& of_features, const Tensor& of_attention,
                const std::vector<bool>& needs)
      : features(needs[0] ? empty_map_like(of_features)
                          : uninitialized({0}, of_features.scalar_type())),
        attention(needs[1] ? empty_map_like(of_attention)
                           : uninitialized({0}, of_attention.scalar_type())) {}
};

}  // namespace magsd::MAGSD_ISA
