// Mean and variance of every channel of a map, in one pass over it.
//
// Values are shifted by the channel's first value and added up in double: the shift takes away a
// large common mean, so that the variance keeps its digits. The cut does not depend on threads: a
// channel (contiguous) or a block of kBlockPixels pixels (channels last), added in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/feature_map.h"
#include "common/tensor.h"
#include "cpu/parallel.h"

namespace magsd::MAGSD_ISA {

struct ChannelStatistics {
  double mean, variance;  // The biased variance.
};

constexpr int64_t kBlockPixels = 512;

// Interleaved chains, which hide the latency of an addition.
constexpr int kSumChains = 16;
struct ShiftedSums {
  double plain[kSumChains] = {}, squares[kSumChains] = {};

  // Adds value - shift, and its square, for a row of values.
  template <typename T>
  void add(const T* MAGSD_RESTRICT row, int64_t count, accumulate_t<T> shift) {
    using A = accumulate_t<T>;
    int64_t i = 0;
    for (; i + kSumChains <= count; i += kSumChains) {
      for (int k = 0; k < kSumChains; ++k) {
        const double value = static_cast<double>(static_cast<A>(row[i + k]) - shift);
        plain[k] += value;
        squares[k] += value * value;
      }
    }
    for (int k = 0; i < count; ++i, ++k) {
      const double value = static_cast<double>(static_cast<A>(row[i]) - shift);
      plain[k] += value;
      squares[k] += value * value;
    }
  }
};

inline ChannelStatistics statistics_of(double shift, double sum, double squares, int64_t count) {
  const double mean = sum / static_cast<double>(count);
  const double variance = squares / static_cast<double>(count) - mean * mean;
  return {shift + mean, variance < 0 ? 0 : variance};
}

template <typename T>
void contiguous_statistics(const T* values, const MapSteps& steps, ChannelStatistics* to) {
  using A = accumulate_t<T>;
  const int64_t pixels = steps.pixels();
  const int64_t grain = 1 + 16384 / (steps.batch * pixels);
  parallel_for(steps.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const A shift = static_cast<A>(values[m * steps.step_c]);
      ShiftedSums sums;
      for (int64_t b = 0; b < steps.batch; ++b) {
        sums.add(values + b * steps.step_b + m * steps.step_c, pixels, shift);
      }
      double plain = 0, squares = 0;
      for (int k = 0; k < kSumChains; ++k) {
        plain += sums.plain[k];
        squares += sums.squares[k];
      }
      to[m] = statistics_of(static_cast<double>(shift), plain, squares, steps.batch * pixels);
    }
  });
}

template <typename T>
void channels_last_statistics(const T* values, const MapSteps& steps, ChannelStatistics* to) {
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
  for (int64_t m = 0; m < channels; ++m) {
    double plain = 0, squares = 0;
    for (int64_t i = 0; i < blocks; ++i) {
      plain += sums[i * 2 * channels + m];
      squares += sums[(i * 2 + 1) * channels + m];
    }
    to[m] = statistics_of(static_cast<double>(shifts[m]), plain, squares, total);
  }
}

// Statistics of every channel of a map that is not empty.
template <typename T>
std::vector<ChannelStatistics> batch_statistics(const FeatureMap& map) {
  std::vector<ChannelStatistics> result(map.steps.channels);
  if (map.channels_last) {
    channels_last_statistics(data<T>(map.tensor), map.steps, result.data());
  } else {
    contiguous_statistics(data<T>(map.tensor), map.steps, result.data());
  }
  return result;
}

}  // namespace magsd::MAGSD_ISA
