// Bilinear attention pooling, forward, in half precision on GPUs with clusters (all other calls:
// bilinear_pool.cu).
//
// Must move the features once in and P (B M C) once out, and does no more: a cluster of four or
// eight blocks keeps an image, each block a part of the channels. The part is copied whole into
// shared memory, in two halves, the second under the products of the first; P (32 x 512 at most)
// stays in registers. The blocks read one another's sums of squares, scale, and write by way of
// shared memory, where the features lay. One launch.
#include <cstdint>

#include "cuda/bilinear_pool_cluster.h"

namespace magsd::MAGSD_ISA::bilinear_pool {
namespace {

template <typename T>
struct ClusterJob {
  T* output;    // (B, M, C)
  float* norm;  // (B,) or null
};

#if defined(MAGSD_HAS_CLUSTERS)
// A thread's share of the sum of squares of the roots; what belongs to no map becomes 0.
template <typename T, bool kChannelsLast>
__device__ float sum_of_squares(const PoolCall<T>& call, const ClusterTile<T, kChannelsLast>& tile,
                                float (&sums)[kTiles][8]) {
  float sum = 0;
  int roots = 0;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (tile.map_of(i) >= call.maps) sums[n][i] = 0;
      sum += call.signed_sqrt ? std::abs(sums[n][i]) : sums[n][i] * sums[n][i];
      roots += sums[n][i] != 0;
    }
  }
  if (!call.signed_sqrt) return sum * call.factor * call.factor;
  // The square of a root is its radicand.
  return sum * call.factor + static_cast<float>(roots) * call.eps;
}

// Roots times `factor`, rounded, to rows of maps in shared memory.
template <typename T, bool kChannelsLast>
__device__ void stage_result(const PoolCall<T>& call, const ClusterTile<T, kChannelsLast>& tile,
                             const float (&sums)[kTiles][8], float factor, unsigned char* memory) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float roots[8];
    call.take_roots(sums[n], roots);
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      unsigned char* row = memory + tile.map_of(i) * tile.partition().result_pitch();
      const unsigned two = downcast_two<T>(roots[i] * factor, roots[i + 1] * factor);
      if constexpr (kChannelsLast) {
        if (tile.has_channel(n, i)) {
          *reinterpret_cast<unsigned*>(row + sizeof(T) * tile.channel_of(n, i)) = two;
        }
      } else {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!tile.has_channel(n, i + e)) continue;
          *reinterpret_cast<uint16_t*>(row + sizeof(T) * tile.channel_of(n, i + e)) =
              static_cast<uint16_t>(two >> 16 * e);
        }
      }
    }
  }
}

template <typename T, bool kChannelsLast>
__device__ void write_result(const PoolCall<T>& call, const ClusterTile<T, kChannelsLast>& tile,
                             const unsigned char* memory, T* output) {
  // As the rows in shared memory are aligned.
  using Word = std::conditional_t<kChannelsLast, uint4, unsigned>;
  constexpr int kEach = sizeof(Word) / sizeof(T);
  const int words = 8 * tile.octets() / kEach;
  for (int m = threadIdx.x / kWarp; m < call.maps; m += kClusterWarps) {
    const Word* from = reinterpret_cast<const Word*>(memory + m * tile.partition().result_pitch());
    Word* to = reinterpret_cast<Word*>(output + int64_t{m} * call.channels + tile.first_channel());
    for (int i = threadIdx.x % kWarp; i < words; i += kWarp) __stcs(to + i, from[i]);
  }
}
#endif

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kClusterThreads, 2)
    cluster_pool_kernel(const PoolCall<T> call, const int blocks, const ClusterJob<T> job) {
#if defined(MAGSD_HAS_CLUSTERS)
  MAGSD_DYNAMIC_SHARED(unsigned char, memory);
  const int b = blockIdx.x / blocks, rank = blockIdx.x % blocks;
  const ClusterTile<T, kChannelsLast> tile(call, blocks, b, rank, memory);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    tile.load_features(half);
    close_copies();
  }
  tile.load_attention();
  float sums[kTiles][8] = {};
  wait_groups_but<1>();
  __syncthreads();
  tile.multiply(0, sums);
  wait_groups_but<0>();
  __syncthreads();
  tile.multiply(1, sums);

  float factor = call.scale;
  if (call.normalize) {
    const double squares = static_cast<double>(sum_of_squares(call, tile, sums));
    const float norm = static_cast<float>(std::sqrt(cluster_sum(squares, blocks)));
    if (rank == 0 && threadIdx.x == 0) job.norm[b] = norm;
    factor = static_cast<float>(static_cast<double>(call.scale) / clamped_norm(norm));
  } else {
    __syncthreads();
  }
  stage_result(call, tile, sums, factor, memory);
  __syncthreads();
  write_result(call, tile, memory, job.output + int64_t{b} * call.maps * call.channels);
  if (call.normalize) cluster_wait();
#endif
}

}  // namespace

template <typename T>
bool pool_by_clusters(const DeviceScope& scope, const PoolCall<T>& call, T* output, float* norm) {
  const auto kernel =
      call.features.channels_last ? &cluster_pool_kernel<T, true> : &cluster_pool_kernel<T, false>;
  return launch_smallest_clusters(
      scope, call, kernel, [](const ClusterPartition& partition) { return partition.bytes(); },
      ClusterJob<T>{output, norm});
}

#define MAGSD_POOL_BY_CLUSTERS(T) \
  template bool pool_by_clusters(const DeviceScope&, const PoolCall<T>&, T*, float*);
MAGSD_POOL_BY_CLUSTERS(Half)
MAGSD_POOL_BY_CLUSTERS(BFloat16)

}  // namespace magsd::MAGSD_ISA::bilinear_pool
