// Bilinear attention pooling, forward and backward: P = A F^T over the pixels, its signed square
// root and norm.
//
// Forward moves the features once in and P (B M C) once out; backward moves the features, the
// output and its gradient in, and the gradient of the features out. The attention of an image
// (M HW) stays in the first-level cache. The features of kPanel channels are laid out as a panel
// (pixels x channels), which makes both memory formats, all dtypes and both poolings one case:
//
//   forward   P[m, c]  = sum over p of A[m, p] F[p, c]     panel of F
//   backward  dF[p, c] = sum over m of A[m, p] W[m, c]     panel of W
//             dA[p, m] = sum over c of F[p, c] W[m, c]     panel of W transposed
//
// W, the gradient of P, is never stored whole. The root under the square is read back from the
// output; only where that is rounded to half precision, or cannot hold the root, is P computed
// again. The work of an image is cut into blocks of kBlock channels, whose sums are added in
// order: results do not depend on the number of threads. With images enough for every thread a
// task is an image, so that its output is still in the cache when its norm is known; else a block.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "common/feature_map.h"
#include "common/tensor.h"
#include "cpu/axis.h"
#include "cpu/panel.h"
#include "cpu/parallel.h"

namespace magsd::MAGSD_ISA {
namespace {

constexpr int64_t kBlock = 256;
constexpr double kSmallestNorm = 1e-12;

struct Settings {
  bool maximum, signed_sqrt, normalize;
  double scale, eps;
};

// Sizes of one call, and the cut into blocks.
struct Shape {
  int64_t batch, channels, maps, pixels;
  int64_t blocks() const { return (channels + kBlock - 1) / kBlock; }
  int64_t block_end(int64_t block) const { return std::min(channels, (block + 1) * kBlock); }
};

// Runs once for every (image, block) pair, then `finish` once for every image.
template <typename Block, typename Finish>
void for_images(const Shape& shape, const Block& block, const Finish& finish) {
  const int64_t blocks = shape.blocks();
  if (shape.batch >= 2 * static_cast<int64_t>(torch::stable::get_num_threads())) {
    const int64_t work = shape.channels * shape.maps * shape.pixels;
    parallel_for(shape.batch, 1 + (1 << 15) / work, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t i = 0; i < blocks; ++i) block(b, i);
        finish(b);
      }
    });
    return;
  }
  const int64_t work = std::min(kBlock, shape.channels) * shape.maps * shape.pixels;
  const int64_t grain = 1 + (1 << 15) / work;
  parallel_for(shape.batch * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) block(i / blocks, i % blocks);
  });
  parallel_for(shape.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) finish(b);
  });
}

// Attention of every image as a dense (M, HW) matrix of the accumulation type, at the features'
// size; in place where it already is.
template <typename T>
class Attention {
  using A = accumulate_t<T>;

 public:
  Attention(const FeatureMap& maps, int64_t height, int64_t width)
      : count_(maps.steps.channels * height * width),
        copy_(needs_copy(maps, height, width) ? maps.steps.batch * count_ : 0),
        matrices_(copy_.get()) {
    if constexpr (std::is_same_v<T, A>) {
      if (!needs_copy(maps, height, width)) {
        matrices_ = data<A>(maps.tensor);
        return;
      }
    }
    const MapSteps& steps = maps.steps;
    const T* source = data<T>(maps.tensor);
    const bool resized = steps.height != height || steps.width != width;
    const Axis<A> rows = resize_axis<A>(steps.height, height, Resampling::kBilinear, true);
    const Axis<A> columns = resize_axis<A>(steps.width, width, Resampling::kBilinear, true);
    const int64_t grain = 1 + 16384 / std::max<int64_t>(count_, 1);
    parallel_for(steps.batch, grain, [&](int64_t begin, int64_t end) {
      Scratch<A> plane(steps.pixels()), line(steps.width);
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t m = 0; m < steps.channels; ++m) {
          const T* from = source + b * steps.step_b + m * steps.step_c;
          A* to = copy_.get() + b * count_ + m * height * width;
          A* dense = resized ? plane.get() : to;
          for (int64_t p = 0; p < steps.pixels(); ++p) {
            dense[p] = static_cast<A>(from[p * steps.step_p]);
          }
          if (resized) resize_plane(dense, steps.width, rows, columns, to, line.get());
        }
      }
    });
  }

  const A* matrix(int64_t image) const { return matrices_ + image * count_; }

 private:
  static bool needs_copy(const FeatureMap& maps, int64_t height, int64_t width) {
    return !std::is_same_v<T, A> || maps.steps.step_p != 1 || maps.steps.height != height ||
           maps.steps.width != width;
  }

  int64_t count_;
  Scratch<A> copy_;
  const A* matrices_;
};

