// Multiscale attention, forward and backward: batch norm, ReLU, resampling and the sum over the
// scales. resample_attention is the same without the norm and the ReLU.
//
// Forward reads every projection twice in training (statistics, then everything else), once in
// evaluation, and writes the sum once; no normalised map is stored. Backward reads every
// projection twice (sums of the batch norm's gradient, then the gradient itself) and writes its
// gradient once; a resampled gradient is computed where it is needed. Resizing is separable and
// runs from tables of taps (cpu/axis.h).
//
// Contiguous maps are cut by (image, map) forward and by (map, scale) backward, so that a map's
// sums and its gradient meet in one task, while it is in the cache; loops run along rows. Channels
// last is cut by rows of pixels, and loops run along the maps. Sums of rows or blocks are added in
// order: results do not depend on the number of threads.
#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "common/feature_map.h"
#include "common/tensor.h"
#include "cpu/axis.h"
#include "cpu/batch_statistics.h"
#include "cpu/panel.h"
#include "cpu/parallel.h"

namespace magsd::MAGSD_ISA {
namespace {

constexpr int64_t kMostMaps = 8;
constexpr int64_t kBlockRows = 8;

// The published number of maps. Loops over the maps of a pixel are compiled for it, without the
// entry and the tail that a loop of unknown length has; kMaps 0 stands for any other number.
constexpr int64_t kPublishedMaps = 32;

// One channel of a batch norm: n = (x - mean) factor + bias, factor = weight rstd.
template <typename A>
struct Norm {
  std::vector<A> mean, rstd, factor, bias;

