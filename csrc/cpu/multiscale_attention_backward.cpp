// Backward of multiscale attention and of resample_attention.
//
// Reads every projection twice (sums of the batch norm's gradient, then the gradient itself) and
// writes its gradient once; a resampled gradient is computed where it is needed. Resizing is
// separable and runs from tables of taps (cpu/axis.h).
//
// Contiguous maps are split by (map, scale), so that a map's sums and its gradient meet in one
// task, while it is in the cache; loops run along rows. Channels last is split by rows of pixels,
// and loops run along the maps. Sums of rows or blocks are added in order: results do not depend on
// the number of threads.
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "common/multiscale_attention_arguments.h"
#include "cpu/multiscale_attention.h"
#include "cpu/panel.h"
#include "cpu/parallel.h"

namespace magsd::MAGSD_ISA::multiscale_attention {
namespace {

constexpr int64_t kBlockRows = 8;

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
  if (scale.cells.whole()) {
    return spread_cells(grad, scale.cells, A{1} / static_cast<A>(scale.cells.size()), back);
  }
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
  A plain[kChains] = {}, centered[kChains] = {};

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
      centered[k] += passed * (offset * rstd);
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
    T* to = task.grad + b * task.grad_steps.step_b + m * task.grad_steps.step_c;
    const bool direct = norm == nullptr && std::is_same_v<T, A> && task.grad_steps.step_p == 1;
    if constexpr (std::is_same_v<T, A>) back = direct ? to : back;
    resize_back(grad + b * steps.step_b + m * steps.step_c, steps.height, steps.width, scale,
                expanded.get(), back);
    if (norm == nullptr) {
      if (!direct) write_map(back, pixels, to, task.grad_steps.step_p);
      continue;
    }
    GradientSums<A> sums;
    sums.add(scale.values + b * scale.steps.step_b + m * scale.steps.step_c, back, pixels, *norm,
             m);
    for (int k = 0; k < sums.kChains; ++k) {
      of_bias += static_cast<double>(sums.plain[k]);
      of_weight += static_cast<double>(sums.centered[k]);
    }
  }
  if (norm == nullptr) return;
  task.of_bias[m] = of_bias;
  task.of_weight[m] = of_weight;
  const A mean = norm->mean[m], rstd = norm->rstd[m], factor = norm->factor[m];
  const A shift = task.share(task.of_bias, m), slope = task.share(task.of_weight, m);
  for (int64_t b = 0; b < batch; ++b) {
    const T* MAGSD_RESTRICT values = scale.values + b * scale.steps.step_b + m * scale.steps.step_c;
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
void gather_pixel(const T* grad, const MapSteps& steps, const Scale<T>& scale, int64_t y, int64_t x,
                  A* sum) {
  std::fill(sum, sum + (kMaps > 0 ? kMaps : steps.channels), A{0});
  const Axis<A>&rows = scale.rows, &columns = scale.columns;
  for (int64_t k = 0; k < rows.count(y); ++k) {
    for (int64_t i = 0; i < columns.count(x); ++i) {
      const int64_t p = (rows.first[y] + k) * steps.width + columns.first[x] + i;
      add_pixel<kMaps>(grad + p * steps.step_p, steps.channels,
                       rows.weight(y)[k] * columns.weight(x)[i], sum);
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
    A* MAGSD_RESTRICT centered = plain + maps;
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
        centered[m] += passed * (offset * rstd[m]);
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

template <typename T>
BackwardScale<T> backward_scale(const Tensor& result, const FeatureMap& grad, Resampling mode,
                                bool align_corners) {
  using A = accumulate_t<T>;
  const int64_t height = result.size(2), width = result.size(3);
  const int64_t to_height = grad.steps.height, to_width = grad.steps.width;
  BackwardScale<T> task{};
  task.grad = mutable_data<T>(result);
  task.grad_steps = dense_steps(result, is_channels_last(result));
  Scale<T>& scale = task.scale;
  scale.steps = task.grad_steps;
  scale.identity = height == to_height && width == to_width;
  if (mode == Resampling::kArea && !grad.channels_last) {
    scale.cells = Cells::between(height, width, to_height, to_width);
  }
  if (!scale.cells.whole()) {
    scale.rows = adjoint_axis(resize_axis<A>(height, to_height, mode, align_corners), height);
    scale.columns = adjoint_axis(resize_axis<A>(width, to_width, mode, align_corners), width);
  }
  return task;
}

Tensors resample_attention_backward(const Tensor& grad, const std::vector<int64_t>& heights,
                                    const std::vector<int64_t>& widths,
                                    const std::string& resampling, bool align_corners) {
  check_resample_backward(grad, heights, widths);
  const Resampling mode = mode_of(resampling);
  const FeatureMap taken(grad);
  Tensors results = empty_maps(grad, heights, widths);
  if (grad.numel() == 0) return results;
  visit_floating(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    std::vector<BackwardScale<T>> tasks;
    for (const Tensor& result : results) {
      tasks.push_back(backward_scale<T>(result, taken, mode, align_corners));
    }
    backward<T>(tasks, taken);
  });
  return results;
}

// Rounds the sums to a parameter's gradient.
void write_sums(const std::vector<double>& sums, const Tensor& to) {
  visit_floating(to.scalar_type(), [&](auto parameter) {
    using P = decltype(parameter);
    P* entries = mutable_data<P>(to);
    for (size_t m = 0; m < sums.size(); ++m) {
      entries[m] = static_cast<P>(static_cast<accumulate_t<P>>(sums[m]));
    }
  });
}

Gradients multiscale_attention_backward(const Tensor& grad, const Tensors& projections,
                                        const Tensors& weights, const Tensors& biases,
                                        const Tensor& mean, const Tensor& rstd, bool training,
                                        const std::string& resampling, bool align_corners) {
  check_multiscale_backward(grad, projections, weights, biases, mean, rstd);
  const int64_t batch = projections[0].size(0), maps = projections[0].size(1);
  const int64_t count = static_cast<int64_t>(projections.size());
  const Resampling mode = mode_of(resampling);
  const bool last = is_channels_last(projections[0]);
  const FeatureMap dense_grad(grad, last);
  const std::vector<FeatureMap> taken = feature_maps(projections, last);
  const Tensor dense_mean = dense(mean), dense_rstd = dense(rstd);
  Gradients grads = empty_gradients(projections, weights, biases);
  visit_floating(grad.scalar_type(), [&](auto type) {
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
      tasks.push_back(backward_scale<T>(std::get<0>(grads)[i], dense_grad, mode, align_corners));
      tasks[i].scale.values = data<T>(taken[i].tensor);
      tasks[i].scale.steps = taken[i].steps;
      tasks[i].scale.norm = &norm;
      tasks[i].training = training;
      tasks[i].of_bias.assign(maps, 0);
      tasks[i].of_weight.assign(maps, 0);
    }
    if (batch > 0) backward<T>(tasks, dense_grad);
    for (int64_t i = 0; i < count; ++i) {
      write_sums(tasks[i].of_weight, std::get<1>(grads)[i]);
      write_sums(tasks[i].of_bias, std::get<2>(grads)[i]);
    }
  });
  return grads;
}

}  // namespace

MAGSD_OPERATORS(multiscale_attention_backward, library) {
  library.impl("resample_attention_backward", TORCH_BOX(&resample_attention_backward));
  library.impl("multiscale_attention_backward", TORCH_BOX(&multiscale_attention_backward));
}

}  // namespace magsd::MAGSD_ISA::multiscale_attention
