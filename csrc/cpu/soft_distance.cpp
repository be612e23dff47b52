// Soft distance loss, forward and backward: cross entropy of the raw logits, and the distance of
// every view's softmax from the soft target.
//
// Reads every logit once and writes, backward, every gradient once; at the sizes of a classifier
// (16 images, 4 classes) that is a few hundred numbers, and the call itself is what costs. So one
// pass per image holds everything: softmax, target rule, views. Blocks of kRows images add up in
// double and are added in order, so that the result does not depend on the number of threads.
// Backward computes the softmax again instead of storing it. Any strides are read in place.
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/soft_distance_arguments.h"
#include "common/soft_target.h"
#include "common/tensor.h"
#include "cpu/parallel.h"

namespace magsd::MAGSD_ISA::soft_distance {
namespace {

constexpr int64_t kRows = 64;

// A (B, K) matrix of any strides.
template <typename T>
struct Matrix {
  T* entries;
  int64_t step_b, step_k;
};

// What a call reads.
template <typename T>
struct Inputs {
  using A = accumulate_t<T>;
  int64_t batch, classes;
  Matrix<const T> logits;
  std::vector<Matrix<const T>> views;
  const int64_t* targets;
  std::vector<A> class_weights;
  A confidence;
  double smoothing;

  int64_t blocks() const { return (batch + kRows - 1) / kRows; }
  int64_t grain() const {
    const int64_t work = kRows * classes * (1 + static_cast<int64_t>(views.size()));
    return 1 + 16384 / work;
  }
  bool valid(int64_t b) const { return targets[b] >= 0 && targets[b] < classes; }
  // The first class stands in for a target that names none; the loss is NaN then.
  int64_t safe_target(int64_t b) const { return valid(b) ? targets[b] : 0; }
  A weight(int64_t b) const { return class_weights.empty() ? A{1} : class_weights[safe_target(b)]; }
};

// probabilities = softmax of row b; returns the logarithm of the sum of exp(logit - maximum), and
// the maximum.
template <typename T>
std::pair<accumulate_t<T>, accumulate_t<T>> softmax(const Matrix<const T>& logits, int64_t b,
                                                    int64_t classes,
                                                    accumulate_t<T>* probabilities) {
  using A = accumulate_t<T>;
  const T* row = logits.entries + b * logits.step_b;
  A maximum = -std::numeric_limits<A>::infinity();
  for (int64_t k = 0; k < classes; ++k) {
    probabilities[k] = static_cast<A>(row[k * logits.step_k]);
    maximum = probabilities[k] > maximum ? probabilities[k] : maximum;
  }
  A sum = 0;
  for (int64_t k = 0; k < classes; ++k) {
    probabilities[k] = std::exp(probabilities[k] - maximum);
    sum += probabilities[k];
  }
  const A inverse = 1 / sum;
  for (int64_t k = 0; k < classes; ++k) probabilities[k] *= inverse;
  return {std::log(sum), maximum};
}

// Turns the softmax of row b into its soft target.
template <typename T>
void soften(const Inputs<T>& inputs, int64_t b, accumulate_t<T>* probabilities) {
  using A = accumulate_t<T>;
  const int64_t target = inputs.safe_target(b);
  int64_t predicted = 0;
  for (int64_t k = 1; k < inputs.classes; ++k) {
    if (probabilities[k] > probabilities[predicted]) predicted = k;
  }
  if (keeps_prediction(predicted, probabilities[predicted], target, inputs.confidence)) return;
  for (int64_t k = 0; k < inputs.classes; ++k) {
    probabilities[k] = smoothed_target<A>(k, target, inputs.classes, inputs.smoothing);
  }
}

struct Sums {
  double entropy = 0, weight = 0, distance = 0;
};

template <typename T>
Sums forward_block(const Inputs<T>& inputs, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t classes = inputs.classes;
  std::vector<A> buffer(2 * classes);
  A *soft = buffer.data(), *view = soft + classes;
  Sums sums;
  for (int64_t b = begin; b < end; ++b) {
    const auto [log_sum, maximum] = softmax(inputs.logits, b, classes, soft);
    const int64_t target = inputs.safe_target(b);
    const T* row = inputs.logits.entries + b * inputs.logits.step_b;
    const A centered = static_cast<A>(row[target * inputs.logits.step_k]) - maximum;
    const A weight = inputs.weight(b);
    const A entropy =
        inputs.valid(b) ? (log_sum - centered) * weight : std::numeric_limits<A>::quiet_NaN();
    sums.entropy += static_cast<double>(entropy);
    sums.weight += static_cast<double>(weight);
    soften(inputs, b, soft);
    for (const auto& logits : inputs.views) {
      softmax(logits, b, classes, view);
      A distance = 0;
      for (int64_t k = 0; k < classes; ++k) distance += std::abs(soft[k] - view[k]);
      sums.distance += static_cast<double>(distance);
    }
  }
  return sums;
}

template <typename T>
void forward(const Inputs<T>& inputs, const LossResults& results) {
  using A = accumulate_t<T>;
  std::vector<Sums> sums(inputs.blocks());
  parallel_for(inputs.blocks(), inputs.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      sums[i] = forward_block(inputs, i * kRows, std::min(inputs.batch, (i + 1) * kRows));
    }
  });
  Sums total;
  for (const Sums& block : sums) {
    total.entropy += block.entropy;
    total.weight += block.weight;
    total.distance += block.distance;
  }
  // Over an empty batch both are 0 / 0, NaN, as torch's means are.
  const double entropy = total.entropy / total.weight;
  const double mean = total.distance / static_cast<double>(inputs.batch * inputs.classes);
  *mutable_data<A>(results.loss) = static_cast<A>(entropy + mean);
  *mutable_data<A>(results.cross_entropy) = static_cast<A>(entropy);
  *mutable_data<A>(results.distance) = static_cast<A>(mean);
}