  explicit Norm(int64_t channels)
      : mean(channels), rstd(channels), factor(channels), bias(channels) {}
};

// One scale: its map, its norm (none for resample_attention) and its tables.
template <typename T>
struct Scale {
  using A = accumulate_t<T>;
  const T* values;
  MapSteps steps;
  const Norm<A>* norm;
  Axis<A> rows, columns;
  bool identity;  // The map has the size of the result.
};

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
void add_pixel(const T* MAGSD_RESTRICT pixel, int64_t count, A weight, const Norm<A>* norm,
               A* MAGSD_RESTRICT sum) {
  const int64_t channels = kMaps > 0 ? kMaps : count;
  if (norm == nullptr) {
    for (int64_t m = 0; m < channels; ++m) sum[m] += weight * static_cast<A>(pixel[m]);
    return;
  }
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
    const T* row = scale.values + b * steps.step_b +
                   (rows.first[y] + k) * steps.width * steps.step_p;
    for (int64_t x = 0; x < columns.size(); ++x) {
      for (int64_t i = 0; i < columns.count(x); ++i) {
        const A weight = rows.weight(y)[k] * columns.weight(x)[i];
        add_pixel<kMaps>(row + (columns.first[x] + i) * steps.step_p, steps.channels, weight,
                         scale.norm, out + x * steps.channels);
      }
    }
  }
}

// Sum over the scales of their resampled maps, dense in the memory format of `channels_last`.
template <typename T>
void forward(const std::vector<Scale<T>>& scales, int64_t height, int64_t width,
             bool channels_last, T* to) {
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

// One scale backward: `values` is null for resample_attention; rows and columns are the adjoint
// tables, from an input to the outputs that read it.
template <typename T>
struct BackwardScale {
  using A = accumulate_t<T>;
  Scale<T> scale;
  T* grad;
  MapSteps grad_steps;
  bool training;
  // The batch's sums of the gradient of n, and of that times (x - mean) rstd, over every map.
  std::vector<double> of_bias, of_weight;

  // The batch norm's share of the gradient (Ioffe and Szegedy 2015): mean of each sum.
  A share(const std::vector<double>& sums, int64_t m) const {
    const MapSteps& steps = scale.steps;
    return training ? static_cast<A>(sums[m] / static_cast<double>(steps.batch * steps.pixels()))
                    : A{0};
  }
};

// back (h, w) = the gradient (H, W) of one map resized back; `expanded` holds (H, w).
template <typename T, typename A>
void resize_back(const T* grad, int64_t height, int64_t width, const Scale<T>& scale, A* expanded,
                 A* MAGSD_RESTRICT back) {
  if (scale.identity) return convert(grad, height * width, back);
  const Axis<A>&rows = scale.rows, &columns = scale.columns;
  const int64_t row_size = columns.size();
  for (int64_t y = 0; y < height; ++y) {
    const T* row = grad + y * width;
    A* to = expanded + y * row_size;
    for (int64_t x = 0; x < row_size; ++x) {
      const T* from = row + columns.first[x];
      const A* weights = columns.weight(x);
      A sum = 0;
      for (int64_t k = 0; k < columns.count(x); ++k) sum += weights[k] * static_cast<A>(from[k]);
      to[x] = sum;
    }
  }
  for (int64_t y = 0; y < rows.size(); ++y, back += row_size) {
    std::fill(back, back + row_size, A{0});
    for (int64_t k = 0; k < rows.count(y); ++k) {
      const A weight = rows.weight(y)[k];
      const A* MAGSD_RESTRICT from = expanded + (rows.first[y] + k) * row_size;
      for (int64_t x = 0; x < row_size; ++x) back[x] += weight * from[x];
    }
  }
}

// Sums of the gradient of n, and of that times (x - mean) rstd, in interleaved chains.
template <typename A>
struct GradientSums {
  static constexpr int kChains = 16;
  A plain[kChains] = {}, centred[kChains] = {};

  // Adds one map of one image, and keeps in `gradient` what passes the ReLU.
  template <typename T>
  void add(const T* MAGSD_RESTRICT values, A* MAGSD_RESTRICT gradient, int64_t count,
           const Norm<A>& norm, int64_t m) {
    const A mean = norm.mean[m], rstd = norm.rstd[m], factor = norm.factor[m], bias = norm.bias[m];
    const auto one = [&](int64_t i, int k) __attribute__((always_inline)) {
      const A offset = static_cast<A>(values[i]) - mean;
      const A passed = offset * factor + bias > 0 ? gradient[i] : A{0};
      gradient[i] = passed;
      plain[k] += passed;
      centred[k] += passed * (offset * rstd);
    };
    int64_t i = 0;
    for (; i + kChains <= count; i += kChains) {
      for (int k = 0; k < kChains; ++k) one(i + k, k);
    }
    for (int k = 0; i < count; ++i, ++k) one(i, k);
  }
};

// Writes one map's gradient, `count` pixels `step_p` apart.
template <typename T, typename A>
void write_map(const A* MAGSD_RESTRICT gradient, int64_t count, T* to, int64_t step_p) {
  if (step_p == 1) return convert(gradient, count, to);
  for (int64_t p = 0; p < count; ++p) to[p * step_p] = static_cast<T>(gradient[p]);
}

// Map m of every image of one scale: its sums, then its gradient. What passes the ReLU is kept in
// between, 1 / M of a projection.
template <typename T>
void backward_map(BackwardScale<T>& task, const T* grad, const MapSteps& steps, int64_t m) {
  using A = accumulate_t<T>;
  const Scale<T>& scale = task.scale;
  const int64_t pixels = scale.steps.pixels(), batch = scale.steps.batch;
  const Norm<A>* norm = scale.norm;
  Scratch<A> kept((norm == nullptr ? 1 : batch) * pixels);
  Scratch<A> expanded(steps.height * scale.steps.width);
  double of_bias = 0, of_weight = 0;
  for (int64_t b = 0; b < batch; ++b) {
    A* back = kept.get() + (norm == nullptr ? 0 : b * pixels);
    resize_back(grad + b * steps.step_b + m * steps.step_c, steps.height, steps.width, scale,
                expanded.get(), back);
    if (norm == nullptr) {
      T* to = task.grad + b * task.grad_steps.step_b + m * task.grad_steps.step_c;
      write_map(back, pixels, to, task.grad_steps.step_p);
      continue;
    }
    GradientSums<A> sums;
    sums.add(scale.values + b * scale.steps.step_b + m * scale.steps.step_c, back, pixels, *norm,
             m);
    for (int k = 0; k < sums.kChains; ++k) {
      of_bias += static_cast<double>(sums.plain[k]);
      of_weight += static_cast<double>(sums.centred[k]);
    }
  }
  if (norm == nullptr) return;
  task.of_bias[m] = of_bias;
  task.of_weight[m] = of_weight;
  const A mean = norm->mean[m], rstd = norm->rstd[m], factor = norm->factor[m];
  const A shift = task.share(task.of_bias, m), slope = task.share(task.of_weight, m);
  for (int64_t b = 0; b < batch; ++b) {
    const T* MAGSD_RESTRICT values =
        scale.values + b * scale.steps.step_b + m * scale.steps.step_c;
    A* MAGSD_RESTRICT gradient = kept.get() + b * pixels;
    for (int64_t p = 0; p < pixels; ++p) {
      const A offset = static_cast<A>(values[p]) - mean;
      gradient[p] = (gradient[p] - (shift + offset * rstd * slope)) * factor;
    }
    T* to = task.grad + b * task.grad_steps.step_b + m * task.grad_steps.step_c;
    write_map(gradient, pixels, to, task.grad_steps.step_p);
  }
}

template <typename T>
void contiguous_backward(std::vector<BackwardScale<T>>& tasks, const T* grad,
                         const MapSteps& steps) {
  int64_t pixels = 0;
  for (const auto& task : tasks) pixels += task.scale.steps.pixels();
  const int64_t count = static_cast<int64_t>(tasks.size());
  const int64_t grain = 1 + 16384 * count / (pixels * steps.batch);
  parallel_for(steps.channels * count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) backward_map(tasks[i % count], grad, steps, i / count);
  });
}

