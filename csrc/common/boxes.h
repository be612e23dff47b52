// The rules of the guided views' boxes. Source: magsd_kernels/attention_augment.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace magsd::MAGSD_ISA::attention_augment {

// Half-open interval of rows or columns.
struct Interval {
  int32_t start, stop;
  MAGSD_HD int32_t extent() const { return stop - start; }
  MAGSD_HD bool holds(int64_t entry) const { return entry >= start && entry < stop; }
};

struct Box {
  Interval rows, columns;
};

// The larger of two values of a map, NaN if one is.
MAGSD_HD float larger(float a, float b) { return b > a || b != b ? b : a; }

// Whether a value can be said to lie below a threshold in spite of its rounding; false for NaN.
MAGSD_HD bool clearly_below(float value, float threshold) {
  return value + 1e-6f * std::fabs(value) < threshold;
}

// The interval from the first to the last entry that passes, padded by `padding` of the length, in
// double precision, truncated toward zero; it holds at least one entry. `first` > `last` says that
// no entry passes, and gives the whole.
MAGSD_HD Interval padded_extent(int64_t first, int64_t last, int64_t length, double padding) {
  if (first > last) return {0, static_cast<int32_t>(length)};
  const double margin = padding * static_cast<double>(length);
  const double low = static_cast<double>(first) - margin;
  const double high = static_cast<double>(last) + margin;
  // The comparisons come before the conversions, which a large padding would overflow.
  const int64_t start = low > 0 ? static_cast<int64_t>(low) : 0;
  int64_t stop = high < static_cast<double>(length) ? static_cast<int64_t>(high) : length;
  if (stop < start + 1) stop = start + 1;
  return {static_cast<int32_t>(start), static_cast<int32_t>(stop)};
}

// The nearest interval of at least one entry inside 0..length.
MAGSD_HD Interval inside(Interval interval, int32_t length) {
  int32_t start = interval.start < length ? interval.start : length - 1;
  if (start < 0) start = 0;
  int32_t stop = interval.stop < length ? interval.stop : length;
  if (stop <= start) stop = start + 1;
  return {start, stop};
}

// Where a box of `extent` entries is pasted into `length`, for a uniform u in [0, 1).
MAGSD_HD int64_t paste_start(float u, int64_t extent, int64_t length) {
  const int64_t room = length - extent;
  const double corner = std::floor(static_cast<double>(u) * static_cast<double>(room + 1));
  if (!(corner > 0)) return 0;
  return corner < static_cast<double>(room) ? static_cast<int64_t>(corner) : room;
}

// Where the copy of a box begins in an image.
struct Corner {
  int64_t row, column;
};

MAGSD_HD Corner paste_corner(const Box& box, float u_y, float u_x, int64_t height, int64_t width) {
  return {paste_start(u_y, box.rows.extent(), height),
          paste_start(u_x, box.columns.extent(), width)};
}

// Rank of the map that an index names; one outside 0..maps-1 counts as the nearest inside.
MAGSD_HD int64_t nearest_map(int64_t index, int64_t maps) {
  if (index < 0) return 0;
  return index < maps ? index : maps - 1;
}

}  // namespace magsd::MAGSD_ISA::attention_augment
