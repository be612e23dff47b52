// Products of small matrices in panels: the register tile, the transpose, scratch memory.
//
// A panel is a matrix of kPanel<A> columns, dense, row by row. A product C = X Y takes X with any
// strides, one broadcast element at a time, and Y as a panel, so that one tile serves every memory
// layout of X. kPanel is two vectors: R rows of the result then occupy 2 R registers, and each
// loaded element of Y meets R multiplications.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "common/macros.h"
#include "cpu/instruction_set.h"

namespace magsd::MAGSD_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 12;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 6;
#endif

template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));
template <typename A>
constexpr int kPanel = 2 * kLanes<A>;

template <typename A, int kBytes>
struct VectorOf {
  typedef A type __attribute__((vector_size(kBytes)));
  // By reference: how a vector is returned depends on the instruction set.
  static void load(const A* from, type& value) { std::memcpy(&value, from, sizeof(value)); }
  static void store(A* to, const type& value) { std::memcpy(to, &value, sizeof(value)); }
};

// Uninitialized memory on a cache line's boundary, freed at the end of the scope.
template <typename A>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<A*>(::operator new(sizeof(A) * (count > 0 ? count : 1), kAlignment))) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  A* data_;
};

// kRows x kPanel results: out (+)= sum over k of x[r step_r + k step_k] * y[k kPanel + column].
template <typename A, int kRows>
void tile(const A* x, int64_t step_r, int64_t step_k, const A* MAGSD_RESTRICT y, int64_t depth,
          A* MAGSD_RESTRICT out, int64_t step_out, bool accumulate) {
  using Vector = VectorOf<A, kVectorBytes>;
  using V = typename Vector::type;
  constexpr int kWidth = kLanes<A>;
  V sum[kRows][2];
  for (int r = 0; r < kRows; ++r) {
    if (accumulate) {
      Vector::load(out + r * step_out, sum[r][0]);
      Vector::load(out + r * step_out + kWidth, sum[r][1]);
    } else {
      sum[r][0] = sum[r][1] = V{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    V left, right;
    Vector::load(y + k * kPanel<A>, left);
    Vector::load(y + k * kPanel<A> + kWidth, right);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const A factor = x[r * step_r + k * step_k];
      sum[r][0] += factor * left;
      sum[r][1] += factor * right;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    Vector::store(out + r * step_out, sum[r][0]);
    Vector::store(out + r * step_out + kWidth, sum[r][1]);
  }
}

template <typename A, int kRows = kTileRows>
void tile_of(int rows, const A* x, int64_t step_r, int64_t step_k, const A* y, int64_t depth,
             A* out, int64_t step_out, bool accumulate) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      return tile<A, kRows>(x, step_r, step_k, y, depth, out, step_out, accumulate);
    }
    tile_of<A, kRows - 1>(rows, x, step_r, step_k, y, depth, out, step_out, accumulate);
  }
}

// Memory that is read soon, to be brought into the second-level cache.
struct Ahead {
  const char* from = nullptr;
  int64_t bytes = 0;

  template <typename A>
  static Ahead of(const A* from, int64_t count) {
    return {reinterpret_cast<const char*>(from), count * static_cast<int64_t>(sizeof(A))};
  }
  // The part that falls to step `t` of `steps`.
  void fetch(int64_t t, int64_t steps) const {
    const int64_t end = bytes * (t + 1) / steps;
    for (int64_t at = bytes * t / steps; at < end; at += 64) __builtin_prefetch(from + at, 0, 2);
  }
};

// out (rows x kPanel, rows `step_out` apart) (+)= X (rows x depth) Y (depth x kPanel). The rows
// are shared out evenly, because a tile of few rows waits for its own additions.
template <typename A>
void panel_product(int64_t rows, const A* x, int64_t step_r, int64_t step_k, const A* y,
                   int64_t depth, A* out, int64_t step_out, bool accumulate, Ahead ahead = {}) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  int64_t begin = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t end = rows * (t + 1) / tiles;
    ahead.fetch(t, tiles);
    tile_of<A>(static_cast<int>(end - begin), x + begin * step_r, step_r, step_k, y, depth,
               out + begin * step_out, step_out, accumulate);
    begin = end;
  }
}

// to[c step_to + r] = from[r step_from + c], in squares of 4 x 4.
template <typename A>
void transpose(const A* MAGSD_RESTRICT from, int64_t step_from, int64_t rows, int64_t columns,
               A* MAGSD_RESTRICT to, int64_t step_to) {
  using Four = VectorOf<A, 4 * static_cast<int>(sizeof(A))>;
  using V = typename Four::type;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      const A* corner = from + r * step_from + c;
      V a, b, d, e;
      Four::load(corner, a);
      Four::load(corner + step_from, b);
      Four::load(corner + 2 * step_from, d);
      Four::load(corner + 3 * step_from, e);
      const V ab_low{a[0], b[0], a[1], b[1]}, ab_high{a[2], b[2], a[3], b[3]};
      const V de_low{d[0], e[0], d[1], e[1]}, de_high{d[2], e[2], d[3], e[3]};
      A* there = to + c * step_to + r;
      Four::store(there, V{ab_low[0], ab_low[1], de_low[0], de_low[1]});
      Four::store(there + step_to, V{ab_low[2], ab_low[3], de_low[2], de_low[3]});
      Four::store(there + 2 * step_to, V{ab_high[0], ab_high[1], de_high[0], de_high[1]});
      Four::store(there + 3 * step_to, V{ab_high[2], ab_high[3], de_high[2], de_high[3]});
    }
    for (; c < columns; ++c) {
      for (int i = 0; i < 4; ++i) to[c * step_to + r + i] = from[(r + i) * step_from + c];
    }
  }
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[c * step_to + r] = from[r * step_from + c];
  }
}

}  // namespace magsd::MAGSD_ISA
