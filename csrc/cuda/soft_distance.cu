// Soft distance loss, forward and backward: cross entropy of the raw logits, and the distance of
// every view's softmax from the soft target.
//
// Reads (1 + V) B K logits and writes, backward, as many gradients: a few kilobytes at the sizes of
// a classifier, so that latency is what costs. Hence one launch each way, and no row waits for
// another: the unit of work is a row of one matrix, of the raw logits or of a view, and a view's
// row computes the soft target for itself. A row belongs to as many neighboring lanes as it has
// classes, at most a warp; neighboring rows lie in neighboring lanes.
//
// The forward is one block where that goes over the rows in a few turns. More rows are spread over
// the device, and the last block to end adds up the sums of all: that costs it two trips to memory.
// Backward spreads the rows too, and each block adds up the target weights for itself. Sums run in
// double, in an order that the sizes and the number of multiprocessors decide. Softmaxes are
// computed again, not stored; any strides are read in place.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/soft_distance_arguments.h"
#include "common/soft_target.h"
#include "cuda/kernel.h"
#include "cuda/tickets.h"

namespace magsd::MAGSD_ISA::soft_distance {
namespace {

constexpr int kForwardThreads = 512;  // of the one block
constexpr int kThreads = 256;         // of one of several
constexpr int kBlocksPerProcessor = 4;
constexpr int64_t kMostTurns = 2;   // of the one block
constexpr int64_t kMostViews = 32;  // whose pointers a kernel takes; more are stacked first

template <typename T>
struct Row {
  const T* entries;
  int64_t step;

  __device__ accumulate_t<T> operator[](int64_t k) const { return upcast(entries[k * step]); }
};

// A (B, K) matrix of any strides.
template <typename T>
struct Matrix {
  const T* entries;
  int64_t step_b, step_k;
};

// What a call reads. Part 0 is the raw logits, part 1 + v is view v.
template <typename T>
struct Inputs {
  using A = accumulate_t<T>;
  int64_t batch, classes, parts;
  int lanes;  // that share a row
  // Parts after the last matrix given follow it at step_part: the views of one (V, B, K) tensor.
  Matrix<T> matrices[1 + kMostViews];
  int64_t last, step_part;
  const int64_t* targets;
  int64_t step_target;
  const void* class_weights;  // null: all 1
  bool float32_weights;       // else of the logits' dtype
  int64_t step_weight;
  A confidence;
  double smoothing;
  double share;  // of one probability in a mean, 1 / (B K)

  __device__ Row<T> row(int64_t part, int64_t b) const {
    const int64_t given = part < last ? part : last;
    const Matrix<T>& matrix = matrices[given];
    return {matrix.entries + (part - given) * step_part + b * matrix.step_b, matrix.step_k};
  }
  __device__ bool valid(int64_t b) const {
    const int64_t target = targets[b * step_target];
    return target >= 0 && target < classes;
  }
  // The first class stands in for a target that names none; the loss is NaN then.
  __device__ int64_t safe_target(int64_t b) const {
    return valid(b) ? targets[b * step_target] : 0;
  }
  __device__ A weight(int64_t b) const {
    if (class_weights == nullptr) return 1;
    const int64_t at = safe_target(b) * step_weight;
    return float32_weights ? static_cast<A>(static_cast<const float*>(class_weights)[at])
                           : upcast(static_cast<const T*>(class_weights)[at]);
  }
};

// Where the gradients of the parts go; as in Inputs, parts after the last follow it.
template <typename T>
struct Gradients {
  T* matrices[1 + kMostViews];
};

// The softmax of a row, in every lane of the row.
template <typename T>
struct Softmax {
  using A = accumulate_t<T>;
  Row<T> row;
  A maximum, sum, inverse;
  int64_t predicted;  // the first class of the largest probability, which is `inverse`

  __device__ A operator[](int64_t k) const { return std::exp(row[k] - maximum) * inverse; }
};

// Every lane of a warp must come here.
template <typename T>
__device__ Softmax<T> softmax_of(const Row<T>& row, int64_t classes, int lane, int lanes) {
  using A = accumulate_t<T>;
  const auto larger = [](A a, A b) { return a > b ? a : b; };
  A maximum = -std::numeric_limits<A>::infinity();
#pragma unroll 1  // A lane has one class where there are few; registers count for more.
  for (int64_t k = lane; k < classes; k += lanes) maximum = larger(row[k], maximum);
  maximum = warp_reduce(maximum, larger, lanes);
  A sum = 0;
  int64_t predicted = classes;
#pragma unroll 1
  for (int64_t k = lane; k < classes; k += lanes) {
    const A share = std::exp(row[k] - maximum);
    sum += share;
    if (share == 1 && k < predicted) predicted = k;
  }
  sum = warp_sum(sum, lanes);
  predicted = warp_reduce(predicted, [](int64_t a, int64_t b) { return a < b ? a : b; }, lanes);
  return {row, maximum, sum, 1 / sum, predicted};
}

// What the views of an image shall predict.
template <typename T>
struct SoftTarget {
  const Softmax<T>& raw;
  int64_t target, classes;
  double smoothing;
  bool kept;

