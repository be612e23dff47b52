// Bilinear pooling of half precision by clusters: an image's features, a part of the channels in the
// shared memory of each block, with all its attention; products by m16n8k16. A cluster has four
// blocks, or eight where a quarter of the channels does not fit. The backward keeps more than the
// forward and may take eight where the forward takes four: neither depends on the other's number.
//
// Rows of D are maps, columns are eight channels of a tile. Channels go in octets of eight that
// follow one another; a block has at most kOctets of them.
//   - Channels last: a row of the shared tile is a pixel. Column i of tile n of warp w is channel i
//     of octet 8 n + w.
//   - Planes of N pixels: an octet is N times 16 bytes wherever it begins, copied as it lies, and
//     row w of every octet begins (w N) mod 8 pixels into 16 bytes. Column i of tile n of warp w is
//     therefore channel w of octet 8 n + i: what a warp reads begins alike, and it shifts the
//     attention instead, whose rows are pixels.
// The pitch in 16 bytes is odd, so that eight rows of a matrix lie in different banks.
#pragma once

#include <cstdint>

#include "cuda/bilinear_pool.h"
#include "cuda/cluster.h"
#include "cuda/mma_half.h"

namespace magsd::MAGSD_ISA::bilinear_pool {

constexpr int kClusterWarps = 8;  // of a block
constexpr int kClusterThreads = kClusterWarps * kWarp;
constexpr int kClusterMaps = 32;
constexpr int kOctets = 64;  // of a block at most: 64 registers of sums a thread
constexpr int kTiles = kOctets / kClusterWarps;
constexpr int kMostPixels = 4096;  // so that no offset overflows; shared memory ends long before

// How an image is cut, and the shared memory of a block. Offsets in bytes; all are multiples of 16.
struct ClusterPartition {
  static constexpr int kAttentionPitch = 2 * kClusterMaps + 16;

  int blocks;  // of an image
  int octets;  // of a block; the last ones may have fewer, or none
  int pixels;
  bool channels_last;

  // Larger sizes, which no cluster takes, count as the largest, so that nothing overflows.
  MAGSD_HD ClusterPartition(int blocks_of, int channels, int pixels_of, bool last)
      : blocks(blocks_of),
        octets(smaller(kOctets, ceil_div(channels / 8, blocks_of))),
        pixels(smaller(kMostPixels, pixels_of)),
        channels_last(last) {}

  // Of a row of features: 16 bytes a piece.
  MAGSD_HD int pitch() const { return (channels_last ? octets : pixels) | 1; }
  // Of a row of the result, a map's channels. Lanes write neighbors in channels last, every eighth
  // channel in planes: in both no two lanes of a warp write to the same bank.
  MAGSD_HD int result_pitch() const { return 16 * octets + (channels_last ? 16 : 4); }

  MAGSD_HD int features_bytes() const { return 16 * pitch() * (channels_last ? pixels : octets); }
  MAGSD_HD int result_bytes() const { return kClusterMaps * result_pitch(); }
  MAGSD_HD int zero_row() const { return larger(features_bytes(), result_bytes()); }
  MAGSD_HD int attention() const { return zero_row() + 16; }
  MAGSD_HD int bytes() const { return attention() + pixels * kAttentionPitch; }
};

// Launches kernel(call, blocks of a cluster, job) in the smallest clusters that take the call, if
// any do; whether they did. Sizes, alignment and the device alone decide, so that it is the same every time.
// (Not measured: whether eight blocks are better where four fit that fill a multiprocessor each.)
template <typename T, typename Job>
bool launch_smallest_clusters(const DeviceScope& scope, const PoolCall<T>& call,
                              void (*kernel)(PoolCall<T>, int, Job),
                              int (*shared_bytes)(const ClusterPartition&), const Job& job) {
  constexpr size_t kStaticBytes = 256;  // at least what a kernel declares
  const Features<T>& features = call.features;
  const bool whole_octets = call.channels % 8 == 0 && features.misaligned == 0 &&
                            (!features.channels_last || features.aligned_pixels);
  if (call.attention.resized || call.maps > kClusterMaps || !whole_octets ||
      call.pixels > kMostPixels) {
    return false;
  }
  for (const int blocks : {4, kMostClusterBlocks}) {
    const ClusterPartition partition(blocks, call.channels, call.pixels, features.channels_last);
    const ClusterShape shape{blocks, kClusterThreads,
                             static_cast<size_t>(shared_bytes(partition))};
    if (call.channels > 8 * kOctets * blocks ||
        !device_runs(reinterpret_cast<const void*>(kernel), shape, kStaticBytes)) {
      continue;
    }
    launch_clusters(scope, grid_of(int64_t{call.batch} * blocks), shape, kernel, call, blocks, job);
    return true;
  }
  return false;
}

#if defined(MAGSD_HAS_CLUSTERS)
template <typename T, bool kChannelsLast>
class ClusterTile {
 public:
  __device__ ClusterTile(const PoolCall<T>& call, int blocks, int b, int rank,
                         unsigned char* memory)
      : call_(call),
        b_(b),
        partition_(blocks, call.channels, call.pixels, kChannelsLast),
        first_(rank * partition_.octets),
        octets_(larger(0, smaller(partition_.octets, call.channels / 8 - first_))),
        pitch_(16 * partition_.pitch()),
        memory_(memory),
        begin_(kChannelsLast ? 0 : warp_ * call.pixels % 8),
        chunk_(kChannelsLast ? 0 : warp_ * call.pixels / 8) {}

