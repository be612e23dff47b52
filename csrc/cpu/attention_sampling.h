// The operator of attention_sampling.cpp, for views that draw their maps.
#pragma once

#include "common/tensor.h"

namespace magsd::MAGSD_ISA::attention_sampling {

// (B, K) int64 draws from maps (B, M, h, w) by uniforms (B, K) float32.
torch::stable::Tensor sample_attention(const torch::stable::Tensor& attention,
                                       const torch::stable::Tensor& uniforms, double eps);

}  // namespace magsd::MAGSD_ISA::attention_sampling
