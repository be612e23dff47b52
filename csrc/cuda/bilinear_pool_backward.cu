// Bilinear attention pooling, backward: with W the gradient of the pooled matrix,
//
//   dF[p, c] = sum over m of A[p, m] W[c, m]
//   dA[p, m] = sum over c of F[p, c] W[c, m]
//
// Must move the features and the gradient of the output in, and the gradient of the features out.
// The output is not read: it is rounded in half precision, and where it is not, one way for all
// dtypes is worth more than the product that it would save. Three launches at most:
//   - normalised: the sum of root * gradient over an image (the forward's kernel);
//   - W: a warp makes the pooled matrix of 64 channels again, turns it into W in shared memory, and
//     walks over the pixels a second time for dF and its block's share of dA;
//   - the shares are added in order, resized back and rounded.
// Maps past the 32 of a group take another round each; what they add to dF is kept wide between.
// With the maximum, sums take only the pixel that argmax names.
#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cuda/bilinear_pool.h"
#include "cuda/bilinear_pool_tile.h"

namespace magsd::MAGSD_ISA {
namespace {

constexpr int kMostWarps = 4;
template <typename T>
constexpr ScalarType kWideDtype =
    std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
constexpr int kThreads = 128;  // of a block that adds shares

template <typename T>
struct Job {
  using A = accumulate_t<T>;
  const T* grad;          // (B, M, C)
  const A* norm;          // (B,) where normalised
  const double* sums;     // (B, shares) of scale * root * grad, where normalised
  const int32_t* argmax;  // (B, M, C) where pooled by maximum
  T* features;            // gradient, dense, or null
  A* wide;                // the same, wide, where several groups of maps add to it
  A* attention;           // (B, blocks, HW, M), shares of the gradient, or null
  int shares;
  bool channels_last, aligned_grad, aligned_features;
};

// From a pooled entry's root and the gradient of the output to the gradient of its sum.
template <typename T>
struct Chain {
  using A = accumulate_t<T>;
  A scale, inverse_length = 1, along = 0;

  __device__ Chain(const PoolCall<T>& call, const Job<T>& job, int64_t b) : scale(call.scale) {
    if (!call.normalize) return;
    const double length = length_of(job.norm[b]);
    inverse_length = static_cast<A>(1 / length);
    scale *= inverse_length;
    // Under the smallest norm the divisor is constant, and no gradient flows through it.
    if (!(job.norm[b] >= static_cast<A>(kSmallestNorm))) return;
    double sum = 0;
    for (int i = 0; i < job.shares; ++i) sum += job.sums[b * job.shares + i];
    along = static_cast<A>(sum / (length * length));
  }

  __device__ A operator()(const PoolCall<T>& call, A sum, A grad) const {
    const A pooled = sum * call.factor;
    const A wide = scale * grad - call.root(pooled) * inverse_length * along;
    if (!call.signed_sqrt) return wide * call.factor;
    const A inverse_root = quick_inverse_root(std::abs(pooled) + call.eps);
    return pooled == 0 ? A{0} : wide * (call.factor / 2) * inverse_root;
  }
};

// A warp's channels c .. c + kChannels of image b, and what it keeps in shared memory: W and, for
// the maximum, the pixels it goes to, both with the rows of a stage and a column per map; two
// stages.
template <typename T, Product kProduct>
class Share {
  using C = Cut<T, kProduct>;
  using A = accumulate_t<T>;
  static constexpr bool kMaximum = kProduct == Product::kMaximum;
  static constexpr bool kTensor = kProduct == Product::kTensor;
  static constexpr int kPitch = C::kMaps + 4;  // of a row of W
  static constexpr int kEntries = kChannels * kPitch;
  static constexpr int kFirstBytes = kMaximum ? kEntries * 4 : 0;
  static constexpr int kWeightBytes = kEntries * static_cast<int>(sizeof(A));
  // Pixels of a lane: 8 i + g of a stage. A product with pixels as rows takes kRows of them.
  static constexpr int kPixels = C::kStage / 8, kRows = kPixels < 2 ? 1 : 2;

