// Bilinear pooling in shared memory: a warp's stage of features, a block's tile of attention, and
// the pooled matrix that they make.
//
// A stage is 64 bytes of pixels of 64 channels, in rows of pixels or of channels as the features
// lie, copied 16 bytes at a time without passing registers while the stage before it is worked on.
// Rows of channels begin anywhere: the 16 bytes that hold a row's first pixel are copied whole, and
// the row is read from its own beginning. Row 8 j + g of a stage holds channel 8 chunk_of(g) + j,
// which keeps the lanes of a warp in different banks.
#pragma once

#include "cuda/bilinear_pool.h"

namespace magsd::MAGSD_ISA {

struct Step {
  int outer, middle, inner;
};

// body(step, buffer) for every step of nested loops of these counts; load(step, buffer) of the next
// step runs under it. Buffers are a warp's own.
template <typename Load, typename Body>
__device__ __forceinline__ void walk(const Step& counts, const Load& load, const Body& body) {
  Step now{0, 0, -1}, next{0, 0, 0};
  for (int buffer = 0; now.outer < counts.outer; buffer = 1 - buffer) {
    wait_copies();
    __syncwarp();
    if (next.outer < counts.outer) load(next, buffer);
    if (now.inner >= 0) body(now, 1 - buffer);
    now = next;
    if (++next.inner == counts.inner) {
      next.inner = 0;
      if (++next.middle == counts.middle) {
        next.middle = 0;
        ++next.outer;
      }
    }
  }
}

// Channels c .. c + kChannels of image b; c is a multiple of kChannels. What a stage holds of
// channels past the last is 0, of pixels past the last undefined.
template <typename T>
class Window {
 public:
  static constexpr int kEach = 16 / sizeof(T);
  static constexpr int kStage = 64 / sizeof(T);
  static constexpr int kPixelBytes = kChannels * sizeof(T) + 16;

  __device__ Window(const Features<T>& features, int64_t b, int c, int channels, int pixels)
      : features_(features),
        origin_(b * features.step_b + c * features.step_c),
        beginning_(static_cast<int>((features.misaligned + b * features.step_b) % kEach)),
        row_step_(static_cast<int>(features.step_c % kEach)),
        channels_(channels - c),
        pixels_(pixels) {}

  // Channels from the first on that exist; may be negative.
  __device__ int channels() const { return channels_; }

  // Copies pixels from p on; all lanes of a warp.
  __device__ void load(unsigned char* to, int p) const {
    if (channels_ <= 0) return;
    if (features_.channels_last) {
      load_pixels(to, p, smaller(kStage, pixels_ - p));
    } else {
      load_channels(to, p, smaller(kStage, pixels_ - p));
    }
  }

  // The 8 channels of lane group g at pixel p of a stage; 0 where that does not exist.
  __device__ void column(const unsigned char* stage, int g, int p, bool exists,
                         T (&values)[8]) const {
    if (!exists) {
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = T{};
    } else if (features_.channels_last) {
      load_eight(reinterpret_cast<const T*>(stage + p * kPixelBytes) + 8 * chunk_of(g), values);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = at(stage, 8 * j + g, p);
    }
  }

  __device__ T at(const unsigned char* stage, int row, int p) const {
    const int g = row % 8, j = row / 8;
    if (features_.channels_last) {
      return reinterpret_cast<const T*>(stage + p * kPixelBytes)[8 * chunk_of(g) + j];
    }
    return reinterpret_cast<const T*>(stage + row * kRowBytes)[beginning_of(j) + p];
  }

 private:
  // Entries of a row that precede its first pixel. Neither 8 channels nor a stage change it.
  __device__ unsigned beginning_of(int j) const {
    return (beginning_ + j * row_step_) & (kEach - 1);
  }