// panel[p kPanel + j] = features of channel c + j; columns past `count` are 0.
template <typename T, typename A>
void pack(const T* features, const MapSteps& steps, int64_t c, int64_t count, A* panel, A* rows) {
  constexpr int64_t kColumns = kPanel<A>;
  const int64_t pixels = steps.pixels();
  if (count < kColumns) std::fill(panel, panel + pixels * kColumns, A{0});
  if (steps.step_c == 1 && steps.step_p != 1) {
    for (int64_t p = 0; p < pixels; ++p) {
      const T* from = features + p * steps.step_p + c;
      if (count == kColumns) {
        convert(from, kColumns, panel + p * kColumns);
      } else {
        convert(from, count, panel + p * kColumns);
      }
    }
    return;
  }
  const T* from = features + c * steps.step_c;
  if constexpr (std::is_same_v<T, A>) {
    transpose(from, steps.step_c, count, pixels, panel, kColumns);
  } else {
    for (int64_t j = 0; j < count; ++j) {
      convert(from + j * steps.step_c, pixels, rows + j * pixels);
    }
    transpose(rows, pixels, count, pixels, panel, kColumns);
  }
}

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

// Largest product of a map and every channel of a panel, and its first pixel. NaN is the largest.
template <typename A>
void maximum_row(const A* map, const A* panel, int64_t pixels, A* best, int32_t* first) {
  constexpr int kColumns = kPanel<A>;
  for (int j = 0; j < kColumns; ++j) {
    best[j] = map[0] * panel[j];
    first[j] = 0;
  }
  for (int64_t p = 1; p < pixels; ++p) {
    const A* row = panel + p * kColumns;
    for (int j = 0; j < kColumns; ++j) {
      const A value = map[p] * row[j];
      const bool larger = !(value <= best[j]) & (best[j] == best[j]);
      best[j] = larger ? value : best[j];
      first[j] = larger ? static_cast<int32_t>(p) : first[j];
    }
  }
}

// row = sign(row factor) sqrt(|row factor| + eps); adds the squares to `squares`.
template <typename A>
void root_row(A* MAGSD_RESTRICT row, A factor, bool signed_sqrt, A eps, A* MAGSD_RESTRICT squares) {
  constexpr int kColumns = kPanel<A>;
  if (signed_sqrt) {
    for (int j = 0; j < kColumns; ++j) {
      const A value = row[j] * factor;
      const A root = std::copysign(std::sqrt(std::abs(value) + eps), value);
      row[j] = value == 0 ? A{0} : root;
    }
  } else {
    for (int j = 0; j < kColumns; ++j) row[j] *= factor;
  }
  for (int j = 0; j < kColumns; ++j) squares[j] += row[j] * row[j];
}

