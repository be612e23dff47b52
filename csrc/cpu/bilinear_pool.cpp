// Bilinear attention pooling, forward: P = A F^T over the pixels, its signed square root and norm.
//
// Moves the features once in and P (B M C) once out. P[m, c] is the sum over p of A[m, p] F[p, c],
// with panels of F or of A; see bilinear_pool.h for the cut.
#include "cpu/bilinear_pool.h"

#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace magsd::MAGSD_ISA {
namespace {

// ||P|| of an image from the sums of squares of its blocks.
double norm_of(const double* squares, int64_t blocks) {
  double total = 0;
  for (int64_t i = 0; i < blocks; ++i) total += squares[i];
  return std::sqrt(total);
}

template <typename T>
void forward(const FeatureMap& features, const FeatureMap& maps, const PoolShape& shape,
             const PoolSettings& settings, const PoolResults& results) {
  using A = accumulate_t<T>;
  constexpr bool kWide = std::is_same_v<T, A>;
  const PoolAttention<T> attention(maps, features.steps.height, features.steps.width);
  const int64_t entries = shape.entries();
  const Pooling<T> pooling(features, attention, shape, settings);
  T* out = mutable_data<T>(results.output);
  int32_t* first = settings.maximum ? mutable_data<int32_t>(results.argmax) : nullptr;
  A* norms = settings.normalize ? mutable_data<A>(results.norm) : nullptr;
  // Half precision keeps the roots of the whole batch wide until their norm is known.
  Scratch<A> wide(kWide ? 0 : shape.batch * entries);
  std::vector<double> squares(shape.batch * blocks_of(shape));
  const auto block = [&](int64_t b, int64_t i) {
    int32_t* image_first = first == nullptr ? nullptr : first + b * entries;
    A* to;
    if constexpr (kWide) {
      to = out + b * entries;
    } else {
      to = wide.get() + b * entries;
    }
    squares[b * blocks_of(shape) + i] = pooling.block(b, i, to, image_first);
  };
  const auto finish = [&](int64_t b) {
    double factor = settings.scale;
    if (settings.normalize) {
      const double length = norm_of(squares.data() + b * blocks_of(shape), blocks_of(shape));
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
  for_images(shape, [&](int64_t b) { pooling.start(b); }, block, finish);
}

std::tuple<Tensor, Tensor, Tensor> bilinear_attention_pool(
    const Tensor& features, const Tensor& attention, const std::string& pool, bool signed_sqrt,
    bool normalize, double scale, double eps, bool /*allow_tf32*/) {
  const PoolShape shape = check_pool_inputs(features, attention);
  const PoolSettings settings = pool_settings(pool, signed_sqrt, normalize, scale, eps);
  const PoolResults results(shape, settings, features.scalar_type());
  if (shape.batch > 0) {
    const FeatureMap map(features), maps(attention);
    visit_floating(features.scalar_type(), [&](auto type) {
      forward<decltype(type)>(map, maps, shape, settings, results);
    });
  }
  return {results.output, results.norm, results.argmax};
}

}  // namespace
}  // namespace magsd::MAGSD_ISA

MAGSD_OPERATORS(bilinear_pool, library) {
  library.impl("bilinear_attention_pool", TORCH_BOX(&bilinear_attention_pool));
}
