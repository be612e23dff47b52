// Activations and their gradients, for loops that become vector code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/batch_norm_act_arguments.h"
#include "common/macros.h"

namespace magsd::MAGSD_ISA::batch_norm_act {

// exp(x) for a loop that becomes vector code: 2^k e^r, |r| <= log(2) / 2, with the polynomial of
// the Cephes library, within 2 units in the last place. Beyond the range of float it is 0 or
// infinity; NaN stays.
MAGSD_HD float exponential(float x) {
  constexpr float kMost = 88.72283f, kLeast = -87.33654f;
  const float clamped = x > kMost ? kMost : (x < kLeast ? kLeast : x);
  const float k = __builtin_rintf(clamped * 1.44269504f);
  const float r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Half of the exponent at a time: 2^128 is no float. A NaN has no integer.
  const int32_t exponent = static_cast<int32_t>(k == k ? k : 0.0f), half = exponent / 2;
  const int32_t bits[2] = {(half + 127) * (1 << 23), (exponent - half + 127) * (1 << 23)};
  float powers[2];
  std::memcpy(powers, bits, sizeof(powers));
  const float result = p * powers[0] * powers[1];
  return x > kMost ? std::numeric_limits<float>::infinity() : (x < kLeast ? 0.0f : result);
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
