// What the forward and the backward of batch_norm_act share: how maps are cut, loops over a row.
//
// A row is what lies side by side: pixels of a plane (contiguous), which share one norm, or the
// channels of a pixel (channels last), where every element has its own; several pixels of few
// channels make one row, and the coefficients repeat. The loops are written once for both, over
// `PerElement` or `Shared` coefficients.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/batch_norm_act_arguments.h"
#include "cpu/activation.h"
#include "cpu/large_result.h"
#include "cpu/panel.h"
#include "cpu/parallel.h"
#include "cpu/parameters.h"
#include "cpu/stream.h"

namespace magsd::MAGSD_ISA::batch_norm_act {

// Elements of a piece of work, and the most rows whose sums are added up in float.
constexpr int64_t kPieceElements = int64_t{1} << 16;
constexpr int64_t kMostRows = 128;
// Pixels of a plane that pass through a buffer at a time.
constexpr int64_t kPlanePiece = 2048;
// Elements of a row that are treated for all rows of a piece before the next, so that coefficients
// and sums stay near. Less than a row makes memory slower than it makes the caches faster.
constexpr int64_t kSlab = 2048;
// A row of fewer elements holds several pixels: a call of a loop must be worth it.
constexpr int64_t kShortRow = 512;
// A result from here on is streamed: a smaller one, the next layer finds in the last cache.
constexpr int64_t kStreamed = int64_t{1} << 25;
// Pixels of a plane that form a row, so that a sum over them has as many chains.
constexpr int64_t kLaneRow = 64;

// A vector that begins on a cache line, so that loads and stores of it do not straddle two.
template <typename A>
struct LineAllocator {
  using value_type = A;
  static constexpr std::align_val_t kLine{64};
  LineAllocator() = default;
  template <typename B>
  LineAllocator(const LineAllocator<B>&) {}
  A* allocate(size_t count) { return static_cast<A*>(::operator new(count * sizeof(A), kLine)); }
  void deallocate(A* memory, size_t) { ::operator delete(memory, kLine); }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};
template <typename A>
using LineVector = std::vector<A, LineAllocator<A>>;

// Elements rounded up to whole cache lines, and a few lines more: a multiple of 4 KiB between two
// arrays that are written in step makes a load of one wait for a store to the other.
inline int64_t padded(int64_t count) { return (count + 15) / 16 * 16 + 80; }

template <typename A>
struct PerElement {
  const A* MAGSD_RESTRICT values;
  A operator[](int64_t i) const { return values[i]; }
};
template <typename A>
struct Shared {
  A value;
  A operator[](int64_t) const { return value; }
};

// The norm of a row: z = (x - mean) factor + bias, factor = weight rstd.
template <typename Coefficients>
struct RowNorm {
  Coefficients mean, factor, bias;
};

// Numbers of every channel in every group, (groups, pixels of a row, C).
template <typename A>
struct PerChannel {
  int64_t channels, pixels;
  LineVector<A> values;

  PerChannel(int64_t groups, int64_t of_channels, int64_t of_pixels)
      : channels(of_channels), pixels(of_pixels), values(groups * of_channels * of_pixels) {}
  A get(int64_t group, int64_t c) const { return values[group * channels * pixels + c]; }
  void set(int64_t group, int64_t c, A value) {
    A* row = values.data() + group * channels * pixels;
    for (int64_t p = 0; p < pixels; ++p) row[p * channels + c] = value;
  }
  // From element `first` of a row on.
  PerElement<A> row(int64_t group, int64_t first) const {
    return {values.data() + group * channels * pixels + first};
  }
  Shared<A> plane(int64_t group, int64_t c) const { return {get(group, c)}; }
};

// The norms of every channel, in every group.
template <typename A>
struct Norms {
  std::vector<A> weight;
  PerChannel<A> mean, factor, bias;