// sum (M) = the gradient resized back at pixel (y, x) of a scale.
template <int64_t kMaps, typename T, typename A>
void gather_pixel(const T* grad, const MapSteps& steps, const Scale<T>& scale, int64_t y,
                  int64_t x, A* sum) {
  std::fill(sum, sum + (kMaps > 0 ? kMaps : steps.channels), A{0});
  const Axis<A>&rows = scale.rows, &columns = scale.columns;
  for (int64_t k = 0; k < rows.count(y); ++k) {
    for (int64_t i = 0; i < columns.count(x); ++i) {
      const int64_t p = (rows.first[y] + k) * steps.width + columns.first[x] + i;
      add_pixel<kMaps>(grad + p * steps.step_p, steps.channels,
                       rows.weight(y)[k] * columns.weight(x)[i],
                       static_cast<const Norm<A>*>(nullptr), sum);
    }
  }
}

// Runs body(b, y, x, block) over every pixel of a scale, on threads by blocks of rows.
template <typename Body>
void for_pixels(const MapSteps& steps, const Body& body) {
  const int64_t blocks = (steps.height + kBlockRows - 1) / kBlockRows;
  const int64_t grain = 1 + 16384 * blocks / (steps.pixels() * steps.channels);
  parallel_for(steps.batch * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = i % blocks * kBlockRows;
      body(i / blocks, from, std::min(steps.height, from + kBlockRows), i);
    }
  });
}

