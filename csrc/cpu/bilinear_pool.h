// What both directions of bilinear pooling share on the CPU: the partition of the work, the
// attention and the features as matrices, the pooled matrix of a block of channels.
//
// Channels last, the features of kPanel channels are laid out as a panel (pixels x channels). Where
// the pixels of a channel lie side by side that would be a transpose of the largest operand, which
// costs as much as the product: there the maps are the panels (pixels x maps), the features are
// read where they lie, one element at a time, and only the smaller result is transposed. Pooling by
// maximum, and maps that would fill less than three quarters of their panels, take the first way in
// both memory formats. The work of an image is split into blocks of
// kBlock channels, whose sums are added in order: results do not depend on the number of threads.
// With images enough for every thread a task is an image, so that its output is still in the cache
// when its norm is known; else a block. The attention of an image (M HW) stays in the first-level
// cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/bilinear_pool_arguments.h"
#include "common/feature_map.h"
#include "cpu/axis.h"
#include "cpu/panel.h"
#include "cpu/parallel.h"

namespace magsd::MAGSD_ISA::bilinear_pool {

constexpr int64_t kBlock = 256;

template <typename A>
int64_t panels_of(int64_t columns) {
  return (columns + kPanel<A> - 1) / kPanel<A>;
}

inline int64_t blocks_of(const PoolShape& shape) { return (shape.channels + kBlock - 1) / kBlock; }

inline int64_t block_end(const PoolShape& shape, int64_t block) {
  return std::min(shape.channels, (block + 1) * kBlock);
}

// Runs `start` for every image, `block` for every (image, block) pair, `finish` for every image.
template <typename Start, typename Block, typename Finish>
void for_images(const PoolShape& shape, const Start& start, const Block& block,
                const Finish& finish) {
  const int64_t blocks = blocks_of(shape);
  if (shape.batch >= 2 * static_cast<int64_t>(torch::stable::get_num_threads())) {
    const int64_t work = shape.channels * shape.maps * shape.pixels;
    parallel_for(shape.batch, 1 + (1 << 15) / work, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        start(b);
        for (int64_t i = 0; i < blocks; ++i) block(b, i);
        finish(b);
      }
    });
    return;
  }
  const int64_t work = std::min(kBlock, shape.channels) * shape.maps * shape.pixels;
  const int64_t grain = 1 + (1 << 15) / work;
  parallel_for(shape.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) start(b);
  });
  parallel_for(shape.batch * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) block(i / blocks, i % blocks);
  });
  parallel_for(shape.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) finish(b);
  });
}

// Attention of every image as a dense (M, HW) matrix of the accumulation type, at the features'
// size; in place where it already is.
template <typename T>
class PoolAttention {
  using A = accumulate_t<T>;

 public:
  PoolAttention(const FeatureMap& maps, int64_t height, int64_t width)
      : maps_(maps.steps.channels),
        pixels_(height * width),
        count_(maps_ * pixels_),
        copy_(needs_copy(maps, height, width) ? maps.steps.batch * count_ : 0),
        matrices_(copy_.get()) {
    if constexpr (std::is_same_v<T, A>) {
      if (!needs_copy(maps, height, width)) {
        matrices_ = data<A>(maps.tensor);
        return;
      }
    }
    fill_copy(maps, height, width);
  }

  const A* matrix(int64_t image) const { return matrices_ + image * count_; }

  // The matrix of an image as panels of maps (HW, kPanel), columns past the last map 0.
  void map_panels(int64_t image, A* to) const {
    constexpr int64_t kColumns = kPanel<A>;
    const A* from = matrix(image);
    for (int64_t m = 0; m < maps_; m += kColumns, to += pixels_ * kColumns) {
      const int64_t taken = std::min(kColumns, maps_ - m);
      if (taken < kColumns) std::fill(to, to + pixels_ * kColumns, A{0});
      transpose(from + m * pixels_, pixels_, taken, pixels_, to, kColumns);
    }
  }

 private:
  void fill_copy(const FeatureMap& maps, int64_t height, int64_t width) {
    const MapSteps& steps = maps.steps;
    const T* source = data<T>(maps.tensor);
    const bool resized = steps.height != height || steps.width != width;
    const Axis<A> rows = resize_axis<A>(steps.height, height, Resampling::kBilinear, true);
    const Axis<A> columns = resize_axis<A>(steps.width, width, Resampling::kBilinear, true);
    const int64_t grain = 1 + 16384 / std::max<int64_t>(count_, 1);
    parallel_for(steps.batch, grain, [&](int64_t begin, int64_t end) {
      Scratch<A> plane(steps.pixels()), line(steps.width);
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t m = 0; m < steps.channels; ++m) {
          const T* from = source + b * steps.step_b + m * steps.step_c;
          A* to = copy_.get() + b * count_ + m * height * width;
          A* dense = resized ? plane.get() : to;
          for (int64_t p = 0; p < steps.pixels(); ++p) {
            dense[p] = static_cast<A>(from[p * steps.step_p]);
          }
          if (resized) resize_plane(dense, steps.width, rows, columns, to, line.get());
        }
      }
    });
  }

  static bool needs_copy(const FeatureMap& maps, int64_t height, int64_t width) {
    return !std::is_same_v<T, A> || maps.steps.step_p != 1 || maps.steps.height != height ||
           maps.steps.width != width;
  }

  int64_t maps_, pixels_, count_;
  Scratch<A> copy_;
  const A* matrices_;
};

