// Parameters and running statistics of batch norms: (C,) tensors of any floating dtype and stride.
#pragma once

#include <cstdint>
#include <vector>

#include "common/tensor.h"

namespace magsd::MAGSD_ISA {

template <typename Vector>
void read_parameters(const Tensor& values, Vector& to) {
  using A = typename Vector::value_type;
  visit_floating(values.scalar_type(), [&](auto type) {
    const auto* from = data<decltype(type)>(values);
    const int64_t step = values.stride(0);
    for (size_t c = 0; c < to.size(); ++c) to[c] = static_cast<A>(from[c * step]);
  });
}

// Entry c.
inline double entry(const Tensor& values, int64_t c) {
  double result = 0;
  visit_floating(values.scalar_type(), [&](auto type) {
    result = static_cast<double>(data<decltype(type)>(values)[c * values.stride(0)]);
  });
  return result;
}

// Entry c of running statistics <- (1 - momentum) entry + momentum value, rounded once.
inline void update_running(const Tensor& running, int64_t c, double momentum, double value) {
  visit_floating(running.scalar_type(), [&](auto type) {
    using R = decltype(type);
    R* at = mutable_data<R>(running) + c * running.stride(0);
    const double updated = (1 - momentum) * static_cast<double>(*at) + momentum * value;
    *at = static_cast<R>(static_cast<accumulate_t<R>>(updated));
  });
}

}  // namespace magsd::MAGSD_ISA
