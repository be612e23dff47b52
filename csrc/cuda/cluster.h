// Clusters: blocks, neighbors in x, that run at the same time, wait for one another and read one
// another's shared memory. GPUs have them from compute capability 9.0 on.
//
// A block reads a peer's shared memory between a barrier that follows the peer's writes and one
// that the peer waits for before it ends.
#pragma once

#if !defined(MAGSD_SIMT)
#include "cuda/cluster_support.h"
#endif
#include "cuda/cluster_shape.h"
#include "cuda/kernel.h"

// Around the body of a kernel that works in clusters: for older GPUs it is compiled empty, and the
// host does not launch it.
#if defined(MAGSD_SIMT) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define MAGSD_HAS_CLUSTERS
#endif

namespace magsd::MAGSD_ISA {

constexpr int kMostClusterBlocks = 8;  // that every GPU with clusters takes

// Whether the current device runs `kernel` in such clusters, whose blocks also declare `declared`
// bytes of shared memory.
inline bool device_runs([[maybe_unused]] const void* kernel, const ClusterShape& shape,
                        size_t declared) {
#if defined(MAGSD_SIMT)
  return simt::capability() >= 90 && shape.shared + declared <= 227 * 1024;
#else
  const auto attribute = [device = current_device()](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
  };
  const int capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                         attribute(cudaDevAttrComputeCapabilityMinor);
  bool runs = false;
  if (capability >= kFirstWithClusters &&
      shape.shared + declared <=
          static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin))) {
    check_cuda(runs_clusters(kernel, shape, &runs), "room for clusters");
  }
  return runs;
#endif
}

// Launches `grid` blocks in clusters.
template <typename... Parameters, typename... Arguments>
void launch_clusters(const DeviceScope& scope, dim3 grid, const ClusterShape& shape,
                     void (*kernel)(Parameters...), Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= kParameterBytes, "too many parameters");
#if defined(MAGSD_SIMT)
  (void)scope;
  simt::launch({grid, shape.threads, shape.shared, shape.blocks},
               [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
  check_cuda(allow_shared(reinterpret_cast<const void*>(kernel), shape.shared),
             "shared memory of a kernel");
  cudaLaunchAttribute attribute = cluster_attribute(shape.blocks);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared;
  config.stream = scope.stream();
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel,
                                static_cast<Parameters>(std::forward<Arguments>(arguments))...),
             "kernel launch");
#endif
}

#if defined(MAGSD_HAS_CLUSTERS)
#if defined(MAGSD_SIMT)
inline void cluster_arrive(simt::Line line = simt::Line::of_call()) {
  simt::cluster_arrive({"cluster_arrive", line.number});
}
inline void cluster_wait() { simt::cluster_wait(); }
#else
// Every thread of the cluster arrives, and later waits for the arrival of all. What was written
// before the arrival is seen after the wait. Not `.aligned`: lanes may come apart before.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
#endif

// Where block `rank` of the cluster holds what `mine` is in this block's shared memory.
template <typename T>
__device__ __forceinline__ T* peer_shared(T* mine, int rank) {
#if defined(MAGSD_SIMT)
  return static_cast<T*>(simt::peer_shared(mine, rank));
#else
  T* peer;
  asm("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(mine), "r"(rank));
  return peer;
#endif
}
#endif

}  // namespace magsd::MAGSD_ISA