// panel[p kPanel + j] = features of channel c + j; columns past `count` are 0.
template <typename T, typename A>
void pack(const T* features, const MapSteps& steps, int64_t c, int64_t count, A* panel, A* rows) {
  constexpr int64_t kColumns = kPanel<A>;
  const int64_t pixels = steps.pixels();
  if (count < kColumns) std::fill(panel, panel + pixels * kColumns, A{0});
  if (steps.step_c == 1 && steps.step_p != 1) {
    for (int64_t p = 0; p < pixels; ++p) {
      const T* from = features + p * steps.step_p + c;
      if (count == kColumns) {
        convert(from, kColumns, panel + p * kColumns);
      } else {
        convert(from, count, panel + p * kColumns);
      }
    }
    return;
  }
  const T* from = features + c * steps.step_c;
  if constexpr (std::is_same_v<T, A>) {
    transpose(from, steps.step_c, count, pixels, panel, kColumns);
  } else {
    for (int64_t j = 0; j < count; ++j) {
      convert(from + j * steps.step_c, pixels, rows + j * pixels);
    }
    transpose(rows, pixels, count, pixels, panel, kColumns);
  }
}

// Largest product of a map and every channel of a panel, and its first pixel. NaN is the largest.
template <typename A>
void maximum_row(const A* map, const A* panel, int64_t pixels, A* best, int32_t* first) {
  constexpr int kColumns = kPanel<A>;
  for (int j = 0; j < kColumns; ++j) {
    best[j] = map[0] * panel[j];
    first[j] = 0;
  }
  for (int64_t p = 1; p < pixels; ++p) {
    const A* row = panel + p * kColumns;
    for (int j = 0; j < kColumns; ++j) {
      const A value = map[p] * row[j];
      const bool larger = !(value <= best[j]) & (best[j] == best[j]);
      best[j] = larger ? value : best[j];
      first[j] = larger ? static_cast<int32_t>(p) : first[j];
    }
  }
}

// row = sign(row factor) sqrt(|row factor| + eps); adds the squares to `squares`.
template <typename A>
void root_row(A* MAGSD_RESTRICT row, A factor, bool signed_sqrt, A eps, A* MAGSD_RESTRICT squares) {
  constexpr int kColumns = kPanel<A>;
  if (signed_sqrt) {
    for (int j = 0; j < kColumns; ++j) {
      const A value = row[j] * factor;
      const A root = std::copysign(std::sqrt(std::abs(value) + eps), value);
      row[j] = value == 0 ? A{0} : root;
    }
  } else {
    for (int j = 0; j < kColumns; ++j) row[j] *= factor;
  }
  for (int j = 0; j < kColumns; ++j) squares[j] += row[j] * row[j];
}

// Whether the maps are the panels and the features are read where they lie.
template <typename A>
bool reads_in_place(const MapSteps& steps, const PoolShape& shape, const PoolSettings& settings) {
  const int64_t padded = panels_of<A>(shape.maps) * kPanel<A>;
  return steps.step_p == 1 && !settings.maximum && 3 * padded <= 4 * shape.maps;
}

// The pooled matrix of a block, its rows in `to` (M, C), from the panels of an image's maps;
// returns its sum of squares.
template <typename T, typename Out>
double pool_in_place(const T* features, const MapSteps& steps, const accumulate_t<T>* map_panels,
                     const PoolShape& shape, const PoolSettings& settings, int64_t block, Out* to) {
  using A = accumulate_t<T>;
  constexpr int64_t kColumns = kPanel<A>;
  constexpr int64_t kChannels = 2 * kColumns;
  const int64_t pixels = shape.pixels;
  Scratch<A> acc(std::is_same_v<T, A> ? 0 : pixels * kChannels);
  alignas(64) A tiles[kChannels * kColumns], turned[kColumns * kChannels];
  const A factor = A{1} / static_cast<A>(pixels);
  double total = 0;
  for (int64_t c = block * kBlock; c < block_end(shape, block); c += kChannels) {
    const int64_t count = std::min(kChannels, block_end(shape, block) - c);
    const A* rows;
    Ahead ahead;
    if constexpr (std::is_same_v<T, A>) {
      rows = features + c * steps.step_c;
      ahead = Ahead::of(rows + count * pixels,
                        std::min(kChannels, shape.channels - c - count) * pixels);
    } else {
      convert(features + c * steps.step_c, count * pixels, acc.get());
      rows = acc.get();
    }
    for (int64_t m = 0; m < shape.maps; m += kColumns) {
      const int64_t taken = std::min(kColumns, shape.maps - m);
      panel_product(count, rows, pixels, int64_t{1}, map_panels + m * pixels, pixels, tiles,
                    kColumns, false, m == 0 ? ahead : Ahead{});
      A squares[kColumns] = {};
      for (int64_t j = 0; j < count; ++j) {
        root_row(tiles + j * kColumns, factor, settings.signed_sqrt, static_cast<A>(settings.eps),
                 squares);
      }
      for (int64_t i = 0; i < taken; ++i) total += static_cast<double>(squares[i]);
      // By way of a dense block: rows of the result lie a power of two apart, on the same few
      // lines of the cache.
      transpose(tiles, kColumns, count, taken, turned, kChannels);
      for (int64_t i = 0; i < taken; ++i) {
        convert(turned + i * kChannels, count, to + (m + i) * shape.channels + c);
      }
    }
  }
  return total;
}