  __device__ SoftTarget(const Inputs<T>& inputs, const Softmax<T>& softmax, int64_t b)
      : raw(softmax),
        target(inputs.safe_target(b)),
        classes(inputs.classes),
        smoothing(inputs.smoothing),
        kept(keeps_prediction(raw.predicted, raw.inverse, target, inputs.confidence)) {}
  __device__ accumulate_t<T> operator[](int64_t k) const {
    return kept ? raw[k] : smoothed_target<accumulate_t<T>>(k, target, classes, smoothing);
  }
};

// Calls visit(part, b, lane, inside) for the rows of this thread; `lane` is its position in
// the row. The lanes of a warp make the same number of calls, those past the last row on the first.
template <typename T, typename Visitor>
__device__ void for_each_row(const Inputs<T>& inputs, const Visitor& visit) {
  const int64_t rows = inputs.parts * inputs.batch;
  const int64_t at_once = static_cast<int64_t>(gridDim.x) * blockDim.x / inputs.lanes;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int in_warp = threadIdx.x % kWarp / inputs.lanes;
  int64_t warp_row = thread / kWarp * (kWarp / inputs.lanes);
  int64_t part = 0, b = warp_row + in_warp;
  for (; warp_row < rows; warp_row += at_once, b += at_once) {
    const bool inside = warp_row + in_warp < rows;
    for (; inside && b >= inputs.batch; b -= inputs.batch) ++part;
    visit(inside ? part : 0, inside ? b : 0, static_cast<int>(threadIdx.x) % inputs.lanes, inside);
  }
}

// Sum over the block, in every thread. `partial` holds an entry for each warp.
__device__ double block_sum(double value, double* partial) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  value = warp_sum(value);
  if (lane == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : 0.0);
}

// What a block adds up over its rows.
struct Sums {
  double entropy, weight, apart;
};

// Where the forward leaves its results.
template <typename A>
struct Results {
  A *loss, *cross_entropy, *distance;
  Sums* parts;  // of every block, where there are several
  Tickets tickets;
};

template <typename T>
__global__ void __launch_bounds__(kForwardThreads, 1)
    soft_distance_kernel(Inputs<T> inputs, Results<accumulate_t<T>> results) {
  using A = accumulate_t<T>;
  MAGSD_SHARED(double, partial, [3][kForwardThreads / kWarp]);
  double entropy = 0, weight = 0, apart = 0;
  for_each_row(inputs, [&](int64_t part, int64_t b, int lane, bool inside) {
    const int64_t classes = inputs.classes;
    const Softmax<T> raw = softmax_of(inputs.row(0, b), classes, lane, inputs.lanes);
    const Softmax<T> own = softmax_of(inputs.row(part, b), classes, lane, inputs.lanes);
    const SoftTarget<T> soft(inputs, raw, b);
    if (!inside) return;
    if (part == 0) {
      if (lane != 0) return;
      const A centered = raw.row[soft.target] - raw.maximum;
      const A nll = (std::log(raw.sum) - centered) * inputs.weight(b);
      entropy += static_cast<double>(inputs.valid(b) ? nll : std::numeric_limits<A>::quiet_NaN());
      weight += static_cast<double>(inputs.weight(b));
    } else {
      A sum = 0;
      for (int64_t k = lane; k < classes; k += inputs.lanes) sum += std::abs(soft[k] - own[k]);
      apart += static_cast<double>(sum);
    }
  });
  entropy = block_sum(entropy, partial[0]);
  weight = block_sum(weight, partial[1]);
  apart = block_sum(apart, partial[2]);
  const int blocks = static_cast<int>(gridDim.x);
  if (blocks > 1) {
    if (threadIdx.x == 0) results.parts[blockIdx.x] = {entropy, weight, apart};
    if (!is_last_block(results.tickets, 0, blocks)) return;
    entropy = weight = apart = 0;
    for (int i = static_cast<int>(threadIdx.x); i < blocks; i += static_cast<int>(blockDim.x)) {
      const Sums part = results.parts[i];
      entropy += part.entropy;
      weight += part.weight;
      apart += part.apart;
    }
    entropy = block_sum(entropy, partial[0]);
    weight = block_sum(weight, partial[1]);
    apart = block_sum(apart, partial[2]);
  }
  if (threadIdx.x != 0) return;
  // Over an empty batch both are 0 / 0, NaN, as torch's means are.
  entropy /= weight;
  apart *= inputs.share;
  *results.loss = static_cast<A>(entropy + apart);
  *results.cross_entropy = static_cast<A>(entropy);
  *results.distance = static_cast<A>(apart);
}

template <typename A>
__device__ double value_of(const A* gradient) {
  return gradient == nullptr ? 0.0 : static_cast<double>(*gradient);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    soft_distance_backward_kernel(Inputs<T> inputs, const accumulate_t<T>* grad_loss,
                                  const accumulate_t<T>* grad_cross_entropy,
                                  const accumulate_t<T>* grad_distance, Gradients<T> grads) {
  using A = accumulate_t<T>;
  MAGSD_SHARED(double, partial, [kThreads / kWarp]);
  const int64_t batch = inputs.batch, classes = inputs.classes;
  double weight = static_cast<double>(batch);
  if (inputs.class_weights != nullptr) {
    double sum = 0;
    for (int64_t b = threadIdx.x; b < batch; b += blockDim.x) {
      sum += static_cast<double>(inputs.weight(b));
    }
    weight = block_sum(sum, partial);
  }
  const double grad_entropy = (value_of(grad_loss) + value_of(grad_cross_entropy)) / weight;
  const A step = static_cast<A>((value_of(grad_loss) + value_of(grad_distance)) * inputs.share);
  for_each_row(inputs, [&](int64_t part, int64_t b, int lane, bool inside) {
    const Softmax<T> raw = softmax_of(inputs.row(0, b), classes, lane, inputs.lanes);
    const Softmax<T> own = softmax_of(inputs.row(part, b), classes, lane, inputs.lanes);
    const SoftTarget<T> soft(inputs, raw, b);
    // d|own - soft| / d own is a sign; softmax's Jacobian takes its weighted mean away.
    const auto signed_step = [&](A probability, int64_t k) {
      const A wanted = soft[k];
      return (static_cast<A>(probability > wanted) - static_cast<A>(probability < wanted)) * step;
    };
    A mean = 0;
    for (int64_t k = lane; k < classes; k += inputs.lanes) {
      const A probability = own[k];
      mean += probability * signed_step(probability, k);
    }
    mean = warp_sum(mean, inputs.lanes);
    if (!inside) return;
    const A factor = inputs.valid(b)
                         ? static_cast<A>(grad_entropy * static_cast<double>(inputs.weight(b)))
                         : std::numeric_limits<A>::quiet_NaN();
    const int64_t given = part < inputs.last ? part : inputs.last;
    T* row = grads.matrices[given] + ((part - given) * batch + b) * classes;
    for (int64_t k = lane; k < classes; k += inputs.lanes) {
      const A probability = own[k];
      row[k] = downcast<T>(part == 0 ? (probability - (k == soft.target ? A{1} : A{0})) * factor
                                     : probability * (signed_step(probability, k) - mean));
    }
  });
}

template <typename T>
Inputs<T> inputs_of(const Tensor& logits, const std::vector<Tensor>& views, const Tensor& targets,
                    const std::optional<Tensor>& class_weights, double confidence,
                    double smoothing) {
  Inputs<T> inputs{};
  inputs.batch = logits.size(0);
  inputs.classes = logits.size(1);
  inputs.lanes = 1;
  while (inputs.lanes < kWarp && inputs.lanes < inputs.classes) inputs.lanes *= 2;
  inputs.matrices[0] = {data<T>(logits), logits.stride(0), logits.stride(1)};
  const bool stacked = is_stacked(views);
  for (const Tensor& view : views) {
    inputs.matrices[++inputs.last] = {data<T>(view), view.stride(stacked),
                                      view.stride(stacked + 1)};
  }
  inputs.parts = 1 + (stacked ? views[0].size(0) : inputs.last);
  inputs.step_part = stacked ? views[0].stride(0) : 0;
  inputs.targets = data<int64_t>(targets);
  inputs.step_target = targets.stride(0);
  if (class_weights.has_value()) {
    inputs.class_weights = class_weights->const_data_ptr();
    inputs.float32_weights = class_weights->scalar_type() == ScalarType::Float;
    inputs.step_weight = class_weights->stride(0);
  }
  inputs.confidence = static_cast<accumulate_t<T>>(confidence);
  inputs.smoothing = smoothing;
  inputs.share = 1 / static_cast<double>(inputs.batch * inputs.classes);
  return inputs;
}

// The views as a kernel takes them: one (V, B, K) tensor in place of too many.
std::vector<Tensor> gathered(const std::vector<Tensor>& views) {
  const int64_t count = static_cast<int64_t>(views.size());
  if (count <= kMostViews) return views;
  const Tensor stack =
      uninitialized({count, views[0].size(0), views[0].size(1)}, views[0].scalar_type());
  for (int64_t v = 0; v < count; ++v) {
    Tensor slot = torch::stable::select(stack, 0, v);
    torch::stable::copy_(slot, views[v]);
  }
  return {stack};
}

// Threads that the rows fill, a multiple of a warp.
template <typename T>
int64_t threads_of(const Inputs<T>& inputs) {
  return ceil_div<int64_t>(inputs.parts * inputs.batch * inputs.lanes, kWarp) * kWarp;
}

// Blocks that so many threads are spread over.
int64_t blocks_for(int64_t threads) {
  return std::min<int64_t>(ceil_div<int64_t>(threads, kThreads),
                           int64_t{kBlocksPerProcessor} * multiprocessors());
}

std::tuple<Tensor, Tensor, Tensor> soft_distance_loss(const Tensor& logits,
                                                      const std::vector<Tensor>& view_logits,
                                                      const Tensor& targets,
                                                      const std::optional<Tensor>& class_weights,
                                                      double confidence, double smoothing) {
  const DeviceScope scope(logits);
  check_loss_arguments(logits, view_logits, targets, class_weights);
  const LossResults results(logits.scalar_type());
  const std::vector<Tensor> views = gathered(view_logits);
  visit_floating(logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Inputs<T> inputs =
        inputs_of<T>(logits, views, targets, class_weights, confidence, smoothing);
    Results<A> to{mutable_data<A>(results.loss),
                  mutable_data<A>(results.cross_entropy),
                  mutable_data<A>(results.distance),
                  nullptr,
                  {}};
    const int64_t threads = threads_of(inputs);
    if (threads <= kMostTurns * kForwardThreads) {
      const auto own = static_cast<int>(std::clamp<int64_t>(threads, kWarp, kForwardThreads));
      launch(scope, {grid_of(1), own}, soft_distance_kernel<T>, inputs, to);
      return;
    }
    const int64_t blocks = blocks_for(threads);
    const Tensor parts = uninitialized({3 * blocks}, ScalarType::Double);
    static_assert(sizeof(Sums) == 3 * sizeof(double));
    to.parts = static_cast<Sums*>(parts.mutable_data_ptr());
    const TicketBook book = tickets_for(scope, 1);
    to.tickets = book.tickets;
    launch(scope, {grid_of(blocks), kThreads}, soft_distance_kernel<T>, inputs, to);
  });
  return {results.loss, results.cross_entropy, results.distance};
}

std::tuple<Tensor, std::vector<Tensor>> soft_distance_loss_backward(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_cross_entropy,
    const std::optional<Tensor>& grad_distance, const Tensor& logits,
    const std::vector<Tensor>& view_logits, const Tensor& targets,
    const std::optional<Tensor>& class_weights, double confidence, double smoothing) {
  const DeviceScope scope(logits);
  check_loss_arguments(logits, view_logits, targets, class_weights);
  const ScalarType dtype = logits.scalar_type();
  const std::vector<Tensor> views = gathered(view_logits);
  const Tensor grad = uninitialized({logits.size(0), logits.size(1)}, dtype);
  const std::vector<Tensor> grad_views = empty_like(views);
  visit_floating(dtype, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Inputs<T> inputs =
        inputs_of<T>(logits, views, targets, class_weights, confidence, smoothing);
    Gradients<T> grads{{mutable_data<T>(grad)}};
    for (size_t v = 0; v < grad_views.size(); ++v) {
      grads.matrices[1 + v] = mutable_data<T>(grad_views[v]);
    }
    const A *of_loss = scalar_gradient<A>(grad_loss),
            *of_distance = scalar_gradient<A>(grad_distance);
    const A* of_entropy = scalar_gradient<A>(grad_cross_entropy);
    if (inputs.batch == 0) return;
    const int64_t threads = threads_of(inputs);
    const auto own = static_cast<int>(std::min<int64_t>(threads, kThreads));
    launch(scope, {grid_of(blocks_for(threads)), own}, soft_distance_backward_kernel<T>, inputs,
           of_loss, of_entropy, of_distance, grads);
  });
  if (views.size() == view_logits.size()) return {grad, grad_views};
  std::vector<Tensor> separate;
  for (size_t v = 0; v < view_logits.size(); ++v) {
    separate.push_back(torch::stable::clone(torch::stable::select(grad_views[0], 0, v)));
  }
  return {grad, separate};
}

}  // namespace

MAGSD_OPERATORS(library) {
  library.impl("soft_distance_loss", TORCH_BOX(&soft_distance_loss));
  library.impl("soft_distance_loss_backward", TORCH_BOX(&soft_distance_loss_backward));
}

}  // namespace magsd::MAGSD_ISA::soft_distance