// Where the pooled matrix of a block goes: `to` (M, C) of the output's or of the accumulation
// type, and the argmax (M, C) where pooling by maximum asks for it.
template <typename T, typename Out>
double pool_block(const T* features, const MapSteps& steps, const accumulate_t<T>* attention,
                  const Shape& shape, const Settings& settings, int64_t block, Out* to,
                  int32_t* argmax) {
  using A = accumulate_t<T>;
  constexpr int64_t kColumns = kPanel<A>;
  constexpr int64_t kRows = 4 * kTileRows;
  const int64_t pixels = shape.pixels;
  Scratch<A> panel(pixels * kColumns), rows(std::is_same_v<T, A> ? 0 : pixels * kColumns);
  alignas(64) A tiles[kRows * kColumns];
  alignas(64) int32_t first[kRows * kColumns];
  const A factor = settings.maximum ? A{1} : A{1} / static_cast<A>(pixels);
  double total = 0;
  for (int64_t c = block * kBlock; c < shape.block_end(block); c += kColumns) {
    const int64_t count = std::min(kColumns, shape.block_end(block) - c);
    pack(features, steps, c, count, panel.get(), rows.get());
    A squares[kColumns] = {};
    for (int64_t m = 0; m < shape.maps; m += kRows) {
      const int64_t taken = std::min(kRows, shape.maps - m);
      if (settings.maximum) {
        for (int64_t r = 0; r < taken; ++r) {
          maximum_row(attention + (m + r) * pixels, panel.get(), pixels, tiles + r * kColumns,
                      first + r * kColumns);
        }
      } else {
        panel_product(taken, attention + m * pixels, pixels, int64_t{1}, panel.get(), pixels,
                      tiles, kColumns, false);
      }
      for (int64_t r = 0; r < taken; ++r) {
        A* row = tiles + r * kColumns;
        root_row(row, factor, settings.signed_sqrt, static_cast<A>(settings.eps), squares);
        const int64_t at = (m + r) * shape.channels + c;
        convert(row, count, to + at);
        if (argmax != nullptr) std::copy_n(first + r * kColumns, count, argmax + at);
      }
    }
    for (int64_t j = 0; j < count; ++j) total += static_cast<double>(squares[j]);
  }
  return total;
}

// ||P|| of an image from the sums of squares of its blocks.
double norm_of(const double* squares, int64_t blocks) {
  double total = 0;
  for (int64_t i = 0; i < blocks; ++i) total += squares[i];
  return std::sqrt(total);
}

// NaN stays NaN.
double length_of(double norm) { return norm < kSmallestNorm ? kSmallestNorm : norm; }

template <typename T>
void forward(const FeatureMap& features, const FeatureMap& maps, const Shape& shape,
             const Settings& settings, const Tensor& output, const Tensor& norm,
             const Tensor& argmax) {
  using A = accumulate_t<T>;
  constexpr bool kWide = std::is_same_v<T, A>;
  const Attention<T> attention(maps, features.steps.height, features.steps.width);
  const int64_t entries = shape.maps * shape.channels;
  const T* from = data<T>(features.tensor);
  T* out = mutable_data<T>(output);
  int32_t* first = settings.maximum ? mutable_data<int32_t>(argmax) : nullptr;
  A* norms = settings.normalize ? mutable_data<A>(norm) : nullptr;
  // Half precision keeps the roots of the whole batch wide until their norm is known.
  Scratch<A> wide(kWide ? 0 : shape.batch * entries);
  std::vector<double> squares(shape.batch * shape.blocks());
  const auto block = [&](int64_t b, int64_t i) {
    int32_t* image_first = first == nullptr ? nullptr : first + b * entries;
    A* to;
    if constexpr (kWide) {
      to = out + b * entries;
    } else {
      to = wide.get() + b * entries;
    }
    squares[b * shape.blocks() + i] =
        pool_block(from + b * features.steps.step_b, features.steps, attention.matrix(b), shape,
                   settings, i, to, image_first);
  };
  const auto finish = [&](int64_t b) {
    double factor = settings.scale;
    if (settings.normalize) {
      const double length = norm_of(squares.data() + b * shape.blocks(), shape.blocks());
      norms[b] = static_cast<A>(length);
      factor /= length_of(norms[b]);
    }
    const A multiplier = static_cast<A>(factor);
    T* row = out + b * entries;
    if constexpr (kWide) {
      for (int64_t i = 0; i < entries; ++i) row[i] *= multiplier;
    } else {
      const A* roots = wide.get() + b * entries;
      for (int64_t i = 0; i < entries; ++i) row[i] = static_cast<T>(roots[i] * multiplier);
    }
  };
  for_images(shape, block, finish);
}

