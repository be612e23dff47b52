// Tables of a separable resize: for every entry of one side the entries of the other that it
// weighs, which always follow one another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/resampling.h"
#include "cpu/instruction_set.h"

namespace magsd::MAGSD_ISA {

// Entry i weighs entries first[i] .. first[i] + count(i) - 1 of the other side.
template <typename A>
struct Axis {
  std::vector<int64_t> first, offset;
  std::vector<A> weights;

  int64_t size() const { return static_cast<int64_t>(first.size()); }
  int64_t count(int64_t i) const { return offset[i + 1] - offset[i]; }
  const A* weight(int64_t i) const { return weights.data() + offset[i]; }
};

// What every output reads of the inputs.
template <typename A>
Axis<A> resize_axis(int64_t size_in, int64_t size_out, Resampling mode, bool align_corners) {
  const ResizeRule rule{size_in, size_out, mode, align_corners};
  Axis<A> axis;
  axis.first.resize(size_out);
  axis.offset.assign(1, 0);
  for (int64_t o = 0; o < size_out; ++o) {
    const Span inputs = inputs_of(rule, o);
    axis.first[o] = inputs.first;
    for (int64_t k = 0; k < inputs.count; ++k) {
      // Only area weighs more than two inputs, and those all alike.
      axis.weights.push_back(k < 2 ? resize_weight<A>(rule, o, inputs.first + k)
                                   : axis.weights.back());
    }
    axis.offset.push_back(static_cast<int64_t>(axis.weights.size()));
  }
  return axis;
}

// What every input is read by: the adjoint of `axis` of `size_in` inputs.
template <typename A>
Axis<A> adjoint_axis(const Axis<A>& axis, int64_t size_in) {
  Axis<A> adjoint;
  adjoint.first.assign(size_in, 0);
  adjoint.offset.assign(1, 0);
  // First inputs and last inputs grow with the output, so the outputs that read an input follow
  // one another from the first whose last input has reached it.
  int64_t from = 0;
  for (int64_t i = 0; i < size_in; ++i) {
    while (from < axis.size() && axis.first[from] + axis.count(from) <= i) ++from;
    adjoint.first[i] = std::min(from, std::max<int64_t>(axis.size() - 1, 0));
    for (int64_t o = from; o < axis.size() && axis.first[o] <= i; ++o) {
      adjoint.weights.push_back(axis.weight(o)[i - axis.first[o]]);
    }
    adjoint.offset.push_back(static_cast<int64_t>(adjoint.weights.size()));
  }
  return adjoint;
}

// to (rows.size() x columns.size()) = the plane `from`, rows `width` apart, resized on both axes.
// `line` holds one row of the plane.
template <typename A>
void resize_plane(const A* from, int64_t width, const Axis<A>& rows, const Axis<A>& columns, A* to,
                  A* line) {
  for (int64_t y = 0; y < rows.size(); ++y) {
    std::fill(line, line + width, A{0});
    for (int64_t k = 0; k < rows.count(y); ++k) {
      const A weight = rows.weight(y)[k];
      const A* row = from + (rows.first[y] + k) * width;
      for (int64_t x = 0; x < width; ++x) line[x] += weight * row[x];
    }
    for (int64_t x = 0; x < columns.size(); ++x) {
      A sum = 0;
      for (int64_t k = 0; k < columns.count(x); ++k) {
        sum += columns.weight(x)[k] * line[columns.first[x] + k];
      }
      to[y * columns.size() + x] = sum;
    }
  }
}

}  // namespace magsd::MAGSD_ISA