template <int64_t kMaps, typename T>
void channels_last_sums(BackwardScale<T>& task, const T* grad, const MapSteps& steps) {
  using A = accumulate_t<T>;
  const Scale<T>& scale = task.scale;
  const int64_t maps = kMaps > 0 ? kMaps : steps.channels, width = scale.steps.width;
  const int64_t blocks = (scale.steps.height + kBlockRows - 1) / kBlockRows;
  std::vector<A> sums(scale.steps.batch * blocks * 2 * maps);
  for_pixels(scale.steps, [&](int64_t b, int64_t from, int64_t to, int64_t block) {
    Scratch<A> gathered(maps);
    A* MAGSD_RESTRICT plain = sums.data() + block * 2 * maps;
    A* MAGSD_RESTRICT centred = plain + maps;
    const A* MAGSD_RESTRICT mean = scale.norm->mean.data();
    const A* MAGSD_RESTRICT rstd = scale.norm->rstd.data();
    const A* MAGSD_RESTRICT factor = scale.norm->factor.data();
    const A* MAGSD_RESTRICT bias = scale.norm->bias.data();
    for (int64_t p = from * width; p < to * width; ++p) {
      const T* MAGSD_RESTRICT pixel =
          scale.values + b * scale.steps.step_b + p * scale.steps.step_p;
      gather_pixel<kMaps>(grad + b * steps.step_b, steps, scale, p / width, p % width,
                          gathered.get());
      const A* MAGSD_RESTRICT gradient = gathered.get();
      for (int64_t m = 0; m < maps; ++m) {
        const A offset = static_cast<A>(pixel[m]) - mean[m];
        const A passed = offset * factor[m] + bias[m] > 0 ? gradient[m] : A{0};
        plain[m] += passed;
        centred[m] += passed * (offset * rstd[m]);
      }
    }
  });
  for (int64_t i = 0; i < scale.steps.batch * blocks; ++i) {
    for (int64_t m = 0; m < maps; ++m) {
      task.of_bias[m] += static_cast<double>(sums[i * 2 * maps + m]);
      task.of_weight[m] += static_cast<double>(sums[(i * 2 + 1) * maps + m]);
    }
  }
}

template <int64_t kMaps, typename T>
void channels_last_backward(BackwardScale<T>& task, const T* grad, const MapSteps& steps) {
  using A = accumulate_t<T>;
  const Scale<T>& scale = task.scale;
  const int64_t maps = kMaps > 0 ? kMaps : steps.channels, width = scale.steps.width;
  std::vector<A> shifts(maps), slopes(maps);
  if (scale.norm != nullptr) {
    channels_last_sums<kMaps>(task, grad, steps);
    for (int64_t m = 0; m < maps; ++m) {
      shifts[m] = task.share(task.of_bias, m);
      slopes[m] = task.share(task.of_weight, m);
    }
  }
  for_pixels(scale.steps, [&](int64_t b, int64_t from, int64_t to, int64_t) {
    Scratch<A> gathered(maps);
    A* MAGSD_RESTRICT gradient = gathered.get();
    for (int64_t p = from * width; p < to * width; ++p) {
      gather_pixel<kMaps>(grad + b * steps.step_b, steps, scale, p / width, p % width, gradient);
      if (scale.norm != nullptr) {
        const T* MAGSD_RESTRICT pixel =
            scale.values + b * scale.steps.step_b + p * scale.steps.step_p;
        const A* MAGSD_RESTRICT mean = scale.norm->mean.data();
        const A* MAGSD_RESTRICT rstd = scale.norm->rstd.data();
        const A* MAGSD_RESTRICT factor = scale.norm->factor.data();
        const A* MAGSD_RESTRICT bias = scale.norm->bias.data();
        const A* MAGSD_RESTRICT shift = shifts.data();
        const A* MAGSD_RESTRICT slope = slopes.data();
        for (int64_t m = 0; m < maps; ++m) {
          const A offset = static_cast<A>(pixel[m]) - mean[m];
          const A passed = offset * factor[m] + bias[m] > 0 ? gradient[m] : A{0};
          gradient[m] = (passed - (shift[m] + offset * rstd[m] * slope[m])) * factor[m];
        }
      }
      T* pixel = task.grad + b * task.grad_steps.step_b + p * task.grad_steps.step_p;
      if (task.grad_steps.step_c == 1) {
        convert(gradient, maps, pixel);
      } else {
        for (int64_t m = 0; m < maps; ++m) {
          pixel[m * task.grad_steps.step_c] = static_cast<T>(gradient[m]);
        }
      }
    }
  });
}

