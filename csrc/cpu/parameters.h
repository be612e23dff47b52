// Parameters and running statistics of batch norms: (C,) tensors of any floating dtype and stride.
#pragma once

#include <cstdint>
#include <utility>
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

// Entries of a (C,) tensor, for loops over channels: asking a tensor for its memory takes longer
// than what is done with an entry.
class Entries {
 public:
  explicit Entries(const Tensor& values) : type_(values.scalar_type()), step_(values.stride(0)) {
    visit_floating(type_, [&](auto type) { first_ = mutable_data<decltype(type)>(values); });
  }

  double get(int64_t c) const {
    double result = 0;
    visit_floating(type_, [&](auto type) {
      result = static_cast<double>(static_cast<const decltype(type)*>(first_)[c * step_]);
    });
    return result;
  }
  // Rounds once.
  void set(int64_t c, double value) const {
    visit_floating(type_, [&](auto type) {
      using R = decltype(type);
      static_cast<R*>(first_)[c * step_] = static_cast<R>(static_cast<accumulate_t<R>>(value));
    });
  }
  // As running statistics: entry <- (1 - momentum) entry + momentum value.
  void update(int64_t c, double momentum, double value) const {
    set(c, (1 - momentum) * get(c) + momentum * value);
  }

 private:
  decltype(std::declval<Tensor>().scalar_type()) type_;
  int64_t step_;
  void* first_ = nullptr;
};

}  // namespace magsd::MAGSD_ISA
