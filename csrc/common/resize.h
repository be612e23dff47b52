// Bilinear resizing in one dimension: where an output samples its input, and its adjoint's weights.
// Source: the rule of torch.nn.functional.interpolate, mode "bilinear", without antialiasing.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace magsd {

// Output = (1 - weight) input[lower] + weight input[upper].
template <typename Real>
struct Sample {
  int64_t lower, upper;
  Real weight;
};

// Inputs per output. A single output of a resize with aligned corners samples the first input.
template <typename Real>
MAGSD_HD Real sampling_step(int64_t length, int64_t size, bool align_corners) {
  if (!align_corners) return static_cast<Real>(length) / static_cast<Real>(size);
  return static_cast<Real>(length - 1) / static_cast<Real>(size > 1 ? size - 1 : 1);
}

// Where output `o` samples an input of `length` entries.
template <typename Real>
MAGSD_HD Sample<Real> sample_at(int64_t o, int64_t length, Real step, bool align_corners) {
  Real position;
  if (align_corners) {
    position = static_cast<Real>(o) * step;
  } else {
    position = (static_cast<Real>(o) + static_cast<Real>(0.5)) * step - static_cast<Real>(0.5);
    if (position < 0) position = 0;
  }
  // Not negative, so that truncation is the floor.
  int64_t lower = static_cast<int64_t>(position);
  if (lower > length - 1) lower = length - 1;
  const int64_t upper = lower + 1 < length ? lower + 1 : length - 1;
  return {lower, upper, position - static_cast<Real>(lower)};
}

// An upsampled value; the two products and their sum round one by one, as torch rounds them.
MAGSD_HD float interpolate(float lower, float upper, float weight) {
  return lower * (1.0f - weight) + upper * weight;
}

}  // namespace magsd
