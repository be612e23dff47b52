// What every CPU operator does to its arguments first: checks of all that it indexes by, strides.
//
// The checks of the contract stand in Python; these hold when an operator is called directly, and
// end in an exception, never in a read out of bounds.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "common/dtype.h"
#include "cpu/instruction_set.h"

namespace magsd::MAGSD_ISA {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// A strided CPU tensor of `dims` dimensions.
inline void check_tensor(const Tensor& tensor, const char* name, int64_t dims) {
  STD_TORCH_CHECK(tensor.defined(), name, " is not defined");
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.dim() == dims, name, " must have ", dims, " dimensions, got ",
                  tensor.dim());
  STD_TORCH_CHECK(tensor.layout() == torch::headeronly::Layout::Strided, name, " must be strided");
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
}

inline void check_floating(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(is_floating(tensor.scalar_type()), name,
                  " must be float16, bfloat16, float32 or float64");
}

// -1 stands for any size.
inline void check_sizes(const Tensor& tensor, const char* name,
                        std::initializer_list<int64_t> sizes) {
  int64_t d = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size < 0 || tensor.size(d) == size, name, " must have size ", size,
                    " in dimension ", d, ", got ", tensor.size(d));
    ++d;
  }
}

// Dense, row by row; a copy only where it is not.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Uninitialised dense CPU tensor.
inline Tensor uninitialized(const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// Calls visitor(T{}) with the C++ type of a floating dtype.
template <typename Visitor>
void visit_floating(ScalarType dtype, const Visitor& visitor) {
  switch (dtype) {
    case ScalarType::Float:
      return visitor(float{});
    case ScalarType::Double:
      return visitor(double{});
    case ScalarType::BFloat16:
      return visitor(BFloat16{});
    case ScalarType::Half:
      return visitor(Half{});
    default:
      STD_TORCH_CHECK(false, "the dtype must be float16, bfloat16, float32 or float64");
  }
}

// Runs body(begin, end) over pieces of 0..count on torch's threads; a piece holds at least `grain`
// entries. What a body computes for an entry must not depend on the piece it lies in.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (count <= grain) return body(int64_t{0}, count);
  torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), body);
}

}  // namespace magsd::MAGSD_ISA
