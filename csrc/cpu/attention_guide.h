// The guide of a view: a low-resolution attention map, upsampled to the image, and its threshold.
//
// U is never stored: a guide keeps the h rows of the map interpolated along x (h W floats), and a
// row of U is an interpolation of two of them. Bands of rows whose two neighbors stay clearly
// below the threshold are skipped: interpolation exceeds the map by no more than rounding. A box
// takes the rows up to the first and down to the last that passes, and for its columns the two ends
// of every stretch between two rows of the map.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/attention_augment_arguments.h"
#include "common/boxes.h"
#include "common/resampling.h"
#include "common/tensor.h"

namespace magsd::MAGSD_ISA::attention_augment {

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
        data_(attention.const_data_ptr()),
        left_(width),
        right_(width),
        share_(width) {
    for (int d = 0; d < 4; ++d) step_[d] = attention.stride(d);
    const float step_y = resize_step<float>(low_height_, height, align_corners);
    rows_.reserve(height);
    for (int64_t y = 0; y < height; ++y) {
      rows_.push_back(linear_taps(y, low_height_, step_y, align_corners));
    }
    const float step_x = resize_step<float>(low_width_, width, align_corners);
    for (int64_t x = 0; x < width; ++x) {
      const LinearTaps<float> at = linear_taps(x, low_width_, step_x, align_corners);
      left_[x] = static_cast<int32_t>(at.lower);
      right_[x] = static_cast<int32_t>(at.upper);
      share_[x] = at.weight;
    }
  }

  int64_t maps() const { return maps_; }
  int64_t low_height() const { return low_height_; }
  int64_t low_width() const { return low_width_; }
  int64_t height() const { return height_; }
  int64_t width() const { return width_; }
  const LinearTaps<float>& row(int64_t y) const { return rows_[y]; }

  // Map m of image b in float32, low_height x low_width.
  void read(int64_t b, int64_t m, float* map) const {
    visit_floating(dtype_, [&](auto type) {
      using T = decltype(type);
      const T* first = static_cast<const T*>(data_) + b * step_[0] + m * step_[1];
      for (int64_t y = 0; y < low_height_; ++y) {
        for (int64_t x = 0; x < low_width_; ++x) {
          map[y * low_width_ + x] = static_cast<float>(upcast(first[y * step_[2] + x * step_[3]]));
        }
      }
    });
  }

  // upsampled[x] for every column of the image, from a row of a low-resolution map.
  void upsample_row(const float* MAGSD_RESTRICT low, float* MAGSD_RESTRICT upsampled) const {
    const int32_t* MAGSD_RESTRICT left = left_.data();
    const int32_t* MAGSD_RESTRICT right = right_.data();
    const float* MAGSD_RESTRICT share = share_.data();
    for (int64_t x = 0; x < width_; ++x)
      upsampled[x] = interpolate(low[left[x]], low[right[x]], share[x]);
  }

 private:
  Tensor attention_;
  ScalarType dtype_;
  int64_t maps_, low_height_, low_width_, height_, width_;
  int64_t step_[4];
  const void* data_;
  std::vector<LinearTaps<float>> rows_;
  std::vector<int32_t> left_, right_;
  std::vector<float> share_;
};

// One map and its threshold. Reused from image to image, so that memory is taken once per task.
class Guide {
 public:
  explicit Guide(const AttentionMaps& maps)
      : maps_(maps),
        low_(maps.low_height() * maps.low_width()),
        upsampled_(maps.low_height() * maps.width()),
        peaks_(maps.low_height()),
        highest_(maps.width()) {}

  // Takes a map of image b; t = theta * (maximum of the low-resolution map), NaN if one is in it.
  void set(int64_t b, const Choice& choice) {
    maps_.read(b, choice.map(b, maps_.maps()), low_.data());
    float peak = low_[0], largest = 0;
    finite_ = true;
    for (const float value : low_) {
      peak = larger(peak, value);
      largest = std::max(largest, std::fabs(value));
      finite_ &= std::isfinite(value);
    }
    threshold_ = choice.theta[b] * peak;
    slack_ = 1e-6f * largest;
    const int64_t low_width = maps_.low_width();
    for (int64_t i = 0; i < maps_.low_height(); ++i) {
      const float* row = low_.data() + i * low_width;
      maps_.upsample_row(row, upsampled_.data() + i * maps_.width());
      peaks_[i] = *std::max_element(row, row + low_width);
    }
  }

  // False only where U < t holds at every pixel of row y.
  bool can_pass(int64_t y) const {
    if (!finite_) return true;
    const LinearTaps<float>& at = maps_.row(y);
    return !clearly_below(std::max(peaks_[at.lower], peaks_[at.upper]), threshold_);
  }

