// Runs CUDA kernels on the host: the words of CUDA C++ that our kernels use, for a C++ compiler.
//
// The threads of a block are fibers on one host thread. A fiber runs until it waits (barrier, warp
// function) or ends; between two waits the fibers run in an order that changes from round to round,
// and blocks in one that changes from launch to launch, so that a result which depends on the order
// is seen.
// Shared memory is taken from the heap, one allocation an array, filled with NaN, given back at the
// block's end: what a missing barrier reads is poison, and AddressSanitizer sees what lies outside.
// Vector types keep CUDA's alignment, so that UBSan sees a misaligned 16-byte access.
//
// The blocks of a cluster live side by side and take turns, in an order that changes from round to
// round; a block goes as far as it can without the others. The shared memory of one that has ended
// is poison at once, while others may still read it.
//
// launch() throws std::runtime_error where a GPU would hang or leave its result undefined: a
// barrier or a warp function that some threads do not reach or reach at another position, a block
// that is no multiple of a warp, a grid, a cluster or shared memory larger than the hardware's, a
// peer that the cluster does not have.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

namespace simt {

constexpr int kLanes = 32;

constexpr int kMostThreads = 1024;
constexpr int kMostClusterBlocks = 8;

// Where the running fiber stands in its grid. Without clusters a block is one by itself.
struct Position {
  uint3 thread, block;
  dim3 block_size, grid_size;
  unsigned cluster_rank, cluster_size;
};
const Position& position();

struct LaunchShape {
  dim3 grid;
  int threads;             // of a block
  std::size_t shared = 0;  // dynamic, bytes of a block
  int cluster = 1;         // blocks of a cluster, neighbors in x
};

// Runs `body` as every thread of every block. Throws what is said at the top of this file.
void launch(const LaunchShape& shape, const std::function<void()>& body);

// Compute capability of the emulated GPU, major and minor digit: 90 unless a test sets another.
int capability();

// Shared memory of the running block: the array declared at `site`, and the dynamic one.
void* shared(const void* site, std::size_t bytes);
void* dynamic_shared();

// Where a thread waits: every thread of a block, or lane of a warp, must wait at the same position.
struct Site {
  const char* function;
  int line;
};
// The line of the call, where it is a default argument; no int is taken for one by mistake.
struct Line {
  int number;
  static constexpr Line of_call(int number = __builtin_LINE()) { return {number}; }
};

void barrier(const Site& site);
bool barrier_or(bool value, const Site& site);

// The two halves of a barrier of all threads of a cluster.
void cluster_arrive(const Site& site);
void cluster_wait();

// Where block `rank` of the cluster holds what `mine` is in this block's shared memory.
void* peer_shared(void* mine, int rank);

// Gives `bytes` (at most 64) of this lane to its warp and waits for all of them. Returns kLanes
// entries, kExchangeBytes apart, valid until the lane's next exchange.
const unsigned char* exchange(const void* value, std::size_t bytes, unsigned mask,
                              const Site& site);
constexpr std::size_t kExchangeBytes = 64;

// Ends the launch with an error: what a GPU would do is undefined.
[[noreturn]] void fail(const char* why);

// Multiprocessors of the emulated GPU: 2 unless a test sets another number.
int multiprocessors();

template <typename T>
T from_lane(const unsigned char* slots, int lane) {
  T value;
  std::memcpy(&value, slots + static_cast<std::size_t>(lane) * kExchangeBytes, sizeof(T));
  return value;
}

template <typename T>
T shuffle(unsigned mask, T value, const Site& site, int source_of(int lane, int argument),
          int argument) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kExchangeBytes);
  const int lane = static_cast<int>(position().thread.x) % kLanes;
  const unsigned char* slots = exchange(&value, sizeof(T), mask, site);
  const int source = source_of(lane, argument);
  return source >= 0 && source < kLanes ? from_lane<T>(slots, source) : value;
}

