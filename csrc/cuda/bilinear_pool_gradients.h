// What a warp of bilinear pooling's backward does with its 64 channels: makes W, the gradient of
// the pooled matrix, and multiplies with it.
#pragma once

#include <cstdint>

#include "cuda/bilinear_pool.h"
#include "cuda/bilinear_pool_tile.h"

namespace magsd::MAGSD_ISA::bilinear_pool {

template <typename T>
struct GradientJob {
  using A = accumulate_t<T>;
  const T* grad;          // (B, M, C)
  const A* norm;          // (B,) where normalized
  const double* sums;     // (B, shares) of scale * root * grad, where normalized
  const int32_t* argmax;  // (B, M, C) where pooled by maximum
  T* features;            // gradient, dense, or null
  A* grad_acc;            // the same in the accumulation type, where several groups of maps add
  A* attention;           // (B, blocks, HW, M), shares of the gradient, or null
  int shares;
  bool channels_last, aligned_grad, aligned_features;
};

// From a pooled entry's root and the gradient of the output to the gradient of its sum.
template <typename T>
struct Chain {
  using A = accumulate_t<T>;
  A scale, inverse_norm = 1, projection = 0;

  __device__ explicit Chain(const PoolCall<T>& call) : scale(call.scale) {}

  __device__ Chain(const PoolCall<T>& call, const GradientJob<T>& job, int64_t b) : Chain(call) {
    if (!call.normalize) return;
    double sum = 0;
    for (int i = 0; i < job.shares; ++i) sum += job.sums[b * job.shares + i];
    normalize(job.norm[b], sum);
  }

  // `sum` is that of scale * root * grad.
  __device__ void normalize(A norm, double sum) {
    const double clamped = clamped_norm(norm);
    inverse_norm = static_cast<A>(1 / clamped);
    scale *= inverse_norm;
    // Under the smallest norm the divisor is constant, and no gradient flows through it.
    if (norm >= static_cast<A>(kSmallestNorm)) {
      projection = static_cast<A>(sum / (clamped * clamped));
    }
  }

  // Sums of products to their gradients.
  __device__ void operator()(const PoolCall<T>& call, const T (&grad)[8], A (&sums)[8]) const {
    A roots[8];
    call.take_roots(sums, roots);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const A pooled = sums[j] * call.factor;
      sums[j] = (scale * upcast(grad[j]) - roots[j] * inverse_norm * projection) * call.factor;
      if (!call.signed_sqrt) continue;
      sums[j] *= quick_inverse_root(std::abs(pooled) + call.eps) / 2;
      if (pooled == 0) sums[j] = 0;
    }
  }
};

// A warp's channels c .. c + kChannels of image b, and what it keeps in shared memory: W and, for
// the maximum, the pixels it goes to, both with the rows of a stage and a column per map; two
// stages.
template <typename T, Product kProduct>
class WarpGradients {
  using C = Partition<T, kProduct>;
  using A = accumulate_t<T>;
  static constexpr bool kMaximum = kProduct == Product::kMaximum;
  static constexpr bool kTensor = kProduct == Product::kTensor;
  // Of a row of W, in entries: by the accesses that are most, pairs or sixteen bytes.
  static constexpr int kPitch = C::kMaps + (kTensor ? 8 : 4);
  static constexpr int kEntries = kChannels * kPitch;
  static constexpr int kFirstBytes = kMaximum ? kEntries * 4 : 0;
  static constexpr int kWeightBytes = kEntries * static_cast<int>(sizeof(A));
  // Pixels of a lane: 8 i + g of a stage. A product with pixels as rows takes kRows of them.
  static constexpr int kPixels = C::kStage / 8, kRows = kPixels < 2 ? 1 : 2;

 public:
  static constexpr int kBytes = kWeightBytes + kFirstBytes + 2 * kStageBytes;

  __device__ WarpGradients(const PoolCall<T>& call, const GradientJob<T>& job, int64_t b, int c,
                           unsigned char* memory)
      : call_(call),
        job_(job),
        b_(b),
        c_(c),
        window_(call.features, b, c, call.channels, call.pixels),
        memory_(memory),
        weights_(reinterpret_cast<A*>(memory)),
        first_(reinterpret_cast<int*>(memory + kWeightBytes)) {
    clear();
  }

