// Rows of a box resized to the whole image, and the adjoint, for planes of either memory format.
//
// Along x a box is never shrunk, so that a vector of consecutive outputs reads entries that lie
// within one vector's length: two loads and two permutations replace two gathers. The table notes
// for each vector of outputs where its inputs begin, or that they do not fit (-1).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/image_layout.h"
#include "common/resampling.h"

namespace magsd::MAGSD_ISA::attention_augment {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 1;
#endif

// Where each element of an output row (width x inner) reads a row of the box. The upper neighbor
// lies `inner` elements behind the lower one: rows carry their last pixel twice.
template <typename Real>
class ColumnTable {
 public:
  ColumnTable(int64_t width, int64_t inner)
      : width_(width), inner_(inner), lower_(width * inner + kLanes), weight_(width * inner) {
    base_.resize(width * inner / kLanes);
  }

  void set(int64_t length, bool align_corners) {
    const Real step = resize_step<Real>(length, width_, align_corners);
    for (int64_t x = 0; x < width_; ++x) {
      const LinearTaps<Real> at = linear_taps(x, length, step, align_corners);
      for (int64_t c = 0; c < inner_; ++c) {
        lower_[x * inner_ + c] = static_cast<int32_t>(at.lower * inner_ + c);
        weight_[x * inner_ + c] = at.weight;
      }
    }
    if constexpr (kLanes == 1 || !std::is_same_v<Real, float>) return;
    for (size_t v = 0; v < base_.size(); ++v) {
      const int32_t* lower = lower_.data() + v * kLanes;
      const auto [low, high] = std::minmax_element(lower, lower + kLanes);
      base_[v] = *high - *low < kLanes ? *low : -1;
    }
  }

  // result[i] = own image[i] + crop ((1 - w) row[lower] + w row[lower + inner]); without an image
  // the crop alone. `row` is readable for kLanes + inner elements behind its last.
  void apply(const Real* MAGSD_RESTRICT row, const Real* MAGSD_RESTRICT image, Real own, Real crop,
             Real* MAGSD_RESTRICT result) const {
    const int64_t count = width_ * inner_;
    int64_t i = 0;
#if defined(__AVX2__)
    if constexpr (std::is_same_v<Real, float>) {
      for (size_t v = 0; v < base_.size(); ++v, i += kLanes) {
        if (base_[v] < 0) {
          part(row, image, own, crop, result, i, i + kLanes);
        } else {
          vector(row + base_[v], base_[v], image, own, crop, result, i);
        }
      }
    }
#endif
    part(row, image, own, crop, result, i, count);
  }

  // grad[x] of the box's row, from that of the output row; x runs over `length` pixels.
  void apply_adjoint(const Real* MAGSD_RESTRICT grad_result, int64_t length,
                     Real* MAGSD_RESTRICT grad) const {
    std::fill(grad, grad + length * inner_, Real(0));
    for (int64_t i = 0; i < width_ * inner_; ++i) {
      const int64_t lower = lower_[i];
      const int64_t upper = lower + inner_ < length * inner_ ? lower + inner_ : lower;
      grad[lower] += (Real(1) - weight_[i]) * grad_result[i];
      grad[upper] += weight_[i] * grad_result[i];
    }
  }

 private:
  void part(const Real* MAGSD_RESTRICT row, const Real* MAGSD_RESTRICT image, Real own, Real crop,
            Real* MAGSD_RESTRICT result, int64_t begin, int64_t end) const {
    const int32_t* MAGSD_RESTRICT lower = lower_.data();
    const Real* MAGSD_RESTRICT weight = weight_.data();
    const int64_t inner = inner_;
    for (int64_t i = begin; i < end; ++i) {
      const Real first = row[lower[i]];
      const Real value = first + weight[i] * (row[lower[i] + inner] - first);
      result[i] = image ? own * image[i] + crop * value : value;
    }
  }

#if defined(__AVX512F__)
  void vector(const float* row, int32_t base, const float* image, float own, float crop,
              float* result, int64_t i) const {
    const __m512i lower =
        _mm512_sub_epi32(_mm512_loadu_si512(lower_.data() + i), _mm512_set1_epi32(base));
    const __m512 first = _mm512_permutexvar_ps(lower, _mm512_loadu_ps(row));
    const __m512 second = _mm512_permutexvar_ps(lower, _mm512_loadu_ps(row + inner_));
    const __m512 weight = _mm512_loadu_ps(weight_.data() + i);
    __m512 value = _mm512_fmadd_ps(weight, _mm512_sub_ps(second, first), first);
    if (image) {
      const __m512 kept = _mm512_mul_ps(_mm512_set1_ps(own), _mm512_loadu_ps(image + i));
      value = _mm512_fmadd_ps(_mm512_set1_ps(crop), value, kept);
    }
    _mm512_storeu_ps(result + i, value);
  }
#elif defined(__AVX2__)
  void vector(const float* row, int32_t base, const float* image, float own, float crop,
              float* result, int64_t i) const {
    const __m256i* index = reinterpret_cast<const __m256i*>(lower_.data() + i);
    const __m256i lower = _mm256_sub_epi32(_mm256_loadu_si256(index), _mm256_set1_epi32(base));
    const __m256 first = _mm256_permutevar8x32_ps(_mm256_loadu_ps(row), lower);
    const __m256 second = _mm256_permutevar8x32_ps(_mm256_loadu_ps(row + inner_), lower);
    const __m256 weight = _mm256_loadu_ps(weight_.data() + i);
    __m256 value = _mm256_fmadd_ps(weight, _mm256_sub_ps(second, first), first);
    if (image) {
      const __m256 kept = _mm256_mul_ps(_mm256_set1_ps(own), _mm256_loadu_ps(image + i));
      value = _mm256_fmadd_ps(_mm256_set1_ps(crop), value, kept);
    }
    _mm256_storeu_ps(result + i, value);
  }
#endif

  int64_t width_, inner_;
  std::vector<int32_t> lower_, base_;
  std::vector<Real> weight_;
};

// Two neighboring rows of a box in the accumulation type, read once while outputs lie between them.
template <typename T>
class RowPair {
 public:
  using Real = accumulate_t<T>;

  explicit RowPair(int64_t row) : upcast_{std::vector<Real>(row), std::vector<Real>(row)} {}

  void forget() { held_[0] = held_[1] = nullptr; }

  // mixed[0..count) = row `lower` + weight (row `upper` - row `lower`)
  void mix(const T* lower, const T* upper, Real weight, int64_t count, Real* MAGSD_RESTRICT mixed) {
    const Real* MAGSD_RESTRICT first = upcast(lower, count, 0);
    const Real* MAGSD_RESTRICT second = upper == lower ? first : upcast(upper, count, 1);
    for (int64_t i = 0; i < count; ++i) mixed[i] = first[i] + weight * (second[i] - first[i]);
  }

 private:
  const Real* upcast(const T* row, int64_t count, int slot) {
    if constexpr (std::is_same_v<T, Real>) {
      return row;
    } else {
      if (slot == 0 && held_[1] == row) {
        std::swap(upcast_[0], upcast_[1]);
        std::swap(held_[0], held_[1]);
      }
      if (held_[slot] != row) {
        load_row(row, count, upcast_[slot].data());
        held_[slot] = row;
      }
      return upcast_[slot].data();
    }
  }

  std::vector<Real> upcast_[2];
  const T* held_[2] = {nullptr, nullptr};
};

}  // namespace magsd::MAGSD_ISA::attention_augment
