// Multiscale attention: batch norm, ReLU, resampling and the sum over the scales.
// resample_attention is the same without the norm and the ReLU.
//
// Reads every projection twice in training (statistics, then everything else), once in evaluation,
// and writes the sum once; no normalised map is stored. Resizing is separable and runs from tables
// of taps (cpu/axis.h).
//
// Contiguous maps are cut by (image, map), and loops run along rows. Channels last is cut by rows
// of pixels, and loops run along the maps.
#include "cpu/multiscale_attention.h"

#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "common/multiscale_attention_arguments.h"
#include "cpu/batch_statistics.h"
#include "cpu/panel.h"
#include "cpu/parallel.h"

namespace magsd::MAGSD_ISA {
namespace {

template <typename A>
A rectified(A value) {
  return value < 0 ? A{0} : value;  // NaN stays NaN.
}

// line[x] += weight * relu(norm(row[x])), or weight * row[x].
template <typename T, typename A>
void add_line(const T* MAGSD_RESTRICT row, int64_t width, A weight, const Norm<A>* norm, int64_t m,
              A* MAGSD_RESTRICT line) {
  if (norm == nullptr) {
    for (int64_t x = 0; x < width; ++x) line[x] += weight * static_cast<A>(row[x]);
    return;
  }
  const A mean = norm->mean[m], factor = norm->factor[m], bias = norm->bias[m];
  for (int64_t x = 0; x < width; ++x) {
    line[x] += weight * rectified((static_cast<A>(row[x]) - mean) * factor + bias);
  }
}

// The same for the maps of one pixel.
template <int64_t kMaps, typename T, typename A>
void add_normal_pixel(const T* MAGSD_RESTRICT pixel, int64_t count, A weight, const Norm<A>* norm,
                      A* MAGSD_RESTRICT sum) {
  if (norm == nullptr) return add_pixel<kMaps>(pixel, count, weight, sum);
  const int64_t channels = kMaps > 0 ? kMaps : count;
  const A* MAGSD_RESTRICT mean = norm->mean.data();
  const A* MAGSD_RESTRICT factor = norm->factor.data();
  const A* MAGSD_RESTRICT bias = norm->bias.data();
  for (int64_t m = 0; m < channels; ++m) {
    sum[m] += weight * rectified((static_cast<A>(pixel[m]) - mean[m]) * factor[m] + bias[m]);
  }
}

// out (H, W) += the resampled map m of image b.
template <typename T, typename A>
void add_plane(const Scale<T>& scale, int64_t b, int64_t m, A* out, A* line) {
  const T* plane = scale.values + b * scale.steps.step_b + m * scale.steps.step_c;
  const int64_t width = scale.steps.width;
  const Axis<A>&rows = scale.rows, &columns = scale.columns;
  if (scale.identity) return add_line(plane, scale.steps.pixels(), A{1}, scale.norm, m, out);
  for (int64_t y = 0; y < rows.size(); ++y) {
    std::fill(line, line + width, A{0});
    for (int64_t k = 0; k < rows.count(y); ++k) {
      add_line(plane + (rows.first[y] + k) * width, width, rows.weight(y)[k], scale.norm, m, line);
    }
    A* to = out + y * columns.size();
    for (int64_t x = 0; x < columns.size(); ++x) {
      const A* from = line + columns.first[x];
      const A* weights = columns.weight(x);
      A sum = 0;
      for (int64_t k = 0; k < columns.count(x); ++k) sum += weights[k] * from[k];
      to[x] += sum;
    }
  }
}

// out (W, M) += row y of the resampled maps of image b, the maps of a pixel side by side.
template <int64_t kMaps, typename T, typename A>
void add_pixels(const Scale<T>& scale, int64_t b, int64_t y, A* out) {
  const MapSteps& steps = scale.steps;
  const Axis<A>&rows = scale.rows, &columns = scale.columns;
  for (int64_t k = 0; k < rows.count(y); ++k) {
    const T* row =
        scale.values + b * steps.step_b + (rows.first[y] + k) * steps.width * steps.step_p;
    for (int64_t x = 0; x < columns.size(); ++x) {
      for (int64_t i = 0; i < columns.count(x); ++i) {
        const A weight = rows.weight(y)[k] * columns.weight(x)[i];
        add_normal_pixel<kMaps>(row + (columns.first[x] + i) * steps.step_p, steps.channels, weight,
                                scale.norm, out + x * steps.channels);
      }
    }
  }
}

// Sum over the scales of their resampled maps, dense in the memory format of `channels_last`.
template <typename T>
void forward(const std::vector<Scale<T>>& scales, int64_t height, int64_t width, bool channels_last,
             T* to) {
  using A = accumulate_t<T>;
  const MapSteps& steps = scales[0].steps;
  int64_t read = 0, widest = 1;
  for (const auto& scale : scales) {
    read += scale.steps.pixels();
    widest = std::max(widest, scale.steps.width);
  }
  const int64_t maps = steps.channels, pixels = height * width;
  if (!channels_last) {
    parallel_for(steps.batch * maps, 1 + 16384 / read, [&](int64_t begin, int64_t end) {
      Scratch<A> sum(pixels), line(widest);
      for (int64_t i = begin; i < end; ++i) {
        std::fill(sum.get(), sum.get() + pixels, A{0});
        for (const auto& scale : scales) {
          add_plane(scale, i / maps, i % maps, sum.get(), line.get());
        }
        convert(sum.get(), pixels, to + i * pixels);
      }
    });
    return;
  }
  const int64_t grain = 1 + 16384 * height / (read * maps);
  parallel_for(steps.batch * height, grain, [&](int64_t begin, int64_t end) {
    Scratch<A> sum(width * maps);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(sum.get(), sum.get() + width * maps, A{0});
      for (const auto& scale : scales) {
        if (maps == kPublishedMaps) {
          add_pixels<kPublishedMaps>(scale, i / height, i % height, sum.get());
        } else {
          add_pixels<0>(scale, i / height, i % height, sum.get());
        }
      }
      convert(sum.get(), width * maps, to + i * width * maps);
    }
  });
}

// Entry m of a (M,) tensor.
double entry(const Tensor& values, int64_t m) {
  double result = 0;
  visit_floating(values.scalar_type(), [&](auto type) {
    result = static_cast<double>(data<decltype(type)>(values)[m * values.stride(0)]);
  });
  return result;
}

// running <- (1 - momentum) running + momentum value, rounded once.
void update_running(const Tensor& running, int64_t m, double momentum, double value) {
  visit_floating(running.scalar_type(), [&](auto type) {
    using R = decltype(type);
    R* at = mutable_data<R>(running) + m * running.stride(0);
    const double updated = (1 - momentum) * static_cast<double>(*at) + momentum * value;
    *at = static_cast<R>(static_cast<accumulate_t<R>>(updated));
  });
}

// Scales of a forward pass; the maps are brought to the memory format of the first.
template <typename T>
std::vector<Scale<T>> scales_of(const std::vector<FeatureMap>& maps, int64_t height, int64_t width,
                                Resampling mode, bool align_corners) {
  using A = accumulate_t<T>;
  std::vector<Scale<T>> scales;
  for (const FeatureMap& map : maps) {
    Axis<A> rows = resize_axis<A>(map.steps.height, height, mode, align_corners);
    Axis<A> columns = resize_axis<A>(map.steps.width, width, mode, align_corners);
    const bool identity =
        rows.is_identity(map.steps.height) && columns.is_identity(map.steps.width);
    scales.push_back(
        {data<T>(map.tensor), map.steps, nullptr, std::move(rows), std::move(columns), identity});
  }
  return scales;
}

Tensor resample_attention(const std::vector<Tensor>& maps, const std::vector<int64_t>& size,
                          const std::string& resampling, bool align_corners) {
  check_maps(maps, "maps");
  check_size(size);
  const Resampling mode = mode_of(resampling);
  const bool last = is_channels_last(maps[0]);
  const ScalarType dtype = maps[0].scalar_type();
  const Tensor result = empty_map(maps[0].size(0), maps[0].size(1), size[0], size[1], dtype, last);
  if (result.numel() == 0) return result;
  const std::vector<FeatureMap> taken = feature_maps(maps, last);
  visit_floating(dtype, [&](auto type) {
    using T = decltype(type);
    forward<T>(scales_of<T>(taken, size[0], size[1], mode, align_corners), size[0], size[1], last,
               mutable_data<T>(result));
  });
  return result;
}

// The norm of one scale: of the batch, which also updates the running statistics, or of those.
template <typename T>
Norm<accumulate_t<T>> norm_of(const FeatureMap& map, const Tensor& weight, const Tensor& bias,
                              const Tensor& running_mean, const Tensor& running_var, bool of_batch,
                              double momentum, double eps) {
  using A = accumulate_t<T>;
  const int64_t maps = map.steps.channels;
  Norm<A> norm(maps);
  read_parameters(weight, norm.factor);
  read_parameters(bias, norm.bias);
  std::vector<ChannelStatistics> statistics(maps);
  const double count = static_cast<double>(map.steps.batch * map.steps.pixels());
  if (of_batch) statistics = batch_statistics<T>(map);
  for (int64_t m = 0; m < maps; ++m) {
    if (of_batch) {
      const auto [average, variance] = statistics[m];
      update_running(running_mean, m, momentum, average);
      update_running(running_var, m, momentum, variance * count / (count - 1));
    } else {
      statistics[m] = {entry(running_mean, m), entry(running_var, m)};
    }
    norm.mean[m] = static_cast<A>(statistics[m].mean);
    norm.rstd[m] = static_cast<A>(1 / std::sqrt(statistics[m].variance + eps));
    norm.factor[m] *= norm.rstd[m];
  }
  return norm;
}

std::tuple<Tensor, Tensor, Tensor> multiscale_attention(
    const Tensors& projections, const Tensors& weights, const Tensors& biases,
    const Tensors& running_means, const Tensors& running_vars, const std::vector<int64_t>& size,
    bool training, double momentum, double eps, const std::string& resampling, bool align_corners) {
  check_multiscale(projections, weights, biases, running_means, running_vars, size);
  const int64_t batch = projections[0].size(0), maps = projections[0].size(1);
  const Resampling mode = mode_of(resampling);
  const bool last = is_channels_last(projections[0]);
  const ScalarType dtype = projections[0].scalar_type();
  const int64_t count = static_cast<int64_t>(projections.size());
  const Tensor result = empty_map(batch, maps, size[0], size[1], dtype, last);
  const Tensor mean = uninitialized({count, maps}, accumulation_dtype(dtype));
  const Tensor rstd = uninitialized({count, maps}, accumulation_dtype(dtype));
  const std::vector<FeatureMap> taken = feature_maps(projections, last);
  visit_floating(dtype, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    std::vector<Scale<T>> scales = scales_of<T>(taken, size[0], size[1], mode, align_corners);
    std::vector<Norm<A>> norms;
    norms.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      norms.push_back(norm_of<T>(taken[i], weights[i], biases[i], running_means[i], running_vars[i],
                                 training && batch > 0, momentum, eps));
      std::copy(norms[i].mean.begin(), norms[i].mean.end(), mutable_data<A>(mean) + i * maps);
      std::copy(norms[i].rstd.begin(), norms[i].rstd.end(), mutable_data<A>(rstd) + i * maps);
      scales[i].norm = &norms[i];
    }
    if (batch > 0) forward<T>(scales, size[0], size[1], last, mutable_data<T>(result));
  });
  return {result, mean, rstd};
}

}  // namespace
}  // namespace magsd::MAGSD_ISA

MAGSD_OPERATORS(multiscale_attention, library) {
  library.impl("resample_attention", TORCH_BOX(&resample_attention));
  library.impl("multiscale_attention", TORCH_BOX(&multiscale_attention));
}