  __device__ static int stage_offset(int buffer) {
    return kWeightBytes + kFirstBytes + buffer * kStageBytes;
  }
  __device__ unsigned char* stage(int buffer) const { return memory_ + stage_offset(buffer); }
  __device__ const Window<T>& window() const { return window_; }

  // Before every group of maps.
  __device__ void clear() { pooled_.clear(); }

  // Reads where the maxima of a group of maps lie. An index from outside is not trusted.
  __device__ void load_first(int group) {
    const int c = c_ + 8 * chunk_of(g_);
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) {
      const int m = group * C::kMaps + map_of(slot);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const bool exists = m < call_.maps && c + j < call_.channels;
        const int p = exists ? job_.argmax[(b_ * call_.maps + m) * call_.channels + c + j] : 0;
        first_[position_of(8 * j + g_, slot)] = larger(0, smaller(p, call_.pixels - 1));
      }
    }
    __syncwarp();
  }

  // Takes `count` pixels of a stage, p the first, into the pooled matrix; `attention` is the row of
  // p.
  __device__ void add(const unsigned char* stage, const A* attention, int p, int count) {
    if constexpr (kMaximum) {
      gather(stage, attention, p, count);
    } else {
      pooled_.add(window_, stage, attention, p, count, call_.attention.resized);
    }
  }

  // W from the pooled matrix; 0 for channels and maps past the last.
  __device__ void weigh(const Chain<T>& chain, int group) {
    const int c = c_ + 8 * chunk_of(g_), count = call_.channels - c;
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) {
      const int m = group * C::kMaps + map_of(slot);
      T grad[8] = {};
      if (m < call_.maps && count > 0) {
        load_row(job_.grad + (b_ * call_.maps + m) * call_.channels + c, count,
                 job_.aligned_grad && count >= 8, grad);
      }
      chain(call_, grad, pooled_.sum[slot]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        A weight = m < call_.maps && j < count ? pooled_.sum[slot][j] : A{0};
        if constexpr (C::kRounds) weight = to_tf32(weight);
        weights_[position_of(8 * j + g_, slot)] = weight;
      }
    }
    __syncwarp();
  }

  // The share of the gradient of attention at a stage's pixels, which replaces the stage: row by
  // pixel, a column per map.
  __device__ void attention_gradient(unsigned char* stage, int p) const {
    A sum[kPixels][C::kSlots] = {};
    window_.read([&](const auto& reader) {
      if constexpr (kTensor) {
        multiply_features_on_tensor_cores(sum, reader, stage);
      } else {
        multiply_features(sum, reader, stage, p);
      }
    });
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
#pragma unroll
      for (int slot = 0; slot < C::kSlots; ++slot) {
        reinterpret_cast<A*>(stage)[(8 * i + g_) * C::kPitch + map_of(slot)] = sum[i][slot];
      }
    }
  }

  // The gradient of features at `count` pixels from p on, written in place or, with pixels side by
  // side, by way of the stage. `attention` is the row of p.
  __device__ void feature_gradient(unsigned char* stage, const A* attention, int p, int count,
                                   int group, int groups) const {
    for (int first = 0; first < count; first += 8 * kRows) {
      A sum[kRows][2][8] = {};
      multiply_attention(sum, attention + (first + g_) * C::kPitch, p + first + g_);
#pragma unroll
      for (int i = 0; i < kRows * 2; ++i) {
        const int pixel = first + i / 2 * 8 + g_, e = i % 2;
        if (pixel >= count) continue;
        A(&values)[8] = sum[i / 2][e];
        const int c = 8 * chunk_of(2 * t_ + e);
        if (groups > 1) add_grad_acc(values, c, p + pixel, group, groups);
        if (!job_.channels_last) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            T* row = reinterpret_cast<T*>(stage + (8 * j + 2 * t_ + e) * kRowBytes);
            row[beginning_of(j) + pixel] = downcast<T>(values[j]);
          }
        } else if (c < window_.channels() && group == groups - 1) {
          store_row(values, job_.features + entry_of(c, p + pixel), window_.channels() - c,
                    job_.aligned_features && c + 8 <= window_.channels());
        }
      }
    }
    __syncwarp();
    if (!job_.channels_last && group == groups - 1) write_rows(stage, p, count);
  }

 private:
  // Where the map of a slot lies in a row of W.
  __device__ int position_of(int row, int slot) const {
    return row * kPitch + C::position_of(map_of(slot));
  }

  __device__ int map_of(int slot) const { return slot / 2 * 8 + 2 * t_ + slot % 2; }

  // Products at those of the first pixels that lie in a stage.
  __device__ void gather(const unsigned char* stage, const A* attention, int p, int count) {
    window_.read([&](const auto& reader) {
#pragma unroll
      for (int slot = 0; slot < C::kSlots; ++slot) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int row = 8 * j + g_, i = first_[position_of(row, slot)] - p;
          if (i < 0 || i >= count) continue;
          pooled_.sum[slot][j] = attention[i * C::kPitch + C::position_of(map_of(slot))] *
                                 upcast(reader.at(stage, row, i));
        }
      }
    });
  }

  __device__ bool takes(int at, int p) const {
    if constexpr (kMaximum) return first_[at] == p;
    return true;
  }

  // 16 rows of two k-columns each, times W; split in two where half precision meets it.
  __device__ static void add_rows(A& d0, A& d1, A& d2, A& d3, const A (&upper)[2],
                                  const A (&lower)[2], A b0, A b1) {
    if constexpr (C::kRounds) {
      mma_tf32(d0, d1, d2, d3, upper[0], lower[0], upper[1], lower[1], b0, b1);
    } else {
      mma_tf32(d0, d1, d2, d3, upper[0], lower[0], upper[1], lower[1], tf32_part(b0),
               tf32_part(b1));
      mma_tf32(d0, d1, d2, d3, upper[0], lower[0], upper[1], lower[1], tf32_rest(b0),
               tf32_rest(b1));
    }
  }

  // sum[i][slot] = sum over c of F[p, c] W[c, m] at pixel 8 i + g of a stage.
  template <typename Reader>
  __device__ void multiply_features_on_tensor_cores(A (&sum)[kPixels][C::kSlots],
                                                    const Reader& reader,
                                                    const unsigned char* stage) const {
#pragma unroll 2
    for (int k = 0; k < 8; ++k) {
      // Any order of the channels will do. In this one the lanes read different banks.
      const int row = (k + 2 * t_) % 8 * 8 + t_;
      A features[kPixels][2];
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const A value = upcast(reader.at(stage, row + 4 * e, 8 * i + g_));
          features[i][e] = C::kRounds ? to_tf32(value) : value;
        }
      }
      const A* weights = weights_ + row * kPitch + g_;