// Where the pooled matrix of a block goes: `to` (M, C) of the output's or of the accumulation
// type, and the argmax (M, C) where pooling by maximum asks for it.
template <typename T, typename Out>
double pool_block(const T* features, const MapSteps& steps, const accumulate_t<T>* attention,
                  const PoolShape& shape, const PoolSettings& settings, int64_t block, Out* to,
                  int32_t* argmax) {
  using A = accumulate_t<T>;
  constexpr int64_t kColumns = kPanel<A>;
  constexpr int64_t kRows = 4 * kTileRows;
  const int64_t pixels = shape.pixels;
  Scratch<A> panel(pixels * kColumns), rows(std::is_same_v<T, A> ? 0 : pixels * kColumns);
  alignas(64) A tiles[kRows * kColumns];
  alignas(64) int32_t first[kRows * kColumns];
  const A factor = settings.maximum ? A{1} : A{1} / static_cast<A>(pixels);
  double total = 0;
  for (int64_t c = block * kBlock; c < block_end(shape, block); c += kColumns) {
    const int64_t count = std::min(kColumns, block_end(shape, block) - c);
    pack(features, steps, c, count, panel.get(), rows.get());
    A squares[kColumns] = {};
    for (int64_t m = 0; m < shape.maps; m += kRows) {
      const int64_t taken = std::min(kRows, shape.maps - m);
      if (settings.maximum) {
        for (int64_t r = 0; r < taken; ++r) {
          maximum_row(attention + (m + r) * pixels, panel.get(), pixels, tiles + r * kColumns,
                      first + r * kColumns);
        }
      } else {
        panel_product(taken, attention + m * pixels, pixels, int64_t{1}, panel.get(), pixels, tiles,
                      kColumns, false);
      }
      for (int64_t r = 0; r < taken; ++r) {
        A* row = tiles + r * kColumns;
        root_row(row, factor, settings.signed_sqrt, static_cast<A>(settings.eps), squares);
        const int64_t at = (m + r) * shape.channels + c;
        convert(row, count, to + at);
        if (argmax != nullptr) std::copy_n(first + r * kColumns, count, argmax + at);
      }
    }
    for (int64_t j = 0; j < count; ++j) total += static_cast<double>(squares[j]);
  }
  return total;
}

// The pooled matrices of a batch, in the way that suits them, block by block.
template <typename T>
class Pooling {
  using A = accumulate_t<T>;

 public:
  Pooling(const FeatureMap& features, const PoolAttention<T>& attention, const PoolShape& shape,
          const PoolSettings& settings)
      : features_(data<T>(features.tensor)),
        steps_(features.steps),
        attention_(attention),
        shape_(shape),
        settings_(settings),
        in_place_(reads_in_place<A>(steps_, shape, settings)),
        panel_size_(panels_of<A>(shape.maps) * kPanel<A> * shape.pixels),
        panels_(in_place_ ? shape.batch * panel_size_ : 0) {}

  // Before the blocks of an image.
  void start(int64_t b) const {
    if (in_place_) attention_.map_panels(b, panels_.get() + b * panel_size_);
  }

  template <typename Out>
  double block(int64_t b, int64_t i, Out* to, int32_t* argmax) const {
    const T* from = features_ + b * steps_.step_b;
    if (in_place_) {
      return pool_in_place(from, steps_, panels_.get() + b * panel_size_, shape_, settings_, i, to);
    }
    return pool_block(from, steps_, attention_.matrix(b), shape_, settings_, i, to, argmax);
  }

 private:
  const T* features_;
  const MapSteps& steps_;
  const PoolAttention<T>& attention_;
  const PoolShape& shape_;
  const PoolSettings& settings_;
  bool in_place_;
  int64_t panel_size_;
  Scratch<A> panels_;
};

}  // namespace magsd::MAGSD_ISA::bilinear_pool
