// Bilinear attention pooling, backward, in half precision on GPUs with clusters (see
// bilinear_pool_backward.cu for the equations and all other calls).
//
// Must move the features and the gradient of the output in, and the gradients of the features and
// of the attention out, and does no more: a cluster of four or eight blocks keeps an image,
// each block a part of the channels, whose features lie in shared memory from the first product to
// the last. One launch:
//   - the pooled matrix in registers, as the forward makes it; the sum of root * gradient over the
//     image by way of the blocks' shared memory; W in the same registers, as two numbers of half
//     precision, a number and its rest;
//   - dA: the warps take turns on the pixels, so that sums are added in one order; each block then
//     adds all blocks' sums of a part of dA, in the order of the blocks;
//   - dF takes the place of the features and is written from there.
// In float16 a warp's W is scaled by a power of two, so that it neither overflows nor loses bits.
#include <cstdint>
#include <type_traits>

#include "cuda/bilinear_pool_cluster.h"
#include "cuda/bilinear_pool_gradients.h"

namespace magsd::MAGSD_ISA::bilinear_pool {
namespace {

constexpr int kSumPitch = kClusterMaps + 4;  // of a pixel's sums of dA

// Behind the forward's shared memory: the gradient of the output, then the sums of dA.
int shared_bytes(const ClusterPartition& partition) {
  const int sums = partition.pixels * kSumPitch * static_cast<int>(sizeof(float));
  return partition.bytes() + larger(partition.result_bytes(), sums);
}

#if defined(MAGSD_HAS_CLUSTERS)
template <typename T>
__device__ void upcast_two(unsigned two, float& low, float& high) {
  T values[2];
  std::memcpy(values, &two, sizeof(values));
  low = upcast(values[0]);
  high = upcast(values[1]);
}

// Rows of this block's channels of grad to shared memory, as the forward lays out the result.
template <typename T, bool kChannelsLast>
__device__ void load_grad(const PoolCall<T>& call, const ClusterTile<T, kChannelsLast>& tile,
                          const T* grad, bool aligned, unsigned char* memory) {
  const int channels = 8 * tile.octets();
  for (int m = threadIdx.x / kWarp; m < call.maps; m += kClusterWarps) {
    const T* from = grad + int64_t{m} * call.channels + tile.first_channel();
    unsigned* to = reinterpret_cast<unsigned*>(memory + m * tile.partition().result_pitch());
    for (int i = threadIdx.x % kWarp; i < channels / 2; i += kWarp) {
      if (aligned) {
        to[i] = reinterpret_cast<const unsigned*>(from)[i];
      } else {
        std::memcpy(to + i, from + 2 * i, sizeof(unsigned));
      }
    }
  }
}

// A thread's entries of tile n of the gradient; 0 past the last map and channel.
template <typename T, bool kChannelsLast>
__device__ void read_grad(const PoolCall<T>& call, const ClusterTile<T, kChannelsLast>& tile,
                          const unsigned char* memory, int n, T (&grad)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const T* row =
        reinterpret_cast<const T*>(memory + tile.map_of(i) * tile.partition().result_pitch());
    const bool exists = tile.map_of(i) < call.maps && tile.has_channel(n, i);
    grad[i] = exists ? row[tile.channel_of(n, i)] : T{};
  }
}

// From sums of products to W; 0 past the last map.
template <typename T, bool kChannelsLast>
__device__ void weigh(const PoolCall<T>& call, const ClusterTile<T, kChannelsLast>& tile,
                      const unsigned char* grads, const float* norm, float (&sums)[kTiles][8]) {
  Chain<T> chain(call);
  if (call.normalize) {
    float projection = 0;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      T grad[8];
      float roots[8];
      read_grad(call, tile, grads, n, grad);
      call.take_roots(sums[n], roots);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (tile.map_of(i) < call.maps) projection += roots[i] * upcast(grad[i]);
      }
    }
    const double mine = static_cast<double>(projection * call.scale);
    chain.normalize(*norm, cluster_sum(mine, tile.partition().blocks));
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    T grad[8];
    read_grad(call, tile, grads, n, grad);
    chain(call, grad, sums[n]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (tile.map_of(i) >= call.maps || !tile.has_channel(n, i)) sums[n][i] = 0;
    }
  }
}

