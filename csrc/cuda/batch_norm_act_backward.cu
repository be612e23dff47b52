// Batch norm, residual and activation, backward.
//
// With g = grad act'(z), training is two launches:
//   sums      reads x, grad and, with a residual, what the forward kept of it. A block leaves its
//             part of sum g and sum g (x - mean); the last block of a range of channels adds up the
//             parts of every group, which are the gradients of weight and bias. Writes g, the
//             gradient of the residual, where that is asked for.
//   gradient  reads x and grad again, or g, which relu leaves exact, in its place, and writes the
//             gradient of x. It goes through the maps from the end, of which the L2 still holds
//             most.
// So training moves 5 values an element, of relu with a residual 7. In evaluation the gradient of x
// needs no sums: it is one launch, of the first kind where the gradients of weight and bias are
// asked for. What a pass does not need it does not read.
#include <optional>

#include "cuda/batch_norm_act.h"
#include "cuda/batch_norm_act_sums.h"

namespace magsd::MAGSD_ISA::batch_norm_act {
namespace {

// Of the gradient of x, weight rstd (g - plain - (x - mean) centered).
template <typename A>
struct alignas(2 * sizeof(A)) Means {
  A plain, centered;
};

template <typename T>
struct Backward {
  using A = accumulate_t<T>;
  Partition partition;
  const T *grad, *x, *kept;   // x and kept null: not needed
  T *grad_x, *grad_residual;  // null: not written
  const A *mean, *rstd;       // (groups, C)
  Means<A>* means;            // the same, null where evaluation needs none
  Parameter<T> weight, bias, grad_weight, grad_bias;
  Pair* parts;
  Tickets tickets;
  Act act;
  bool of_parameters;
};

// What a thread knows of a channel.
template <typename A>
struct Slope {
  Norm<A> norm;
  A offset, slope;  // the gradient of x: g factor - (offset + (x - mean) slope)
};

template <typename G, bool kSums>
__device__ Slope<typename G::A> slope_of(const Backward<typename G::T>& call, const Place<G>& place,
                                         int64_t channel) {
  using A = typename G::A;
  const int64_t at = place.group * call.partition.channels + channel;
  const A factor = call.weight[channel] * call.rstd[at];
  Slope<A> slope{{call.mean[at], factor, call.bias[channel]}, 0, 0};
  if (!kSums && call.means != nullptr) {
    const Means<A> means = call.means[at];
    slope.offset = means.plain * factor;
    slope.slope = means.centered * factor;
  }
  return slope;
}

// g = grad act'(z). kept, if there is a residual: the result for relu, the residual for silu.
template <typename G>
__device__ __forceinline__ void differentiate(Act act, const Slope<typename G::A> (&own)[G::kOwn],
                                              const typename G::A (&x)[G::kItems], bool has_kept,
                                              const Raw<G>& kept, typename G::A (&g)[G::kItems]) {
  using T = typename G::T;
  using A = typename G::A;
  // The branches lie outside the loops: all threads take the same one.
  if (act == Act::kNone) return;
  A z[G::kItems];
  if (has_kept) unpack<G>(kept, z);
  if (!has_kept || act == Act::kSilu) {
#pragma unroll
    for (int k = 0; k < G::kItems; ++k) {
      const A normal = own[G::kLast ? k : 0].norm(x[k]);
      z[k] = has_kept ? normal + z[k] : normal;
    }
  }
  if (act == Act::kRelu) {
#pragma unroll
    for (int k = 0; k < G::kItems; ++k) g[k] = z[k] <= 0 ? 0 : g[k];  // passes where z is NaN
  } else {
#pragma unroll
    for (int k = 0; k < G::kItems; ++k) {
      const A sigmoid = divided<T>(A{1}, one_and_exp<T>(z[k]));
      g[k] *= sigmoid * (1 + z[k] * (1 - sigmoid));
    }
  }
}

template <typename G>
__device__ __forceinline__ void leave_sums(const Backward<typename G::T>& call, int64_t range) {
  using A = typename G::A;
  const Partition& p = call.partition;
  const Totals<G> totals(p, range);
  const int64_t channel = totals.channel;
  double of_weight = 0, of_bias = 0;
  const double each = 1 / p.count;
  const auto rstd_of = [&](int group) { return call.rstd[group * p.channels + channel]; };
  totals.visit(call.parts, rstd_of, [&](int group, A rstd, const Pair& sums) {
    const double normal = sums.second * static_cast<double>(rstd);
    if (p.positions > 0) {  // or rstd may be NaN
      of_weight += normal;
      of_bias += sums.first;
    }
    if (call.means != nullptr) {
      // Ioffe and Szegedy 2015: the batch's mean and variance depend on every element.
      call.means[group * p.channels + channel] = {
          static_cast<A>(sums.first * each),
          static_cast<A>(normal * static_cast<double>(rstd) * each)};
    }
  });
  if (!call.of_parameters || !totals.is_finisher()) return;
  call.grad_weight.set(channel, of_weight);
  call.grad_bias.set(channel, of_bias);
}

// kSums: the first launch of training, the only one where the parameters' gradients are asked for
// in evaluation.
template <typename G, bool kSums>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ Backward<typename G::T> call) {
  using A = typename G::A;
  constexpr int kUnroll = G::kOwn == 8 ? 3 : (G::kBytes < 16 ? 6 : 4);
  MAGSD_SHARED(Slope<A>, slopes, [G::kChannels]);
  const Partition& p = call.partition;
  const Place<G> place(p);
  Slope<A> own[G::kOwn] = {};
  const auto prepare = [&] {
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t channel = place.range * p.block_channels + thread;
    if (thread < p.block_channels && channel < p.channels) {
      slopes[thread] = slope_of<G, kSums>(call, place, channel);
    }
    __syncthreads();
    if (!place.exists) return;
#pragma unroll
    for (int k = 0; k < G::kOwn; ++k) own[k] = slopes[place.own + k];
  };
  Raw<G> raw_grad[kUnroll] = {}, raw_x[kUnroll] = {}, raw_kept[kUnroll] = {};
  const auto load = [&](int u, int64_t offset) {
    raw_grad[u] = load_raw<G>(call.grad + offset);
    if (kSums || call.x != nullptr) raw_x[u] = load_raw<G>(call.x + offset);
    if (call.kept != nullptr) raw_kept[u] = load_raw<G>(call.kept + offset);
  };
  A plain[G::kOwn] = {}, centered[G::kOwn] = {};
  for_positions<G, kUnroll, !kSums>(p, place, prepare, load, [&](int u, int64_t offset) {
    A g[G::kItems], x[G::kItems];
    unpack<G>(raw_grad[u], g);
    unpack<G>(raw_x[u], x);
    differentiate<G>(call.act, own, x, call.kept != nullptr, raw_kept[u], g);
    if constexpr (kSums) {
#pragma unroll
      for (int k = 0; k < G::kItems; ++k) {
        const int channel = G::kLast ? k : 0;
        plain[channel] += g[k];
        centered[channel] += g[k] * (x[k] - own[channel].norm.mean);
      }
    }
    if (call.grad_residual != nullptr) store<G>(call.grad_residual + offset, g);
    if (call.grad_x == nullptr) return;
#pragma unroll
    for (int k = 0; k < G::kItems; ++k) g[k] *= own[G::kLast ? k : 0].norm.factor;
    if (!kSums && call.means != nullptr) {
#pragma unroll
      for (int k = 0; k < G::kItems; ++k) {
        const Slope<A>& slope = own[G::kLast ? k : 0];
        g[k] -= slope.offset + (x[k] - slope.norm.mean) * slope.slope;
      }
    }
    store<G>(call.grad_x + offset, g);
  });
  if constexpr (kSums) {
    Pair pairs[G::kOwn];
#pragma unroll
    for (int k = 0; k < G::kOwn; ++k) {
#pragma unroll
      for (int step = kWarp / 2; step >= G::kLanes; step /= 2) {
        plain[k] += __shfl_xor_sync(kAllLanes, plain[k], step);
        centered[k] += __shfl_xor_sync(kAllLanes, centered[k], step);
      }
      pairs[k] = {static_cast<double>(plain[k]), static_cast<double>(centered[k])};
    }
    leave_part(p, place, pairs, call.parts);
    if (is_last_block(call.tickets, place.range, p.parts())) leave_sums<G>(call, place.range);
  }
}

struct Backend {
  template <typename T>
  static void backward(const DeviceScope& scope, const NormBackward& call) {
    using A = accumulate_t<T>;
    const bool sums = call.of_parameters || (call.of_x && call.of_batch);
    const bool writes = (call.of_x || call.of_residual) && !call.shape.empty();
    if (!sums && !writes) return;
    const FeatureMap grad = dense_map(call.grad), x = dense_map(call.x);
    std::optional<FeatureMap> kept;
    if (call.kept.has_value() && call.act != Act::kNone) kept = dense_map(*call.kept);
    Backward<T> first{};
    first.grad = data<T>(grad.tensor);
    first.x = data<T>(x.tensor);
    first.kept = kept.has_value() ? data<T>(kept->tensor) : nullptr;
    T* const grad_x = call.of_x ? mutable_data<T>(call.grad_x) : nullptr;
    T* const grad_residual = call.of_residual ? mutable_data<T>(call.grad_residual) : nullptr;
    first.grad_residual = grad_residual;
    first.mean = data<A>(call.mean);
    first.rstd = data<A>(call.rstd);
    first.weight = parameter_of<T>(call.weight);
    first.bias = parameter_of<T>(call.bias);
    first.act = call.act;
    first.of_parameters = call.of_parameters;
    if (call.of_parameters) {
      first.grad_weight = parameter_of<T>(call.grad_weight, true);
      first.grad_bias = parameter_of<T>(call.grad_bias, true);
    }
    const auto launch_all = [&](auto grain) {
      using G = decltype(grain);
      first.partition = partition_of<G>(call.shape);
      const LaunchShape shape{grid_of(first.partition.blocks()), kThreads};
      if (!sums) {
        first.grad_x = grad_x;
        const bool of_z = call.act == Act::kSilu || (call.act == Act::kRelu && !kept.has_value());
        if (!of_z) first.x = nullptr;
        launch(scope, shape, backward_kernel<G, false>, first);
        return;
      }
      const Tensor parts = parts_of(first.partition);
      first.parts = static_cast<Pair*>(parts.mutable_data_ptr());
      const TicketBook book = tickets_of(scope, first.partition);
      first.tickets = book.tickets;
      if (!call.of_batch || !call.of_x) {
        first.grad_x = grad_x;
        launch(scope, shape, backward_kernel<G, true>, first);
        return;
      }
      static_assert(sizeof(Means<A>) == 2 * sizeof(A));
      const Tensor means =
          uninitialized({2 * call.shape.groups * call.shape.channels}, call.mean.scalar_type());
      first.means = static_cast<Means<A>*>(means.mutable_data_ptr());
      launch(scope, shape, backward_kernel<G, true>, first);
      Backward<T> second = first;
      second.grad_x = grad_x;
      second.grad_residual = nullptr;
      if (grad_residual != nullptr && call.act != Act::kSilu) {
        second.grad = grad_residual;
        second.kept = nullptr;
        second.act = Act::kNone;
      }
      launch(scope, shape, backward_kernel<G, false>, second);
    };
    visit_grain<T>(call.shape, x.channels_last,
                   {first.grad, first.x, first.kept, grad_x, grad_residual}, launch_all);
  }
};

}  // namespace

MAGSD_OPERATORS(library) {
  library.impl("batch_norm_act_backward", TORCH_BOX(&norm_backward<Backend>));
}

}  // namespace magsd::MAGSD_ISA::batch_norm_act
