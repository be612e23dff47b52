// Bilinear attention pooling, backward.
//
// Moves the features in once, the output and its gradient twice (the first time for the sum along
// the unit vector, right before an image's blocks), and the gradient of the features out:
//
//   dF[p, c] = sum over m of A[m, p] W[m, c]     panel of W
//   dA[p, m] = sum over c of F[p, c] W[m, c]     panel of W transposed
//
// W, the gradient of P, is never stored whole. The root under the square is read back from the
// output; only where that is rounded to half precision, or cannot hold the root, is P computed
// again. See bilinear_pool.h for the partition.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/bilinear_pool.h"
#include "cpu/large_result.h"
#include "cpu/stream.h"

namespace magsd::MAGSD_ISA::bilinear_pool {
namespace {

// The inverse of `pack`.
template <typename T, typename A>
void unpack(const A* panel, const MapSteps& steps, int64_t c, int64_t count, T* features, A* rows) {
  constexpr int64_t kColumns = kPanel<A>;
  const int64_t pixels = steps.pixels();
  if (steps.step_c == 1 && steps.step_p != 1) {
    for (int64_t p = 0; p < pixels; ++p) {
      convert(panel + p * kColumns, count, features + p * steps.step_p + c);
    }
    return;
  }
  T* to = features + c * steps.step_c;
  if constexpr (std::is_same_v<T, A>) {
    transpose(panel, kColumns, pixels, count, to, steps.step_c);
  } else {
    transpose(panel, kColumns, pixels, count, rows, pixels);
    for (int64_t j = 0; j < count; ++j) {
      convert(rows + j * pixels, pixels, to + j * steps.step_c);
    }
  }
}

// The gradient W of the pooled matrix of one image: from the gradient of the output and the unit
// vector P / ||P||, which is `units` times `to_unit`.
template <typename T, typename U>
struct PooledGradient {
  using A = accumulate_t<T>;
  const T* grad;
  const U* units;
  A to_unit, scale, projection, norm, inverse_norm, factor;
  bool signed_sqrt;

  // Panels of W (M x kPanel) of channels c to `end`, columns past the last one 0. Row by row: those
  // of the gradient lie far apart, and short pieces of them would be fetched one by one.
  void panels(const PoolShape& shape, int64_t c, int64_t end, A* MAGSD_RESTRICT to) const {
    constexpr int64_t kColumns = kPanel<A>;
    for (int64_t m = 0; m < shape.maps; ++m) {
      A* piece = to + m * kColumns;
      for (int64_t at = c; at < end; at += kColumns, piece += shape.maps * kColumns) {
        const T* g = grad + m * shape.channels + at;
        const U* u = units + m * shape.channels + at;
        if (end - at >= kColumns) {
          row(g, u, kColumns, piece);
        } else {
          std::fill(piece, piece + kColumns, A{0});
          row(g, u, end - at, piece);
        }
      }
    }
  }

