// What every compiled operator does to its arguments first: checks of all that it indexes by,
// strides.
//
// The checks of the contract stand in Python; these hold when an operator is called directly, and
// end in an exception, never in a read out of bounds. The CUDA operators are compiled with
// MAGSD_DEVICE_CUDA and take tensors of the current CUDA device; the others take CPU tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "common/dtype.h"

namespace magsd::MAGSD_ISA {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(MAGSD_DEVICE_CUDA)
constexpr DeviceType kDevice = DeviceType::CUDA;
constexpr const char* kDeviceName = "CUDA";
#else
constexpr DeviceType kDevice = DeviceType::CPU;
constexpr const char* kDeviceName = "CPU";
#endif

inline int32_t current_device() {
  if constexpr (kDevice == DeviceType::CPU) return 0;
  return torch::stable::accelerator::getCurrentDeviceIndex();
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline ScalarType accumulation_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A strided tensor of `dims` dimensions on the device that this compilation serves.
inline void check_tensor(const Tensor& tensor, const char* name, int64_t dims) {
  STD_TORCH_CHECK(tensor.defined(), name, " is not defined");
  STD_TORCH_CHECK(tensor.device().type() == kDevice, name, " must be on a ", kDeviceName,
                  " device");
  if constexpr (kDevice == DeviceType::CUDA) {
    const int32_t current = current_device();
    STD_TORCH_CHECK(tensor.get_device_index() == current, name, " must be on device ", current,
                    ", got ", tensor.get_device_index());
  }
  STD_TORCH_CHECK(tensor.dim() == dims, name, " must have ", dims, " dimensions, got ",
                  tensor.dim());
  int32_t layout;  // by the function of torch 2.10, whose Tensor has no member for it
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  STD_TORCH_CHECK(layout == aoti_torch_layout_strided(), name, " must be strided");
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

inline int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    default:
      return aoti_torch_dtype_float32();
  }
}

// Uninitialized tensor on the current device. torch::stable::empty goes through the dispatcher,
// which takes as long as a small kernel.
inline Tensor empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                            ScalarType dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype_code(dtype),
                                                  static_cast<int32_t>(kDevice), current_device(),
                                                  &handle));
  return Tensor(handle);
}

// The same, dense.
inline Tensor uninitialized(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0; step *= sizes[d] > 0 ? sizes[d] : 1) strides[d] = step;
  return empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype);
}

// `is_channels_last` of magsd_kernels/_layout.py, which the fakes follow too.
inline bool is_channels_last(const Tensor& images) {
  if (images.is_contiguous()) return false;
  const auto size = images.sizes();
  const auto step = images.strides();
  constexpr int c = 1, y = 2, x = 3;
  return size[c] > 1 && step[c] == 1 && (size[x] == 1 || step[x] >= size[c]) &&
         (size[y] == 1 || step[y] >= step[x]);
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

}  // namespace magsd::MAGSD_ISA