  // Whether any pixel of row y passes.
  bool passes(int64_t y) const {
    const LinearTaps<float>& at = maps_.row(y);
    const float* MAGSD_RESTRICT lower = upsampled_.data() + at.lower * maps_.width();
    const float* MAGSD_RESTRICT upper = upsampled_.data() + at.upper * maps_.width();
    const float weight = at.weight, threshold = threshold_;
    int32_t any = 0;
    for (int64_t x = 0; x < maps_.width(); ++x) {
      any |= interpolate(lower[x], upper[x], weight) >= threshold ? 1 : 0;
    }
    return any != 0;
  }

  // factor[i] = [U < t] + floor for the elements of row y, `inner` to a pixel.
  template <typename Real>
  void factors(int64_t y, Real floor, int64_t inner, Real* MAGSD_RESTRICT factor) const {
    const int64_t width = maps_.width();
    const Real kept = Real(1) + floor;
    if (!can_pass(y)) {
      std::fill_n(factor, width * inner, kept);
      return;
    }
    const LinearTaps<float>& at = maps_.row(y);
    const float* MAGSD_RESTRICT lower = upsampled_.data() + at.lower * width;
    const float* MAGSD_RESTRICT upper = upsampled_.data() + at.upper * width;
    const float weight = at.weight, threshold = threshold_;
    for (int64_t x = 0; x < width; ++x) {
      factor[x] = interpolate(lower[x], upper[x], weight) < threshold ? kept : floor;
    }
    if (inner == 1) return;
    for (int64_t x = width - 1; x >= 0; --x) {
      std::fill_n(factor + x * inner, inner, Real(factor[x]));
    }
  }

  // The padded box around the pixels with U >= t.
  Box box(double padding) {
    const int64_t height = maps_.height(), width = maps_.width();
    int64_t top = 0, bottom = height - 1, left = width, right = -1;
    const auto fails = [&](int64_t y) { return !(can_pass(y) && passes(y)); };
    while (top < height && fails(top)) ++top;
    if (top < height) {
      while (fails(bottom)) --bottom;
      // Between two rows of the map U is linear along y: what is largest lies at an end. Rounding
      // can lift a row between them over its ends by less than `slack`.
      mark_columns(top, bottom, finite_);
      columns_that_reach(threshold_, left, right);
      int64_t least = left, most = right;
      columns_that_reach(threshold_ - slack_, least, most);
      if (finite_ && (least < left || most > right)) {
        mark_columns(top, bottom, false);
        columns_that_reach(threshold_, left, right);
      }
    }
    return {padded_extent(top, bottom, height, padding),
            padded_extent(left, right, width, padding)};
  }

 private:
  // highest[x] becomes the maximum of U over rows first..last, or over the ends of each stretch
  // that lies between the same two rows of the map.
  void mark_columns(int64_t first, int64_t last, bool ends_only) {
    std::fill(highest_.begin(), highest_.end(), -std::numeric_limits<float>::infinity());
    for (int64_t y = first; y <= last; ++y) {
      const LinearTaps<float>& at = maps_.row(y);
      const auto between_the_same = [&](int64_t other) {
        return other >= first && other <= last && maps_.row(other).lower == at.lower &&
               maps_.row(other).upper == at.upper;
      };
      if (ends_only && between_the_same(y - 1) && between_the_same(y + 1)) continue;
      if (!can_pass(y)) continue;
      const float* MAGSD_RESTRICT lower = upsampled_.data() + at.lower * maps_.width();
      const float* MAGSD_RESTRICT upper = upsampled_.data() + at.upper * maps_.width();
      float* MAGSD_RESTRICT highest = highest_.data();
      const float weight = at.weight;
      for (int64_t x = 0; x < maps_.width(); ++x) {
        const float value = interpolate(lower[x], upper[x], weight);
        // NaN never exceeds, as it never passes.
        highest[x] = highest[x] < value ? value : highest[x];
      }
    }
  }

  // The first and the last column whose `highest` reaches a value.
  void columns_that_reach(float value, int64_t& first, int64_t& last) const {
    const int64_t width = maps_.width();
    first = 0;
    last = width - 1;
    while (first < width && !(highest_[first] >= value)) ++first;
    while (last >= 0 && !(highest_[last] >= value)) --last;
  }

  const AttentionMaps& maps_;
  std::vector<float> low_, upsampled_, peaks_, highest_;
  float threshold_ = 0;
  float slack_ = 0;
  bool finite_ = true;
};

}  // namespace magsd::MAGSD_ISA::attention_augment
