// The operators of batch_norm_act, as far as the CPU and the CUDA kernels agree: checks, results.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/device_scope.h"
#include "common/feature_map.h"
#include "common/tensor.h"

namespace magsd::MAGSD_ISA::batch_norm_act {

enum class Act { kRelu, kSilu, kNone };

inline Act act_of(const std::string& act) {
  if (act == "relu") return Act::kRelu;
  if (act == "silu") return Act::kSilu;
  STD_TORCH_CHECK(act == "none", "act must be relu, silu or none, got ", act);
  return Act::kNone;
}

struct NormShape {
  int64_t groups, batch, channels, pixels;  // `batch` images in every group
  int64_t elements() const { return groups * channels * values(); }
  int64_t values() const { return batch * pixels; }  // of a channel in a group
  bool empty() const { return batch == 0; }
};

inline void check_parameter(const Tensor& values, const char* name, const Tensor& x) {
  check_tensor(values, name, 1);
  check_sizes(values, name, {x.size(1)});
  const ScalarType dtype = values.scalar_type();
  STD_TORCH_CHECK(dtype == x.scalar_type() || dtype == ScalarType::Float, name,
                  " must have x's dtype or float32");
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& x) {
  check_tensor(tensor, name, 4);
  check_dtype(tensor, name, x.scalar_type());
  check_sizes(tensor, name, {x.size(0), x.size(1), x.size(2), x.size(3)});
}

inline NormShape check_norm(const Tensor& x, const Tensor& weight, const Tensor& bias,
                            int64_t groups) {
  check_tensor(x, "x", 4);
  check_floating(x, "x");
  for (int64_t d = 1; d < 4; ++d) STD_TORCH_CHECK(x.size(d) > 0, "x must not be empty");
  check_parameter(weight, "weight", x);
  check_parameter(bias, "bias", x);
  STD_TORCH_CHECK(groups > 0 && x.size(0) % groups == 0, "groups must divide the batch, got ",
                  groups);
  return {groups, x.size(0) / groups, x.size(1), x.size(2) * x.size(3)};
}

// What a forward reads and writes. x, residual and output have one memory format.
struct NormForward {
  NormShape shape;
  Act act;
  bool of_batch;  // normalize by the batch's statistics; `running` ones are then updated
  double momentum, eps;
  FeatureMap x;
  std::optional<FeatureMap> residual;
  Tensor weight, bias, running_mean, running_var;
  Tensor output, mean, rstd;  // mean and rstd (groups, C) in the accumulation dtype
};

// What a backward reads and writes. All maps have x's memory format.
struct NormBackward {
  NormShape shape;
  Act act;
  bool of_batch;
  bool of_x, of_parameters, of_residual;  // gradients that are wanted; the other tensors are empty
  FeatureMap grad, x;
  // With a residual: the result for relu, the residual for silu.
  std::optional<FeatureMap> kept;
  Tensor weight, bias, mean, rstd;
  Tensor grad_x, grad_weight, grad_bias, grad_residual;
};

inline std::optional<FeatureMap> map_like(const std::optional<Tensor>& tensor, const char* name,
                                          const Tensor& x) {
  if (!tensor.has_value()) return std::nullopt;
  check_like(*tensor, name, x);
  return FeatureMap(*tensor, is_channels_last(x));
}

// Backend::forward<T>(scope, NormForward) and Backend::backward<T>(scope, NormBackward) do the
// work; they are called for empty batches too.
template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> norm_forward(const Tensor& x, const Tensor& weight,
                                                const Tensor& bias, const Tensor& running_mean,
                                                const Tensor& running_var,
                                                const std::optional<Tensor>& residual,
                                                int64_t groups, const std::string& act,
                                                bool training, double momentum, double eps) {
  const DeviceScope scope(x);
  const NormShape shape = check_norm(x, weight, bias, groups);
  check_parameter(running_mean, "running_mean", x);
  check_parameter(running_var, "running_var", x);
  STD_TORCH_CHECK(training || groups == 1, "groups must be 1 in evaluation");
  STD_TORCH_CHECK(!training || shape.values() != 1,
                  "x must have more than one value per channel and group in training");
  const ScalarType statistics = accumulation_dtype(x.scalar_type());
  const NormForward call{shape,
                         act_of(act),
                         training && !shape.empty(),
                         momentum,
                         eps,
                         FeatureMap(x),
                         map_like(residual, "residual", x),
                         weight,
                         bias,
                         running_mean,
                         running_var,
                         empty_map_like(x),
                         uninitialized({groups, shape.channels}, statistics),
                         uninitialized({groups, shape.channels}, statistics)};
  visit_floating(x.scalar_type(),
                 [&](auto type) { Backend::template forward<decltype(type)>(scope, call); });
  return {call.output, call.mean, call.rstd};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const Tensor& x,
                                                         const Tensor& weight, const Tensor& bias,
                                                         const std::optional<Tensor>& kept,
                                                         const Tensor& mean, const Tensor& rstd,
                                                         const std::string& act, bool training,
                                                         const std::vector<bool>& needs) {
  const DeviceScope scope(x);
  for (const Tensor* statistics : {&mean, &rstd}) {
    check_tensor(*statistics, "mean and rstd", 2);
    check_floating(x, "x");
    check_dtype(*statistics, "mean and rstd", accumulation_dtype(x.scalar_type()));
    check_sizes(*statistics, "mean and rstd", {mean.size(0), x.dim() == 4 ? x.size(1) : -1});
  }
  const NormShape shape = check_norm(x, weight, bias, mean.size(0));
  check_like(grad, "grad", x);
  STD_TORCH_CHECK(needs.size() == 3, "needs must have 3 entries, got ", needs.size());
  const ScalarType dtype = x.scalar_type();
  const auto map_if = [&](bool wanted) {
    return wanted ? empty_map_like(x) : uninitialized({0}, dtype);
  };
  const int64_t count = needs[1] ? shape.channels : 0;
  const NormBackward call{shape,
                          act_of(act),
                          training && !shape.empty(),
                          needs[0],
                          needs[1],
                          needs[2],
                          FeatureMap(grad, is_channels_last(x)),
                          FeatureMap(x),
                          map_like(kept, "kept", x),
                          weight,
                          bias,
                          dense(mean),
                          dense(rstd),
                          map_if(needs[0]),
                          uninitialized({count}, weight.scalar_type()),
                          uninitialized({count}, bias.scalar_type()),
                          map_if(needs[2])};
  visit_floating(dtype,
                 [&](auto type) { Backend::template backward<decltype(type)>(scope, call); });
  return {call.grad_x, call.grad_weight, call.grad_bias, call.grad_residual};
}

}  // namespace magsd::MAGSD_ISA::batch_norm_act
