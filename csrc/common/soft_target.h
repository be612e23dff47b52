// The rule of the soft distance's target. Source: magsd_kernels/soft_distance.py.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace magsd::MAGSD_ISA::soft_distance {

// Whether the raw prediction is taken as it is: right, and confident. NaN is not confident.
template <typename A>
MAGSD_HD bool keeps_prediction(int64_t predicted, A top, int64_t target, A confidence) {
  return predicted == target && top >= confidence;
}

// Entry k of the smoothed target that stands in for a prediction that is not kept.
template <typename A>
MAGSD_HD A smoothed_target(int64_t k, int64_t target, int64_t classes, double smoothing) {
  return static_cast<A>(k == target ? 1 - static_cast<double>(classes) * smoothing : smoothing);
}

}  // namespace magsd::MAGSD_ISA::soft_distance
