// Batch norm, residual and activation, forward.
//
// Training reads x twice and the residual once and writes the result, in two launches:
//   statistics  a block leaves the sums of a part of its channels; the last block of a range of
//               channels makes of all parts the mean, rstd and running statistics of every group
//   apply       normalizes, adds the residual, activates. It goes through the map from the end, of
//               which the L2 still holds most.
// Evaluation, and an empty batch, is the second launch alone. So training moves 3 values an
// element, 4 with a residual, and evaluation 2 or 3.
//
// Statistics: a thread adds up differences from a value that it meets, a median, lest one far off
// is taken; the threads of a warp merge by the formula of Chan et al. 1983; beyond, sums of
// differences from the channel's pivot, the median of three values of the group, run in double. All
// in a fixed order: neither a large common mean nor a value far off takes the others' digits.
#include <optional>

#include "cuda/batch_norm_act.h"
#include "cuda/batch_norm_act_sums.h"

namespace magsd::MAGSD_ISA::batch_norm_act {
namespace {

template <typename T>
struct Statistics {
  using A = accumulate_t<T>;
  Partition partition;
  const T* x;
  int64_t samples[3];  // of a channel, from its first value in a group
  A *mean, *rstd;      // (groups, C)
  Parameter<T> running_mean, running_var;
  Pair* parts;
  Tickets tickets;
  double momentum;
  A eps;
};

template <typename A>
__device__ __forceinline__ A median(A a, A b, A c) {
  const A lower = a < b ? a : b, upper = a < b ? b : a;
  return c < lower ? lower : (c > upper ? upper : c);
}

// Of some values of kOwn channels: how many, their mean, the squared differences from it.
template <typename A, int kOwn>
struct Moments {
  A count, mean[kOwn], squares[kOwn];

