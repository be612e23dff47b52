// Bilinear resizing in one dimension: where an output samples its input, and its adjoint's weights.
// Source: the rule of torch.nn.functional.interpolate, mode "bilinear", without antialiasing.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace magsd {

// Output = (1 - weight) input[lower] + weight input[upper].
template <typename Real, typename Index = int64_t>
struct Sample {
  using Position = Index;
  Index lower, upper;
  Real weight;
};

// Inputs per output. A single output of a resize with aligned corners samples the first input.
template <typename Real>
MAGSD_HD Real sampling_step(int64_t length, int64_t size, bool align_corners) {
  if (!align_corners) return static_cast<Real>(length) / static_cast<Real>(size);
  return static_cast<Real>(length - 1) / static_cast<Real>(size > 1 ? size - 1 : 1);
}

// Where output `o` lies among the inputs; not negative, so that truncation is the floor.
template <typename Real, typename Index>
MAGSD_HD Real sampling_position(Index o, Real step, bool align_corners) {
  if (align_corners) return static_cast<Real>(o) * step;
  const Real position =
      (static_cast<Real>(o) + static_cast<Real>(0.5)) * step - static_cast<Real>(0.5);
  return position < 0 ? static_cast<Real>(0) : position;
}

// Where output `o` samples an input of `length` entries.
template <typename Real, typename Index = int64_t>
MAGSD_HD Sample<Real, Index> sample_at(typename Sample<Real, Index>::Position o,
                                       typename Sample<Real, Index>::Position length, Real step,
                                       bool align_corners) {
  const Real position = sampling_position(o, step, align_corners);
  Index lower = static_cast<Index>(position);
  if (lower > length - 1) lower = length - 1;
  const Index upper = lower + 1 < length ? lower + 1 : length - 1;
  return {lower, upper, position - static_cast<Real>(lower)};
}

// The weight with which an output that samples there reads its lower or upper input `i`.
template <typename Real, typename Index>
MAGSD_HD Real weight_of(const Sample<Real, Index>& at, Index i) {
  if (at.lower != i) return at.weight;
  return at.upper == i ? static_cast<Real>(1) : static_cast<Real>(1) - at.weight;
}

// First of `size` outputs whose lower input is at least `i`; `size` where none is. Outputs
// first_output(i - 1) to first_output(i + 1) - 1 are those that read input i.
template <typename Real, typename Index = int64_t>
MAGSD_HD Index first_output(typename Sample<Real, Index>::Position i,
                            typename Sample<Real, Index>::Position length,
                            typename Sample<Real, Index>::Position size, Real step,
                            bool align_corners) {
  if (i <= 0) return 0;
  if (i >= length) return size;
  // The position's inverse, which rounds; the samples decide.
  const Real half = static_cast<Real>(align_corners ? 0 : 0.5);
  const Real guess = (static_cast<Real>(i) + half) / step - half;
  Index o = guess < static_cast<Real>(size) ? static_cast<Index>(guess) : size;
  while (o > 0 && sample_at<Real, Index>(o - 1, length, step, align_corners).lower >= i) --o;
  while (o < size && sample_at<Real, Index>(o, length, step, align_corners).lower < i) ++o;
  return o;
}

// An upsampled value; the two products and their sum round one by one, as torch rounds them.
MAGSD_HD float interpolate(float lower, float upper, float weight) {
  return lower * (1.0f - weight) + upper * weight;
}

}  // namespace magsd
