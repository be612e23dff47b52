// Multiscale attention, forward: batch norm, ReLU, resampling and the sum over the scales.
// resample_attention is the same without the norm and the ReLU.
//
// Training reads every projection twice and writes the sum once, in two launches over all scales:
//   statistics  of every channel, and the running ones (multiscale_attention_statistics.h)
//   apply       every output gathers, normalizes and adds what it weighs
// Evaluation and resample_attention are the second launch alone. No normalized map is stored. What
// an output weighs is found once a block for every row and column of outputs; where these are more
// than two a thread, once for every pixel of a thread. Images and channels share it.
#include <cmath>
#include <limits>
#include <string>
#include <tuple>

#include "cuda/multiscale_attention.h"
#include "cuda/multiscale_attention_statistics.h"

namespace magsd::MAGSD_ISA::multiscale_attention {
namespace {

template <typename T>
struct ForwardScale {
  MapView<const T> map;
  ResizeRule rows, columns;
  Parameter weight, bias, running_mean, running_var;
};

constexpr int kMostTaps = 2 * kThreads;  // of a scale: a row's and a column's for every thread

template <typename T>
struct Forward {
  using A = accumulate_t<T>;
  ForwardScale<T> scales[kMostMaps];
  MapView<T> result;
  Partition partition;
  int64_t channels, groups, height, width;
  A *mean, *rstd;  // (scales, channels), in training as the statistics left them
  A eps;
  int count;  // of scales
  int taps;   // kept of a scale
  bool norm, training;

