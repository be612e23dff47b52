// Multiscale attention: batch norm, ReLU, resampling and the sum over the scales.
// resample_attention is the same without the norm and the ReLU.
//
// Reads every projection once from memory, and in training once or twice more from the cache
// (statistics, then everything else), and writes the sum once; no normalized map is stored.
// Resizing is separable and runs from tables of taps (cpu/axis.h), average pooling by whole ratios
// without any (cpu/cell_sums.h).
//
// Contiguous maps are split by map, or by (image, map) where nothing but the map itself is asked
// for, and loops run along rows. Channels last is split by rows of pixels, and loops run along the
// maps.
#include "cpu/multiscale_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/multiscale_attention_arguments.h"
#include "cpu/batch_statistics.h"
#include "cpu/panel.h"
#include "cpu/parallel.h"

namespace magsd::MAGSD_ISA::multiscale_attention {
namespace {

// What is pooled of a pixel: relu(norm(x)) of one map. Takes a vector or a single value.
template <typename A>
struct Rectified {
  A mean, factor, bias;

  Rectified(const Norm<A>& norm, int64_t m)
      : mean(norm.mean[m]), factor(norm.factor[m]), bias(norm.bias[m]) {}

  template <typename V>
  MAGSD_HD V operator()(const V& x) const {
    const V normal = (x - mean) * factor + bias;
    return normal < A{0} ? V{} : normal;  // NaN stays NaN.
  }
};

// The same for resample_attention.
struct Itself {
  template <typename V>
  MAGSD_HD V operator()(const V& x) const {
    return x;
  }
};

// line[x] += weight * each(row[x])
template <typename A, typename Each>
void add_line(const A* MAGSD_RESTRICT row, int64_t width, A weight, const Each& each,
              A* MAGSD_RESTRICT line) {
  for (int64_t x = 0; x < width; ++x) line[x] += weight * each(row[x]);
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
    const A normal = (static_cast<A>(pixel[m]) - mean[m]) * factor[m] + bias[m];
    sum[m] += weight * (normal < 0 ? A{0} : normal);
  }
}

// out[x] (+)= weight * each(row[x])
template <typename A, typename Each>
void put_line(const A* row, int64_t count, A weight, const Each& each, bool add, A* out) {
  if (add) return add_line(row, count, weight, each, out);
  using Vector = VectorOf<A, kVectorBytes>;
  typename Vector::type value;
  constexpr int64_t kWidth = kLanes<A>;
  for (int64_t next = 0; count >= kWidth && next < count; next += kWidth) {
    const int64_t x = std::min(next, count - kWidth);  // the last overlaps the one before
    Vector::load(row + x, value);
    Vector::store(out + x, weight * each(value));
  }
  for (int64_t x = 0; count < kWidth && x < count; ++x) out[x] = weight * each(row[x]);
}

// Memory that a task uses again from plane to plane.
template <typename T>
struct PlaneBuffers {
  using A = accumulate_t<T>;
  Scratch<A> sum, acc, first, second;