  void row(const T* MAGSD_RESTRICT g, const U* MAGSD_RESTRICT u, int64_t count,
           A* MAGSD_RESTRICT to) const {
    if (signed_sqrt) {
      const A half = factor / 2;
      for (int64_t j = 0; j < count; ++j) {
        const A unit = static_cast<A>(u[j]) * to_unit;
        const A grad_root = (scale * static_cast<A>(g[j]) - unit * projection) * inverse_norm;
        const A slope = half / (std::abs(unit) * norm);
        to[j] = unit == 0 ? A{0} : grad_root * slope;
      }
    } else {
      for (int64_t j = 0; j < count; ++j) {
        const A unit = static_cast<A>(u[j]) * to_unit;
        to[j] = (scale * static_cast<A>(g[j]) - unit * projection) * inverse_norm * factor;
      }
    }
  }
};

// Sum of the products of two rows, in double.
template <typename T, typename U>
double dot(const T* MAGSD_RESTRICT a, const U* MAGSD_RESTRICT b, int64_t count) {
  constexpr int kChains = 16;
  double chains[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains) {
    for (int k = 0; k < kChains; ++k) {
      chains[k] += static_cast<double>(a[i + k]) * static_cast<double>(b[i + k]);
    }
  }
  for (; i < count; ++i) chains[0] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  double total = 0;
  for (const double chain : chains) total += chain;
  return total;
}

// Gradients of one backward call, as far as they are asked for.
template <typename T>
struct Gradients {
  T* features;
  MapSteps feature_steps;
  T* attention;
  MapSteps attention_steps;
};

// Transposes W (M x columns) into panels of maps: panel i holds maps i kPanel .. of every column.
template <typename A>
void transpose_panels(const A* panel, int64_t maps, int64_t count, A* to) {
  constexpr int64_t kColumns = kPanel<A>;
  for (int64_t m = 0; m < maps; m += kColumns, to += kColumns * kColumns) {
    const int64_t taken = std::min(kColumns, maps - m);
    if (taken < kColumns) std::fill(to, to + kColumns * kColumns, A{0});
    transpose(panel + m * kColumns, kColumns, taken, count, to, kColumns);
  }
}

// Scatters W to the first maximal pixels.
template <typename A>
void maximum_backward(const A* weights, const int32_t* argmax, const A* attention, const A* panel,
                      const PoolShape& shape, int64_t c, int64_t count, A* grad_panel, A* grad_maps,
                      int64_t padded) {
  constexpr int64_t kColumns = kPanel<A>;
  if (grad_panel != nullptr) std::fill(grad_panel, grad_panel + shape.pixels * kColumns, A{0});
  for (int64_t m = 0; m < shape.maps; ++m) {
    const int32_t* first = argmax + m * shape.channels + c;
    for (int64_t j = 0; j < count; ++j) {
      // An index from outside is not trusted.
      const int64_t p = std::clamp<int64_t>(first[j], 0, shape.pixels - 1);
      const A weight = weights[m * kColumns + j];
      if (grad_panel != nullptr) {
        grad_panel[p * kColumns + j] += weight * attention[m * shape.pixels + p];
      }
      if (grad_maps != nullptr) grad_maps[p * padded + m] += weight * panel[p * kColumns + j];
    }
  }
}

// One block: gradient of its features, and its share (HW, maps padded to a panel) of the
// gradient of the attention.
template <typename T, typename U>
void backward_block(const T* features, const MapSteps& steps, const accumulate_t<T>* attention,
                    const PoolShape& shape, const PoolSettings& settings, int64_t block,
                    const PooledGradient<T, U>& pooled, const int32_t* argmax, T* grad_features,
                    const MapSteps& grad_steps, accumulate_t<T>* grad_maps) {
  using A = accumulate_t<T>;
  constexpr int64_t kColumns = kPanel<A>;
  const int64_t pixels = shape.pixels;
  const int64_t panels = panels_of<A>(shape.maps), padded = panels * kColumns;
  const int64_t first = block * kBlock, end = block_end(shape, block);
  const bool streamed =
      shape.batch * shape.channels * pixels * int64_t{sizeof(T)} >= kStreamedBytes;
  Scratch<A> block_weights(shape.maps * kBlock), turned(padded * kColumns);
  Scratch<A> panel(pixels * kColumns), rows(std::is_same_v<T, A> ? 0 : pixels * kColumns);
  const bool in_planes = grad_features != nullptr && grad_steps.step_p == 1;
  Scratch<T> planes(in_planes ? pixels * kColumns : 0);
  pooled.panels(shape, first, end, block_weights.get());
  if (grad_maps != nullptr) std::fill(grad_maps, grad_maps + pixels * padded, A{0});
  for (int64_t c = first; c < end; c += kColumns) {
    const int64_t count = std::min(kColumns, end - c);
    const A* weights = block_weights.get() + (c - first) * shape.maps;
    const A* x = nullptr;
    Ahead ahead;
    int64_t step_p = kColumns, step_c = 1;
    if (grad_maps != nullptr) {
      if constexpr (std::is_same_v<T, A>) {
        x = features + c * steps.step_c;
        step_p = steps.step_p;
        step_c = steps.step_c;
        if (step_p == 1) {
          const int64_t next = std::min(kColumns, shape.channels - c - count);
          ahead = Ahead::of(x + count * pixels, next * pixels);
        }
      }
      if (x == nullptr || settings.maximum) {
        pack(features, steps, c, count, panel.get(), rows.get());
      }
      if (x == nullptr) x = panel.get();
    }
    if (settings.maximum) {
      Scratch<A> grad_panel(grad_features == nullptr ? 0 : pixels * kColumns);
      A* scattered = grad_features == nullptr ? nullptr : grad_panel.get();
      maximum_backward(weights, argmax, attention, panel.get(), shape, c, count, scattered,
                       grad_maps, padded);
      if (scattered != nullptr) {
        unpack(scattered, grad_steps, c, count, grad_features, rows.get());
      }
      continue;
    }
    if (grad_maps != nullptr) {
      transpose_panels(weights, shape.maps, count, turned.get());
      for (int64_t i = 0; i < panels; ++i) {
        panel_product(pixels, x, step_p, step_c, turned.get() + i * kColumns * kColumns, count,
                      grad_maps + i * kColumns, padded, true, i == 0 ? ahead : Ahead{});
      }
    }
    if (grad_features != nullptr) {
      panel_product(pixels, attention, int64_t{1}, pixels, weights, shape.maps, panel.get(),
                    kColumns, false);
      if (in_planes) {
        unpack(panel.get(), grad_steps, 0, count, planes.get(), rows.get());
        write_row(planes.get(), count * pixels, grad_features + c * pixels, streamed);
      } else {
        unpack(panel.get(), grad_steps, c, count, grad_features, rows.get());
      }
    }
  }
  if (in_planes) finish_rows(streamed);
}

// Adds up the blocks' shares (HW, padded) in order and resizes the sum back.
template <typename T>
class AttentionGradient {
  using A = accumulate_t<T>;