  Norms(const NormShape& shape, int64_t pixels, const Tensor& weights, const Tensor& biases)
      : weight(shape.channels),
        mean(shape.groups, shape.channels, pixels),
        factor(shape.groups, shape.channels, pixels),
        bias(1, shape.channels, pixels) {
    std::vector<A> values(shape.channels);
    read_parameters(weights, weight);
    read_parameters(biases, values);
    for (int64_t c = 0; c < shape.channels; ++c) bias.set(0, c, values[c]);
  }
  void set(int64_t group, int64_t c, A new_mean, A rstd) {
    mean.set(group, c, new_mean);
    factor.set(group, c, weight[c] * rstd);
  }
  RowNorm<PerElement<A>> row(int64_t group, int64_t first) const {
    return {mean.row(group, first), factor.row(group, first), bias.row(0, first)};
  }
  RowNorm<Shared<A>> plane(int64_t group, int64_t c) const {
    return {mean.plane(group, c), factor.plane(group, c), bias.plane(0, c)};
  }
};

// Calls visitor(std::integral_constant<Act, ...>{}).
template <typename Visitor>
void visit_act(Act act, const Visitor& visitor) {
  switch (act) {
    case Act::kRelu:
      return visitor(std::integral_constant<Act, Act::kRelu>{});
    case Act::kSilu:
      return visitor(std::integral_constant<Act, Act::kSilu>{});
    default:
      return visitor(std::integral_constant<Act, Act::kNone>{});
  }
}

// Rows that are `step` apart.
template <typename X>
struct Rows {
  X* first;
  int64_t step;
};

// Calls body(std::integral_constant<int, n>{}, row) for blocks of n rows: of four for sums, whose
// rows then share the loads and stores of the sums.
constexpr int kBlock = 4;
template <typename Body>
void for_blocks(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + kBlock <= rows; r += kBlock) body(std::integral_constant<int, kBlock>{}, r);
  for (; r < rows; ++r) body(std::integral_constant<int, 1>{}, r);
}

// Asks for the block after the next of `rows` rows, of which block `r` is treated: memory gives
// four rows in turns more slowly than one after the other.
template <typename T>
void fetch_ahead(const T* first, int64_t step, int64_t r, int64_t rows, int64_t count) {
  const int64_t begin = r + 2 * kBlock, end = std::min(rows, begin + kBlock);
  for (int64_t i = begin; i < end; ++i) Ahead::of(first + i * step, count).fetch(0, 1);
}

// What loops read of a T: float for float16, whose conversion is no vector code of the compiler's.
template <typename T>
using Readable = std::conditional_t<std::is_same_v<T, Half>, float, T>;

// A block of rows as loops take it: in place or converted.
template <typename T>
class Input {
 public:
  explicit Input(int64_t most) : copy_(std::is_same_v<T, Half> ? kBlock * most : 0) {}
  Rows<const Readable<T>> read(const T* first, int64_t step, [[maybe_unused]] int rows,
                               [[maybe_unused]] int64_t count) {
    if constexpr (std::is_same_v<T, Half>) {
      for (int r = 0; r < rows; ++r) load_row(first + r * step, count, copy_.get() + r * count);
      return {copy_.get(), count};
    } else {
      return {first, step};
    }
  }

 private:
  Scratch<Readable<T>> copy_;
};

// A row of a result: written in place, or in the first cache and from there past the caches.
template <typename T>
class Output {
  static constexpr bool kConverts = std::is_same_v<T, Half>;

 public:
  Output(int64_t most, bool streamed)
      : streamed_(streamed), wide_(kConverts ? most : 0), row_(streamed ? most : 0) {}
  Readable<T>* begin([[maybe_unused]] T* to) {
    if constexpr (kConverts) {
      return wide_.get();
    } else {
      return streamed_ ? row_.get() : to;
    }
  }
  void end(T* to, int64_t count) {
    T* at = streamed_ ? row_.get() : to;
    if constexpr (kConverts) store_row(wide_.get(), count, at);
    if (streamed_) write_row(at, count, to, true);
  }

 private:
  bool streamed_;
  Scratch<Readable<T>> wide_;
  Scratch<T> row_;
};

// Where the pixels of a map in channels last lie.
struct Pixels {
  int64_t step_image, step;
  Pixels(const MapSteps& steps) : step_image(steps.step_b), step(steps.step_p) {}
};

// How maps in channels last are cut: into rows of one or several pixels, and runs of rows, the
// pieces of work. Rows run on from image to image where the images of every map follow each other.
struct Pieces {
  int64_t images;  // through which a row counter runs
  int64_t pixels;  // of a row
  int64_t width;   // elements of a row
  int64_t rows;    // of these images, the last perhaps shorter
  int64_t step;    // rows of a piece
  int64_t per_segment, segments, count;

  Pieces(const NormShape& shape, std::initializer_list<Pixels> maps) {
    const auto all = [&](const auto& holds) {
      return std::all_of(maps.begin(), maps.end(), holds);
    };
    const bool one = shape.batch * shape.groups == 1;
    const bool follow =
        all([&](const Pixels& map) { return one || map.step_image == shape.pixels * map.step; });
    const bool dense = all([&](const Pixels& map) { return map.step == shape.channels; });
    images = follow ? shape.batch : 1;
    pixels = dense ? std::clamp<int64_t>(kShortRow / shape.channels, 1, images * shape.pixels) : 1;
    width = pixels * shape.channels;
    total_ = images * shape.pixels;
    rows = (total_ + pixels - 1) / pixels;
    step = std::clamp<int64_t>(kPieceElements / width, 16, kMostRows);
    per_segment = (rows + step - 1) / step;
    segments = shape.batch / images;
    count = shape.groups * segments * per_segment;
  }