  __device__ const ClusterPartition& partition() const { return partition_; }
  // Octets of this block, and channels before them.
  __device__ int octets() const { return octets_; }
  __device__ int first_channel() const { return 8 * first_; }

  // Starts to copy the features of half the octets.
  __device__ void load_features(int half) const {
    const Features<T>& features = call_.features;
    const int begin = begin_of(half), end = end_of(half);
    const T* from = features.data + int64_t{b_} * features.step_b + 8 * first_ * features.step_c;
    if constexpr (kChannelsLast) {
      const int octet = begin + lane_;
      if (octet >= end) return;
      from += 8 * octet;
      for (int p = warp_; p < call_.pixels; p += kClusterWarps) {
        copy_async(memory_ + p * pitch_ + 16 * octet, from + p * features.step_p);
      }
    } else {
      for (int octet = begin + warp_; octet < end; octet += kClusterWarps) {
        const T* row = from + 8 * octet * features.step_c;
        for (int k = lane_; k < call_.pixels; k += kWarp) {
          copy_async(memory_ + octet * pitch_ + 16 * k, row + 8 * k);
        }
      }
    }
  }

  // A row of maps per pixel, 0 past the last map; and the row of zeros.
  __device__ void load_attention() const {
    const AttentionMaps<T>& maps = call_.attention;
    const bool maps_inner = maps.step_m == 1;  // neighboring threads read neighbors
    const T* from = maps.data + int64_t{b_} * maps.step_b;
    for (int i = threadIdx.x; i < call_.pixels * kClusterMaps; i += blockDim.x) {
      const int m = maps_inner ? i % kClusterMaps : i / call_.pixels;
      const int p = maps_inner ? i / kClusterMaps : i % call_.pixels;
      const int y = p / maps.to_width, x = p % maps.to_width;
      T* to = reinterpret_cast<T*>(attention_at(p)) + m;
      *to = m < call_.maps ? from[m * maps.step_m + y * maps.step_y + x * maps.step_x] : T{};
    }
    if (threadIdx.x < 4) reinterpret_cast<unsigned*>(zero_row())[threadIdx.x] = 0;
  }

  // Adds the products of half the octets: sums[n][4 m + i] is d_i of tile n and maps 16 m.
  __device__ void multiply(int half, float (&sums)[kTiles][8]) const {
    const int steps = ceil_div(begin_ + call_.pixels, 16);
#pragma unroll 1
    for (int k = 0; k < 16 * steps; k += 16) {
      unsigned maps[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_matrices<true>(attention_row(k, m), maps[m]);
#pragma unroll
      for (int n = half * kTiles / 4; n < (half + 1) * kTiles / 2; n += 2) {
        if (n * kClusterWarps < begin_of(half) || n * kClusterWarps >= end_of(half)) continue;
        unsigned features[4];
        load_matrices<kChannelsLast>(feature_row(k, n), features);
        if constexpr (!kChannelsLast) {
#pragma unroll
          for (int i = 0; i < 4; ++i) features[i] &= mask(k + i % 2 * 8 + 2 * t_);
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            float* d = &sums[n + e][4 * m];
            mma_half<T>(d[0], d[1], d[2], d[3], maps[m], features[2 * e], features[2 * e + 1]);
          }
        }
      }
    }
  }