// The gradient W of the pooled matrix of one image: from the gradient of the output and the unit
// vector P / ||P||, which is `units` times `to_unit`.
template <typename T, typename U>
struct PooledGradient {
  using A = accumulate_t<T>;
  const T* grad;
  const U* units;
  A to_unit, scale, along, length, inverse_length, factor;
  bool signed_sqrt;

  // panel[m kPanel + j] = W[m, c + j]; columns past `count` are 0.
  void rows(const Shape& shape, int64_t c, int64_t count, A* MAGSD_RESTRICT panel) const {
    constexpr int64_t kColumns = kPanel<A>;
    for (int64_t m = 0; m < shape.maps; ++m) {
      const T* g = grad + m * shape.channels + c;
      const U* u = units + m * shape.channels + c;
      A* to = panel + m * kColumns;
      if (count == kColumns) {
        row(g, u, kColumns, to);
      } else {
        std::fill(to, to + kColumns, A{0});
        row(g, u, count, to);
      }
    }
  }

  void row(const T* MAGSD_RESTRICT g, const U* MAGSD_RESTRICT u, int64_t count,
           A* MAGSD_RESTRICT to) const {
    if (signed_sqrt) {
      const A half = factor / 2;
      for (int64_t j = 0; j < count; ++j) {
        const A unit = static_cast<A>(u[j]) * to_unit;
        const A wide = (scale * static_cast<A>(g[j]) - unit * along) * inverse_length;
        const A slope = half / (std::abs(unit) * length);
        to[j] = unit == 0 ? A{0} : wide * slope;
      }
    } else {
      for (int64_t j = 0; j < count; ++j) {
        const A unit = static_cast<A>(u[j]) * to_unit;
        to[j] = (scale * static_cast<A>(g[j]) - unit * along) * inverse_length * factor;
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
                      const Shape& shape, int64_t c, int64_t count, A* grad_panel, A* grad_maps,
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
                    const Shape& shape, const Settings& settings, int64_t block,
                    const PooledGradient<T, U>& pooled, const int32_t* argmax, T* grad_features,
                    const MapSteps& grad_steps, accumulate_t<T>* grad_maps) {
  using A = accumulate_t<T>;
  constexpr int64_t kColumns = kPanel<A>;
  const int64_t pixels = shape.pixels;
  const int64_t panels = (shape.maps + kColumns - 1) / kColumns, padded = panels * kColumns;
  Scratch<A> weights(shape.maps * kColumns), turned(padded * kColumns);
  Scratch<A> panel(pixels * kColumns), rows(std::is_same_v<T, A> ? 0 : pixels * kColumns);
  if (grad_maps != nullptr) std::fill(grad_maps, grad_maps + pixels * padded, A{0});
  for (int64_t c = block * kBlock; c < shape.block_end(block); c += kColumns) {
    const int64_t count = std::min(kColumns, shape.block_end(block) - c);
    pooled.rows(shape, c, count, weights.get());
    const A* x = nullptr;
    int64_t step_p = kColumns, step_c = 1;
    if (grad_maps != nullptr) {
      if constexpr (std::is_same_v<T, A>) {
        x = features + c * steps.step_c;
        step_p = steps.step_p;
        step_c = steps.step_c;
      }
      if (x == nullptr || settings.maximum) {
        pack(features, steps, c, count, panel.get(), rows.get());
      }
      if (x == nullptr) x = panel.get();
    }
    if (settings.maximum) {
      Scratch<A> grad_panel(grad_features == nullptr ? 0 : pixels * kColumns);
      A* scattered = grad_features == nullptr ? nullptr : grad_panel.get();
      maximum_backward(weights.get(), argmax, attention, panel.get(), shape, c, count, scattered,
                       grad_maps, padded);
      if (scattered != nullptr) {
        unpack(scattered, grad_steps, c, count, grad_features, rows.get());
      }
      continue;
    }
    if (grad_maps != nullptr) {
      transpose_panels(weights.get(), shape.maps, count, turned.get());
      for (int64_t i = 0; i < panels; ++i) {
        panel_product(pixels, x, step_p, step_c, turned.get() + i * kColumns * kColumns, count,
                      grad_maps + i * kColumns, padded, true);
      }
    }
    if (grad_features != nullptr) {
      panel_product(pixels, attention, int64_t{1}, pixels, weights.get(), shape.maps, panel.get(),
                    kColumns, false);
      unpack(panel.get(), grad_steps, c, count, grad_features, rows.get());
    }
  }
}

// Adds up the blocks' shares (HW, padded) in order and resizes the sum back.
template <typename T>
class AttentionGradient {
  using A = accumulate_t<T>;

 public:
  AttentionGradient(const Shape& shape, int64_t height, int64_t width, const MapSteps& steps)
      : shape_(shape), steps_(steps), resized_(steps.height != height || steps.width != width) {
    if (!resized_) return;
    rows_ = adjoint_axis(resize_axis<A>(steps.height, height, Resampling::kBilinear, true),
                         steps.height);
    columns_ = adjoint_axis(resize_axis<A>(steps.width, width, Resampling::kBilinear, true),
                            steps.width);
    width_ = width;
  }

  void write(const A* shares, int64_t padded, T* to) const {
    const int64_t count = shape_.pixels * padded;
    Scratch<A> sum(count), plane(shape_.pixels), small(steps_.pixels()), line(width_);
    std::copy_n(shares, count, sum.get());
    for (int64_t i = 1; i < shape_.blocks(); ++i) {
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
  Shape shape_;
  MapSteps steps_;
  bool resized_;
  int64_t width_ = 0;
  Axis<A> rows_, columns_;
};

// Whether the output holds the root of every entry to the accumulation type's precision.
template <typename T>
bool holds_roots(const Settings& settings) {
  const double size = std::abs(settings.scale);
  return std::is_same_v<T, accumulate_t<T>> && size >= 1e-6 && size <= 1e6 &&
         (!settings.signed_sqrt || settings.eps >= 1e-30);
}

template <typename T, typename U>
void backward_from(const FeatureMap& features, const Shape& shape, const Settings& settings,
                   const T* grad, const U* units, bool are_roots, const Attention<T>& attention,
                   const accumulate_t<T>* norms, const int32_t* argmax,
                   const Gradients<T>& gradients) {
  using A = accumulate_t<T>;
  constexpr int64_t kColumns = kPanel<A>;
  const int64_t entries = shape.maps * shape.channels, blocks = shape.blocks();
  const int64_t padded = (shape.maps + kColumns - 1) / kColumns * kColumns;
  const int64_t share = shape.pixels * padded;
  std::vector<PooledGradient<T, U>> pooled(shape.batch);
  parallel_for(shape.batch, 1 + 32768 / entries, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const double length = settings.normalize ? length_of(norms[b]) : 1.0;
      const double to_unit = are_roots ? 1 / length : 1 / settings.scale;
      double along = 0;
      // Under the smallest norm the divisor is constant, and no gradient flows through it.
      if (settings.normalize && norms[b] >= kSmallestNorm) {
        along = settings.scale * to_unit * dot(grad + b * entries, units + b * entries, entries);
      }
      pooled[b] = {grad + b * entries,
                   units + b * entries,
                   static_cast<A>(to_unit),
                   static_cast<A>(settings.scale),
                   static_cast<A>(along),
                   static_cast<A>(length),
                   static_cast<A>(1 / length),
                   settings.maximum ? A{1} : A{1} / static_cast<A>(shape.pixels),
                   settings.signed_sqrt};
    }
  });
  const bool wants_attention = gradients.attention != nullptr;
  Scratch<A> shares(wants_attention ? shape.batch * blocks * share : 0);
  const AttentionGradient<T> attention_gradient(shape, features.steps.height, features.steps.width,
                                                gradients.attention_steps);
  const T* from = data<T>(features.tensor);
  for_images(
      shape,
      [&](int64_t b, int64_t i) {
        T* grad_features = gradients.features;
        if (grad_features != nullptr) grad_features += b * gradients.feature_steps.step_b;
        backward_block(from + b * features.steps.step_b, features.steps, attention.matrix(b),
                       shape, settings, i, pooled[b],
                       argmax == nullptr ? nullptr : argmax + b * entries, grad_features,
                       gradients.feature_steps,
                       wants_attention ? shares.get() + (b * blocks + i) * share : nullptr);
      },
      [&](int64_t b) {
        if (!wants_attention) return;
        attention_gradient.write(shares.get() + b * blocks * share, padded,
                                 gradients.attention + b * gradients.attention_steps.step_b);
      });
}

template <typename T>
void backward(const FeatureMap& features, const FeatureMap& maps, const Shape& shape,
              const Settings& settings, const Tensor& grad, const Tensor& output,
              const Tensor& norm, const Tensor& argmax, const Gradients<T>& gradients) {
  using A = accumulate_t<T>;
  const Attention<T> attention(maps, features.steps.height, features.steps.width);
  const int64_t entries = shape.maps * shape.channels;
  const A* norms = settings.normalize ? data<A>(norm) : nullptr;
  const int32_t* first = settings.maximum ? data<int32_t>(argmax) : nullptr;
  if (holds_roots<T>(settings)) {
    backward_from<T, T>(features, shape, settings, data<T>(grad), data<T>(output), false,
                        attention, norms, first, gradients);
    return;
  }
  Scratch<A> roots(shape.batch * entries);
  const T* from = data<T>(features.tensor);
  for_images(
      shape,
      [&](int64_t b, int64_t i) {
        pool_block(from + b * features.steps.step_b, features.steps, attention.matrix(b), shape,
                   settings, i, roots.get() + b * entries, static_cast<int32_t*>(nullptr));
      },
      [](int64_t) {});
  backward_from<T, A>(features, shape, settings, data<T>(grad), roots.get(), true, attention,
                      norms, first, gradients);
}

Settings settings_of(const std::string& pool, bool signed_sqrt, bool normalize, double scale,
                     double eps) {
  STD_TORCH_CHECK(pool == "avg" || pool == "max", "pool must be avg or max, got ", pool);
  return {pool == "max", signed_sqrt, normalize, scale, eps};
}

Shape shape_of(const Tensor& features, const Tensor& attention) {
  check_tensor(features, "features", 4);
  check_floating(features, "features");
  check_tensor(attention, "attention", 4);
  check_dtype(attention, "attention", features.scalar_type());
  check_sizes(attention, "attention", {features.size(0), -1, -1, -1});
  const Shape shape{features.size(0), features.size(1), attention.size(1),
                    features.size(2) * features.size(3)};
  STD_TORCH_CHECK(shape.channels > 0 && shape.pixels > 0, "features must not be empty");
  STD_TORCH_CHECK(shape.maps > 0 && attention.size(2) > 0 && attention.size(3) > 0,
                  "attention must not be empty");
  STD_TORCH_CHECK(shape.pixels <= std::numeric_limits<int32_t>::max(),
                  "features must have fewer than 2^31 pixels");
  return shape;
}

std::tuple<Tensor, Tensor, Tensor> bilinear_attention_pool(const Tensor& features,
                                                           const Tensor& attention,
                                                           const std::string& pool,
                                                           bool signed_sqrt, bool normalize,
                                                           double scale, double eps) {
  const Shape shape = shape_of(features, attention);
  const Settings settings = settings_of(pool, signed_sqrt, normalize, scale, eps);
  const ScalarType dtype = features.scalar_type();
  const Tensor output = uninitialized({shape.batch, shape.maps * shape.channels}, dtype);
  const Tensor norm = uninitialized({normalize ? shape.batch : 0}, accumulation_dtype(dtype));
  const Tensor argmax =
      settings.maximum ? uninitialized({shape.batch, shape.maps, shape.channels}, ScalarType::Int)
                       : uninitialized({0}, ScalarType::Int);
  if (shape.batch > 0) {
    const FeatureMap map(features), maps(attention);
    visit_floating(dtype, [&](auto type) {
      forward<decltype(type)>(map, maps, shape, settings, output, norm, argmax);
    });
  }
  return {output, norm, argmax};
}

std::tuple<Tensor, Tensor> bilinear_attention_pool_backward(
    const Tensor& grad, const Tensor& features, const Tensor& attention, const Tensor& output,
    const Tensor& norm, const Tensor& argmax, const std::string& pool, bool signed_sqrt,
    bool normalize, double scale, double eps, const std::vector<bool>& needs) {
  const Shape shape = shape_of(features, attention);
  const Settings settings = settings_of(pool, signed_sqrt, normalize, scale, eps);
  const ScalarType dtype = features.scalar_type();
  const int64_t entries = shape.maps * shape.channels;
  STD_TORCH_CHECK(needs.size() == 2, "needs must have 2 entries, got ", needs.size());
  check_tensor(grad, "grad", 2);
  check_dtype(grad, "grad", dtype);
  check_sizes(grad, "grad", {shape.batch, entries});
  check_tensor(output, "output", 2);
  check_dtype(output, "output", dtype);
  check_sizes(output, "output", {shape.batch, entries});
  if (normalize) {
    check_tensor(norm, "norm", 1);
    check_dtype(norm, "norm", accumulation_dtype(dtype));
    check_sizes(norm, "norm", {shape.batch});
  }
  if (settings.maximum) {
    check_tensor(argmax, "argmax", 3);
    check_dtype(argmax, "argmax", ScalarType::Int);
    check_sizes(argmax, "argmax", {shape.batch, shape.maps, shape.channels});
  }
  const bool last_f = is_channels_last(features), last_a = is_channels_last(attention);
  const Tensor grad_features = needs[0] ? empty_map_like(features) : uninitialized({0}, dtype);
  const Tensor grad_attention = needs[1] ? empty_map_like(attention) : uninitialized({0}, dtype);
  if (shape.batch > 0 && (needs[0] || needs[1])) {
    const FeatureMap map(features), maps(attention);
    const Tensor dense_grad = dense(grad), dense_output = dense(output);
    const Tensor dense_norm = normalize ? dense(norm) : norm;
    const Tensor dense_argmax = settings.maximum ? dense(argmax) : argmax;
    visit_floating(dtype, [&](auto type) {
      using T = decltype(type);
      const Gradients<T> gradients{needs[0] ? mutable_data<T>(grad_features) : nullptr,
                                   dense_steps(features, last_f),
                                   needs[1] ? mutable_data<T>(grad_attention) : nullptr,
                                   dense_steps(attention, last_a)};
      backward<T>(map, maps, shape, settings, dense_grad, dense_output, dense_norm, dense_argmax,
                  gradients);
    });
  }
  return {grad_features, grad_attention};
}

}  // namespace
}  // namespace magsd::MAGSD_ISA

MAGSD_OPERATORS(bilinear_pool, library) {
  library.impl("bilinear_attention_pool", TORCH_BOX(&bilinear_attention_pool));
  library.impl("bilinear_attention_pool_backward", TORCH_BOX(&bilinear_attention_pool_backward));
}