 public:
  static constexpr int kBytes = kWeightBytes + kFirstBytes + 2 * kStageBytes;

  __device__ Share(const PoolCall<T>& call, const Job<T>& job, int64_t b, int c,
                   unsigned char* memory)
      : call_(call),
        job_(job),
        b_(b),
        c_(c),
        window_(call.features, b, c, call.channels, call.pixels),
        memory_(memory),
        weights_(reinterpret_cast<A*>(memory)),
        first_(reinterpret_cast<int*>(memory + kWeightBytes)) {}

  __device__ static int stage_offset(int buffer) {
    return kWeightBytes + kFirstBytes + buffer * kStageBytes;
  }
  __device__ unsigned char* stage(int buffer) const { return memory_ + stage_offset(buffer); }
  __device__ const Window<T>& window() const { return window_; }

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
        first_[place_of(8 * j + g_, slot)] = larger(0, smaller(p, call_.pixels - 1));
      }
    }
    __syncwarp();
  }

  // Products at those of the first pixels that lie in a stage.
  __device__ void gather(Pooled<T, kProduct>& pooled, const unsigned char* stage,
                         const A* attention, int p, int count) const {
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int row = 8 * j + g_, i = first_[place_of(row, slot)] - p;
        if (i >= 0 && i < count) {
          pooled.sum[slot][j] =
              attention[i * C::kPitch + place_of(0, slot)] * widen(window_.at(stage, row, i));
        }
      }
    }
  }

  // W from the pooled matrix; 0 for channels and maps past the last.
  __device__ void weigh(const Pooled<T, kProduct>& pooled, const Chain<T>& chain, int group) {
    const int c = c_ + 8 * chunk_of(g_), count = call_.channels - c;
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) {
      const int m = group * C::kMaps + map_of(slot);
      T grad[8] = {};
      if (m < call_.maps && count > 0) {
        load_row(job_.grad + (b_ * call_.maps + m) * call_.channels + c, count,
                 job_.aligned_grad && count >= 8, grad);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        A weight =
            m < call_.maps && j < count ? chain(call_, pooled.sum[slot][j], widen(grad[j])) : A{0};
        if constexpr (C::kRounds) weight = to_tf32(weight);
        weights_[place_of(8 * j + g_, slot)] = weight;
      }
    }
    __syncwarp();
  }

  // The share of the gradient of attention at a stage's pixels, which replaces the stage: row by
  // pixel, a column per map.
  __device__ void attention_gradient(unsigned char* stage, int p) const {
    A sum[kPixels][C::kSlots] = {};
    if constexpr (kTensor) {
#pragma unroll 2
      for (int k = 0; k < 8; ++k) {
        // Any order of the channels will do. In this one the lanes read different banks.
        const int row = (k + 2 * t_) % 8 * 8 + t_;
        A features[kPixels][2];
#pragma unroll
        for (int i = 0; i < 2 * kPixels; ++i) {
          A value = widen(window_.at(stage, row + i % 2 * 4, i / 2 * 8 + g_));
          if constexpr (C::kRounds) value = to_tf32(value);
          features[i / 2][i % 2] = value;
        }
        A b0[C::kEighths], b1[C::kEighths];
        load_aligned(weights_ + row * kPitch + g_ * C::kEighths, b0);
        load_aligned(weights_ + (row + 4) * kPitch + g_ * C::kEighths, b1);
#pragma unroll
        for (int n = 0; n < C::kEighths; ++n) {
#pragma unroll
          for (int i = 0; i < kPixels; i += 2) {
            add_rows(sum[i][2 * n], sum[i][2 * n + 1], sum[i + 1][2 * n], sum[i + 1][2 * n + 1],
                     features[i], features[i + 1], b0[n], b1[n]);
          }
        }
      }
    } else {
#pragma unroll 1
      for (int row = 0; row < kChannels; ++row) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = place_of(row, e);
          A weights[C::kEighths];
          load_aligned(weights_ + at, weights);
#pragma unroll
          for (int i = 0; i < kPixels; ++i) {
            const A value = widen(window_.at(stage, row, 8 * i + g_));
#pragma unroll
            for (int n = 0; n < C::kEighths; ++n) {
              if (takes(at + n, p + 8 * i + g_)) sum[i][2 * n + e] += value * weights[n];
            }
          }
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPixels * C::kSlots; ++i) {
      const int row = i / C::kSlots * 8 + g_, slot = i % C::kSlots;
      reinterpret_cast<A*>(stage)[row * C::kPitch + map_of(slot)] = sum[i / C::kSlots][slot];
    }
  }

  // The gradient of features at `count` pixels from p on, written in place or, with pixels side by
  // side, by way of the stage. `attention` is the row of p.
  __device__ void feature_gradient(unsigned char* stage, const A* attention, int p, int count,
                                   int group, int groups) const {
    for (int first = 0; first < count; first += 8 * kRows) {
      A sum[kRows][2][8] = {};
      multiply(sum, attention + (first + g_) * C::kPitch, p + first + g_);
#pragma unroll
      for (int i = 0; i < kRows * 2; ++i) {
        const int pixel = first + i / 2 * 8 + g_, e = i % 2;
        if (pixel >= count) continue;
        A(&values)[8] = sum[i / 2][e];
        const int c = 8 * chunk_of(2 * t_ + e);
        if (groups > 1) add_wide(values, c, p + pixel, group, groups);
        if (!job_.channels_last) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            T* row = reinterpret_cast<T*>(stage + (8 * j + 2 * t_ + e) * kRowBytes);
            row[beginning_of(j) + pixel] = narrow<T>(values[j]);
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
  __device__ int place_of(int row, int slot) const {
    return row * kPitch + (2 * t_ + slot % 2) * C::kEighths + slot / 2;
  }

  __device__ int map_of(int slot) const { return slot / 2 * 8 + 2 * t_ + slot % 2; }

  __device__ bool takes(int at, int p) const {
    if constexpr (kMaximum) return first_[at] == p;
    return true;
  }

  // 16 rows of two k-columns each, times W; cut in two where half precision meets it.
  __device__ static void add_rows(A& d0, A& d1, A& d2, A& d3, const A (&upper)[2],
                                  const A (&lower)[2], A b0, A b1) {
    mma_tf32(d0, d1, d2, d3, upper[0], lower[0], upper[1], lower[1], b0, b1);
    if constexpr (!C::kRounds) {
      mma_tf32(d0, d1, d2, d3, upper[0], lower[0], upper[1], lower[1], tf32_rest(b0),
               tf32_rest(b1));
    }
  }

  // sum[i][e][j] = sum over m of attention W, at pixel p + 8 i and channel 8 chunk_of(2 t + e) + j.
  __device__ void multiply(A (&sum)[kRows][2][8], const A* attention, int p) const {
    if constexpr (kTensor) {
      A factors[kRows][2][C::kEighths];
#pragma unroll
      for (int i = 0; i < kRows * 2; ++i) {
        load_aligned(attention + i / 2 * 8 * C::kPitch + place_of(0, i % 2), factors[i / 2][i % 2]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        A b0[C::kEighths], b1[C::kEighths];
        load_aligned(weights_ + place_of(8 * j + g_, 0), b0);
        load_aligned(weights_ + place_of(8 * j + g_, 1), b1);
#pragma unroll
        for (int n = 0; n < C::kEighths; ++n) {
          const A upper[2] = {factors[0][0][n], factors[0][1][n]};
          const A lower[2] = {factors[1][0][n], factors[1][1][n]};
          add_rows(sum[0][0][j], sum[0][1][j], sum[1][0][j], sum[1][1][j], upper, lower, b0[n],
                   b1[n]);
          if (!C::kRounds && call_.attention.resized) {
            mma_tf32(sum[0][0][j], sum[0][1][j], sum[1][0][j], sum[1][1][j], tf32_rest(upper[0]),
                     tf32_rest(lower[0]), tf32_rest(upper[1]), tf32_rest(lower[1]), b0[n], b1[n]);
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
  __device__ void add_wide(A (&values)[8], int c, int p, int group, int groups) const {
    for (int j = 0; j < 8 && c + j < window_.channels(); ++j) {
      A& wide = job_.wide[entry_of(c + j, p)];
      if (group > 0) values[j] += wide;
      if (group < groups - 1) wide = values[j];
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
  const Job<T>& job_;
  const int64_t b_;
  const int c_;
  const int g_ = threadIdx.x % kWarp / 4, t_ = threadIdx.x % 4;
  const Window<T> window_;
  unsigned char* const memory_;
  A* const weights_;
  int* const first_;
};

// Warps of a block: what fits in the shared memory of the smallest GPU.
template <typename T, Product kProduct>
constexpr int warps_of_block() {
  using C = Cut<T, kProduct>;
  constexpr int kLeft =
      99 * 1024 - C::kKept * C::kPitch * static_cast<int>(sizeof(accumulate_t<T>));
  return smaller(kMostWarps, kLeft / Share<T, kProduct>::kBytes);
}

// The shares of a block's warps, added up in order: `memory` is the first warp's stage.
template <typename T, Product kProduct>
__device__ void add_warps(const PoolCall<T>& call, const unsigned char* memory, int warps,
                          int group, int count, accumulate_t<T>* to) {
  using C = Cut<T, kProduct>;
  using A = accumulate_t<T>;
  for (int i = threadIdx.x; i < count * C::kMaps; i += blockDim.x) {
    const int p = i / C::kMaps, m = i % C::kMaps;
    if (group * C::kMaps + m >= call.maps) continue;
    A sum = 0;
    for (int w = 0; w < warps; ++w) {
      sum += reinterpret_cast<const A*>(memory + w * Share<T, kProduct>::kBytes)[p * C::kPitch + m];
    }
    to[int64_t{p} * call.maps + group * C::kMaps + m] = sum;
  }
}

template <typename T, Product kProduct>
__global__ void __launch_bounds__(kMostWarps* kWarp, 2)
    backward_kernel(const PoolCall<T> call, const Job<T> job) {
  using C = Cut<T, kProduct>;
  using A = accumulate_t<T>;
  MAGSD_DYNAMIC_SHARED(unsigned char, memory);
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  const int blocks = ceil_div(call.channels, warps * kChannels);
  const int block = blockIdx.x % blocks, groups = ceil_div(call.maps, C::kMaps);
  const int64_t b = blockIdx.x / blocks;
  const int c = (block * warps + warp) * kChannels;
  const int busy = smaller(warps, ceil_div(call.channels - block * warps * kChannels, kChannels));
  const int stages = ceil_div(call.pixels, C::kStage);
  // Without root and norm W is the gradient of the output itself.
  const int walks = call.signed_sqrt || call.normalize ? 2 : 1;

  AttentionTile<T, kProduct> attention(reinterpret_cast<A*>(memory), call, b);
  unsigned char* const shares = memory + attention.bytes(call.pixels);
  Share<T, kProduct> share(call, job, b, c, shares + warp * share.kBytes);
  const Chain<T> chain(call, job, b);
  Pooled<T, kProduct> pooled;
  walk(
      {groups, walks, stages},
      [&](const Step& step, int buffer) {
        const bool read = step.middle < walks - 1 || job.attention != nullptr;
        if (read) share.window().load(share.stage(buffer), step.inner * C::kStage);
      },
      [&](const Step& step, int buffer) {
        const int group = step.outer, p = step.inner * C::kStage;
        const int count = smaller(C::kStage, call.pixels - p);
        unsigned char* const stage = share.stage(buffer);
        const A* rows = attention.rows(group, p);
        if (step.middle == 0 && step.inner == 0 && warp < busy) {
          pooled.clear();
          if constexpr (kProduct == Product::kMaximum) share.load_first(group);
          if (walks == 1) share.weigh(pooled, chain, group);
        }
        if (step.middle < walks - 1) {
          if (warp >= busy) return;
          if constexpr (kProduct == Product::kMaximum) {
            share.gather(pooled, stage, rows, p, count);
          } else {
            pooled.add(share.window(), stage, rows, p, count, call.attention.resized);
          }
          if (step.inner == stages - 1) share.weigh(pooled, chain, group);
          return;
        }
        if (job.attention != nullptr) {
          if (warp < busy) share.attention_gradient(stage, p);
          __syncthreads();
          const int64_t at = ((b * blocks + block) * call.pixels + p) * call.maps;
          add_warps<T, kProduct>(call, shares + share.stage_offset(buffer), busy, group, count,
                                 job.attention + at);
          __syncthreads();
        }
        if (job.features != nullptr && warp < busy) {
          share.feature_gradient(stage, rows, p, count, group, groups);
        }
      });
}

// Adds up the blocks' shares of the gradient of attention and resizes the sum back.
template <typename T>
struct Resize {
  using A = accumulate_t<T>;
  AttentionMaps<T> maps;
  int count, blocks, to_height;
  bool channels_last;
  const A* shares;
  T* grad;

  // Outputs that may read input i are first .. last.
  __device__ static void readers(int i, A step, int size, int& first, int& last) {
    const A low = larger(A{0}, static_cast<A>(i - 1)), high = static_cast<A>(i + 1);
    first = step > 0 ? larger(0, static_cast<int>(low / step) - 1) : 0;
    last = step > 0 ? smaller(size - 1, static_cast<int>(high / step) + 1) : size - 1;
  }

  // What output o takes of input i.
  __device__ static A weight(int o, int i, int length, A step) {
    const Sample<A> sample = sample_at(o, length, step, true);
    return (sample.lower == i ? A{1} - sample.weight : A{0}) +
           (sample.upper == i ? sample.weight : A{0});
  }

  __device__ A sum(int64_t b, int64_t p, int m) const {
    const int64_t pixels = int64_t{to_height} * maps.to_width;
    A total = 0;
    for (int64_t i = 0; i < blocks; ++i)
      total += shares[((b * blocks + i) * pixels + p) * count + m];
    return total;
  }

  __device__ A value(int64_t b, int p, int m) const {
    if (!maps.resized) return sum(b, p, m);
    const int y = p / maps.width, x = p % maps.width;
    int top, bottom, left, right;
    readers(y, maps.rows_apart, to_height, top, bottom);
    readers(x, maps.columns_apart, maps.to_width, left, right);
    A total = 0;
    for (int row = top; row <= bottom; ++row) {
      const A of_row = weight(row, y, maps.height, maps.rows_apart);
      if (of_row == 0) continue;
      for (int column = left; column <= right; ++column) {
        const A of_column = weight(column, x, maps.width, maps.columns_apart);
        if (of_column == 0) continue;
        total += of_row * of_column * sum(b, int64_t{row} * maps.to_width + column, m);
      }
    }
    return total;
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) attention_kernel(const Resize<T> resize, int blocks) {
  const int64_t b = blockIdx.x / blocks, pixels = int64_t{resize.maps.height} * resize.maps.width;
  const int64_t i = int64_t{blockIdx.x % blocks} * kThreads + threadIdx.x;
  if (i >= pixels * resize.count) return;
  // Neighbouring threads read neighbours: the shares have a column per map.
  const int64_t p = i / resize.count, m = i % resize.count;
  const int64_t at = resize.channels_last ? (b * pixels + p) * resize.count + m
                                          : (b * resize.count + m) * pixels + p;
  resize.grad[at] = narrow<T>(resize.value(b, static_cast<int>(p), static_cast<int>(m)));
}

template <typename T>
void backward(const DeviceScope& scope, const PoolCall<T>& call, const PoolSettings& settings,
              bool allow_tf32, Job<T> job, const PoolGradients& results, const Tensor& attention) {
  using A = accumulate_t<T>;
  Tensor sums, wide, shares;
  if (settings.normalize) {
    sums = sums_along(scope, call, settings.maximum, allow_tf32, job.grad);
    job.sums = data<double>(sums);
    job.shares = static_cast<int>(sums.size(1));
  }
  visit_product<T>(settings.maximum, allow_tf32, [&](auto product) {
    constexpr Product kProduct = decltype(product)::value;
    using S = Share<T, kProduct>;
    const int warps = smaller(warps_of_block<T, kProduct>(), ceil_div(call.channels, kChannels));
    const int blocks = ceil_div(call.channels, warps * kChannels);
    if (job.features != nullptr && call.maps > Cut<T, kProduct>::kMaps) {
      if constexpr (std::is_same_v<T, A>) {
        job.wide = job.features;
      } else {
        wide = uninitialized({results.features.numel()}, kWideDtype<T>);
        job.wide = mutable_data<A>(wide);
      }
    }
    if (results.attention.numel() > 0) {
      shares = uninitialized({call.batch, blocks, call.pixels, call.maps}, kWideDtype<T>);
      job.attention = mutable_data<A>(shares);
    }
    launch(scope, grid_of(int64_t{call.batch} * blocks), warps * kWarp,
           AttentionTile<T, kProduct>::bytes(call.pixels) + warps * S::kBytes,
           backward_kernel<T, kProduct>, call, job);
    if (job.attention == nullptr) return;
    const Resize<T> resize{call.attention,
                           call.maps,
                           blocks,
                           call.pixels / call.attention.to_width,
                           is_channels_last(attention),
                           job.attention,
                           mutable_data<T>(results.attention)};
    const int64_t entries = attention.numel() / call.batch;
    const int64_t pieces = ceil_div(entries, int64_t{kThreads});
    launch(scope, grid_of(call.batch * pieces), kThreads, 0, attention_kernel<T>, resize,
           static_cast<int>(pieces));
  });
}

std::tuple<Tensor, Tensor> bilinear_attention_pool_backward(
    const Tensor& grad, const Tensor& features, const Tensor& attention, const Tensor& output,
    const Tensor& norm, const Tensor& argmax, const std::string& pool, bool signed_sqrt,
    bool normalize, double scale, double eps, bool allow_tf32, const std::vector<bool>& needs) {
  const DeviceScope scope(grad);
  const PoolShape shape = check_pool_inputs(features, attention);
  const PoolSettings settings = pool_settings(pool, signed_sqrt, normalize, scale, eps);
  const ScalarType dtype = features.scalar_type();
  check_pool_results(grad, output, norm, argmax, shape, settings, dtype, needs);
  const PoolGradients results(features, attention, needs);
  if (shape.batch > 0 && (needs[0] || needs[1])) {
    const FeatureMap map(features);
    const Tensor dense_grad = dense(grad);
    const Tensor dense_norm = normalize ? dense(norm) : norm;
    const Tensor dense_argmax = settings.maximum ? dense(argmax) : argmax;
    visit_floating(dtype, [&](auto type) {
      using T = decltype(type);
      using A = accumulate_t<T>;
      const PoolCall<T> call(map, attention, shape, settings);
      Job<T> job{};
      job.grad = data<T>(dense_grad);
      job.norm = normalize ? data<A>(dense_norm) : nullptr;
      job.argmax = settings.maximum ? data<int32_t>(dense_argmax) : nullptr;
      job.features = needs[0] ? mutable_data<T>(results.features) : nullptr;
      job.channels_last = is_channels_last(features);
      job.aligned_grad = call.has_aligned_rows(job.grad);
      job.aligned_features = call.has_aligned_rows(job.features);
      backward(scope, call, settings, allow_tf32, job, results, attention);
    });
  }
  return {results.features, results.attention};
}

}  // namespace
}  // namespace magsd::MAGSD_ISA

MAGSD_OPERATORS(library) {
  library.impl("bilinear_attention_pool_backward",
               TORCH_BOX(&magsd::MAGSD_ISA::bilinear_attention_pool_backward));
}