  // Merges those of the lanes of a warp that have the same place among `lanes` lanes.
  __device__ __forceinline__ void merge_warp(int lanes) {
#pragma unroll
    for (int step = kWarp / 2; step >= 1; step /= 2) {
      if (step < lanes) break;
      const A others = __shfl_xor_sync(kAllLanes, count, step), total = count + others;
      const A share = total > 0 ? others / total : A{0}, weight = count * share;
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        const A apart = __shfl_xor_sync(kAllLanes, mean[k], step) - mean[k];
        squares[k] += __shfl_xor_sync(kAllLanes, squares[k], step) + apart * apart * weight;
        mean[k] += apart * share;
      }
      count = total;
    }
  }
};

template <typename G>
__device__ __forceinline__ void leave_statistics(const Statistics<typename G::T>& call,
                                                 int64_t range) {
  using A = typename G::A;
  const Partition& p = call.partition;
  const Totals<G> totals(p, range);
  const int64_t channel = totals.channel;
  double mean = 0, variance = 0;  // the running ones
  if (totals.is_finisher()) {
    mean = static_cast<double>(call.running_mean[channel]);
    variance = static_cast<double>(call.running_var[channel]);
  }
  const double each = 1 / p.count, unbiased = p.count / (p.count - 1);
  const auto updated = [&](const Parameter<typename G::T>& running, double old, double value) {
    return running.rounded((1 - call.momentum) * old + call.momentum * value);
  };
  const auto pivot_of = [&](int group) {
    const auto* x = call.x + group * p.group_values + channel_start<G>(p, channel);
    return median(upcast(x[call.samples[0]]), upcast(x[call.samples[1]]),
                  upcast(x[call.samples[2]]));
  };
  totals.visit(call.parts, pivot_of, [&](int group, A pivot, const Pair& sums) {
    const double apart = sums.first * each;
    double spread = (sums.second - sums.first * apart) * each;
    if (spread < 0) spread = 0;  // NaN stays NaN.
    const double center = static_cast<double>(pivot) + apart;
    const int64_t at = group * p.channels + channel;
    call.mean[at] = static_cast<A>(center);
    call.rstd[at] = A{1} / std::sqrt(static_cast<A>(spread) + call.eps);
    mean = updated(call.running_mean, mean, center);
    variance = updated(call.running_var, variance, spread * unbiased);
  });
  if (!totals.is_finisher()) return;
  call.running_mean.set(channel, mean);
  call.running_var.set(channel, variance);
}

template <typename G>
__global__ void __launch_bounds__(kThreads, 1)
    statistics_kernel(const __grid_constant__ Statistics<typename G::T> call) {
  using T = typename G::T;
  using A = typename G::A;
  constexpr int kUnroll = 8;
  const Partition& p = call.partition;
  const Place<G> place(p);
  Raw<G> raw[kUnroll] = {}, samples[3] = {};
  if (place.exists) {
    const T* x = call.x + place.group_start + channel_start<G>(p, place.channel);
#pragma unroll
    for (int i = 0; i < 3; ++i) samples[i] = load_raw<G>(x + call.samples[i]);
  }
  A pivot[G::kOwn], shift[G::kOwn] = {}, sum[G::kOwn] = {}, squares[G::kOwn] = {};
  const auto prepare = [&] {
    A first[G::kItems], second[G::kItems], a[G::kItems], b[G::kItems], c[G::kItems];
    unpack<G>(raw[0], first);
    unpack<G>(raw[1], second);
    unpack<G>(samples[0], a);
    unpack<G>(samples[1], b);
    unpack<G>(samples[2], c);
#pragma unroll
    for (int k = 0; k < G::kOwn; ++k) {
      pivot[k] = median(a[k], b[k], c[k]);
      shift[k] = place.turns > 1 ? median(first[k], second[k], pivot[k]) : first[k];
    }
  };
  const auto load = [&](int u, int64_t offset) { raw[u] = load_raw<G>(call.x + offset); };
  for_positions<G, kUnroll, false>(p, place, prepare, load, [&](int u, int64_t) {
    A values[G::kItems];
    unpack<G>(raw[u], values);
#pragma unroll
    for (int k = 0; k < G::kItems; ++k) {
      const int own = G::kLast ? k : 0;
      const A apart = values[k] - shift[own];
      sum[own] += apart;
      squares[own] += apart * apart;
    }
  });
  Moments<A, G::kOwn> moments;
  moments.count = static_cast<A>(int64_t{place.turns} * (G::kLast ? 1 : G::kItems));
  const A each = place.turns > 0 ? A{1} / moments.count : A{0};
#pragma unroll
  for (int k = 0; k < G::kOwn; ++k) {
    const A mean = sum[k] * each;
    moments.mean[k] = place.turns > 0 ? shift[k] - pivot[k] + mean : A{0};
    moments.squares[k] = squares[k] - sum[k] * mean;
  }
  moments.merge_warp(G::kLanes);
  Pair pairs[G::kOwn];
#pragma unroll
  for (int k = 0; k < G::kOwn; ++k) {
    const double mean = static_cast<double>(moments.mean[k]);
    const double plain = static_cast<double>(moments.count) * mean;
    pairs[k] = {plain, static_cast<double>(moments.squares[k]) + plain * mean};
  }
  leave_part(p, place, pairs, call.parts);
  if (is_last_block(call.tickets, place.range, p.parts())) leave_statistics<G>(call, place.range);
}

// A first, a middle and a last position of a channel.
template <typename G>
void choose_samples(const Partition& p, int64_t (&samples)[3]) {
  const int64_t places[3] = {0, p.positions / 2, p.positions - 1};
  for (int i = 0; i < 3; ++i) {
    samples[i] = G::kLast ? places[i] * p.channels
                          : places[i] / p.per_plane * p.image + places[i] % p.per_plane * G::kItems;
  }
}

template <typename T>
struct Apply {
  using A = accumulate_t<T>;
  Partition partition;
  const T *x, *residual;  // null: none
  T* output;
  A *mean, *rstd;  // read where of_batch, else written
  Parameter<T> weight, bias, running_mean, running_var;
  A eps;
  Act act;
  bool of_batch;
};

template <typename G>
__device__ Norm<typename G::A> norm_of(const Apply<typename G::T>& call, const Place<G>& place,
                                       int64_t channel) {
  using A = typename G::A;
  const int64_t at = place.group * call.partition.channels + channel;
  A mean, rstd;
  if (call.of_batch) {
    mean = call.mean[at];
    rstd = call.rstd[at];
  } else {
    mean = call.running_mean[channel];
    rstd = A{1} / std::sqrt(call.running_var[channel] + call.eps);
    if (place.split == 0) {
      call.mean[at] = mean;
      call.rstd[at] = rstd;
    }
  }
  return {mean, call.weight[channel] * rstd, call.bias[channel]};
}

// The branches lie outside the loops: all threads take the same one.
template <typename G>
__device__ __forceinline__ void activate(Act act, typename G::A (&z)[G::kItems]) {
  if (act == Act::kRelu) {
#pragma unroll
    for (int k = 0; k < G::kItems; ++k) z[k] = z[k] <= 0 ? 0 : z[k];  // NaN stays NaN.
  } else if (act == Act::kSilu) {
    using T = typename G::T;
#pragma unroll
    for (int k = 0; k < G::kItems; ++k) z[k] = divided<T>(z[k], one_and_exp<T>(z[k]));
  }
}

template <typename G, bool kResidual>
__device__ __forceinline__ void apply(const Apply<typename G::T>& call,
                                      Norm<typename G::A> (&norms)[G::kChannels]) {
  using A = typename G::A;
  constexpr int kUnroll = kResidual && G::kBytes == 16 ? 4 : 8;
  const Partition& p = call.partition;
  const Place<G> place(p);
  Norm<A> own[G::kOwn] = {};
  const auto prepare = [&] {
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t channel = place.range * p.block_channels + thread;
    if (thread < p.block_channels && channel < p.channels) {
      norms[thread] = norm_of<G>(call, place, channel);
    }
    __syncthreads();
    if (!place.exists) return;
#pragma unroll
    for (int k = 0; k < G::kOwn; ++k) own[k] = norms[place.own + k];
  };
  Raw<G> raw[kUnroll] = {}, raw_residual[kUnroll] = {};
  const auto load = [&](int u, int64_t offset) {
    raw[u] = load_raw<G>(call.x + offset);
    if constexpr (kResidual) raw_residual[u] = load_raw<G>(call.residual + offset);
  };
  for_positions<G, kUnroll, true>(p, place, prepare, load, [&](int u, int64_t offset) {
    A z[G::kItems];
    unpack<G>(raw[u], z);
#pragma unroll
    for (int k = 0; k < G::kItems; ++k) z[k] = own[G::kLast ? k : 0](z[k]);
    if constexpr (kResidual) {
      A residual[G::kItems];
      unpack<G>(raw_residual[u], residual);
#pragma unroll
      for (int k = 0; k < G::kItems; ++k) z[k] += residual[k];
    }
    activate<G>(call.act, z);
    store<G>(call.output + offset, z);
  });
}

template <typename G>
__global__ void __launch_bounds__(kThreads, 1)
    apply_kernel(const __grid_constant__ Apply<typename G::T> call) {
  MAGSD_SHARED(Norm<typename G::A>, norms, [G::kChannels]);
  if (call.residual != nullptr) {
    apply<G, true>(call, norms);
  } else {
    apply<G, false>(call, norms);
  }
}

struct Backend {
  template <typename T>
  static void forward(const DeviceScope& scope, const NormForward& call) {
    using A = accumulate_t<T>;
    const FeatureMap x = dense_map(call.x);
    std::optional<FeatureMap> residual;
    if (call.residual.has_value()) residual = dense_map(*call.residual);
    Apply<T> apply{};
    apply.x = data<T>(x.tensor);
    apply.residual = residual.has_value() ? data<T>(residual->tensor) : nullptr;
    apply.output = mutable_data<T>(call.output);
    apply.mean = mutable_data<A>(call.mean);
    apply.rstd = mutable_data<A>(call.rstd);
    apply.weight = parameter_of<T>(call.weight);
    apply.bias = parameter_of<T>(call.bias);
    apply.running_mean = parameter_of<T>(call.running_mean, call.of_batch);
    apply.running_var = parameter_of<T>(call.running_var, call.of_batch);
    apply.eps = static_cast<A>(call.eps);
    apply.act = call.act;
    apply.of_batch = call.of_batch;
    const auto launch_all = [&](auto grain) {
      using G = decltype(grain);
      apply.partition = partition_of<G>(call.shape);
      const LaunchShape shape{grid_of(apply.partition.blocks()), kThreads};
      if (call.of_batch) {
        const Tensor parts = parts_of(apply.partition);
        const TicketBook book = tickets_of(scope, apply.partition);
        Statistics<T> statistics{apply.partition,
                                 apply.x,
                                 {},
                                 apply.mean,
                                 apply.rstd,
                                 apply.running_mean,
                                 apply.running_var,
                                 static_cast<Pair*>(parts.mutable_data_ptr()),
                                 book.tickets,
                                 call.momentum,
                                 apply.eps};
        choose_samples<G>(apply.partition, statistics.samples);
        launch(scope, shape, statistics_kernel<G>, statistics);
      }
      launch(scope, shape, apply_kernel<G>, apply);
    };
    visit_grain<T>(call.shape, x.channels_last, {apply.x, apply.residual, apply.output},
                   launch_all);
  }
};

}  // namespace

MAGSD_OPERATORS(library) { library.impl("batch_norm_act", TORCH_BOX(&norm_forward<Backend>)); }

}  // namespace magsd::MAGSD_ISA::batch_norm_act
