// Bilinear pooling of half precision by clusters: an image's features, a quarter of the channels in
// the shared memory of each of four blocks, with all its attention; products by m16n8k16.
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

namespace magsd::MAGSD_ISA {

constexpr int kClusterBlocks = 4;  // of an image
constexpr int kClusterWarps = 8;   // of a block
constexpr int kClusterMaps = 32;
constexpr int kOctets = 64;  // of a block at most: 64 registers of sums a thread
constexpr int kTiles = kOctets / kClusterWarps;
constexpr int kMostPixels = 4096;  // so that no offset overflows; shared memory ends long before

// How the shared memory of a block is cut. Offsets in bytes; all are multiples of 16.
struct ClusterCut {
  static constexpr int kAttentionPitch = 2 * kClusterMaps + 16;

  int octets;  // of a block; the last ones may have fewer
  int pixels;
  bool channels_last;

  MAGSD_HD ClusterCut(int channels, int pixels_of, bool last)
      : octets(ceil_div(channels / 8, kClusterBlocks)), pixels(pixels_of), channels_last(last) {}

  // Of a row of features: 16 bytes a piece.
  MAGSD_HD int pitch() const { return (channels_last ? octets : pixels) | 1; }
  // Of a row of the result, a map's channels. Lanes write neighbours in channels last, every eighth
  // channel in planes: in both no two lanes of a warp write to the same bank.
  MAGSD_HD int result_pitch() const { return 16 * octets + (channels_last ? 16 : 4); }

  MAGSD_HD int features_bytes() const { return 16 * pitch() * (channels_last ? pixels : octets); }
  MAGSD_HD int result_bytes() const { return kClusterMaps * result_pitch(); }
  MAGSD_HD int zero_row() const { return larger(features_bytes(), result_bytes()); }
  MAGSD_HD int attention() const { return zero_row() + 16; }
  MAGSD_HD int bytes() const { return attention() + pixels * kAttentionPitch; }
};

#if defined(MAGSD_HAS_CLUSTERS)
template <typename T, bool kChannelsLast>
class ClusterTile {
 public:
  __device__ ClusterTile(const PoolCall<T>& call, int b, int rank, unsigned char* memory)
      : call_(call),
        b_(b),
        cut_(call.channels, call.pixels, kChannelsLast),
        first_(rank * cut_.octets),
        octets_(larger(0, smaller(cut_.octets, call.channels / 8 - first_))),
        pitch_(16 * cut_.pitch()),
        memory_(memory),
        zero_(memory + cut_.zero_row()),
        attention_(memory + cut_.attention()),
        begin_(kChannelsLast ? 0 : warp_ * call.pixels % 8),
        chunk_(kChannelsLast ? 0 : warp_ * call.pixels / 8) {}

  __device__ const ClusterCut& cut() const { return cut_; }
  // Octets of this block, and channels before them.
  __device__ int octets() const { return octets_; }
  __device__ int first_channel() const { return 8 * first_; }

  // Starts to copy the features of half the tiles.
  __device__ void load_features(int half) const {
    const Features<T>& features = call_.features;
    const int begin = half * kOctets / 2, end = smaller(octets_, begin + kOctets / 2);
    const T* from = features.data + b_ * features.step_b + 8 * first_ * features.step_c;
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
    const bool maps_inner = maps.step_m == 1;  // neighbouring threads read neighbours
    const T* from = maps.data + b_ * maps.step_b;
    for (int i = threadIdx.x; i < call_.pixels * kClusterMaps; i += blockDim.x) {
      const int m = maps_inner ? i % kClusterMaps : i / call_.pixels;
      const int p = maps_inner ? i / kClusterMaps : i % call_.pixels;
      const int y = p / maps.to_width, x = p % maps.to_width;
      T* to = reinterpret_cast<T*>(attention_ + p * ClusterCut::kAttentionPitch) + m;
      *to = m < call_.maps ? from[m * maps.step_m + y * maps.step_y + x * maps.step_x] : T{};
    }
    if (threadIdx.x < 4) reinterpret_cast<unsigned*>(zero_)[threadIdx.x] = 0;
  }

