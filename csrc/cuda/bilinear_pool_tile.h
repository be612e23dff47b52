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

namespace magsd::MAGSD_ISA::bilinear_pool {

struct Step {
  int outer, middle, inner;
};

// body(step, buffer) for every step of nested loops of these counts; load(step, buffer) of the next
// step runs under it. Buffers are a warp's own.
template <typename Load, typename Body>
__device__ __forceinline__ void for_steps(const Step& counts, const Load& load, const Body& body) {
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

// Reads a stage whose rows are pixels or channels.
template <typename T, bool kPixels>
struct Reader {
  static constexpr int kEach = 16 / sizeof(T);
  static constexpr int kPixelBytes = kChannels * sizeof(T) + 16;

  int beginning, row_step;  // of channels' rows, see Window

  // Entries of a row that precede its first pixel. Neither 8 channels nor a stage change it.
  __device__ int beginning_of(int j) const { return (beginning + j * row_step) & (kEach - 1); }

  __device__ T at(const unsigned char* stage, int row, int p) const {
    const int g = row % 8, j = row / 8;
    if constexpr (kPixels) {
      return reinterpret_cast<const T*>(stage + p * kPixelBytes)[8 * chunk_of(g) + j];
    } else {
      return reinterpret_cast<const T*>(stage + row * kRowBytes)[beginning_of(j) + p];
    }
  }

  // The 8 channels of lane group g at pixel p of a stage; 0 unless it exists, for what lies past
  // the last pixel may not be finite.
  __device__ void column(const unsigned char* stage, int g, int p, bool exists,
                         accumulate_t<T> (&values)[8]) const {
    if constexpr (kPixels) {
      load_eight(reinterpret_cast<const T*>(stage + p * kPixelBytes) + 8 * chunk_of(g), exists,
                 values);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        values[j] = exists ? upcast(at(stage, 8 * j + g, p)) : accumulate_t<T>{0};
      }
    }
  }
};

// Channels c .. c + kChannels of image b; c is a multiple of kChannels. What a stage holds of
// channels past the last is 0, of pixels past the last undefined.
template <typename T>
class Window {
 public:
  static constexpr int kEach = Reader<T, true>::kEach;
  static constexpr int kStage = 64 / sizeof(T);
  static constexpr int kPixelBytes = Reader<T, true>::kPixelBytes;

  __device__ Window(const Features<T>& features, int64_t b, int c, int channels, int pixels)
      : features_(features),
        origin_(b * features.step_b + c * features.step_c),
        rows_{static_cast<int>((features.misaligned + b * features.step_b) % kEach),
              static_cast<int>(features.step_c % kEach)},
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

  // function(reader) with how stages are read.
  template <typename Function>
  __device__ void read(const Function& function) const {
    if (features_.channels_last) {
      function(Reader<T, true>{0, 0});
    } else {
      function(rows_);
    }
  }

 private:
  // Rows of pixels: a lane copies the same channels of every kRows-th.
  __device__ void load_pixels(unsigned char* to, int p, int count) const {
    constexpr int kChunks = kChannels / kEach, kRows = kWarp / kChunks;
    const int lane = threadIdx.x % kWarp, row = lane / kChunks, c = lane % kChunks * kEach;
    const int end = larger(0, smaller(kEach, channels_ - c));
    const int64_t step = kRows * features_.step_p;
    const T* from = features_.data + origin_ + (p + row) * features_.step_p + c;
    to += row * kPixelBytes + c * sizeof(T);
    if (features_.aligned_pixels && end == kEach) {
#pragma unroll 2
      for (int i = row; i < count; i += kRows, from += step, to += kRows * kPixelBytes) {
        copy_async(to, from);
      }
    } else {
      for (int i = row; i < count; i += kRows, from += step, to += kRows * kPixelBytes) {
        copy_one_by_one(to, from, 0, end);
      }
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
    const int before = rows_.beginning_of(j) - k * kEach;
    if (before + count <= 0) return;
    int64_t at = origin_ + (8 * first + j) * features_.step_c + p - before;
    to += 8 * j * kRowBytes + 16 * k;
#pragma unroll 1
    for (int i = first; i < 8; i += step) {
      const int begin = at < 0 ? static_cast<int>(-at) : 0;
      const int64_t left = features_.count - at;
      const int end = 8 * i + j >= channels_ ? 0 : left < kEach ? static_cast<int>(left) : kEach;
      if (begin == 0 && end == kEach) {
        copy_async(to + group_of(i) * kRowBytes, features_.data + at);
      } else {
        copy_one_by_one(to + group_of(i) * kRowBytes, features_.data + at, begin, end);
      }
      at += 8 * step * features_.step_c;
    }
  }

  // 16 bytes of which entries begin .. end exist; the others become 0.
  __device__ static void copy_one_by_one(unsigned char* to, const T* from, int begin, int end) {
#pragma unroll 1
    for (int i = 0; i < kEach; ++i) {
      reinterpret_cast<T*>(to)[i] = i >= begin && i < end ? from[i] : T{};
    }
  }

  const Features<T>& features_;
  int64_t origin_;
  Reader<T, false> rows_;
  int channels_, pixels_;
};

// Attention of a group of kMaps maps at up to kKept pixels, a row of maps per pixel; 0 past the
// last.
template <typename T, Product kProduct>
class AttentionTile {
  using C = Partition<T, kProduct>;
  using A = accumulate_t<T>;

