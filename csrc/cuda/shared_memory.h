// Dynamic shared memory beyond what a kernel has without asking: 48 KB less what it declares.
//
// What a kernel declares is read once, and what it was granted is remembered, for every device: a
// launch asks the driver for nothing new. Neither question concerns a stream, so that both may be
// asked while one is captured.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

namespace magsd::MAGSD_ISA {

constexpr size_t kSharedUnasked = 48 * 1024;

// Lets blocks of `kernel` have `dynamic` bytes on the current device.
inline cudaError_t allow_shared(const void* kernel, size_t dynamic) {
  if (dynamic == 0) return cudaSuccess;  // nvcc bounds what a kernel declares.
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, size_t> granted;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  auto at = granted.find({device, kernel});
  if (at == granted.end()) {
    cudaFuncAttributes attributes{};
    status = cudaFuncGetAttributes(&attributes, kernel);
    if (status != cudaSuccess) return status;
    at = granted.insert({{device, kernel}, kSharedUnasked - attributes.sharedSizeBytes}).first;
  }
  if (dynamic <= at->second) return cudaSuccess;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(dynamic));
  if (status == cudaSuccess) at->second = dynamic;
  return status;
}

}  // namespace magsd::MAGSD_ISA