  // Whether a block keeps the taps of all rows and columns, not those of its threads' pixels.
  MAGSD_HD bool of_all() const { return height + width <= kMostTaps; }
};

// relu(norm(x)) = max((x - mean) factor + bias, 0).
template <typename A>
struct Norm {
  A mean, factor, bias;
};

// The norm of channel m of scale i; `writes` has it leave, in evaluation, what the backward needs.
template <typename T>
__device__ Norm<accumulate_t<T>> norm_of(const Forward<T>& call, int i, int64_t m, bool writes) {
  using A = accumulate_t<T>;
  const ForwardScale<T>& scale = call.scales[i];
  const int64_t at = i * call.channels + m;
  A mean, rstd;
  if (call.training) {
    mean = call.mean[at];
    rstd = call.rstd[at];
  } else {
    mean = read_parameter<A>(scale.running_mean, m);
    rstd = A{1} / std::sqrt(read_parameter<A>(scale.running_var, m) + call.eps);
    if (writes) {
      call.mean[at] = mean;
      call.rstd[at] = rstd;
    }
  }
  return {mean, read_parameter<A>(scale.weight, m) * rstd, read_parameter<A>(scale.bias, m)};
}

template <typename T, bool kLast>
__global__ void __launch_bounds__(kThreads, kBlocks)
    apply_kernel(const __grid_constant__ Forward<T> call) {
  using A = accumulate_t<T>;
  using G = Grain<T, kLast>;
  MAGSD_SHARED(Norm<A>, norms, [kMostMaps][G::kChannels]);
  MAGSD_DYNAMIC_SHARED(InputTaps<A>, taps);  // (scales, call.taps): rows, then columns
  const int64_t split = quotient(blockIdx.x, call.groups);
  const int64_t group = blockIdx.x - split * call.groups;
  const ThreadPosition<T, kLast> position(group, call.channels);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < call.count * G::kChannels; i += kThreads) {
    const int scale = i / G::kChannels, own = i % G::kChannels;
    const int64_t m = group * G::kChannels + own;
    Norm<A> norm{0, 1, 0};
    if (call.norm && m < call.channels) norm = norm_of(call, scale, m, split == 0);
    norms[scale][own] = norm;
  }
  if (call.of_all()) {
    const int rows = static_cast<int>(call.height);
    for (int i = thread; i < call.count * call.taps; i += kThreads) {
      const int at = i % call.taps;
      const ForwardScale<T>& scale = call.scales[i / call.taps];
      taps[i] = at < rows ? InputTaps<A>(scale.rows, at) : InputTaps<A>(scale.columns, at - rows);
    }
  }
  __syncthreads();
  if (position.channels == 0) return;
  const A least = call.norm ? A{0} : -std::numeric_limits<A>::infinity();
  const auto write = [&](int64_t pixel, const Images& images) {
    const int64_t y = quotient(pixel, call.width), x = pixel - y * call.width;
    int row = static_cast<int>(y), column = static_cast<int>(call.height + x);
    if (!call.of_all()) {
      row = thread;
      column = kThreads + thread;
      for (int i = 0; i < call.count; ++i) {
        taps[i * kMostTaps + row] = InputTaps<A>(call.scales[i].rows, y);
        taps[i * kMostTaps + column] = InputTaps<A>(call.scales[i].columns, x);
      }
    }
    for (int64_t b = images.first; b < images.stop; b += images.step) {
      const int count = items_at(position, call.partition, b, images.stop);
      A sum[G::kItems] = {};
      for (int i = 0; i < call.count; ++i) {
        const ForwardScale<T>& scale = call.scales[i];
        Norm<A> own[G::kOwn];
#pragma unroll
        for (int k = 0; k < G::kOwn; ++k) own[k] = norms[i][position.own + k];
        const T* image =
            scale.map.values + b * scale.map.step_b + position.channel * scale.map.step_c;
        const auto normal = [&](A value, int k) {
          const Norm<A>& norm = own[kLast ? k : 0];
          const A result = (value - norm.mean) * norm.factor + norm.bias;
          return result < least ? least : result;  // NaN stays NaN.
        };
        const InputTaps<A> rows = taps[i * call.taps + row], columns = taps[i * call.taps + column];
        if (kLast && scale.map.vectorized) {
          gather<true, 2>(scale.map, image, rows, columns, count, sum, normal);
        } else {
          gather<false, 2>(scale.map, image, rows, columns, count, sum, normal);
        }
      }
      T* to = call.result.values + b * call.result.step_b + pixel * call.result.step_p +
              position.channel * call.result.step_c;
      store_items(to, call.result.step_item, count, call.result.vectorized, sum);
    }
  };
  for_pixels(call.partition, static_cast<int>(split), position.lane, write);
}

// A call less what concerns the norms.
template <typename T, bool kLast>
Forward<T> forward_of(const std::vector<FeatureMap>& maps, const Tensor& result, Resampling mode,
                      bool align_corners) {
  using G = Grain<T, kLast>;
  Forward<T> call{};
  const int64_t batch = result.size(0), height = result.size(2), width = result.size(3);
  call.channels = result.size(1);
  call.groups = G::groups(call.channels);
  call.height = height;
  call.width = width;
  call.count = static_cast<int>(maps.size());
  call.taps = call.of_all() ? static_cast<int>(height + width) : kMostTaps;
  call.result = view_of<kLast>(mutable_data<T>(result), dense_steps(result, kLast));
  const int items = kLast ? 1 : images_at_once(G::kItems, result.numel());
  call.partition =
      partitions_of({{height * width, items, 1}}, batch, G::kPixelLanes, call.groups)[0];
  for (size_t i = 0; i < maps.size(); ++i) {
    const MapSteps& steps = maps[i].steps;
    call.scales[i].map = view_of<kLast>(data<T>(maps[i].tensor), steps);
    call.scales[i].rows = {steps.height, height, mode, align_corners};
    call.scales[i].columns = {steps.width, width, mode, align_corners};
  }
  return call;
}

template <typename T, bool kLast>
void apply(const DeviceScope& scope, const Forward<T>& call) {
  const size_t shared = sizeof(InputTaps<accumulate_t<T>>) * call.count * call.taps;
  launch(scope, {grid_of(call.partition.splits * call.groups), kThreads, shared},
         apply_kernel<T, kLast>, call);
}

Tensor resample_attention(const Tensors& maps, const std::vector<int64_t>& size,
                          const std::string& resampling, bool align_corners) {
  const DeviceScope scope(first_of(maps, "maps"));
  check_maps(maps, "maps");
  check_size(size);
  const Resampling mode = mode_of(resampling);
  const bool last = is_channels_last(maps[0]);
  const ScalarType dtype = maps[0].scalar_type();
  const Tensor result = empty_attention(maps, size);
  if (result.numel() == 0) return result;
  const std::vector<FeatureMap> taken = feature_maps(maps, last);
  visit_layout(dtype, last, [&](auto type, auto layout) {
    using T = decltype(type);
    constexpr bool kLast = decltype(layout)::value;
    apply<T, kLast>(scope, forward_of<T, kLast>(taken, result, mode, align_corners));
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> multiscale_attention(
    const Tensors& projections, const Tensors& weights, const Tensors& biases,
    const Tensors& running_means, const Tensors& running_vars, const std::vector<int64_t>& size,
    bool training, double momentum, double eps, const std::string& resampling, bool align_corners) {
  const DeviceScope scope(first_of(projections, "projections"));
  check_multiscale(projections, weights, biases, running_means, running_vars, size);
  const Resampling mode = mode_of(resampling);
  const int64_t batch = projections[0].size(0);
  const bool last = is_channels_last(projections[0]);
  const ScalarType dtype = projections[0].scalar_type();
  const int64_t scales = static_cast<int64_t>(projections.size());
  const ForwardResults results(projections, size);
  const std::vector<FeatureMap> taken = feature_maps(projections, last);
  const bool of_batch = training && batch > 0;
  visit_layout(dtype, last, [&](auto type, auto layout) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    constexpr bool kLast = decltype(layout)::value;
    Forward<T> call = forward_of<T, kLast>(taken, results.attention, mode, align_corners);
    Statistics<T> statistics{};
    call.norm = true;
    call.training = of_batch;
    call.eps = statistics.eps = static_cast<A>(eps);
    call.mean = statistics.mean = mutable_data<A>(results.mean);
    call.rstd = statistics.rstd = mutable_data<A>(results.rstd);
    statistics.momentum = momentum;
    for (int64_t i = 0; i < scales; ++i) {
      ForwardScale<T>& scale = call.scales[i];
      scale.weight = parameter_of(weights[i]);
      scale.bias = parameter_of(biases[i]);
      scale.running_mean = parameter_of(running_means[i], of_batch);
      scale.running_var = parameter_of(running_vars[i], of_batch);
      statistics.scales[i].running_mean = scale.running_mean;
      statistics.scales[i].running_var = scale.running_var;
    }
    if (of_batch) take_statistics<T, kLast>(scope, taken, statistics);
    apply<T, kLast>(scope, call);
  });
  return {results.attention, results.mean, results.rstd};
}

}  // namespace

MAGSD_OPERATORS(library) {
  library.impl("resample_attention", TORCH_BOX(&resample_attention));
  library.impl("multiscale_attention", TORCH_BOX(&multiscale_attention));
}

}  // namespace magsd::MAGSD_ISA::multiscale_attention
