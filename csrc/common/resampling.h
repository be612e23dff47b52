// Resampling in one dimension: which inputs an output weighs, which outputs weigh an input, and the
// weight. Both directions come from integers without rounding, so that they never disagree, and a
// weight is the same number whichever side asks for it.
//
// Source: torch.nn.functional.adaptive_avg_pool2d ("area") and interpolate ("bilinear", "nearest"),
// which copy where the sizes are equal.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace magsd {

enum class Resampling : int32_t { kArea, kBilinear, kNearest };

// One dimension of a resize; sizes are 1 to 2^24.
struct ResizeRule {
  int64_t size_in, size_out;
  Resampling mode;
  bool align_corners;
};

// Entries first, first + 1, ... of a side.
struct Span {
  int64_t first, count;
};

// Of numbers that are not negative; 64-bit division is slow, and seldom needed.
MAGSD_HD int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}
MAGSD_HD int64_t rounded_up_quotient(int64_t a, int64_t b) { return quotient(a + b - 1, b); }

// Entries of a side of `from` entries that entry i of a side of `to` entries overlaps.
MAGSD_HD Span area_span(int64_t i, int64_t from, int64_t to) {
  const int64_t first = quotient(i * from, to);
  return {first, rounded_up_quotient((i + 1) * from, to) - first};
}

// Input of output o under nearest. torch computes it in float for every dtype.
MAGSD_HD int64_t nearest_index(int64_t o, int64_t size_in, int64_t size_out) {
  const float scale = static_cast<float>(size_in) / static_cast<float>(size_out);
  const int64_t index = static_cast<int64_t>(std::floor(static_cast<float>(o) * scale));
  return index < size_in ? index : size_in - 1;
}