// Four matrices of 8 x 8 numbers of 16 bits, as ldmatrix.x4 reads them: lane 8 i + r holds the
// address of row r of matrix i. Lane 4 g + t gets of matrix i the entries (g, 2 t) and (g, 2 t + 1)
// in matrices[i], or, transposed, (2 t, g) and (2 t + 1, g).
inline void load_matrices(const void* row, bool transposed, unsigned (&matrices)[4],
                          const Site& site) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) {
    fail("a row of ldmatrix is not aligned to 16 bytes");
  }
  const int lane = static_cast<int>(position().thread.x) % kLanes, g = lane / 4, t = lane % 4;
  unsigned char mine[16];
  std::memcpy(mine, row, sizeof(mine));
  const unsigned char* rows = exchange(mine, sizeof(mine), 0xffffffffu, site);
  for (int i = 0; i < 4; ++i) {
    unsigned char* to = reinterpret_cast<unsigned char*>(&matrices[i]);
    for (int e = 0; e < 2; ++e) {
      const int r = transposed ? 2 * t + e : g, column = transposed ? g : 2 * t + e;
      std::memcpy(to + 2 * e, rows + (8 * i + r) * kExchangeBytes + 2 * column, 2);
    }
  }
}

}  // namespace simt

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

// As cuda/kernel.h has them for a GPU.
#define MAGSD_SHARED(type, name, extents) \
  static const char name##_site = 0;      \
  using name##_array = type extents;      \
  name##_array& name =                    \
      *static_cast<name##_array*>(::simt::shared(&name##_site, sizeof(name##_array)))
#define MAGSD_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::simt::dynamic_shared())

#define threadIdx (::simt::position().thread)
#define blockIdx (::simt::position().block)
#define blockDim (::simt::position().block_size)
#define gridDim (::simt::position().grid_size)

inline void __syncthreads(simt::Line line = simt::Line::of_call()) {
  simt::barrier({"__syncthreads", line.number});
}
inline int __syncthreads_or(int value, simt::Line line = simt::Line::of_call()) {
  return simt::barrier_or(value != 0, {"__syncthreads_or", line.number}) ? 1 : 0;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, simt::Line line = simt::Line::of_call()) {
  return simt::shuffle(
      mask, value, {"__shfl_sync", line.number}, [](int, int from) { return from & 31; }, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, simt::Line line = simt::Line::of_call()) {
  return simt::shuffle(
      mask, value, {"__shfl_xor_sync", line.number}, [](int lane, int by) { return lane ^ by; },
      bits);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, simt::Line line = simt::Line::of_call()) {
  return simt::shuffle(
      mask, value, {"__shfl_up_sync", line.number}, [](int lane, int step) { return lane - step; },
      static_cast<int>(by));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, simt::Line line = simt::Line::of_call()) {
  return simt::shuffle(
      mask, value, {"__shfl_down_sync", line.number},
      [](int lane, int step) { return lane + step; }, static_cast<int>(by));
}
inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Line line = simt::Line::of_call()) {
  const char nothing = 0;
  simt::exchange(&nothing, 1, mask, {"__syncwarp", line.number});
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              simt::Line line = simt::Line::of_call()) {
  const bool mine = predicate != 0;
  const unsigned char* slots =
      simt::exchange(&mine, sizeof(mine), mask, {"__ballot_sync", line.number});
  unsigned bits = 0;
  for (int lane = 0; lane < simt::kLanes; ++lane) {
    bits |= static_cast<unsigned>(simt::from_lane<bool>(slots, lane)) << lane;
  }
  return bits;
}
inline int __any_sync(unsigned mask, int predicate, simt::Line line = simt::Line::of_call()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Line line = simt::Line::of_call()) {
  return __ballot_sync(mask, predicate, line) == 0xffffffffu;
}

// Atomics: the fibers of all blocks share one host thread.
template <typename T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = old + value;
  return old;
}
template <typename T>
T atomicMin(T* at, T value) {
  const T old = *at;
  *at = std::min(old, value);
  return old;
}
template <typename T>
T atomicMax(T* at, T value) {
  const T old = *at;
  *at = std::max(old, value);
  return old;
}
inline void __threadfence() {}

// Accesses with a cache hint.
template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