 public:
  AttentionGradient(const PoolShape& shape, int64_t height, int64_t width, const MapSteps& steps)
      : shape_(shape), steps_(steps), resized_(steps.height != height || steps.width != width) {
    if (!resized_) return;
    rows_ = adjoint_axis(resize_axis<A>(steps.height, height, Resampling::kBilinear, true),
                         steps.height);
    columns_ =
        adjoint_axis(resize_axis<A>(steps.width, width, Resampling::kBilinear, true), steps.width);
    width_ = width;
  }

  void write(const A* shares, int64_t padded, T* to) const {
    const int64_t count = shape_.pixels * padded;
    Scratch<A> sum(count), plane(shape_.pixels), small(steps_.pixels()), line(width_);
    std::copy_n(shares, count, sum.get());
    for (int64_t i = 1; i < blocks_of(shape_); ++i) {
      for (int64_t j = 0; j < count; ++j) sum.get()[j] += shares[i * count + j];
    }
    for (int64_t m = 0; m < shape_.maps; ++m) {
      for (int64_t p = 0; p < shape_.pixels; ++p) plane.get()[p] = sum.get()[p * padded + m];
      const A* result = plane.get();
      if (resized_) {
        resize_plane(plane.get(), width_, rows_, columns_, small.get(), line.get());
        result = small.get();
      }
      for (int64_t p = 0; p < steps_.pixels(); ++p) {
        to[m * steps_.step_c + p * steps_.step_p] = static_cast<T>(result[p]);
      }
    }
  }