  // Rows of pixels: a lane copies the same channels of every kRows-th.
  __device__ void load_pixels(unsigned char* to, int p, int count) const {
    constexpr int kChunks = kChannels / kEach, kRows = kWarp / kChunks;
    const int lane = threadIdx.x % kWarp, row = lane / kChunks, c = lane % kChunks * kEach;
    const int end = larger(0, smaller(kEach, channels_ - c));
    const bool whole = features_.aligned_pixels && end == kEach;
    int64_t at = origin_ + (p + row) * features_.step_p + c;
    to += row * kPixelBytes + c * sizeof(T);
    for (int i = row; i < count; i += kRows) {
      copy(to, at, 0, end, whole);
      at += kRows * features_.step_p;
      to += kRows * kPixelBytes;
    }
  }

  // Rows of channels: a lane copies the same 16 bytes of every eighth, which all begin alike.
  __device__ void load_channels(unsigned char* to, int p, int count) const {
    const int lane = threadIdx.x % kWarp;
    load_rows(to, p, count, lane / 4, lane % 4, 0, 1);
    // What a row's beginning pushes out of 64 bytes.
    load_rows(to, p, count, lane % 8, 4, lane / 8, 4);
  }

  // 16 bytes, the k-th, of channels 8 i + j for i from `first` on, every `step`-th.
  __device__ void load_rows(unsigned char* to, int p, int count, int j, int k, int first,
                            int step) const {
    const int before = beginning_of(j) - k * kEach;
    if (before + count <= 0) return;
    int64_t at = origin_ + (8 * first + j) * features_.step_c + p - before;
    to += 8 * j * kRowBytes + 16 * k;
#pragma unroll 1
    for (int i = first; i < 8; i += step) {
      const int begin = at < 0 ? static_cast<int>(-at) : 0;
      const int64_t left = features_.count - at;
      const int end = 8 * i + j >= channels_ ? 0 : left < kEach ? static_cast<int>(left) : kEach;
      copy(to + group_of(i) * kRowBytes, at, begin, end, true);
      at += 8 * step * features_.step_c;
    }
  }

  // 16 bytes from entry `at` on, of which begin .. end exist.
  __device__ void copy(unsigned char* to, int64_t at, int begin, int end, bool aligned) const {
    if (aligned && begin == 0 && end == kEach) return copy_async(to, features_.data + at);
    for (int i = 0; i < kEach; ++i) {
      reinterpret_cast<T*>(to)[i] = i >= begin && i < end ? features_.data[at + i] : T{};
    }
  }

  const Features<T>& features_;
  int64_t origin_;
  int beginning_, row_step_, channels_, pixels_;
};

// Attention of a group of kMaps maps at up to kKept pixels, a row of maps per pixel; 0 past the
// last.
template <typename T, Product kProduct>
class AttentionTile {
  using C = Cut<T, kProduct>;
  using A = accumulate_t<T>;

 public:
  __device__ AttentionTile(A* tile, const PoolCall<T>& call, int64_t b)
      : tile_(tile), call_(call), b_(b) {}

  // Pixels of a tile; a multiple of kStage, so that a stage never lies in two.
  MAGSD_HD static int kept(int pixels) {
    const int padded = ceil_div(pixels, C::kStage) * C::kStage;
    return padded < C::kKept ? padded : C::kKept;
  }

  MAGSD_HD static size_t bytes(int pixels) { return kept(pixels) * C::kPitch * sizeof(A); }

  // The rows from pixel p on. All threads of the block call it with the same arguments.
  __device__ const A* rows(int group, int p) {
    const int kept_pixels = kept(call_.pixels), chunk = p / kept_pixels;
    if (group != group_ || chunk != chunk_) {
      __syncthreads();
      fill(group * C::kMaps, chunk * kept_pixels, kept_pixels);
      __syncthreads();
      group_ = group;
      chunk_ = chunk;
    }
    return tile_ + (p - chunk * kept_pixels) * C::kPitch;
  }

