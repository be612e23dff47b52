// What every kernel file needs: launches, shared memory, the device and stream of a call, the
// registration of its operators.
//
// The same file is compiled by nvcc for a GPU and, with MAGSD_SIMT, by a C++ compiler for the host,
// where csrc/simt runs a block's threads as fibers. So a kernel keeps to what both offer:
//   - shared memory is declared by MAGSD_SHARED or MAGSD_DYNAMIC_SHARED, launches go through
//   launch();
//   - blocks hold a multiple of 32 threads, warp-wide functions take kAllLanes and are reached by
//     every lane of a warp;
//   - results do not depend on the order of blocks or of threads between barriers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(MAGSD_SIMT)
#include "simt/simt.h"
#else
#include <cuda_runtime.h>

#include "cuda/shared_memory.h"
#endif

#include <torch/csrc/stable/library.h>

#include "common/device_scope.h"
#include "common/dtype.h"
#include "common/tensor.h"

// Opens, in the operation's namespace, the function that registers the operators of one <op>.cu:
//   MAGSD_OPERATORS(library) { library.impl("sample_attention", TORCH_BOX(&sample_attention)); }
#if defined(MAGSD_SIMT)
#define MAGSD_OPERATORS(library) STABLE_TORCH_LIBRARY_IMPL(magsd_cuda, CPU, library)
#else
#define MAGSD_OPERATORS(library) STABLE_TORCH_LIBRARY_IMPL(magsd_cuda, CUDA, library)
#endif

// MAGSD_SHARED(float, tile, [32][33]); declares a shared array.
// MAGSD_DYNAMIC_SHARED(float, rows); declares a pointer to the launch's dynamic shared memory.
// For the host they stand in simt/simt.h.
#if !defined(MAGSD_SIMT)
#define MAGSD_SHARED(type, name, extents) __shared__ type name extents
#define MAGSD_DYNAMIC_SHARED(type, name)                          \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared)
#endif

namespace magsd::MAGSD_ISA {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr size_t kParameterBytes = 4096;
constexpr int64_t kMostBlocksX = 2147483647, kMostBlocksYZ = 65535;

template <typename Integer>
MAGSD_HD Integer ceil_div(Integer count, Integer size) {
  return (count + size - 1) / size;
}

#if !defined(MAGSD_SIMT)
inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    static_cast<void>(cudaGetLastError());  // or the next launch reports it
  STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}
#endif

// Streaming multiprocessors of the current device, to size grids by.
inline int multiprocessors() {
#if defined(MAGSD_SIMT)
  return simt::multiprocessors();
#else
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  return count;
#endif
}

// A grid of at least one block; larger than the hardware takes is an error, never a wrong result.
inline dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  STD_TORCH_CHECK(
      x >= 1 && x <= kMostBlocksX && y >= 1 && y <= kMostBlocksYZ && z >= 1 && z <= kMostBlocksYZ,
      "a grid of ", x, " x ", y, " x ", z, " blocks cannot be launched");
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

struct LaunchShape {
  dim3 grid;
  int threads;        // of a block
  size_t shared = 0;  // dynamic, bytes of a block
};

// Launches a kernel on the stream of `scope`.
template <typename... Parameters, typename... Arguments>
void launch(const DeviceScope& scope, const LaunchShape& shape, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= kParameterBytes, "too many parameters");
#if defined(MAGSD_SIMT)
  (void)scope;
  simt::launch({shape.grid, shape.threads, shape.shared},
               [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
  check_cuda(allow_shared(reinterpret_cast<const void*>(kernel), shape.shared),
             "shared memory of a kernel");
  kernel<<<shape.grid, shape.threads, shape.shared, scope.stream()>>>(
      static_cast<Parameters>(std::forward<Arguments>(arguments))...);
  check_cuda(cudaGetLastError(), "kernel launch");
#endif
}

#if defined(__CUDACC__) || defined(MAGSD_SIMT)
// Sum, maximum or minimum over a warp, or over `lanes` neighbors of it, a power of two; in every
// lane, in a fixed order.
template <typename Value, typename Combine>
__device__ __forceinline__ Value warp_reduce(Value value, const Combine& combine,
                                             int lanes = kWarp) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

template <typename Value>
__device__ __forceinline__ Value warp_sum(Value value, int lanes = kWarp) {
  return warp_reduce(value, [](Value a, Value b) { return a + b; }, lanes);
}

// Two numbers, each rounded to nearest even, in one register.
template <typename T>
__device__ __forceinline__ unsigned downcast_two(float low, float high) {
  unsigned both = 0;
#if defined(MAGSD_SIMT)
  const T values[2] = {downcast<T>(low), downcast<T>(high)};
  std::memcpy(&both, values, sizeof(both));
#else
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
#endif
  return both;
}
#endif

}  // namespace magsd::MAGSD_ISA
