// Random numbers as an operator receives them.
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "common/tensor.h"

namespace magsd::MAGSD_ISA {

// Uniforms (B, n) of any strides, read in place.
struct Uniforms {
  const float* first;
  int64_t step_b, step;
  MAGSD_HD float operator()(int64_t b, int64_t i) const { return first[b * step_b + i * step]; }
};

inline Uniforms uniforms_of(const Tensor& uniforms) {
  return {data<float>(uniforms), uniforms.stride(0), uniforms.stride(1)};
}

}  // namespace magsd::MAGSD_ISA
