// Stands in for CUDA's runtime where the host's side of a launch is tested: two devices, their rule
// for shared memory, and how many clusters find room on them.
#pragma once

#include <array>
#include <cstddef>
#include <map>

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  std::size_t sharedSizeBytes;
  int ptxVersion;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaSizes {
  unsigned x = 1, y = 1, z = 1;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    cudaSizes clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  cudaSizes gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace driver {

struct Kernel {
  std::size_t declared = 0;
  std::array<std::size_t, 2> granted{};
  std::array<int, 2> ptx{};       // by device: the architecture of the code that it loaded
  std::array<int, 2> clusters{};  // that find room; -1: the question fails
  unsigned most_blocks = 8;       // of a cluster that finds room
};
inline std::map<const void*, Kernel> kernels;
inline int device = 0;
inline int calls = 0;
inline cudaError_t last_error = cudaSuccess;

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
  attributes->ptxVersion = driver::kernels[kernel].ptx[driver::device];
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = driver::last_error;
  driver::last_error = cudaSuccess;
  return error;
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                                  const cudaLaunchConfig_t* config) {
  ++driver::calls;
  *clusters = driver::kernels[kernel].clusters[driver::device];
  if (config->gridDim.x > driver::kernels[kernel].most_blocks) *clusters = 0;
  const bool asked = config->numAttrs == 1 &&
                     config->attrs->val.clusterDim.x == config->gridDim.x &&
                     driver::starts(kernel, config->dynamicSmemBytes);
  return driver::last_error = *clusters < 0 || !asked ? cudaErrorInvalidValue : cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  ++driver::calls;
  driver::Kernel& known = driver::kernels[kernel];
  const auto wanted = static_cast<std::size_t>(bytes);
  if (known.declared + wanted > 227 * 1024) return cudaErrorInvalidValue;
  known.granted[driver::device] = wanted;
  return cudaSuccess;
}