  // Adds to d, maps by eight pixels from 8 x - begin() on, the products of the features and a
  // matrix of maps by channels: two[n][j] are the entries 2 j and 2 j + 1 of tile n.
  __device__ void multiply_back(int x, const unsigned (&two)[kTiles][4], float (&d)[8]) const {
#pragma unroll
    for (int n = 0; n < kTiles; n += 4) {
      if (n * kClusterWarps >= octets_) continue;
      unsigned features[4];
      load_matrices<!kChannelsLast>(pixel_row(x, n), features);
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const unsigned a[4] = {two[n + e][2 * m], two[n + e][2 * m + 1], two[n + e + 1][2 * m],
                                 two[n + e + 1][2 * m + 1]};
          mma_half<T>(d[4 * m], d[4 * m + 1], d[4 * m + 2], d[4 * m + 3], a, features[e],
                      features[e + 1]);
        }
      }
    }
  }

  // Attention of sixteen pixels from p on and maps 16 m, pixels as rows.
  __device__ void load_attention_matrix(int p, int m, unsigned (&a)[4]) const {
    const int row = p + lane_ / 8 % 2 * 8 + lane_ % 8;
    const unsigned char* from = attention_at(row) + 32 * m + lane_ / 16 * 16;
    load_matrices<false>(row < call_.pixels ? from : zero_row(), a);
  }

  // Puts numbers of pixel p and of the lane's two columns of tile n where the features were.
  __device__ void replace(int p, int n, float low, float high) const {
    const unsigned two = downcast_two<T>(low, high);
    if constexpr (kChannelsLast) {
      if (!has_channel(n, 0)) return;
      *reinterpret_cast<unsigned*>(memory_ + p * pitch_ + 16 * octet_of(n, 0) + 4 * t_) = two;
    } else {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!has_channel(n, e)) continue;
        unsigned char* octet = memory_ + octet_of(n, 2 * t_ + e) * pitch_;
        reinterpret_cast<uint16_t*>(octet)[warp_ * call_.pixels + p] =
            static_cast<uint16_t>(two >> 16 * e);
      }
    }
  }

  // Writes what is where the features were as a dense result.
  __device__ void store_features(T* result) const {
    const int64_t pixels = call_.pixels, channels = call_.channels;
    T* to = result + b_ * pixels * channels + (kChannelsLast ? 1 : pixels) * 8 * first_;
    const int rows = kChannelsLast ? call_.pixels : octets_;
    const int words = kChannelsLast ? octets_ : call_.pixels;
    const int64_t step = kChannelsLast ? channels : 8 * pixels;
    for (int row = warp_; row < rows; row += kClusterWarps) {
      for (int k = lane_; k < words; k += kWarp) {
        uint4 word[1];
        load_aligned(reinterpret_cast<const uint4*>(memory_ + row * pitch_ + 16 * k), word);
        stream_16(to + row * step + 8 * k, word[0]);
      }
    }
  }

  // Pixels of the warp's rows before the first in 16 bytes.
  __device__ int begin() const { return begin_; }

  // The map, and the channel of this block, of sums[n][i].
  __device__ int map_of(int i) const { return i / 4 * 16 + i / 2 % 2 * 8 + g_; }
  __device__ int channel_of(int n, int i) const {
    return 8 * octet_of(n, 2 * t_ + i % 2) + (kChannelsLast ? 2 * t_ + i % 2 : warp_);
  }
  __device__ bool has_channel(int n, int i) const { return octet_of(n, 2 * t_ + i % 2) < octets_; }

 private:
  // Where the two halves meet: behind two tiles, or four where the block has more than four.
  __device__ int middle() const { return octets_ > kOctets / 2 ? kOctets / 2 : kOctets / 4; }
  __device__ int begin_of(int half) const { return half == 0 ? 0 : middle(); }
  __device__ int end_of(int half) const { return half == 0 ? smaller(octets_, middle()) : octets_; }

  // Of a column of tile n.
  __device__ int octet_of(int n, int column) const {
    return kClusterWarps * n + (kChannelsLast ? warp_ : column);
  }

  // What lanes point at for load_matrices: a row of pixels k .. k + 8 or k + 8 .. k + 16 of the
  // shared rows, counted from 16 bytes that hold the first, and eight maps or a tile's channels.
  __device__ const unsigned char* attention_row(int k, int m) const {
    const int p = k + lane_ / 16 * 8 + lane_ % 8 - begin_;
    if (p < 0 || p >= call_.pixels) return zero_row();
    return attention_at(p) + 32 * m + lane_ / 8 % 2 * 16;
  }
  __device__ const unsigned char* feature_row(int k, int n) const {
    const int octet = octet_of(n + lane_ / 16, lane_ % 8), upper = lane_ / 8 % 2;
    if constexpr (kChannelsLast) {
      const int p = k + 8 * upper + lane_ % 8;
      return p < call_.pixels && octet < octets_ ? memory_ + p * pitch_ + 16 * octet : zero_row();
    } else {
      // At most one piece of 16 bytes past the octet's; masked.
      if (octet >= octets_) return zero_row();
      return memory_ + octet * pitch_ + 16 * (chunk_ + k / 8 + upper);
    }
  }

  // Eight pixels of four tiles from n on, see multiply_back.
  __device__ const unsigned char* pixel_row(int x, int n) const {
    const int octet = octet_of(n + lane_ / 8, lane_ % 8), p = 8 * x + lane_ % 8;
    if (octet >= octets_ || (kChannelsLast && p >= call_.pixels)) return zero_row();
    return memory_ + (kChannelsLast ? p * pitch_ + 16 * octet : octet * pitch_ + 16 * (chunk_ + x));
  }

  // Keeps of two numbers those that belong to the row: beside it lie other channels, which may not
  // be finite.
  __device__ unsigned mask(int k) const {
    const int p = k - begin_;
    return (p >= 0 && p < call_.pixels ? 0xffffu : 0) |
           (p + 1 >= 0 && p + 1 < call_.pixels ? 0xffff0000u : 0);
  }

  __device__ unsigned char* zero_row() const { return memory_ + partition_.zero_row(); }
  __device__ unsigned char* attention_at(int p) const {
    return memory_ + partition_.attention() + p * ClusterPartition::kAttentionPitch;
  }

  const PoolCall<T>& call_;
  const int b_;
  const int warp_ = threadIdx.x / kWarp, lane_ = threadIdx.x % kWarp;
  const int g_ = lane_ / 4, t_ = lane_ % 4;
  const ClusterPartition partition_;
  const int first_, octets_, pitch_;
  unsigned char* const memory_;
  const int begin_, chunk_;  // of the warp's rows: pixels before the first in chunk_
};

