// Activations and their gradients, for loops that become vector code.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/batch_norm_act_arguments.h"
#include "common/dtype.h"
#include "common/macros.h"

namespace magsd::MAGSD_ISA::batch_norm_act {

// exp(x) for a loop that becomes vector code: 2^n e^r, |r| <= log(2) / 2, with the polynomial of
// the Cephes library, within 2 units in the last place. No branch, no conversion of a float to an
// integer and no array, which all keep the compiler from it. NaN stays.
MAGSD_HD float exponential(float x) {
  // Beyond these the result is infinity or 0 by the multiplications below.
  constexpr float kMost = 89.5f, kLeast = -105.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 2^23: a sum with it has no digits behind the point
  constexpr uint32_t kRoundBits = 0x4b400000u;
  const float low = x > kMost ? kMost : x;
  const float clamped = low < kLeast ? kLeast : low;
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors: 2^128 and 2^-150 are no floats.
  const uint32_t exponent = float_bits(shifted) - kRoundBits + 256u;  // above 0
  const uint32_t half = exponent >> 1;
  return p * float_of((half - 1u) << 23) * float_of((exponent - half - 1u) << 23);
}
MAGSD_HD double exponential(double x) { return std::exp(x); }

template <typename A>
MAGSD_HD A sigmoid(A z) {
  return 1 / (1 + exponential(-z));
}

template <Act kAct, typename A>
MAGSD_HD A activate(A z) {
  if constexpr (kAct == Act::kRelu) return z <= 0 ? A{0} : z;  // NaN passes
  if constexpr (kAct == Act::kSilu) return z * sigmoid(z);
  return z;
}

// The gradient before the activation. `z` is its argument, or for relu its result.
template <Act kAct, typename A>
MAGSD_HD A differentiate(A grad, [[maybe_unused]] A z) {
  if constexpr (kAct == Act::kRelu) return z <= 0 ? A{0} : grad;
  if constexpr (kAct == Act::kSilu) {
    const A s = sigmoid(z);
    return grad * s * (1 + z * (1 - s));
  }
  return grad;
}

}  // namespace magsd::MAGSD_ISA::batch_norm_act
