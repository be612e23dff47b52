// Whether the current device runs a kernel in clusters. Its compute capability alone does not say.
//
// The driver may have compiled the kernel from the PTX of an older GPU, in which its body is empty;
// and where a process has a share of a GPU, as under MPS, no cluster may find room.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <map>
#include <mutex>
#include <tuple>

#include "cuda/cluster_shape.h"
#include "cuda/shared_memory.h"

namespace magsd::MAGSD_ISA {

constexpr int kFirstWithClusters = 90;  // compute capability, major and minor digit

// Makes a launch one in clusters of so many blocks, neighbors in x.
inline cudaLaunchAttribute cluster_attribute(int cluster) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  return attribute;
}

// Sets `runs`. Asked once for each device, kernel, number of blocks and size of shared memory; no
// question concerns a stream.
inline cudaError_t runs_clusters(const void* kernel, const ClusterShape& shape, bool* runs) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, size_t>, bool> known;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::tuple key{device, kernel, shape.blocks, shape.shared};
  const auto at = known.find(key);
  if (at != known.end()) {
    *runs = at->second;
    return cudaSuccess;
  }
  cudaFuncAttributes attributes{};
  status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaSuccess) return status;
  int clusters = 0;
  // ptxVersion is the __CUDA_ARCH__ by which the body was chosen, less its last digit.
  if (attributes.ptxVersion >= kFirstWithClusters) {
    status = allow_shared(kernel, shape.shared);
    if (status != cudaSuccess) return status;
    cudaLaunchAttribute attribute = cluster_attribute(shape.blocks);
    cudaLaunchConfig_t config{};
    config.gridDim.x = static_cast<unsigned>(shape.blocks);
    config.blockDim.x = static_cast<unsigned>(shape.threads);
    config.dynamicSmemBytes = shape.shared;
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
      static_cast<void>(cudaGetLastError());  // else the next launch would report it
      clusters = 0;
    }
  }
  *runs = known[key] = clusters > 0;
  return cudaSuccess;
}

}  // namespace magsd::MAGSD_ISA
