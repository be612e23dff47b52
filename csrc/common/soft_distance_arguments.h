// Checks of the arguments of `soft_distance_loss`, before anything is indexed by them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common/tensor.h"

namespace magsd::MAGSD_ISA::soft_distance {

// `views` holds one (V, B, K) tensor or V tensors (B, K).
inline bool is_stacked(const std::vector<Tensor>& views) {
  return views.size() == 1 && views[0].defined() && views[0].dim() == 3;
}

inline void check_loss_arguments(const Tensor& logits, const std::vector<Tensor>& views,
                                 const Tensor& targets,
                                 const std::optional<Tensor>& class_weights) {
  check_tensor(logits, "logits", 2);
  check_floating(logits, "logits");
  const int64_t batch = logits.size(0), classes = logits.size(1);
  STD_TORCH_CHECK(classes > 0, "logits must have at least one class");
  STD_TORCH_CHECK(!views.empty(), "view_logits must have at least one view");
  const bool stacked = is_stacked(views);
  for (const Tensor& view : views) {
    check_tensor(view, "view_logits", stacked ? 3 : 2);
    check_dtype(view, "view_logits", logits.scalar_type());
    if (stacked) {
      check_sizes(view, "view_logits", {-1, batch, classes});
    } else {
      check_sizes(view, "view_logits", {batch, classes});
    }
  }
  check_tensor(targets, "targets", 1);
  check_dtype(targets, "targets", ScalarType::Long);
  check_sizes(targets, "targets", {batch});
  if (class_weights.has_value()) {
    check_tensor(*class_weights, "class_weights", 1);
    check_sizes(*class_weights, "class_weights", {classes});
    const ScalarType dtype = class_weights->scalar_type();
    STD_TORCH_CHECK(dtype == logits.scalar_type() || dtype == ScalarType::Float,
                    "class_weights must have the logits' dtype or float32");
  }
}

// Uninitialized results of the forward.
struct LossResults {
  Tensor loss, cross_entropy, distance;

  explicit LossResults(ScalarType logits)
      : loss(uninitialized({}, accumulation_dtype(logits))),
        cross_entropy(uninitialized({}, accumulation_dtype(logits))),
        distance(uninitialized({}, accumulation_dtype(logits))) {}
};

// Dense uninitialized tensors of the same shapes.
inline std::vector<Tensor> empty_like(const std::vector<Tensor>& views) {
  std::vector<Tensor> results;
  for (const Tensor& view : views) {
    const auto sizes = view.sizes();
    results.push_back(uninitialized({sizes.begin(), sizes.end()}, view.scalar_type()));
  }
  return results;
}

// The gradient of one of the three scalars as they come out; nullptr where it is missing.
template <typename A>
const A* scalar_gradient(const std::optional<Tensor>& grad) {
  if (!grad.has_value()) return nullptr;
  check_tensor(*grad, "the gradient of a scalar", 0);
  check_dtype(*grad, "the gradient of a scalar",
              sizeof(A) == sizeof(double) ? ScalarType::Double : ScalarType::Float);
  return data<A>(*grad);
}

}  // namespace magsd::MAGSD_ISA::soft_distance