  // Adds the products of half the tiles: sums[n][4 m + i] is d_i of tile n and maps 16 m.
  __device__ void multiply(int half, float (&sums)[kTiles][8]) const {
    const int steps = ceil_div(begin_ + call_.pixels, 16);
#pragma unroll 1
    for (int k = 0; k < 16 * steps; k += 16) {
      unsigned maps[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_matrices<true>(attention_row(k, m), maps[m]);
#pragma unroll
      for (int pair = 0; pair < kTiles / 4; ++pair) {
        const int n = half * kTiles / 2 + 2 * pair;
        if (n * kClusterWarps >= octets_) continue;
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

  // The map, and the channel of this block, of sums[n][i].
  __device__ int map_of(int i) const { return i / 4 * 16 + i / 2 % 2 * 8 + g_; }
  __device__ int channel_of(int n, int i) const {
    return 8 * octet_of(n, 2 * t_ + i % 2) + (kChannelsLast ? 2 * t_ + i % 2 : warp_);
  }
  __device__ bool has_channel(int n, int i) const { return octet_of(n, 2 * t_ + i % 2) < octets_; }

 private:
  // Of a column of tile n.
  __device__ int octet_of(int n, int column) const {
    return kClusterWarps * n + (kChannelsLast ? warp_ : column);
  }

  // What lanes point at for load_matrices: a row of pixels k .. k + 8 or k + 8 .. k + 16 of the
  // shared rows, counted from 16 bytes that hold the first, and eight maps or a tile's channels.
  __device__ const unsigned char* attention_row(int k, int m) const {
    const int p = k + lane_ / 16 * 8 + lane_ % 8 - begin_;
    if (p < 0 || p >= call_.pixels) return zero_;
    return attention_ + p * ClusterCut::kAttentionPitch + 32 * m + lane_ / 8 % 2 * 16;
  }
  __device__ const unsigned char* feature_row(int k, int n) const {
    const int octet = octet_of(n + lane_ / 16, lane_ % 8), upper = lane_ / 8 % 2;
    if constexpr (kChannelsLast) {
      const int p = k + 8 * upper + lane_ % 8;
      return p < call_.pixels && octet < octets_ ? memory_ + p * pitch_ + 16 * octet : zero_;
    } else {
      // At most one piece of 16 bytes past the octet's; masked.
      return octet < octets_ ? memory_ + octet * pitch_ + 16 * (chunk_ + k / 8 + upper) : zero_;
    }
  }

  // Keeps of two numbers those that belong to the row: beside it lie other channels, which may not
  // be finite.
  __device__ unsigned mask(int k) const {
    const int p = k - begin_;
    return (p >= 0 && p < call_.pixels ? 0xffffu : 0) |
           (p + 1 >= 0 && p + 1 < call_.pixels ? 0xffff0000u : 0);
  }

  const PoolCall<T>& call_;
  const int64_t b_;
  const int warp_ = threadIdx.x / kWarp, lane_ = threadIdx.x % kWarp;
  const int g_ = lane_ / 4, t_ = lane_ % 4;
  const ClusterCut cut_;
  const int first_, octets_, pitch_;
  unsigned char* const memory_;
  unsigned char* const zero_;
  unsigned char* const attention_;
  const int begin_, chunk_;  // of the warp's rows: pixels before the first in chunk_
};
#endif

// Pools as the forward does, by the mean, if the call's sizes and the device allow it; whether they
// did. The result is (B, M, C), the norm (B,) or null where nothing is normalised.
template <typename T>
bool pool_by_clusters(const DeviceScope& scope, const PoolCall<T>& call, T* output, float* norm);

}  // namespace magsd::MAGSD_ISA