template <typename T>
void backward(std::vector<BackwardScale<T>>& tasks, const FeatureMap& grad) {
  const T* values = data<T>(grad.tensor);
  if (!grad.channels_last) return contiguous_backward(tasks, values, grad.steps);
  for (auto& task : tasks) {
    if (grad.steps.channels == kPublishedMaps) {
      channels_last_backward<kPublishedMaps>(task, values, grad.steps);
    } else {
      channels_last_backward<0>(task, values, grad.steps);
    }
  }
}

Resampling mode_of(const std::string& name) {
  if (name == "area") return Resampling::kArea;
  if (name == "bilinear") return Resampling::kBilinear;
  STD_TORCH_CHECK(name == "nearest", "resampling must be area, bilinear or nearest, got ", name);
  return Resampling::kNearest;
}

void check_maps(const std::vector<Tensor>& maps, const char* name) {
  const int64_t count = static_cast<int64_t>(maps.size());
  STD_TORCH_CHECK(count >= 1 && count <= kMostMaps, name, " must have 1 to 8 entries, got ", count);
  for (const Tensor& map : maps) {
    check_tensor(map, name, 4);
    check_floating(map, name);
    check_dtype(map, name, maps[0].scalar_type());
    check_sizes(map, name, {maps[0].size(0), maps[0].size(1), -1, -1});
    STD_TORCH_CHECK(map.size(1) > 0 && map.size(2) > 0 && map.size(3) > 0, name,
                    " must not be empty");
  }
}

void check_size(int64_t height, int64_t width) {
  constexpr int64_t kMost = int64_t{1} << 24;
  STD_TORCH_CHECK(height > 0 && width > 0 && height <= kMost && width <= kMost,
                  "the size must be 1 to 2^24, got ", height, " x ", width);
}

// (M,) floating tensors, one a scale.
void check_parameters(const std::vector<Tensor>& values, const char* name, size_t scales,
                      int64_t channels) {
  STD_TORCH_CHECK(values.size() == scales, name, " must have one entry a scale");
  for (const Tensor& value : values) {
    check_tensor(value, name, 1);
    check_floating(value, name);
    check_sizes(value, name, {channels});
  }
}

// Entry m of a (M,) tensor.
double entry(const Tensor& values, int64_t m) {
  double result = 0;
  visit_floating(values.scalar_type(), [&](auto type) {
    result = static_cast<double>(data<decltype(type)>(values)[m * values.stride(0)]);
  });
  return result;
}

template <typename A>
void read_parameters(const Tensor& values, std::vector<A>& to) {
  visit_floating(values.scalar_type(), [&](auto type) {
    const auto* from = data<decltype(type)>(values);
    const int64_t step = values.stride(0);
    for (size_t m = 0; m < to.size(); ++m) to[m] = static_cast<A>(from[m * step]);
  });
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
    scales.push_back({data<T>(map.tensor), map.steps, nullptr, std::move(rows),
                      std::move(columns), identity});
  }
  return scales;
}

std::vector<FeatureMap> feature_maps(const std::vector<Tensor>& maps, bool channels_last) {
  std::vector<FeatureMap> result;
  result.reserve(maps.size());
  for (const Tensor& map : maps) result.emplace_back(map, channels_last);
  return result;
}

