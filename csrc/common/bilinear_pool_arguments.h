// The bilinear pooling operators, as far as the CPU and the CUDA kernels agree: checks, results.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "common/device_scope.h"
#include "common/feature_map.h"
#include "common/tensor.h"

namespace magsd::MAGSD_ISA::bilinear_pool {

constexpr double kSmallestNorm = 1e-12;

// A smaller norm counts as the smallest; NaN stays NaN.
MAGSD_HD double clamped_norm(double norm) { return norm < kSmallestNorm ? kSmallestNorm : norm; }

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
  bool needs_features, needs_attention;

  PoolGradients(const Tensor& of_features, const Tensor& of_attention,
                const std::vector<bool>& needs)
      : features(needs[0] ? empty_map_like(of_features)
                          : uninitialized({0}, of_features.scalar_type())),
        attention(needs[1] ? empty_map_like(of_attention)
                           : uninitialized({0}, of_attention.scalar_type())),
        needs_features(needs[0]),
        needs_attention(needs[1]) {}
};

// The forward; Backend::forward<T>(scope, features, attention, shape, settings, allow_tf32,
// results) fills the results of a batch that is not empty.
template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> pool_forward(const Tensor& features, const Tensor& attention,
                                                const std::string& pool, bool signed_sqrt,
                                                bool normalize, double scale, double eps,
                                                bool allow_tf32) {
  const DeviceScope scope(features);
  const PoolShape shape = check_pool_inputs(features, attention);
  const PoolSettings settings = pool_settings(pool, signed_sqrt, normalize, scale, eps);
  const PoolResults results(shape, settings, features.scalar_type());
  if (shape.batch > 0) {
    visit_floating(features.scalar_type(), [&](auto type) {
      Backend::template forward<decltype(type)>(scope, features, attention, shape, settings,
                                                allow_tf32, results);
    });
  }
  return {results.output, results.norm, results.argmax};
}

// What a backward reads besides the inputs; all dense but the output.
struct PoolSaved {
  Tensor grad, output, norm, argmax;
};

// The backward; Backend::backward<T>(scope, features, attention, saved, shape, settings,
// allow_tf32, results) fills what is needed of the gradients of a batch that is not empty.
template <typename Backend>
std::tuple<Tensor, Tensor> pool_backward(const Tensor& grad, const Tensor& features,
                                         const Tensor& attention, const Tensor& output,
                                         const Tensor& norm, const Tensor& argmax,
                                         const std::string& pool, bool signed_sqrt, bool normalize,
                                         double scale, double eps, bool allow_tf32,
                                         const std::vector<bool>& needs) {
  const DeviceScope scope(grad);
  const PoolShape shape = check_pool_inputs(features, attention);
  const PoolSettings settings = pool_settings(pool, signed_sqrt, normalize, scale, eps);
  const ScalarType dtype = features.scalar_type();
  check_pool_results(grad, output, norm, argmax, shape, settings, dtype, needs);
  const PoolGradients results(features, attention, needs);
  if (shape.batch > 0 && (needs[0] || needs[1])) {
    const PoolSaved saved{dense(grad), output, normalize ? dense(norm) : norm,
                          settings.maximum ? dense(argmax) : argmax};
    visit_floating(dtype, [&](auto type) {
      Backend::template backward<decltype(type)>(scope, features, attention, saved, shape, settings,
                                                 allow_tf32, results);
    });
  }
  return {results.features, results.attention};
}

}  // namespace magsd::MAGSD_ISA::bilinear_pool