// W times a power of two as numbers and their rests; the inverse of that power.
template <typename T>
__device__ float split(const float (&weights)[kTiles][8], unsigned (&high)[kTiles][4],
                       unsigned (&rest)[kTiles][4]) {
  float scale = 1, inverse = 1;
  if constexpr (std::is_same_v<T, Half>) {
    float peak = 0;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 8; ++i) peak = larger(peak, std::abs(weights[n][i]));
    }
    peak = warp_reduce(peak, [](float a, float b) { return larger(a, b); });
    // The largest below 2^15, unless it is not finite.
    const int exponent = static_cast<int>(__float_as_uint(peak) >> 23) - 127;
    const int shift = exponent > 127 ? 0 : smaller(14 - exponent, 126);
    scale = __uint_as_float(static_cast<unsigned>(127 + shift) << 23);
    inverse = __uint_as_float(static_cast<unsigned>(127 - shift) << 23);
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float first = weights[n][2 * j] * scale, second = weights[n][2 * j + 1] * scale;
      float rounded_first, rounded_second;
      high[n][j] = downcast_two<T>(first, second);
      upcast_two<T>(high[n][j], rounded_first, rounded_second);
      rest[n][j] = downcast_two<T>(first - rounded_first, second - rounded_second);
    }
  }
  return inverse;
}

// The block's sums of dA, a row of maps per pixel. In each turn a warp has eight pixels from a
// multiple of eight less begin() on; warps keep sixteen apart, so that none meets another's.
template <typename T, bool kChannelsLast>
__device__ void add_attention(const PoolCall<T>& call, const ClusterTile<T, kChannelsLast>& tile,
                              const unsigned (&high)[kTiles][4], const unsigned (&rest)[kTiles][4],
                              float inverse, float* sums) {
  for (int i = threadIdx.x; i < call.pixels * kSumPitch; i += blockDim.x) sums[i] = 0;
  __syncthreads();
  const int warp = threadIdx.x / kWarp, t = threadIdx.x % 4;
  const int turns = larger(2 * kClusterWarps, ceil_div(call.pixels + 7, 8));
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    const int x = (turn + turns - 2 * warp) % turns, first = 8 * x - tile.begin();
    if (first < call.pixels) {
      float d[8] = {};
      tile.multiply_back(x, high, d);
      tile.multiply_back(x, rest, d);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int p = first + 2 * t + i % 2;
        if (p >= 0 && p < call.pixels) sums[p * kSumPitch + tile.map_of(i)] += d[i] * inverse;
      }
    }
    __syncthreads();
  }
}

// A part of dA: the sums of all blocks.
template <typename T>
__device__ void store_attention(const PoolCall<T>& call, const ClusterGradients<T>& job, int b,
                                int blocks, int rank, float* sums) {
  const float* parts[kMostClusterBlocks];
#pragma unroll
  for (int i = 0; i < kMostClusterBlocks; ++i) {
    parts[i] = i < blocks ? peer_shared(sums, i) : nullptr;
  }
  const int count = call.pixels * call.maps;
  T* to = job.attention + int64_t{b} * count;
  for (int i = rank * kClusterThreads + threadIdx.x; i < count; i += blocks * kClusterThreads) {
    const int p = job.step_m == 1 ? i / call.maps : i % call.pixels;
    const int m = job.step_m == 1 ? i % call.maps : i / call.pixels;
    float sum = 0;
#pragma unroll
    for (int part = 0; part < kMostClusterBlocks; ++part) {
      if (part < blocks) sum += parts[part][p * kSumPitch + m];
    }
    to[m * job.step_m + p * job.step_p] = downcast<T>(sum);
  }
}

// dF, where the features were.
template <typename T, bool kChannelsLast>
__device__ void replace_features(const PoolCall<T>& call, const ClusterTile<T, kChannelsLast>& tile,
                                 unsigned (&high)[kTiles][4], unsigned (&rest)[kTiles][4],
                                 float inverse) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      high[n][j] = transpose_matrix(high[n][j]);
      rest[n][j] = transpose_matrix(rest[n][j]);
    }
  }