 private:
  PoolShape shape_;
  MapSteps steps_;
  bool resized_;
  int64_t width_ = 0;
  Axis<A> rows_, columns_;
};

// Whether the output holds the root of every entry to the accumulation type's precision.
template <typename T>
bool holds_roots(const PoolSettings& settings) {
  const double size = std::abs(settings.scale);
  return std::is_same_v<T, accumulate_t<T>> && size >= 1e-6 && size <= 1e6 &&
         (!settings.signed_sqrt || settings.eps >= 1e-30);
}

template <typename T, typename U>
void backward_from(const FeatureMap& features, const PoolShape& shape, const PoolSettings& settings,
                   const T* grad, const U* units, bool are_roots, const PoolAttention<T>& attention,
                   const accumulate_t<T>* norms, const int32_t* argmax,
                   const Gradients<T>& gradients) {
  using A = accumulate_t<T>;
  constexpr int64_t kColumns = kPanel<A>;
  const int64_t entries = shape.entries(), blocks = blocks_of(shape);
  const int64_t padded = panels_of<A>(shape.maps) * kColumns;
  const int64_t share = shape.pixels * padded;
  std::vector<PooledGradient<T, U>> pooled(shape.batch);
  const auto start = [&](int64_t b) {
    const double norm = settings.normalize ? clamped_norm(norms[b]) : 1.0;
    const double to_unit = are_roots ? 1 / norm : 1 / settings.scale;
    double projection = 0;
    // Under the smallest norm the divisor is constant, and no gradient flows through it.
    if (settings.normalize && norms[b] >= kSmallestNorm) {
      projection = settings.scale * to_unit * dot(grad + b * entries, units + b * entries, entries);
    }
    pooled[b] = {
        grad + b * entries,         units + b * entries,
        static_cast<A>(to_unit),    static_cast<A>(settings.scale),
        static_cast<A>(projection), static_cast<A>(norm),
        static_cast<A>(1 / norm),   settings.maximum ? A{1} : A{1} / static_cast<A>(shape.pixels),
        settings.signed_sqrt};
  };
  const bool wants_attention = gradients.attention != nullptr;
  Scratch<A> shares(wants_attention ? shape.batch * blocks * share : 0);
  const AttentionGradient<T> attention_gradient(shape, features.steps.height, features.steps.width,
                                                gradients.attention_steps);
  const T* from = data<T>(features.tensor);
  if (gradients.features != nullptr) {
    expect_writes(gradients.features, shape.batch * shape.channels * shape.pixels);
  }
  for_images(
      shape, start,
      [&](int64_t b, int64_t i) {
        T* grad_features = gradients.features;
        if (grad_features != nullptr) grad_features += b * gradients.feature_steps.step_b;
        backward_block(from + b * features.steps.step_b, features.steps, attention.matrix(b), shape,
                       settings, i, pooled[b], argmax == nullptr ? nullptr : argmax + b * entries,
                       grad_features, gradients.feature_steps,
                       wants_attention ? shares.get() + (b * blocks + i) * share : nullptr);
      },
      [&](int64_t b) {
        if (!wants_attention) return;
        attention_gradient.write(shares.get() + b * blocks * share, padded,
                                 gradients.attention + b * gradients.attention_steps.step_b);
      });
}

template <typename T>
void write_gradients(const FeatureMap& features, const FeatureMap& maps, const PoolSaved& saved,
                     const PoolShape& shape, const PoolSettings& settings,
                     const Gradients<T>& gradients) {
  using A = accumulate_t<T>;
  const PoolAttention<T> attention(maps, features.steps.height, features.steps.width);
  const int64_t entries = shape.entries();
  const A* norms = settings.normalize ? data<A>(saved.norm) : nullptr;
  const int32_t* first = settings.maximum ? data<int32_t>(saved.argmax) : nullptr;
  if (holds_roots<T>(settings)) {
    const Tensor output = dense(saved.output);
    backward_from<T, T>(features, shape, settings, data<T>(saved.grad), data<T>(output), false,
                        attention, norms, first, gradients);
    return;
  }
  Scratch<A> roots(shape.batch * entries);
  const Pooling<T> pooling(features, attention, shape, settings);
  for_images(
      shape, [&](int64_t b) { pooling.start(b); },
      [&](int64_t b, int64_t i) {
        pooling.block(b, i, roots.get() + b * entries, static_cast<int32_t*>(nullptr));
      },
      [](int64_t) {});
  backward_from<T, A>(features, shape, settings, data<T>(saved.grad), roots.get(), true, attention,
                      norms, first, gradients);
}

struct Backend {
  template <typename T>
  static void backward(const DeviceScope&, const Tensor& features, const Tensor& attention,
                       const PoolSaved& saved, const PoolShape& shape, const PoolSettings& settings,
                       bool /*allow_tf32*/, const PoolGradients& results) {
    const Gradients<T> gradients{
        results.needs_features ? mutable_data<T>(results.features) : nullptr,
        dense_steps(features, is_channels_last(features)),
        results.needs_attention ? mutable_data<T>(results.attention) : nullptr,
        dense_steps(attention, is_channels_last(attention))};
    write_gradients<T>(FeatureMap(features), FeatureMap(attention), saved, shape, settings,
                       gradients);
  }
};

}  // namespace

MAGSD_OPERATORS(bilinear_pool_backward, library) {
  library.impl("bilinear_attention_pool_backward", TORCH_BOX(&pool_backward<Backend>));
}

}  // namespace magsd::MAGSD_ISA::bilinear_pool