// Gradients of rows begin..end of the logits and of every view.
template <typename T>
void backward_block(const Inputs<T>& inputs, int64_t begin, int64_t end, double grad_entropy,
                    double grad_distance, T* grad, const std::vector<T*>& grad_views) {
  using A = accumulate_t<T>;
  const int64_t classes = inputs.classes;
  std::vector<A> buffer(2 * classes);
  A *soft = buffer.data(), *view = soft + classes;
  const A step = static_cast<A>(grad_distance);
  for (int64_t b = begin; b < end; ++b) {
    softmax(inputs.logits, b, classes, soft);
    const int64_t target = inputs.safe_target(b);
    const A factor = inputs.valid(b)
                         ? static_cast<A>(grad_entropy * static_cast<double>(inputs.weight(b)))
                         : std::numeric_limits<A>::quiet_NaN();
    for (int64_t k = 0; k < classes; ++k) {
      grad[b * classes + k] = static_cast<T>((soft[k] - (k == target ? A{1} : A{0})) * factor);
    }
    soften(inputs, b, soft);
    for (size_t v = 0; v < grad_views.size(); ++v) {
      softmax(inputs.views[v], b, classes, view);
      // d|view - soft| / d view is a sign; softmax's Jacobian takes its weighted mean away.
      A mean = 0;
      for (int64_t k = 0; k < classes; ++k) {
        const A sign = static_cast<A>(view[k] > soft[k]) - static_cast<A>(view[k] < soft[k]);
        mean += view[k] * (sign * step);
      }
      T* row = grad_views[v] + b * classes;
      for (int64_t k = 0; k < classes; ++k) {
        const A sign = static_cast<A>(view[k] > soft[k]) - static_cast<A>(view[k] < soft[k]);
        row[k] = static_cast<T>(view[k] * (sign * step - mean));
      }
    }
  }
}

template <typename T>
void backward(const Inputs<T>& inputs, double grad_entropy, double grad_distance, T* grad,
              const std::vector<T*>& grad_views) {
  double weight = 0;
  for (int64_t b = 0; b < inputs.batch; ++b) weight += static_cast<double>(inputs.weight(b));
  grad_entropy /= weight;
  grad_distance /= static_cast<double>(inputs.batch * inputs.classes);
  parallel_for(inputs.blocks(), inputs.grain(), [&](int64_t begin, int64_t end) {
    backward_block(inputs, begin * kRows, std::min(inputs.batch, end * kRows), grad_entropy,
                   grad_distance, grad, grad_views);
  });
}

