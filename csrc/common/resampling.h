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

// Under bilinear output o samples the inputs at position(o) / bilinear_unit.
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

}  // namespace magsd
