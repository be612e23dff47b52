// Stands in for CUDA's runtime where the host's side of a launch is tested: two devices, and their
// rule for shared memory.
#pragma once

#include <array>
#include <cstddef>
#include <map>

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  std::size_t sharedSizeBytes;
};

namespace driver {

struct Kernel {
  std::size_t declared = 0;
  std::array<std::size_t, 2> granted{};
};
inline std::map<const void*, Kernel> kernels;
inline int device = 0;
inline int calls = 0;

// Whether a launch on the current device would start.
inline bool starts(const void* kernel, std::size_t dynamic) {
  const Kernel& known = kernels[kernel];
  return known.declared + dynamic <= 48 * 1024 || dynamic <= known.granted[device];
}

}  // namespace driver

inline cudaError_t cudaGetDevice(int* device) {
  *device = driver::device;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  ++driver::calls;
  attributes->sharedSizeBytes = driver::kernels[kernel].declared;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  ++driver::calls;
  driver::Kernel& known = driver::kernels[kernel];
  const auto wanted = static_cast<std::size_t>(bytes);
  if (known.declared + wanted > 227 * 1024) return cudaErrorInvalidValue;
  known.granted[driver::device] = wanted;
  return cudaSuccess;
}