 public:
  __device__ AttentionTile(A* tile, const PoolCall<T>& call, int b)
      : tile_(tile), call_(call), b_(b) {}

  // Pixels of a tile; a multiple of kStage, so that a stage never lies in two.
  MAGSD_HD static int kept(int pixels) {
    const int padded = ceil_div(pixels, C::kStage) * C::kStage;
    return padded < C::kKept ? padded : C::kKept;
  }

  MAGSD_HD static size_t bytes(int pixels) { return kept(pixels) * C::kPitch * sizeof(A); }

  // The rows from pixel p on. All threads of the block call it with the same arguments.
  __device__ const A* rows(int group, int p) {
    const int count = kept(call_.pixels), first = p / count * count;
    if (group != group_ || first != first_) {
      __syncthreads();
      fill(group * C::kMaps, first, count);
      __syncthreads();
      group_ = group;
      first_ = first;
    }
    return tile_ + (p - first) * C::kPitch;
  }

 private:
  __device__ void fill(int first_map, int first_pixel, int count) {
    const bool maps_inner = call_.attention.step_m == 1;  // neighboring threads read neighbors
    for (int i = threadIdx.x; i < count * C::kMaps; i += blockDim.x) {
      const int m = maps_inner ? i % C::kMaps : i / count;
      const int p = maps_inner ? i / C::kMaps : i % count;
      A value = 0;
      if (first_map + m < call_.maps && first_pixel + p < call_.pixels) {
        value = call_.attention.value(b_, first_map + m, first_pixel + p);
      }
      if constexpr (C::kRounds) value = to_tf32(value);
      tile_[p * C::kPitch + C::position_of(m)] = value;
    }
  }

  A* tile_;
  const PoolCall<T>& call_;
  int b_;
  int group_ = -1, first_ = -1;
};

// A lane's entries of the pooled matrix: sums, or maxima with their first pixels.
template <typename T, Product kProduct>
struct Pooled {
  using C = Partition<T, kProduct>;
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

  // Drops all but a lane's first `count` channels.
  __device__ void clear_from(int count) {
    if (count >= 8) return;
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[slot][j] = j < count ? sum[slot][j] : A{0};
    }
  }

  // Takes in `count` pixels of a stage, p the first; `attention` is the row of p.
  __device__ void add(const Window<T>& window, const unsigned char* stage, const A* attention,
                      int p, int count, bool split_attention) {
    window.read([&](const auto& reader) {
      if constexpr (kProduct == Product::kTensor) {
        add_on_tensor_cores(reader, stage, attention, count, split_attention);
      } else {
        add_one_by_one(reader, stage, attention, p, count);
      }
    });
  }

 private:
  template <typename Reader>
  __device__ void add_one_by_one(const Reader& reader, const unsigned char* stage,
                                 const A* attention, int p, int count) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      A column[8];
      reader.column(stage, g, i, true, column);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        A factors[C::kEighths];
        load_aligned(attention + i * C::kPitch + C::position_of(2 * t + e), factors);
#pragma unroll
        for (int n = 0; n < C::kEighths; ++n) {
#pragma unroll
          for (int j = 0; j < 8; ++j) take(factors[n], column[j], 2 * n + e, j, p + i);
        }
      }
    }
  }

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
  // because it was resized, that is split in two.
  template <typename Reader>
  __device__ void add_on_tensor_cores(const Reader& reader, const unsigned char* stage,
                                      const A* attention, int count, bool split_attention) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll 1
    for (int k = 0; k < count; k += 8) {
      A column[2][8];
      reader.column(stage, g, k + t, k + t < count, column[0]);
      reader.column(stage, g, k + t + 4, k + t + 4 < count, column[1]);
      if constexpr (C::kRounds) {
#pragma unroll
        for (int i = 0; i < 16; ++i) column[i / 8][i % 8] = to_tf32(column[i / 8][i % 8]);
      }
      const A* row = attention + (k + t) * C::kPitch + g;
#pragma unroll
      for (int n = 0; n < C::kEighths; ++n) {
        const A b0 = row[8 * n], b1 = row[4 * C::kPitch + 8 * n];
        if constexpr (C::kRounds) {
          add_column(column, n, b0, b1);
        } else {
          add_column(column, n, tf32_part(b0), tf32_part(b1));
          if (split_attention) add_column(column, n, tf32_rest(b0), tf32_rest(b1));
        }
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

}  // namespace magsd::MAGSD_ISA::bilinear_pool
