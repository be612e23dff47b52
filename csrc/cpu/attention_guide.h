// The guide of a view: a low-resolution attention map, upsampled to the image, and its threshold.
//
// U is never stored: a guide keeps the h rows of the map interpolated along x (h W floats), and a
// row of U is an interpolation of two of them. Bands of rows whose two neighbours stay clearly
// below the threshold are skipped: interpolation does not exceed them by more than rounding.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/boxes.h"
#include "common/resize.h"
#include "cpu/tensor.h"

namespace magsd::MAGSD_ISA {

struct Box {
  Interval rows, columns;
};

// Attention maps as an operator receives them: any dtype and strides, read in place.
class AttentionMaps {
 public:
  AttentionMaps(const Tensor& attention, int64_t height, int64_t width, bool align_corners)
      : attention_(attention),
        dtype_(attention.scalar_type()),
        maps_(attention.size(1)),
        low_height_(attention.size(2)),
        low_width_(attention.size(3)),
        height_(height),
        width_(width),
        data_(attention.const_data_ptr()) {
    for (int d = 0; d < 4; ++d) step_[d] = attention.stride(d);
    fill(rows_, low_height_, height, align_corners);
    fill(columns_, low_width_, width, align_corners);
  }

  int64_t maps() const { return maps_; }
  int64_t low_height() const { return low_height_; }
  int64_t low_width() const { return low_width_; }
  int64_t height() const { return height_; }
  int64_t width() const { return width_; }
  const Sample<float>& row(int64_t y) const { return rows_[y]; }
  const Sample<float>& column(int64_t x) const { return columns_[x]; }

  // Map m of image b in float32, low_height x low_width.
  void read(int64_t b, int64_t m, float* map) const {
    visit_floating(dtype_, [&](auto type) {
      using T = decltype(type);
      const T* first = static_cast<const T*>(data_) + b * step_[0] + m * step_[1];
      for (int64_t y = 0; y < low_height_; ++y) {
        for (int64_t x = 0; x < low_width_; ++x) {
          map[y * low_width_ + x] =
              static_cast<float>(widen(first[y * step_[2] + x * step_[3]]));
        }
      }
    });
  }

 private:
  static void fill(std::vector<Sample<float>>& samples, int64_t low, int64_t size,
                   bool align_corners) {
    const float step = sampling_step<float>(low, size, align_corners);
    samples.reserve(size);
    for (int64_t o = 0; o < size; ++o) samples.push_back(sample_at(o, low, step, align_corners));
  }

  Tensor attention_;
  ScalarType dtype_;
  int64_t maps_, low_height_, low_width_, height_, width_;
  int64_t step_[4];
  const void* data_;
  std::vector<Sample<float>> rows_, columns_;
};

// One map and its threshold. Reused from image to image, so that memory is taken once per task.
class Guide {
 public:
  explicit Guide(const AttentionMaps& maps)
      : maps_(maps),
        low_(maps.low_height() * maps.low_width()),
        wide_(maps.low_height() * maps.width()),
        peaks_(maps.low_height()),
        passed_(maps.width()) {}

  // Takes map m of image b; t = theta * (maximum of the low-resolution map), NaN if one is in it.
  void set(int64_t b, int64_t m, float theta) {
    maps_.read(b, m, low_.data());
    float peak = low_[0];
    finite_ = true;
    for (const float value : low_) {
      if (value > peak || std::isnan(value)) peak = value;
      finite_ &= std::isfinite(value);
    }
    threshold_ = theta * peak;
    const int64_t width = maps_.width(), low_width = maps_.low_width();
    for (int64_t i = 0; i < maps_.low_height(); ++i) {
      const float* map = low_.data() + i * low_width;
      float* wide = wide_.data() + i * width;
      float highest = -std::numeric_limits<float>::infinity();
      for (int64_t x = 0; x < width; ++x) {
        const Sample<float>& at = maps_.column(x);
        wide[x] = interpolate(map[at.lower], map[at.upper], at.weight);
        highest = std::max(highest, wide[x]);
      }
      peaks_[i] = highest;
    }
  }

  // False only where U < t holds at every pixel of row y.
  bool can_pass(int64_t y) const {
    if (!finite_) return true;
    const Sample<float>& at = maps_.row(y);
    const float highest = std::max(peaks_[at.lower], peaks_[at.upper]);
    return !(highest + 1e-6f * std::fabs(highest) < threshold_);
  }

  // Whether any pixel of a row passes; marks its columns.
  bool mark(int64_t y, uint8_t* MAGSD_RESTRICT columns) const {
    const Sample<float>& at = maps_.row(y);
    const float* MAGSD_RESTRICT lower = wide_.data() + at.lower * maps_.width();
    const float* MAGSD_RESTRICT upper = wide_.data() + at.upper * maps_.width();
    const float weight = at.weight, threshold = threshold_;
    uint8_t any = 0;
    for (int64_t x = 0; x < maps_.width(); ++x) {
      const uint8_t passes = interpolate(lower[x], upper[x], weight) >= threshold;
      columns[x] |= passes;
      any |= passes;
    }
    return any != 0;
  }

  // factor[x] = [U < t] + floor along row y.
  template <typename Real>
  void factors(int64_t y, Real floor, Real* MAGSD_RESTRICT factor) const {
    const int64_t width = maps_.width();
    const Real kept = Real(1) + floor;
    if (!can_pass(y)) {
      std::fill(factor, factor + width, kept);
      return;
    }
    const Sample<float>& at = maps_.row(y);
    const float* MAGSD_RESTRICT lower = wide_.data() + at.lower * width;
    const float* MAGSD_RESTRICT upper = wide_.data() + at.upper * width;
    const float weight = at.weight, threshold = threshold_;
    for (int64_t x = 0; x < width; ++x) {
      factor[x] = interpolate(lower[x], upper[x], weight) < threshold ? kept : floor;
    }
  }

  // The padded box around the pixels with U >= t.
  Box box(double padding) {
    const int64_t height = maps_.height(), width = maps_.width();
    std::fill(passed_.begin(), passed_.end(), uint8_t{0});
    int64_t top = height, bottom = -1, left = width, right = -1;
    if (!std::isnan(threshold_)) {
      for (int64_t y = 0; y < height; ++y) {
        if (can_pass(y) && mark(y, passed_.data())) {
          top = std::min(top, y);
          bottom = y;
        }
      }
      for (int64_t x = 0; x < width; ++x) {
        if (passed_[x]) {
          left = std::min(left, x);
          right = x;
        }
      }
    }
    return {padded_extent(top, bottom, height, padding), padded_extent(left, right, width, padding)};
  }

 private:
  const AttentionMaps& maps_;
  std::vector<float> low_, wide_, peaks_;
  std::vector<uint8_t> passed_;
  float threshold_ = 0;
  bool finite_ = true;
};

}  // namespace magsd::MAGSD_ISA