  PlaneBuffers(int64_t result, int64_t largest)
      : sum(std::is_same_v<T, A> ? 0 : result),
        acc(std::is_same_v<T, A> ? 0 : largest),
        first(largest),
        second(largest) {}
};

// out (H, W) (+)= a plane of a scale, resampled.
template <typename T, typename A, typename Each>
void put_plane(const Scale<T>& scale, const T* values, const Each& each,
               const PlaneBuffers<T>& buffers, bool add, A* out) {
  const int64_t width = scale.steps.width;
  const A* plane = upcast_row(values, scale.steps.pixels(), buffers.acc.get());
  if (scale.identity) return put_line(plane, scale.steps.pixels(), A{1}, each, add, out);
  if (scale.cells.whole()) {
    const Cells& cells = scale.cells;
    const Ahead next = Ahead::of(values + scale.steps.pixels(), scale.steps.pixels());
    const A* sums = cell_sums(plane, cells, each, buffers.first.get(), buffers.second.get(), next);
    const A share = A{1} / static_cast<A>(cells.size());
    return put_line(sums, cells.count(), share, Itself{}, add, out);
  }
  const Axis<A>&rows = scale.rows, &columns = scale.columns;
  A* line = buffers.first.get();
  if (!add) std::fill(out, out + rows.size() * columns.size(), A{0});
  for (int64_t y = 0; y < rows.size(); ++y) {
    std::fill(line, line + width, A{0});
    for (int64_t k = 0; k < rows.count(y); ++k) {
      add_line(plane + (rows.first[y] + k) * width, width, rows.weight(y)[k], each, line);
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

// to (H, W) = the sum over the scales of map m of image b, resampled.
template <typename T>
void make_plane(const std::vector<Scale<T>>& scales, int64_t b, int64_t m, int64_t pixels,
                const PlaneBuffers<T>& buffers, T* to) {
  using A = accumulate_t<T>;
  A* sum;
  if constexpr (std::is_same_v<T, A>) {
    sum = to;
  } else {
    sum = buffers.sum.get();
  }
  for (const auto& scale : scales) {
    const T* values = scale.values + b * scale.steps.step_b + m * scale.steps.step_c;
    const bool add = &scale != scales.data();
    if (scale.norm == nullptr) {
      put_plane(scale, values, Itself{}, buffers, add, sum);
    } else {
      put_plane(scale, values, Rectified<A>(*scale.norm, m), buffers, add, sum);
    }
  }
  if constexpr (!std::is_same_v<T, A>) store_row<T>(sum, pixels, to);
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

// The sum of contiguous maps. `prepare(m)` finds the norms of map m, if they are of this batch:
// with maps enough for every thread in the task that then pools the map, which it left in the
// cache.
template <typename T, typename Prepare>
void contiguous_forward(const std::vector<Scale<T>>& scales, int64_t pixels, bool of_batch,
                        const Prepare& prepare, T* to) {
  int64_t read = 0, largest = 1;
  for (const auto& scale : scales) {
    read += scale.steps.pixels();
    largest = std::max(largest, scale.steps.pixels());
  }
  const int64_t maps = scales[0].steps.channels, batch = scales[0].steps.batch;
  const int64_t grain = 1 + 16384 / read, map_grain = 1 + 16384 / (read * batch);
  const auto make = [&](int64_t b, int64_t m, const PlaneBuffers<T>& buffers) {
    make_plane(scales, b, m, pixels, buffers, to + (b * maps + m) * pixels);
  };
  if (of_batch && maps >= 2 * static_cast<int64_t>(torch::stable::get_num_threads())) {
    parallel_for(maps, map_grain, [&](int64_t begin, int64_t end) {
      const PlaneBuffers<T> buffers(pixels, largest);
      for (int64_t m = begin; m < end; ++m) {
        prepare(m);
        for (int64_t b = 0; b < batch; ++b) make(b, m, buffers);
      }
    });
    return;
  }
  if (of_batch) {
    parallel_for(maps, map_grain, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) prepare(m);
    });
  }
  parallel_for(batch * maps, grain, [&](int64_t begin, int64_t end) {
    const PlaneBuffers<T> buffers(pixels, largest);
    for (int64_t i = begin; i < end; ++i) make(i / maps, i % maps, buffers);
  });
}

// The sum of maps in channels last.
template <typename T>
void channels_last_forward(const std::vector<Scale<T>>& scales, int64_t height, int64_t width,
                           T* to) {
  using A = accumulate_t<T>;
  const MapSteps& steps = scales[0].steps;
  const int64_t maps = steps.channels;
  int64_t read = 0;
  for (const auto& scale : scales) read += scale.steps.pixels();
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

// Scales of a forward pass; the maps are brought to the memory format of the first.
template <typename T>
std::vector<Scale<T>> scales_of(const std::vector<FeatureMap>& maps, int64_t height, int64_t width,
                                Resampling mode, bool align_corners) {
  using A = accumulate_t<T>;
  std::vector<Scale<T>> scales;
  scales.reserve(maps.size());
  for (const FeatureMap& map : maps) {
    const MapSteps& steps = map.steps;
    Scale<T> scale{};
    scale.values = data<T>(map.tensor);
    scale.steps = steps;
    scale.identity = steps.height == height && steps.width == width;
    if (mode == Resampling::kArea && !map.channels_last) {
      scale.cells = Cells::between(steps.height, steps.width, height, width);
    }
    if (!scale.cells.whole()) {
      scale.rows = resize_axis<A>(steps.height, height, mode, align_corners);
      scale.columns = resize_axis<A>(steps.width, width, mode, align_corners);
    }
    scales.push_back(std::move(scale));
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
  const Tensor result = empty_attention(maps, size);
  if (result.numel() == 0) return result;
  const std::vector<FeatureMap> taken = feature_maps(maps, last);
  visit_floating(dtype, [&](auto type) {
    using T = decltype(type);
    const auto scales = scales_of<T>(taken, size[0], size[1], mode, align_corners);
    T* to = mutable_data<T>(result);
    if (last) return channels_last_forward<T>(scales, size[0], size[1], to);
    contiguous_forward<T>(scales, size[0] * size[1], false, [](int64_t) {}, to);
  });
  return result;
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
  const ForwardResults results(projections, size);
  const std::vector<FeatureMap> taken = feature_maps(projections, last);
  visit_floating(dtype, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    std::vector<Scale<T>> scales = scales_of<T>(taken, size[0], size[1], mode, align_corners);
    std::vector<Norm<A>> norms(count, Norm<A>(maps));
    const std::vector<Entries> means(running_means.begin(), running_means.end());
    const std::vector<Entries> vars(running_vars.begin(), running_vars.end());
    A* const mean = mutable_data<A>(results.mean);
    A* const rstd = mutable_data<A>(results.rstd);
    const auto set = [&](int64_t i, int64_t m, const ChannelStatistics& statistics) {
      Norm<A>& norm = norms[i];
      norm.mean[m] = static_cast<A>(statistics.mean);
      norm.rstd[m] = static_cast<A>(1 / std::sqrt(statistics.variance + eps));
      norm.factor[m] *= norm.rstd[m];
      mean[i * maps + m] = norm.mean[m];
      rstd[i * maps + m] = norm.rstd[m];
    };
    // Of the batch: also updates the running statistics.
    const auto set_of_batch = [&](int64_t i, int64_t m, const ChannelStatistics& statistics) {
      const double values = static_cast<double>(batch * scales[i].steps.pixels());
      means[i].update(m, momentum, statistics.mean);
      vars[i].update(m, momentum, statistics.variance * values / (values - 1));
      set(i, m, statistics);
    };
    const bool of_batch = training && batch > 0;
    for (int64_t i = 0; i < count; ++i) {
      scales[i].norm = &norms[i];
      read_parameters(weights[i], norms[i].factor);
      read_parameters(biases[i], norms[i].bias);
      if (!of_batch) {
        for (int64_t m = 0; m < maps; ++m) {
          set(i, m, {means[i].get(m), vars[i].get(m)});
        }
      } else if (last) {
        const auto statistics = channels_last_statistics<T>(scales[i].values, scales[i].steps);
        for (int64_t m = 0; m < maps; ++m) set_of_batch(i, m, statistics[m]);
      }
    }
    if (batch == 0) return;
    T* to = mutable_data<T>(results.attention);
    if (last) return channels_last_forward<T>(scales, size[0], size[1], to);
    const auto prepare = [&](int64_t m) {
      for (int64_t i = 0; i < count; ++i) {
        set_of_batch(i, m, channel_statistics<T>(scales[i].values, scales[i].steps, m));
      }
    };
    contiguous_forward<T>(scales, size[0] * size[1], of_batch, prepare, to);
  });
  return {results.attention, results.mean, results.rstd};
}

}  // namespace

MAGSD_OPERATORS(multiscale_attention, library) {
  library.impl("resample_attention", TORCH_BOX(&resample_attention));
  library.impl("multiscale_attention", TORCH_BOX(&multiscale_attention));
}

}  // namespace magsd::MAGSD_ISA::multiscale_attention