Tensor resample_attention(const std::vector<Tensor>& maps, const std::vector<int64_t>& size,
                          const std::string& resampling, bool align_corners) {
  check_maps(maps, "maps");
  STD_TORCH_CHECK(size.size() == 2, "size must have 2 entries, got ", size.size());
  check_size(size[0], size[1]);
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

template <typename T>
BackwardScale<T> backward_scale(const Tensor& result, const MapSteps& grad, Resampling mode,
                                bool align_corners) {
  using A = accumulate_t<T>;
  const int64_t height = result.size(2), width = result.size(3);
  BackwardScale<T> task;
  task.grad = mutable_data<T>(result);
  task.grad_steps = dense_steps(result, is_channels_last(result));
  task.scale.values = nullptr;
  task.scale.steps = task.grad_steps;
  task.scale.norm = nullptr;
  task.scale.rows =
      adjoint_axis(resize_axis<A>(height, grad.height, mode, align_corners), height);
  task.scale.columns =
      adjoint_axis(resize_axis<A>(width, grad.width, mode, align_corners), width);
  task.scale.identity =
      task.scale.rows.is_identity(grad.height) && task.scale.columns.is_identity(grad.width);
  task.training = false;
  return task;
}

std::vector<Tensor> resample_attention_backward(const Tensor& grad,
                                                const std::vector<int64_t>& heights,
                                                const std::vector<int64_t>& widths,
                                                const std::string& resampling,
                                                bool align_corners) {
  check_maps({grad}, "grad");
  STD_TORCH_CHECK(!heights.empty() && heights.size() <= static_cast<size_t>(kMostMaps) &&
                      heights.size() == widths.size(),
                  "heights and widths must have the same 1 to 8 entries");
  for (size_t i = 0; i < heights.size(); ++i) check_size(heights[i], widths[i]);
  const Resampling mode = mode_of(resampling);
  const FeatureMap taken(grad);
  std::vector<Tensor> results;
  for (size_t i = 0; i < heights.size(); ++i) {
    results.push_back(empty_map(grad.size(0), grad.size(1), heights[i], widths[i],
                                grad.scalar_type(), is_channels_last(grad)));
  }
  if (grad.numel() == 0) return results;
  visit_floating(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    std::vector<BackwardScale<T>> tasks;
    for (const Tensor& result : results) {
      tasks.push_back(backward_scale<T>(result, taken.steps, mode, align_corners));
    }
    backward<T>(tasks, taken);
  });
  return results;
}

std::tuple<Tensor, Tensor, Tensor> multiscale_attention(
    const std::vector<Tensor>& projections, const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases, const std::vector<Tensor>& running_means,
    const std::vector<Tensor>& running_vars, const std::vector<int64_t>& size, bool training,
    double momentum, double eps, const std::string& resampling, bool align_corners) {
  check_maps(projections, "projections");
  const int64_t batch = projections[0].size(0), maps = projections[0].size(1);
  check_parameters(weights, "weights", projections.size(), maps);
  check_parameters(biases, "biases", projections.size(), maps);
  check_parameters(running_means, "running_means", projections.size(), maps);
  check_parameters(running_vars, "running_vars", projections.size(), maps);
  STD_TORCH_CHECK(size.size() == 2, "size must have 2 entries, got ", size.size());
  check_size(size[0], size[1]);
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
    std::vector<Norm<A>> norms(count, Norm<A>(maps));
    for (int64_t i = 0; i < count; ++i) {
      Norm<A>& norm = norms[i];
      std::vector<A> weight(maps);
      read_parameters(weights[i], weight);
      read_parameters(biases[i], norm.bias);
      std::vector<ChannelStatistics> statistics(maps);
      const int64_t values = batch * taken[i].steps.pixels();
      const bool of_batch = training && batch > 0;
      if (of_batch) statistics = batch_statistics<T>(taken[i]);
      for (int64_t m = 0; m < maps; ++m) {
        if (of_batch) {
          const auto [average, variance] = statistics[m];
          const double unbiased =
              variance * static_cast<double>(values) / static_cast<double>(values - 1);
          update_running(running_means[i], m, momentum, average);
          update_running(running_vars[i], m, momentum, unbiased);
        } else {
          statistics[m] = {entry(running_means[i], m), entry(running_vars[i], m)};
        }
        norm.mean[m] = static_cast<A>(statistics[m].mean);
        norm.rstd[m] = static_cast<A>(1 / std::sqrt(statistics[m].variance + eps));
        norm.factor[m] = weight[m] * norm.rstd[m];
      }
      std::copy(norm.mean.begin(), norm.mean.end(), mutable_data<A>(mean) + i * maps);
      std::copy(norm.rstd.begin(), norm.rstd.end(), mutable_data<A>(rstd) + i * maps);
      scales[i].norm = &norm;
    }
    if (batch > 0) forward<T>(scales, size[0], size[1], last, mutable_data<T>(result));
  });
  return {result, mean, rstd};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>
