// Loops on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "cpu/instruction_set.h"

namespace magsd::MAGSD_ISA {

// Runs body(begin, end) over pieces of 0..count on torch's threads; a piece holds at least `grain`
// entries. What a body computes for an entry must not depend on the piece it lies in.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (count <= grain) return body(int64_t{0}, count);
  torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), body);
}

}  // namespace magsd::MAGSD_ISA