// `targets` is contiguous.
template <typename T>
Inputs<T> inputs_of(const Tensor& logits, const std::vector<Tensor>& views, const Tensor& targets,
                    const std::optional<Tensor>& class_weights, double confidence,
                    double smoothing) {
  using A = accumulate_t<T>;
  Inputs<T> inputs;
  inputs.batch = logits.size(0);
  inputs.classes = logits.size(1);
  inputs.logits = {data<T>(logits), logits.stride(0), logits.stride(1)};
  for (const Tensor& view : views) {
    if (view.dim() == 2) {
      inputs.views.push_back({data<T>(view), view.stride(0), view.stride(1)});
      continue;
    }
    for (int64_t v = 0; v < view.size(0); ++v) {
      const T* entries = data<T>(view) + v * view.stride(0);
      inputs.views.push_back({entries, view.stride(1), view.stride(2)});
    }
  }
  inputs.targets = data<int64_t>(targets);
  if (class_weights.has_value()) {
    const int64_t step = class_weights->stride(0);
    visit_floating(class_weights->scalar_type(), [&](auto type) {
      const auto* weights = data<decltype(type)>(*class_weights);
      for (int64_t k = 0; k < inputs.classes; ++k) {
        inputs.class_weights.push_back(static_cast<A>(weights[k * step]));
      }
    });
  }
  inputs.confidence = static_cast<A>(confidence);
  inputs.smoothing = smoothing;
  return inputs;
}

std::tuple<Tensor, Tensor, Tensor> soft_distance_loss(const Tensor& logits,
                                                      const std::vector<Tensor>& view_logits,
                                                      const Tensor& targets,
                                                      const std::optional<Tensor>& class_weights,
                                                      double confidence, double smoothing) {
  check_loss_arguments(logits, view_logits, targets, class_weights);
  const LossResults results(logits.scalar_type());
  const Tensor dense_targets = dense(targets);
  visit_floating(logits.scalar_type(), [&](auto type) {
    forward(inputs_of<decltype(type)>(logits, view_logits, dense_targets, class_weights, confidence,
                                      smoothing),
            results);
  });
  return {results.loss, results.cross_entropy, results.distance};
}

// A missing gradient counts as 0.
template <typename A>
double value_of(const std::optional<Tensor>& grad) {
  const A* value = scalar_gradient<A>(grad);
  return value == nullptr ? 0 : static_cast<double>(*value);
}

std::tuple<Tensor, std::vector<Tensor>> soft_distance_loss_backward(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_cross_entropy,
    const std::optional<Tensor>& grad_distance, const Tensor& logits,
    const std::vector<Tensor>& view_logits, const Tensor& targets,
    const std::optional<Tensor>& class_weights, double confidence, double smoothing) {
  check_loss_arguments(logits, view_logits, targets, class_weights);
  const ScalarType dtype = logits.scalar_type();
  const int64_t entries = logits.numel();
  const Tensor grad = uninitialized({logits.size(0), logits.size(1)}, dtype);
  const Tensor dense_targets = dense(targets);
  const std::vector<Tensor> grad_views = empty_like(view_logits);
  visit_floating(dtype, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const double of_loss = value_of<A>(grad_loss);
    const double of_entropy = of_loss + value_of<A>(grad_cross_entropy);
    const double of_distance = of_loss + value_of<A>(grad_distance);
    const Inputs<T> inputs =
        inputs_of<T>(logits, view_logits, dense_targets, class_weights, confidence, smoothing);
    std::vector<T*> rows;
    for (const Tensor& view : grad_views) {
      const int64_t stacked = view.dim() == 3 ? view.size(0) : 1;
      for (int64_t v = 0; v < stacked; ++v) rows.push_back(mutable_data<T>(view) + v * entries);
    }
    backward(inputs, of_entropy, of_distance, mutable_data<T>(grad), rows);
  });
  return {grad, grad_views};
}

}  // namespace

MAGSD_OPERATORS(soft_distance, library) {
  library.impl("soft_distance_loss", TORCH_BOX(&soft_distance_loss));
  library.impl("soft_distance_loss_backward", TORCH_BOX(&soft_distance_loss_backward));
}

}  // namespace magsd::MAGSD_ISA::soft_distance