// First output whose input under nearest is j or a later one.
MAGSD_HD int64_t nearest_reach(const ResizeRule& rule, int64_t j) {
  int64_t low = 0, high = rule.size_out;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (nearest_index(middle, rule.size_in, rule.size_out) < j) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Under bilinear output o reads the inputs at position(o) / bilinear_unit.
MAGSD_HD int64_t bilinear_unit(const ResizeRule& rule) {
  if (!rule.align_corners) return 2 * rule.size_out;
  return rule.size_out > 1 ? rule.size_out - 1 : 1;
}
MAGSD_HD int64_t bilinear_position(const ResizeRule& rule, int64_t o) {
  const int64_t position =
      rule.align_corners ? o * (rule.size_in - 1) : (2 * o + 1) * rule.size_in - rule.size_out;
  const int64_t last = (rule.size_in - 1) * bilinear_unit(rule);
  return position < 0 ? 0 : (position < last ? position : last);
}

// First output whose position is that of input j or a later one.
MAGSD_HD int64_t bilinear_reach(const ResizeRule& rule, int64_t j) {
  if (j <= 0) return 0;
  if (j >= rule.size_in) return rule.size_out;
  int64_t reach;
  if (rule.align_corners) {
    reach = rounded_up_quotient(j * bilinear_unit(rule), rule.size_in - 1);
  } else {
    reach = quotient(rounded_up_quotient((2 * j + 1) * rule.size_out, rule.size_in), 2);
  }
  return reach < rule.size_out ? reach : rule.size_out;
}

// Inputs that output o weighs; at least one.
MAGSD_HD Span inputs_of(const ResizeRule& rule, int64_t o) {
  if (rule.size_in == rule.size_out) return {o, 1};
  if (rule.mode == Resampling::kArea) return area_span(o, rule.size_in, rule.size_out);
  if (rule.mode == Resampling::kNearest) {
    return {nearest_index(o, rule.size_in, rule.size_out), 1};
  }
  const int64_t lower = quotient(bilinear_position(rule, o), bilinear_unit(rule));
  return {lower, lower + 1 < rule.size_in ? 2 : 1};
}

// Outputs that weigh input i; there may be none.
MAGSD_HD Span outputs_of(const ResizeRule& rule, int64_t i) {
  if (rule.size_in == rule.size_out) return {i, 1};
  if (rule.mode == Resampling::kArea) return area_span(i, rule.size_out, rule.size_in);
  const bool nearest = rule.mode == Resampling::kNearest;
  const int64_t first = nearest ? nearest_reach(rule, i) : bilinear_reach(rule, i - 1);
  const int64_t last = nearest ? nearest_reach(rule, i + 1) : bilinear_reach(rule, i + 1);
  return {first, last - first};
}

// Weight of input i in output o, which weighs it.
template <typename Real>
MAGSD_HD Real resize_weight(const ResizeRule& rule, int64_t o, int64_t i) {
  if (rule.mode == Resampling::kNearest || rule.size_in == rule.size_out) return 1;
  if (rule.mode == Resampling::kArea) {
    return static_cast<Real>(1) /
           static_cast<Real>(area_span(o, rule.size_in, rule.size_out).count);
  }
  const int64_t unit = bilinear_unit(rule);
  const int64_t offset = bilinear_position(rule, o) - i * unit;
  return static_cast<Real>(unit - (offset < 0 ? -offset : offset)) / static_cast<Real>(unit);
}

// ------------------------------------------------------------------------ bilinear, by positions
//
// The same rule in the type that torch computes it in, for kernels that follow its rounding.

// Output = (1 - weight) input[lower] + weight input[upper].
template <typename Real, typename Index = int64_t>
struct LinearTaps {
  using Position = Index;
  Index lower, upper;
  Real weight;
};

// Inputs per output. A single output of a resize with aligned corners reads the first input.
template <typename Real>
MAGSD_HD Real resize_step(int64_t length, int64_t size, bool align_corners) {
  if (!align_corners) return static_cast<Real>(length) / static_cast<Real>(size);
  return static_cast<Real>(length - 1) / static_cast<Real>(size > 1 ? size - 1 : 1);
}

// Where output `o` lies among the inputs; not negative, so that truncation is the floor.
template <typename Real, typename Index>
MAGSD_HD Real resize_position(Index o, Real step, bool align_corners) {
  if (align_corners) return static_cast<Real>(o) * step;
  const Real position =
      (static_cast<Real>(o) + static_cast<Real>(0.5)) * step - static_cast<Real>(0.5);
  return position < 0 ? static_cast<Real>(0) : position;
}

// What output `o` reads of an input of `length` entries.
template <typename Real, typename Index = int64_t>
MAGSD_HD LinearTaps<Real, Index> linear_taps(typename LinearTaps<Real, Index>::Position o,
                                             typename LinearTaps<Real, Index>::Position length,
                                             Real step, bool align_corners) {
  const Real position = resize_position(o, step, align_corners);
  Index lower = static_cast<Index>(position);
  if (lower > length - 1) lower = length - 1;
  const Index upper = lower + 1 < length ? lower + 1 : length - 1;
  return {lower, upper, position - static_cast<Real>(lower)};
}

// The weight with which an output reads its lower or upper input `i`.
template <typename Real, typename Index>
MAGSD_HD Real weight_of(const LinearTaps<Real, Index>& at, Index i) {
  if (at.lower != i) return at.weight;
  return at.upper == i ? static_cast<Real>(1) : static_cast<Real>(1) - at.weight;
}

// First of `size` outputs whose lower input is at least `i`; `size` where none is. Outputs
// first_output(i - 1) to first_output(i + 1) - 1 are those that read input i.
template <typename Real, typename Index = int64_t>
MAGSD_HD Index first_output(typename LinearTaps<Real, Index>::Position i,
                            typename LinearTaps<Real, Index>::Position length,
                            typename LinearTaps<Real, Index>::Position size, Real step,
                            bool align_corners) {
  if (i <= 0) return 0;
  if (i >= length) return size;
  // The position's inverse, which rounds; the taps decide.
  const Real half = static_cast<Real>(align_corners ? 0 : 0.5);
  const Real guess = (static_cast<Real>(i) + half) / step - half;
  Index o = guess < static_cast<Real>(size) ? static_cast<Index>(guess) : size;
  while (o > 0 && linear_taps<Real, Index>(o - 1, length, step, align_corners).lower >= i) --o;
  while (o < size && linear_taps<Real, Index>(o, length, step, align_corners).lower < i) ++o;
  return o;
}

// An upsampled value; the two products and their sum round one by one, as torch rounds them.
MAGSD_HD float interpolate(float lower, float upper, float weight) {
  return lower * (1.0f - weight) + upper * weight;
}

}  // namespace magsd