 private:
  __device__ void fill(int first_map, int first_pixel, int count) {
    const bool maps_inner = call_.attention.step_m == 1;  // neighbouring threads read neighbours
    for (int i = threadIdx.x; i < count * C::kMaps; i += blockDim.x) {
      const int m = maps_inner ? i % C::kMaps : i / count;
      const int p = maps_inner ? i / C::kMaps : i % count;
      A value = 0;
      if (first_map + m < call_.maps && first_pixel + p < call_.pixels) {
        value = call_.attention.value(b_, first_map + m, first_pixel + p);
      }
      if constexpr (C::kRounds) value = to_tf32(value);
      tile_[p * C::kPitch + place_of<C::kEighths>(m)] = value;
    }
  }

  A* tile_;
  const PoolCall<T>& call_;
  int64_t b_;
  int group_ = -1, chunk_ = -1;
};

// A lane's entries of the pooled matrix: sums, or maxima with their first pixels.
template <typename T, Product kProduct>
struct Pooled {
  using C = Cut<T, kProduct>;
  using A = accumulate_t<T>;
  static constexpr bool kMaximum = kProduct == Product::kMaximum;

  A sum[C::kSlots][8];
  int first[kMaximum ? C::kSlots : 1][8];

  __device__ void clear() {
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[slot][j] = 0;
    }
  }

  // Takes in `count` pixels of a stage, p the first; `attention` is the row of p.
  __device__ void add(const Window<T>& window, const unsigned char* stage, const A* attention,
                      int p, int count, bool cut_attention) {
    if constexpr (kProduct == Product::kTensor) {
      add_on_tensor_cores(window, stage, attention, count, cut_attention);
    } else {
      const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        T column[8];
        window.column(stage, g, i, true, column);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          A factors[C::kEighths];
          load_aligned(attention + i * C::kPitch + (2 * t + e) * C::kEighths, factors);
#pragma unroll
          for (int n = 0; n < C::kEighths; ++n) {
#pragma unroll
            for (int j = 0; j < 8; ++j) take(factors[n], widen(column[j]), 2 * n + e, j, p + i);
          }
        }
      }
    }
  }

 private:
  __device__ void take(A factor, A value, int slot, int j, int p) {
    if constexpr (kMaximum) {
      // NaN is the largest.
      const A product = factor * value, best = sum[slot][j];
      const bool larger = p == 0 || (!(product <= best) && best == best);
      sum[slot][j] = larger ? product : best;
      first[slot][j] = larger ? p : first[slot][j];
    } else {
      sum[slot][j] += factor * value;
    }
  }

  // Rows of D are channels, columns maps. Where half precision meets attention that is float,
  // because it was resized, that is cut in two.
  __device__ void add_on_tensor_cores(const Window<T>& window, const unsigned char* stage,
                                      const A* attention, int count, bool cut_attention) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll 1
    for (int k = 0; k < count; k += 8) {
      T narrow[2][8];
      A column[2][8];
      window.column(stage, g, k + t, k + t < count, narrow[0]);
      window.column(stage, g, k + t + 4, k + t + 4 < count, narrow[1]);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        column[j / 8][j % 8] = widen(narrow[j / 8][j % 8]);
        if constexpr (C::kRounds) column[j / 8][j % 8] = to_tf32(column[j / 8][j % 8]);
      }
      const A* row = attention + (k + t) * C::kPitch + g * C::kEighths;
      A b0[C::kEighths], b1[C::kEighths];
      load_aligned(row, b0);
      load_aligned(row + 4 * C::kPitch, b1);
#pragma unroll
      for (int n = 0; n < C::kEighths; ++n) {
        add_column(column, n, b0[n], b1[n]);
        if (!C::kRounds && cut_attention) add_column(column, n, tf32_rest(b0[n]), tf32_rest(b1[n]));
      }
    }
  }

  __device__ void add_column(const A (&column)[2][8], int n, A b0, A b1) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      mma_tf32(sum[2 * n][j], sum[2 * n + 1][j], sum[2 * n][j + 1], sum[2 * n + 1][j + 1],
               column[0][j], column[0][j + 1], column[1][j], column[1][j + 1], b0, b1);
    }
  }
};

}  // namespace magsd::MAGSD_ISA
