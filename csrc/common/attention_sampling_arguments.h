// Arguments of `sample_attention`, checked for the CPU and the CUDA kernels alike, and its result.
#pragma once

#include "common/tensor.h"

namespace magsd::MAGSD_ISA::attention_sampling {

// The draws (B, K) int64, uninitialized, from maps (B, M, h, w) by uniforms (B, K).
inline Tensor empty_draws(const Tensor& attention, const Tensor& uniforms) {
  check_tensor(attention, "attention", 4);
  check_floating(attention, "attention");
  check_tensor(uniforms, "uniforms", 2);
  check_dtype(uniforms, "uniforms", ScalarType::Float);
  check_sizes(uniforms, "uniforms", {attention.size(0), -1});
  STD_TORCH_CHECK(attention.size(1) > 0, "attention must have at least one map");
  return uninitialized({uniforms.size(0), uniforms.size(1)}, ScalarType::Long);
}

}  // namespace magsd::MAGSD_ISA::attention_sampling