// The sum of `mine` over a cluster, in every thread, added in one order. The next wait must come
// before the block ends.
__device__ __forceinline__ double cluster_sum(double mine, int blocks) {
  MAGSD_SHARED(double, sums, [kClusterWarps]);
  MAGSD_SHARED(double, total, [1]);
  mine = warp_sum(mine);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (int i = 0; i < kClusterWarps; ++i) sum += sums[i];
    total[0] = sum;
  }
  cluster_arrive();
  cluster_wait();
  // A lane reads of one block, so that a warp waits once.
  const int lane = threadIdx.x % kWarp;
  const double part = lane < blocks ? *peer_shared(&total[0], lane) : 0;
  double sum = 0;
#pragma unroll
  for (int rank = 0; rank < kMostClusterBlocks; ++rank) sum += __shfl_sync(kAllLanes, part, rank);
  cluster_arrive();
  return sum;
}
#endif

// Pools as the forward does, by the mean, if the call's sizes and the device allow it; whether they
// did. The result is (B, M, C), the norm (B,) or null where nothing is normalized.
template <typename T>
bool pool_by_clusters(const DeviceScope& scope, const PoolCall<T>& call, T* output, float* norm);

// The gradients, of features and attention or of one of them, of what pool_by_clusters pools. The
// norm is null where nothing is normalized, a gradient where it is not wanted.
template <typename T>
struct ClusterGradients {
  const T* grad;      // (B, M, C)
  const float* norm;  // (B,)
  T* features;        // dense, in the features' format
  T* attention;       // dense, by the steps below
  int64_t step_m, step_p;
};
template <typename T>
bool gradients_by_clusters(const DeviceScope& scope, const PoolCall<T>& call,
                           const ClusterGradients<T>& job);

}  // namespace magsd::MAGSD_ISA::bilinear_pool