#pragma unroll
      for (int n = 0; n < C::kEighths; ++n) {
#pragma unroll
        for (int i = 0; i < kPixels; i += 2) {
          add_rows(sum[i][2 * n], sum[i][2 * n + 1], sum[i + 1][2 * n], sum[i + 1][2 * n + 1],
                   features[i], features[i + 1], weights[8 * n], weights[4 * kPitch + 8 * n]);
        }
      }
    }
  }

  template <typename Reader>
  __device__ void multiply_features(A (&sum)[kPixels][C::kSlots], const Reader& reader,
                                    const unsigned char* stage, int p) const {
#pragma unroll 1
    for (int row = 0; row < kChannels; ++row) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = position_of(row, e);
        A weights[C::kEighths];
        load_aligned(weights_ + at, weights);
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
          const A value = upcast(reader.at(stage, row, 8 * i + g_));
#pragma unroll
          for (int n = 0; n < C::kEighths; ++n) {
            if (takes(at + n, p + 8 * i + g_)) sum[i][2 * n + e] += value * weights[n];
          }
        }
      }
    }
  }

  // sum[i][e][j] = sum over m of A[p, m] W[c, m] at pixel p + 8 i and channel
  // 8 chunk_of(2 t + e) + j; `attention` is the row of p.
  __device__ void multiply_attention(A (&sum)[kRows][2][8], const A* attention, int p) const {
    if constexpr (kTensor) {
#pragma unroll
      for (int n = 0; n < C::kEighths; ++n) {
        const A* factors = attention + 8 * n + 2 * t_;
        const A entries[4] = {factors[0], factors[1], factors[8 * C::kPitch],
                              factors[8 * C::kPitch + 1]};
        const A upper[2] = {tf32_part(entries[0]), tf32_part(entries[1])};
        const A lower[2] = {tf32_part(entries[2]), tf32_part(entries[3])};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          A weights[2];
          load_aligned(weights_ + (8 * j + g_) * kPitch + 8 * n + 2 * t_, weights);
          add_rows(sum[0][0][j], sum[0][1][j], sum[1][0][j], sum[1][1][j], upper, lower, weights[0],
                   weights[1]);
          if (!C::kRounds && call_.attention.resized) {
            mma_tf32(sum[0][0][j], sum[0][1][j], sum[1][0][j], sum[1][1][j], tf32_rest(entries[0]),
                     tf32_rest(entries[2]), tf32_rest(entries[1]), tf32_rest(entries[3]),
                     tf32_part(weights[0]), tf32_part(weights[1]));
          }
        }
      }
    } else {
#pragma unroll 1
      for (int m = 0; m < C::kMaps; m += C::kEighths) {
        A factors[kRows][C::kEighths];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          load_aligned(attention + 8 * i * C::kPitch + m, factors[i]);
        }
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          const int at = (j / 2 * 8 + 2 * t_ + j % 2) * kPitch + m;
          A weights[C::kEighths];
          load_aligned(weights_ + at, weights);
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int n = 0; n < C::kEighths; ++n) {
              if (takes(at + n, p + 8 * i)) sum[i][j % 2][j / 2] += factors[i][n] * weights[n];
            }
          }
        }
      }
    }
  }

  // Adds what earlier groups of maps left, and leaves the sum to later ones.
  __device__ void add_grad_acc(A (&values)[8], int c, int p, int group, int groups) const {
    for (int j = 0; j < 8 && c + j < window_.channels(); ++j) {
      A& acc = job_.grad_acc[entry_of(c + j, p)];
      if (group > 0) values[j] += acc;
      if (group < groups - 1) acc = values[j];
    }
  }

  // Where the gradient of channel c_ + c at pixel p lies.
  __device__ int64_t entry_of(int c, int p) const {
    const int64_t channels = call_.channels, pixels = call_.pixels;
    return job_.channels_last ? (b_ * pixels + p) * channels + c_ + c
                              : (b_ * channels + c_ + c) * pixels + p;
  }

  // Entries of a row of the result that precede a stage's first pixel in 16 bytes.
  __device__ int beginning_of(int j) const {
    return static_cast<int>(entry_of(j, 0) % Window<T>::kEach);
  }

  // Rows of a stage to the result, 16 bytes at a time but for their ends.
  __device__ void write_rows(const unsigned char* stage, int p, int count) const {
    constexpr int kEach = Window<T>::kEach, kChunks = kRowBytes / 16;
    const int channels = smaller(kChannels, window_.channels());
    for (int i = threadIdx.x % kWarp; i < channels * kChunks; i += kWarp) {
      const int c = i / kChunks, k = i % kChunks, j = c % 8, before = beginning_of(j) - k * kEach;
      const int begin = larger(0, before), end = smaller(kEach, before + count);
      if (begin >= end) continue;
      const unsigned char* from = stage + (8 * j + group_of(c / 8)) * kRowBytes + 16 * k;
      T* to = job_.features + entry_of(c, p) - before;
      if (end - begin == kEach) {
        uint4 word[1];
        load_aligned(reinterpret_cast<const uint4*>(from), word);
        stream_16(to, word[0]);
      } else {
        for (int n = begin; n < end; ++n) to[n] = reinterpret_cast<const T*>(from)[n];
      }
    }
  }

  const PoolCall<T>& call_;
  const GradientJob<T>& job_;
  const int64_t b_;
  const int c_;
  const int g_ = threadIdx.x % kWarp / 4, t_ = threadIdx.x % 4;
  const Window<T> window_;
  unsigned char* const memory_;
  A* const weights_;
  int* const first_;
  Pooled<T, kProduct> pooled_;
};

}  // namespace magsd::MAGSD_ISA::bilinear_pool