multiscale_attention_backward(const Tensor& grad, const std::vector<Tensor>& projections,
                              const std::vector<Tensor>& weights,
                              const std::vector<Tensor>& biases, const Tensor& mean,
                              const Tensor& rstd, bool training, const std::string& resampling,
                              bool align_corners) {
  check_maps(projections, "projections");
  check_maps({grad}, "grad");
  const int64_t batch = projections[0].size(0), maps = projections[0].size(1);
  const int64_t count = static_cast<int64_t>(projections.size());
  const ScalarType dtype = projections[0].scalar_type();
  check_dtype(grad, "grad", dtype);
  check_sizes(grad, "grad", {batch, maps, -1, -1});
  check_parameters(weights, "weights", projections.size(), maps);
  check_parameters(biases, "biases", projections.size(), maps);
  for (const Tensor* statistics : {&mean, &rstd}) {
    check_tensor(*statistics, "mean and rstd", 2);
    check_dtype(*statistics, "mean and rstd", accumulation_dtype(dtype));
    check_sizes(*statistics, "mean and rstd", {count, maps});
  }
  const Resampling mode = mode_of(resampling);
  const bool last = is_channels_last(projections[0]);
  const FeatureMap dense_grad(grad, last);
  const std::vector<FeatureMap> taken = feature_maps(projections, last);
  const Tensor dense_mean = dense(mean), dense_rstd = dense(rstd);
  std::vector<Tensor> grads, grad_weights, grad_biases;
  for (int64_t i = 0; i < count; ++i) {
    grads.push_back(empty_map_like(projections[i]));
    grad_weights.push_back(uninitialized({maps}, weights[i].scalar_type()));
    grad_biases.push_back(uninitialized({maps}, biases[i].scalar_type()));
  }
  visit_floating(dtype, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    std::vector<Norm<A>> norms(count, Norm<A>(maps));
    std::vector<BackwardScale<T>> tasks;
    for (int64_t i = 0; i < count; ++i) {
      Norm<A>& norm = norms[i];
      std::copy_n(data<A>(dense_mean) + i * maps, maps, norm.mean.begin());
      std::copy_n(data<A>(dense_rstd) + i * maps, maps, norm.rstd.begin());
      read_parameters(weights[i], norm.factor);
      read_parameters(biases[i], norm.bias);
      for (int64_t m = 0; m < maps; ++m) norm.factor[m] *= norm.rstd[m];
      tasks.push_back(backward_scale<T>(grads[i], dense_grad.steps, mode, align_corners));
      tasks[i].scale.values = data<T>(taken[i].tensor);
      tasks[i].scale.steps = taken[i].steps;
      tasks[i].scale.norm = &norm;
      tasks[i].training = training;
      tasks[i].of_bias.assign(maps, 0);
      tasks[i].of_weight.assign(maps, 0);
    }
    if (batch > 0) backward<T>(tasks, dense_grad);
    const auto write = [&](const std::vector<double>& sums, const Tensor& to) {
      visit_floating(to.scalar_type(), [&](auto parameter) {
        using P = decltype(parameter);
        P* entries = mutable_data<P>(to);
        for (int64_t m = 0; m < maps; ++m) {
          entries[m] = static_cast<P>(static_cast<accumulate_t<P>>(sums[m]));
        }
      });
    };
    for (int64_t i = 0; i < count; ++i) {
      write(tasks[i].of_weight, grad_weights[i]);
      write(tasks[i].of_bias, grad_biases[i]);
    }
  });
  return {grads, grad_weights, grad_biases};
}

}  // namespace
}  // namespace magsd::MAGSD_ISA

MAGSD_OPERATORS(multiscale_attention, library) {
  library.impl("resample_attention", TORCH_BOX(&resample_attention));
  library.impl("resample_attention_backward", TORCH_BOX(&resample_attention_backward));
  library.impl("multiscale_attention", TORCH_BOX(&multiscale_attention));
  library.impl("multiscale_attention_backward", TORCH_BOX(&multiscale_attention_backward));
}
