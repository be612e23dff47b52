// Multiscale attention, backward: the gradients of every projection, weight and bias.
//
// With dN = [normal > 0] (the gradient resized back) and hat x = (x - mean) rstd, two launches over
// all scales read the projections twice and write their gradients once:
//   sums      a block leaves the sums of dN and dN hat x over its part of a channel; the last of a
//             group of channels adds up the parts, always in the same order. They are the gradients
//             of weight and bias.
//   gradient  writes (dN - (sum dN + hat x sum dN hat x) / count) weight rstd
// An input gathers from the outputs that weigh it, so that nothing is scattered and no resized
// gradient is stored; it finds dN twice, from a gradient that the caches hold.
// resample_attention's backward is the second launch without a norm.
#include <string>
#include <tuple>

#include "cuda/multiscale_attention.h"

namespace magsd::MAGSD_ISA::multiscale_attention {
namespace {

// Sums of dN and of dN hat x over a channel or a part of it.
template <typename A>
struct Sums {
  A plain, centered;
};

constexpr int64_t kMostTaps = 1 << 16;  // that a partition reckons with

template <typename T>
struct BackwardScale {
  MapView<const T> map;
  MapView<T> result;
  ResizeRule rows, columns;
  Partition partition;  // of both launches
  Parameter weight, bias, grad_weight, grad_bias;
  Sums<accumulate_t<T>>* parts;  // (channels, splits)
};

template <typename T>
struct Backward {
  using A = accumulate_t<T>;
  BackwardScale<T> scales[kMostMaps];
  int64_t starts[kMostMaps + 1];
  MapView<const T> grad;
  int64_t channels, groups;
  const A *mean, *rstd;
  Sums<A>* sums;    // (scales, channels)
  Tickets tickets;  // of every scale and group
  bool norm, training;
};

// n = (x - mean) factor + bias, and the gradient of x: dN factor - (offset + (x - mean) slope).
template <typename A>
struct Slope {
  A mean, factor, bias, offset, slope;
};

template <typename T>
__device__ __forceinline__ Slope<accumulate_t<T>> slope_of(const Backward<T>& call, int scale,
                                                           int64_t m) {
  using A = accumulate_t<T>;
  const int64_t at = scale * call.channels + m;
  const A factor = read_parameter<A>(call.scales[scale].weight, m) * call.rstd[at];
  return {call.mean[at], factor, read_parameter<A>(call.scales[scale].bias, m), A{0}, A{0}};
}

// Calls body(pixel, b, count, items, gradient) for every pixel and image of a thread, with the
// values of the projection, if there is one, and the gradient resized back.
template <typename T, bool kLast, typename Body>
__device__ __forceinline__ void for_gradients(const Backward<T>& call,
                                              const BackwardScale<T>& scale, int split,
                                              const ThreadPosition<T, kLast>& position,
                                              const Body& body) {
  using A = accumulate_t<T>;
  const T* values = scale.map.values + position.channel * scale.map.step_c;
  const T* grad = call.grad.values + position.channel * call.grad.step_c;
  const Partition& partition = scale.partition;
  for_pixels(partition, split, position.lane, [&](int64_t pixel, const Images& images) {
    const int64_t y = quotient(pixel, scale.columns.size_in);
    const OutputTaps<A> rows(scale.rows, y);
    const OutputTaps<A> columns(scale.columns, pixel - y * scale.columns.size_in);
    for (int64_t b = images.first; b < images.stop; b += images.step) {
      const int count = items_at(position, partition, b, images.stop);
      A items[Grain<T, kLast>::kItems] = {}, gradient[Grain<T, kLast>::kItems] = {};
      if (call.norm) {
        const T* at = values + b * scale.map.step_b + pixel * scale.map.step_p;
        load_items(scale.map, at, count, items);
      }
      const T* image = grad + b * call.grad.step_b;
      const auto same = [](A value, int) { return value; };
      if (kLast && call.grad.vectorized) {
        gather<true, 1>(call.grad, image, rows, columns, count, gradient, same);
      } else {
        gather<false, 1>(call.grad, image, rows, columns, count, gradient, same);
      }
      body(pixel, b, count, items, gradient);
    }
  });
}

// By a warp: the sums of channel m from its parts, which are the gradients of weight and bias.
template <typename T>
__device__ void leave_sums(const Backward<T>& call, int i, int64_t m) {
  using A = accumulate_t<T>;
  const BackwardScale<T>& scale = call.scales[i];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, splits = scale.partition.splits;
  A plain = 0, centered = 0;
  for (int split = lane; split < splits; split += kWarp) {
    const Sums<A> part = scale.parts[m * splits + split];
    plain += part.plain;
    centered += part.centered;
  }
  plain = warp_sum(plain);
  centered = warp_sum(centered);
  if (lane != 0) return;
  call.sums[i * call.channels + m] = {plain, centered};
  write_parameter(scale.grad_weight, m, static_cast<double>(centered));
  write_parameter(scale.grad_bias, m, static_cast<double>(plain));
}

template <typename T, bool kLast>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sums_kernel(const __grid_constant__ Backward<T> call) {
  using A = accumulate_t<T>;
  using G = Grain<T, kLast>;
  const Share share = share_of(call.starts, call.groups);
  const BackwardScale<T>& scale = call.scales[share.scale];
  const ThreadPosition<T, kLast> position(share.group, call.channels);
  MAGSD_SHARED(Slope<A>, slopes, [G::kChannels]);
  const int64_t m = share.group * G::kChannels + threadIdx.x;
  if (threadIdx.x < G::kChannels && m < call.channels) {
    slopes[threadIdx.x] = slope_of(call, share.scale, m);
  }
  __syncthreads();
  A plain[G::kOwn] = {}, centered[G::kOwn] = {};
  const auto add = [&](int64_t, int64_t, int, const A(&items)[G::kItems],
                       const A(&gradient)[G::kItems]) {
#pragma unroll
    for (int k = 0; k < G::kItems; ++k) {
      const int own = kLast ? k : 0;
      const Slope<A>& slope = slopes[position.own + own];
      const A apart = items[k] - slope.mean;
      const A passed = apart * slope.factor + slope.bias > 0 ? gradient[k] : A{0};
      plain[own] += passed;
      centered[own] += passed * apart;
    }
  };
  if (position.channels > 0) for_gradients(call, scale, share.split, position, add);
  block_sums<G::kLanes>(plain);
  block_sums<G::kLanes>(centered);
  const int splits = scale.partition.splits;
  if (threadIdx.x < G::kLanes) {
#pragma unroll
    for (int k = 0; k < G::kOwn; ++k) {
      if (k >= position.channels) break;
      const int64_t channel = position.channel + k;
      const A rstd = call.rstd[share.scale * call.channels + channel];
      scale.parts[channel * splits + share.split] = {plain[k], centered[k] * rstd};
    }
  }
  if (!is_last_block(call.tickets, share.scale * call.groups + share.group, splits)) return;
  for (int own = static_cast<int>(threadIdx.x) / kWarp; own < G::kChannels; own += kWarps) {
    const int64_t channel = share.group * G::kChannels + own;
    if (channel < call.channels) leave_sums(call, share.scale, channel);
  }
}

// The slope of channel m with what its sums take away.
template <typename T>
__device__ Slope<accumulate_t<T>> slope_with_sums(const Backward<T>& call, int i, int64_t m) {
  using A = accumulate_t<T>;
  const BackwardScale<T>& scale = call.scales[i];
  const int64_t at = i * call.channels + m;
  Slope<A> slope = slope_of(call, i, m);
  if (call.training) {
    // Ioffe and Szegedy 2015: the batch's mean and variance depend on every element.
    const A count = static_cast<A>(scale.partition.batch * scale.partition.pixels);
    slope.offset = call.sums[at].plain / count * slope.factor;
    slope.slope = call.sums[at].centered / count * call.rstd[at] * slope.factor;
  }
  return slope;
}

template <typename T, bool kLast>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradient_kernel(const __grid_constant__ Backward<T> call) {
  using A = accumulate_t<T>;
  using G = Grain<T, kLast>;
  MAGSD_SHARED(Slope<A>, slopes, [G::kChannels]);
  const Share share = share_of(call.starts, call.groups);
  const BackwardScale<T>& scale = call.scales[share.scale];
  const ThreadPosition<T, kLast> position(share.group, call.channels);
  if (call.norm) {
    const int64_t m = share.group * G::kChannels + threadIdx.x;
    if (threadIdx.x < G::kChannels && m < call.channels) {
      slopes[threadIdx.x] = slope_with_sums(call, share.scale, m);
    }
    __syncthreads();
  }
  if (position.channels == 0) return;
  T* results = scale.result.values + position.channel * scale.result.step_c;
  const auto write = [&](int64_t pixel, int64_t b, int count, const A(&items)[G::kItems],
                         A(&gradient)[G::kItems]) {
    if (call.norm) {
#pragma unroll
      for (int k = 0; k < G::kItems; ++k) {
        const Slope<A>& own = slopes[position.own + (kLast ? k : 0)];
        const A apart = items[k] - own.mean;
        const A passed = apart * own.factor + own.bias > 0 ? gradient[k] : A{0};
        gradient[k] = passed * own.factor - (own.offset + apart * own.slope);
      }
    }
    store_items(results + b * scale.result.step_b + pixel * scale.result.step_p,
                scale.result.step_item, count, scale.result.vectorized, gradient);
  };
  for_gradients(call, scale, share.split, position, write);
}

// A call that writes `results`, less what concerns the norms.
template <typename T, bool kLast>
Backward<T> backward_of(const FeatureMap& grad, const Tensors& results, Resampling mode,
                        bool align_corners) {
  using G = Grain<T, kLast>;
  Backward<T> call{};
  call.grad = view_of<kLast>(data<T>(grad.tensor), grad.steps);
  call.channels = grad.steps.channels;
  call.groups = G::groups(call.channels);
  const int64_t batch = grad.steps.batch;
  int64_t whole = 0;
  for (const Tensor& result : results) whole += result.size(2) * result.size(3);
  const int items = kLast ? 1 : images_at_once(G::kItems, batch * whole * call.channels);
  std::vector<Task> tasks;
  for (size_t i = 0; i < results.size(); ++i) {
    BackwardScale<T>& scale = call.scales[i];
    const MapSteps steps = dense_steps(results[i], is_channels_last(results[i]));
    scale.result = view_of<kLast>(mutable_data<T>(results[i]), steps);
    scale.rows = {steps.height, grad.steps.height, mode, align_corners};
    scale.columns = {steps.width, grad.steps.width, mode, align_corners};
    // A value of the map, and as many of the gradient as weigh it.
    const int64_t taps =
        ceil_div(grad.steps.height, steps.height) * ceil_div(grad.steps.width, steps.width);
    const int loads = static_cast<int>(std::min(taps, kMostTaps)) + 1;
    tasks.push_back(
        {steps.pixels(), items, loads * (kLast && !call.grad.vectorized ? G::kOwn : items)});
  }
  const std::vector<Partition> partitions =
      partitions_of(tasks, batch, G::kPixelLanes, call.groups);
  for (size_t i = 0; i < results.size(); ++i) {
    call.scales[i].partition = partitions[i];
    call.starts[i + 1] = call.starts[i] + partitions[i].splits * call.groups;
  }
  return call;
}

template <typename T, bool kLast>
void write_gradients(const DeviceScope& scope, const Backward<T>& call, size_t scales) {
  launch(scope, {grid_of(call.starts[scales]), kThreads}, gradient_kernel<T, kLast>, call);
}

// Both launches; the second has nothing to write where there is no image.
template <typename T, bool kLast>
void write_all_gradients(const DeviceScope& scope, Backward<T> call, size_t scales,
                         ScalarType dtype) {
  using A = accumulate_t<T>;
  static_assert(sizeof(Sums<A>) == 2 * sizeof(A));
  std::vector<Partition> partitions;
  int64_t count = static_cast<int64_t>(scales) * call.channels;
  for (size_t i = 0; i < scales; ++i) {
    partitions.push_back(call.scales[i].partition);
    count += partitions[i].splits * call.channels;
  }
  const Tensor memory = uninitialized({2 * count}, dtype);
  call.sums = static_cast<Sums<A>*>(memory.mutable_data_ptr());
  Sums<A>* parts = call.sums + static_cast<int64_t>(scales) * call.channels;
  for (size_t i = 0; i < scales; ++i) {
    call.scales[i].parts = parts;
    parts += partitions[i].splits * call.channels;
  }
  const TicketBook book = tickets_for(scope, counters_of(partitions, call.groups));
  call.tickets = book.tickets;
  launch(scope, {grid_of(call.starts[scales]), kThreads}, sums_kernel<T, kLast>, call);
  if (call.scales[0].partition.batch > 0) write_gradients<T, kLast>(scope, call, scales);
}

Tensors resample_attention_backward(const Tensor& grad, const std::vector<int64_t>& heights,
                                    const std::vector<int64_t>& widths,
                                    const std::string& resampling, bool align_corners) {
  const DeviceScope scope(grad);
  check_resample_backward(grad, heights, widths);
  const Resampling mode = mode_of(resampling);
  const FeatureMap taken(grad);
  const Tensors results = empty_maps(grad, heights, widths);
  if (grad.numel() == 0) return results;
  visit_layout(grad.scalar_type(), taken.channels_last, [&](auto type, auto layout) {
    using T = decltype(type);
    constexpr bool kLast = decltype(layout)::value;
    write_gradients<T, kLast>(scope, backward_of<T, kLast>(taken, results, mode, align_corners),
                              results.size());
  });
  return results;
}

Gradients multiscale_attention_backward(const Tensor& grad, const Tensors& projections,
                                        const Tensors& weights, const Tensors& biases,
                                        const Tensor& mean, const Tensor& rstd, bool training,
                                        const std::string& resampling, bool align_corners) {
  const DeviceScope scope(grad);
  check_multiscale_backward(grad, projections, weights, biases, mean, rstd);
  const Resampling mode = mode_of(resampling);
  const bool last = is_channels_last(projections[0]);
  const FeatureMap taken_grad(grad, last);
  const std::vector<FeatureMap> taken = feature_maps(projections, last);
  const Tensor dense_mean = dense(mean), dense_rstd = dense(rstd);
  const ScalarType dtype = grad.scalar_type();
  const Gradients results = empty_gradients(projections, weights, biases);
  const int64_t scales = static_cast<int64_t>(projections.size());
  visit_layout(dtype, last, [&](auto type, auto layout) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    constexpr bool kLast = decltype(layout)::value;
    Backward<T> call = backward_of<T, kLast>(taken_grad, std::get<0>(results), mode, align_corners);
    call.norm = true;
    call.training = training;
    call.mean = data<A>(dense_mean);
    call.rstd = data<A>(dense_rstd);
    for (int64_t i = 0; i < scales; ++i) {
      BackwardScale<T>& scale = call.scales[i];
      scale.map = view_of<kLast>(data<T>(taken[i].tensor), taken[i].steps);
      scale.weight = parameter_of(weights[i]);
      scale.bias = parameter_of(biases[i]);
      scale.grad_weight = parameter_of(std::get<1>(results)[i], true);
      scale.grad_bias = parameter_of(std::get<2>(results)[i], true);
    }
    write_all_gradients<T, kLast>(scope, call, projections.size(), accumulation_dtype(dtype));
  });
  return results;
}

}  // namespace

MAGSD_OPERATORS(library) {
  library.impl("resample_attention_backward", TORCH_BOX(&resample_attention_backward));
  library.impl("multiscale_attention_backward", TORCH_BOX(&multiscale_attention_backward));
}

}  // namespace magsd::MAGSD_ISA::multiscale_attention
