// The rule by which `sample_attention` draws a map. Source: magsd_kernels/attention_sampling.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace magsd::MAGSD_ISA::attention_sampling {

// Weight of a map whose pixels add up to `sum`. A comparison with NaN is false, so that NaN counts
// as 0, as a negative sum does.
MAGSD_HD double map_weight(double sum, double eps) {
  return std::sqrt((sum > 0 ? sum : 0.0) + eps);
}

// Number of entries of `cumulative`, the inclusive cumulative weights divided by their last, that
// are at most u; at most count - 1.
MAGSD_HD int64_t sampled_map(const double* cumulative, int64_t count, float u) {
  int64_t below = 0;
  for (int64_t m = 0; m < count; ++m) below += cumulative[m] <= static_cast<double>(u);
  return below < count ? below : count - 1;
}

}  // namespace magsd::MAGSD_ISA::attention_sampling