#pragma unroll 1
  for (int first = 0; first < call.pixels; first += 16) {
    unsigned maps[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) tile.load_attention_matrix(first, m, maps[m]);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n * kClusterWarps >= tile.octets()) continue;
      float d[4] = {};
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_half<T>(d[0], d[1], d[2], d[3], maps[m], high[n][2 * m], high[n][2 * m + 1]);
        mma_half<T>(d[0], d[1], d[2], d[3], maps[m], rest[n][2 * m], rest[n][2 * m + 1]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int p = first + 8 * h + threadIdx.x % kWarp / 4;
        if (p < call.pixels) tile.replace(p, n, d[2 * h] * inverse, d[2 * h + 1] * inverse);
      }
    }
  }
}
#endif

// Blocks of an SM. Planes in float16 take a register more than two blocks have.
template <typename T, bool kChannelsLast>
[[maybe_unused]] constexpr int kBlocks = std::is_same_v<T, Half> && !kChannelsLast ? 1 : 2;

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kClusterThreads, (kBlocks<T, kChannelsLast>))
    cluster_gradients_kernel(const PoolCall<T> call, const int blocks,
                             const ClusterGradients<T> job) {
#if defined(MAGSD_HAS_CLUSTERS)
  MAGSD_DYNAMIC_SHARED(unsigned char, memory);
  const int b = blockIdx.x / blocks, rank = blockIdx.x % blocks;
  const ClusterTile<T, kChannelsLast> tile(call, blocks, b, rank, memory);
  unsigned char* const grads = memory + tile.partition().bytes();
  float* const attention_sums = reinterpret_cast<float*>(grads);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    tile.load_features(half);
    close_copies();
  }
  tile.load_attention();
  const T* const grad = job.grad + int64_t{b} * call.maps * call.channels;
  load_grad(call, tile, grad, reinterpret_cast<uintptr_t>(job.grad) % sizeof(unsigned) == 0, grads);
  float weights[kTiles][8] = {};
  wait_groups_but<1>();
  __syncthreads();
  // Without root and norm W is the gradient of the output itself.
  const bool pools = call.signed_sqrt || call.normalize;
  if (pools) tile.multiply(0, weights);
  wait_groups_but<0>();
  __syncthreads();
  if (pools) tile.multiply(1, weights);
  weigh(call, tile, grads, call.normalize ? job.norm + b : nullptr, weights);
  if (call.normalize) cluster_wait();
  __syncthreads();

  unsigned high[kTiles][4], rest[kTiles][4];
  const float inverse = split<T>(weights, high, rest);
  if (job.attention != nullptr) {
    add_attention(call, tile, high, rest, inverse, attention_sums);
    cluster_arrive();
  }
  if (job.features != nullptr) replace_features(call, tile, high, rest, inverse);
  if (job.attention != nullptr) {
    cluster_wait();
    store_attention(call, job, b, blocks, rank, attention_sums);
    cluster_arrive();
  }
  if (job.features != nullptr) {
    __syncthreads();
    tile.store_features(job.features);
  }
  if (job.attention != nullptr) cluster_wait();
#endif
}

}  // namespace

template <typename T>
bool gradients_by_clusters(const DeviceScope& scope, const PoolCall<T>& call,
                           const ClusterGradients<T>& job) {
  const auto kernel = call.features.channels_last ? &cluster_gradients_kernel<T, true>
                                                  : &cluster_gradients_kernel<T, false>;
  return launch_smallest_clusters(scope, call, kernel, &shared_bytes, job);
}

#define MAGSD_GRADIENTS_BY_CLUSTERS(T)                                        \
  template bool gradients_by_clusters(const DeviceScope&, const PoolCall<T>&, \
                                      const ClusterGradients<T>&);
MAGSD_GRADIENTS_BY_CLUSTERS(Half)
MAGSD_GRADIENTS_BY_CLUSTERS(BFloat16)

}  // namespace magsd::MAGSD_ISA::bilinear_pool
