// Mean and variance of the channels of a map.
//
// Values are shifted, so that a large common mean does not cost the variance its digits, and added
// up in double. Contiguous: a channel at a time, shifted by an estimate of its mean from a pass
// before, so that stretches of it may be added up in float. Channels last: in one pass, shifted by
// the channel's first value, by blocks of kBlockPixels pixels that are added in order. No split
// depends on threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/feature_map.h"
#include "common/tensor.h"
#include "cpu/panel.h"
#include "cpu/parallel.h"

namespace magsd::MAGSD_ISA::multiscale_attention {

struct ChannelStatistics {
  double mean, variance;  // The biased variance.
};

constexpr int64_t kBlockPixels = 512;

// Sums of values less a shift and, if asked for, of the squares of these. Float sums of at the most
// about kStretch values, in as many chains as there are lanes in kChains vectors, go to double.
template <typename A, bool kSquares>
class ShiftedSums {
 public:
  explicit ShiftedSums(A shift) : shift_(shift) {}

  void add(const A* values, int64_t count) {
    for (; count > kStretch; count -= kStretch, values += kStretch) add_stretch(values, kStretch);
    add_stretch(values, count);
  }
  double plain() { return total(plain_); }
  double squares() { return total(squares_); }

 private:
  using Vector = VectorOf<A, kVectorBytes>;
  using V = typename Vector::type;
  static constexpr int kWidth = kLanes<A>;
  static constexpr int kChains = 4;  // they hide the latency of an addition
  static constexpr int64_t kStretch = 2048;

  struct Sums {
    V chains[kChains] = {};
    double lanes[kWidth] = {};
  };

  void add_stretch(const A* values, int64_t count) {
    if (held_ + count > kStretch) flush();
    held_ += count;
    const auto take = [&](const V& value, int k) __attribute__((always_inline)) {
      plain_.chains[k] += value;
      if constexpr (kSquares) squares_.chains[k] += value * value;
    };
    const auto shifted = [&](int64_t at) __attribute__((always_inline)) {
      V value;
      Vector::load(values + at, value);
      return value - shift_;
    };
    int64_t i = 0;
    for (; i + kChains * kWidth <= count; i += kChains * kWidth) {
      for (int k = 0; k < kChains; ++k) take(shifted(i + k * kWidth), k);
    }
    for (int k = 0; i + kWidth <= count; i += kWidth, ++k) take(shifted(i), k);
    if (i == count) return;
    if (count >= kWidth) {  // the last vector overlaps the one before, whose values count as 0
      alignas(64) static constexpr Ends kEnds{};
      V end;
      Vector::load(kEnds.ones + (count - i), end);
      take(shifted(count - kWidth) * end, kChains - 1);
      return;
    }
    for (; i < count; ++i) {
      const double value = static_cast<double>(values[i] - shift_);
      plain_.lanes[i] += value;
      squares_.lanes[i] += value * value;
    }
  }

  struct Ends {
    A ones[2 * kWidth] = {};
    constexpr Ends() {
      for (int i = kWidth; i < 2 * kWidth; ++i) ones[i] = 1;
    }
  };

  void flush() {
    held_ = 0;
    flush(plain_);
    if constexpr (kSquares) flush(squares_);
  }

  static void flush(Sums& sums) {
    static_assert(kChains == 4);
    A added[kWidth];
    Vector::store(added, (sums.chains[0] + sums.chains[1]) + (sums.chains[2] + sums.chains[3]));
    for (V& chain : sums.chains) chain = V{};
    for (int lane = 0; lane < kWidth; ++lane) sums.lanes[lane] += static_cast<double>(added[lane]);
  }

  double total(Sums& sums) {
    flush(sums);
    double sum = 0;
    for (const double lane : sums.lanes) sum += lane;
    return sum;
  }

  A shift_;
  int64_t held_ = 0;  // values in the chains
  Sums plain_, squares_;
};

inline ChannelStatistics statistics_of(double shift, double sum, double squares, int64_t count) {
  const double mean = sum / static_cast<double>(count);
  const double variance = squares / static_cast<double>(count) - mean * mean;
  return {shift + mean, variance < 0 ? 0 : variance};
}

// Of channel m of contiguous maps that are not empty.
template <typename T>
ChannelStatistics channel_statistics(const T* values, const MapSteps& steps, int64_t m) {
  using A = accumulate_t<T>;
  const int64_t pixels = steps.pixels(), count = steps.batch * pixels;
  Scratch<A> acc(std::is_same_v<T, A> ? 0 : pixels);
  const auto for_planes = [&](const auto& body) {
    for (int64_t b = 0; b < steps.batch; ++b) {
      body(upcast_row(values + b * steps.step_b + m * steps.step_c, pixels, acc.get()));
    }
  };
  ShiftedSums<A, false> estimate(A{0});
  for_planes([&](const A* plane) {
    if constexpr (std::is_same_v<T, A>) Ahead::of(plane + steps.step_b, pixels).fetch(0, 1);
    estimate.add(plane, pixels);
  });
  const A shift = static_cast<A>(estimate.plain() / static_cast<double>(count));
  ShiftedSums<A, true> sums(shift);
  for_planes([&](const A* plane) { sums.add(plane, pixels); });
  if (std::isfinite(sums.squares())) {
    return statistics_of(static_cast<double>(shift), sums.plain(), sums.squares(), count);
  }
  // What a float cannot hold a double may.
  const double first = static_cast<double>(static_cast<A>(values[m * steps.step_c]));
  double plain = 0, squares = 0;
  for_planes([&](const A* plane) {
    for (int64_t p = 0; p < pixels; ++p) {
      const double value = static_cast<double>(plane[p]) - first;
      plain += value;
      squares += value * value;
    }
  });
  return statistics_of(first, plain, squares, count);
}

// Of all channels of maps in channels last that are not empty.
template <typename T>
std::vector<ChannelStatistics> channels_last_statistics(const T* values, const MapSteps& steps) {
  using A = accumulate_t<T>;
  const int64_t channels = steps.channels, pixels = steps.pixels();
  const int64_t total = steps.batch * pixels, blocks = (total + kBlockPixels - 1) / kBlockPixels;
  std::vector<A> shifts(channels);
  convert(values, channels, shifts.data());
  std::vector<double> sums(blocks * 2 * channels);
  const int64_t grain = 1 + 16384 / (std::min(total, kBlockPixels) * channels);
  parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double* MAGSD_RESTRICT plain = sums.data() + i * 2 * channels;
      double* MAGSD_RESTRICT squares = plain + channels;
      const A* MAGSD_RESTRICT shift = shifts.data();
      for (int64_t p = i * kBlockPixels; p < std::min(total, (i + 1) * kBlockPixels); ++p) {
        const T* pixel = values + p / pixels * steps.step_b + p % pixels * steps.step_p;
        for (int64_t m = 0; m < channels; ++m) {
          const double value = static_cast<double>(static_cast<A>(pixel[m]) - shift[m]);
          plain[m] += value;
          squares[m] += value * value;
        }
      }
    }
  });
  std::vector<ChannelStatistics> result(channels);
  for (int64_t m = 0; m < channels; ++m) {
    double plain = 0, squares = 0;
    for (int64_t i = 0; i < blocks; ++i) {
      plain += sums[i * 2 * channels + m];
      squares += sums[(i * 2 + 1) * channels + m];
    }
    result[m] = statistics_of(static_cast<double>(shifts[m]), plain, squares, total);
  }
  return result;
}

}  // namespace magsd::MAGSD_ISA::multiscale_attention
