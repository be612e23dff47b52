// Bilinear attention pooling, forward: P = A F^T over the pixels, its signed square root and norm.
//
// Moves the features once in and P (B M C) once out. P[m, c] is the sum over p of A[m, p] F[p, c],
// with panels of F or of A; see bilinear_pool.h for the partition.
#include "cpu/bilinear_pool.h"

#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace magsd::MAGSD_ISA::bilinear_pool {
namespace {

// ||P|| of an image from the sums of squares of its blocks.
double norm_of(const double* squares, int64_t blocks) {
  double total = 0;
  for (int64_t i = 0; i < blocks; ++i) total += squares[i];
  return std::sqrt(total);
}

template <typename T>
void pool(const FeatureMap& features, const FeatureMap& maps, const PoolShape& shape,
          const PoolSettings& settings, const PoolResults& results) {
  using A = accumulate_t<T>;
  constexpr bool kKeepsRoots = std::is_same_v<T, A>;
  const PoolAttention<T> attention(maps, features.steps.height, features.steps.width);
  const int64_t entries = shape.entries();
  const Pooling<T> pooling(features, attention, shape, settings);
  T* out = mutable_data<T>(results.output);
  int32_t* first = settings.maximum ? mutable_data<int32_t>(results.argmax) : nullptr;
  A* norms = settings.normalize ? mutable_data<A>(results.norm) : nullptr;
  // Half precision keeps the roots of the whole batch in float until their norm is known.
  Scratch<A> kept_roots(kKeepsRoots ? 0 : shape.batch * entries);
  std::vector<double> squares(shape.batch * blocks_of(shape));
  const auto block = [&](int64_t b, int64_t i) {
    int32_t* image_first = first == nullptr ? nullptr : first + b * entries;
    A* to;
    if constexpr (kKeepsRoots) {
      to = out + b * entries;
    } else {
      to = kept_roots.get() + b * entries;
    }
    squares[b * blocks_of(shape) + i] = pooling.block(b, i, to, image_first);
  };
  const auto finish = [&](int64_t b) {
    double factor = settings.scale;
    if (settings.normalize) {
      const double norm = norm_of(squares.data() + b * blocks_of(shape), blocks_of(shape));
      norms[b] = static_cast<A>(norm);
      factor /= clamped_norm(norms[b]);
    }
    const A multiplier = static_cast<A>(factor);
    T* row = out + b * entries;
    if constexpr (kKeepsRoots) {
      for (int64_t i = 0; i < entries; ++i) row[i] *= multiplier;
    } else {
      const A* roots = kept_roots.get() + b * entries;
      for (int64_t i = 0; i < entries; ++i) row[i] = static_cast<T>(roots[i] * multiplier);
    }
  };
  for_images(shape, [&](int64_t b) { pooling.start(b); }, block, finish);
}

struct Backend {
  template <typename T>
  static void forward(const DeviceScope&, const Tensor& features, const Tensor& attention,
                      const PoolShape& shape, const PoolSettings& settings, bool /*allow_tf32*/,
                      const PoolResults& results) {
    pool<T>(FeatureMap(features), FeatureMap(attention), shape, settings, results);
  }
};

}  // namespace

MAGSD_OPERATORS(bilinear_pool, library) {
  library.impl("bilinear_attention_pool", TORCH_BOX(&pool_forward<Backend>));
}

}  // namespace magsd::MAGSD_ISA::bilinear_pool