  struct Piece {
    int64_t group, image, pixel;
    int64_t rows, rest;  // whole rows, pixels of a shorter one behind them
    int64_t offset(const Pixels& map) const { return image * map.step_image + pixel * map.step; }
  };
  int64_t per_group() const { return segments * per_segment; }
  Piece operator[](int64_t i) const {
    const int64_t segment = i / per_segment, first = i % per_segment * step * pixels;
    const int64_t here = std::min(step * pixels, total_ - first);
    return {segment / segments, segment * images, first, here / pixels, here % pixels};
  }
  // Calls body(row, rows, first element, elements) for the slabs of a piece's rows.
  template <typename Body>
  void for_slabs(const Piece& piece, const Body& body) const {
    for (int64_t c = 0; c < width && piece.rows > 0; c += kSlab) {
      body(int64_t{0}, piece.rows, c, std::min(kSlab, width - c));
    }
    if (piece.rest > 0) body(piece.rows, int64_t{1}, int64_t{0}, piece.rest * (width / pixels));
  }

 private:
  int64_t total_;
};

// Entries that a thread takes at least, of `count` that have so many elements together.
inline int64_t grain_of(int64_t count, int64_t elements) {
  return std::max<int64_t>(1, 32768 * count / std::max<int64_t>(elements, 1));
}

// Two sums over a plane, as many chains of each as a row has lanes: in float for at most about
// kMostRows rows, then in double.
template <typename A>
struct LaneSums {
  alignas(64) A first[kLaneRow] = {};
  alignas(64) A second[kLaneRow] = {};

  // Calls add(pixel, rows, count) for runs of whole rows, and for the rest of the plane as a row of
  // `count` lanes.
  template <typename Add>
  void for_rows(int64_t pixels, const Add& add) {
    const int64_t whole = pixels / kLaneRow;
    for (int64_t r = 0; r < whole;) {
      const int64_t rows = std::min(whole - r, kMostRows - held_);
      add(r * kLaneRow, rows, kLaneRow);
      r += rows;
      hold(rows);
    }
    if (pixels % kLaneRow > 0) {
      add(whole * kLaneRow, 1, pixels % kLaneRow);
      hold(1);
    }
  }
  struct Totals {
    double first, second;
  };
  Totals totals() {
    flush();
    for (int64_t half = kLaneRow / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) lanes_first_[i] += lanes_first_[i + half];
      for (int64_t i = 0; i < half; ++i) lanes_second_[i] += lanes_second_[i + half];
    }
    return {lanes_first_[0], lanes_second_[0]};
  }

 private:
  void hold(int64_t rows) {
    held_ += rows;
    if (held_ >= kMostRows) flush();
  }
  void flush() {
    for (int64_t i = 0; i < kLaneRow; ++i) {
      lanes_first_[i] += static_cast<double>(first[i]);
      lanes_second_[i] += static_cast<double>(second[i]);
      first[i] = second[i] = 0;
    }
    held_ = 0;
  }

  int64_t held_ = 0;
  double lanes_first_[kLaneRow] = {}, lanes_second_[kLaneRow] = {};
};

// Adds up two sums per piece and channel, in order: calls finish(group, channel, first, second),
// the groups of a channel in order.
template <typename A, typename Finish>
void sum_pieces(const LineVector<A>& partial, const Pieces& pieces, const NormShape& shape,
                const Finish& finish) {
  const int64_t channels = shape.channels;
  const int64_t grain = grain_of(channels, 4 * pieces.width * pieces.count);
  parallel_for(channels, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> first(end - begin), second(end - begin);
    for (int64_t g = 0; g < shape.groups; ++g) {
      std::fill(first.begin(), first.end(), 0.0);
      std::fill(second.begin(), second.end(), 0.0);
      for (int64_t i = g * pieces.per_group(); i < (g + 1) * pieces.per_group(); ++i) {
        const A* sums = partial.data() + i * 2 * padded(pieces.width);
        for (int64_t p = 0; p < pieces.pixels; ++p, sums += channels) {
          for (int64_t c = begin; c < end; ++c) {
            first[c - begin] += static_cast<double>(sums[c]);
            second[c - begin] += static_cast<double>(sums[padded(pieces.width) + c]);
          }
        }
      }
      for (int64_t c = begin; c < end; ++c) finish(g, c, first[c - begin], second[c - begin]);
    }
  });
}

}  // namespace magsd::MAGSD_ISA::batch_norm_act
