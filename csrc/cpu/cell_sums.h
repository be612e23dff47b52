// Cells of a dense plane: average pooling by whole ratios, as from one scale of a network to
// another, and its adjoint.
//
// The rows of a cell are added first, along whole vectors. The sums of all rows of cells then lie
// side by side, and a group of neighbors never reaches past the end of its row, so that their
// columns are added in one run over all of them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/panel.h"

namespace magsd::MAGSD_ISA {

// A plane of height x width pixels, rows and columns of them to a cell, without a rest.
struct Cells {
  int64_t height = 0, width = 0, rows = 0, columns = 0;

  // From a plane to one of `to_height` x `to_width`; no rows where the sizes leave a rest.
  static Cells between(int64_t height, int64_t width, int64_t to_height, int64_t to_width) {
    if (height % to_height != 0 || width % to_width != 0) return {};
    return {height, width, height / to_height, width / to_width};
  }
  bool whole() const { return rows > 0; }
  int64_t size() const { return rows * columns; }
  int64_t count() const { return height / rows * (width / columns); }
  int64_t row_sums() const { return height / rows * width; }
};

// to[x] = sum over k of each(from[k width + x]). `each` takes a vector or a single value.
template <int64_t kRows, int kBytes = kVectorBytes, typename A, typename Each>
void add_rows(const A* from, int64_t width, int64_t count, const Each& each, A* to) {
  using Vector = VectorOf<A, kBytes>;
  using V = typename Vector::type;
  constexpr int64_t kWidth = kBytes / static_cast<int64_t>(sizeof(A));
  if constexpr (kWidth == 1) {
    for (int64_t x = 0; x < width; ++x) {
      A sum = each(from[x]);
      for (int64_t k = 1; k < count; ++k) sum += each(from[k * width + x]);
      to[x] = sum;
    }
  } else if (width < kWidth) {
    constexpr int kNarrower = kBytes > 16 ? kBytes / 2 : static_cast<int>(sizeof(A));
    add_rows<kRows, kNarrower>(from, width, count, each, to);
  } else {
    const int64_t rows = kRows > 0 ? kRows : count;
    for (int64_t next = 0; next < width; next += kWidth) {
      const int64_t x = std::min(next, width - kWidth);  // the last overlaps the one before
      V value;
      Vector::load(from + x, value);
      V sum = each(value);
      for (int64_t k = 1; k < rows; ++k) {
        Vector::load(from + k * width + x, value);
        sum += each(value);
      }
      Vector::store(to + x, sum);
    }
  }
}

// to[i] = sum of group i of `size` neighbors.
template <typename A>
void add_groups(const A* MAGSD_RESTRICT from, int64_t count, int64_t size, A* MAGSD_RESTRICT to) {
  if (size == 2) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[2 * i] + from[2 * i + 1];
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    A sum = from[i * size];
    for (int64_t k = 1; k < size; ++k) sum += from[i * size + k];
    to[i] = sum;
  }
}

// The sum of each(pixel) over every cell, in one of two buffers of cells.row_sums() entries.
template <typename A, typename Each>
const A* cell_sums(const A* plane, const Cells& cells, const Each& each, A* sums, A* other,
                   Ahead ahead = {}) {
  A* to = sums;
  for (int64_t y = 0; y < cells.height; y += cells.rows, to += cells.width) {
    const A* from = plane + y * cells.width;
    ahead.fetch(y / cells.rows, cells.height / cells.rows);
    if (cells.rows == 2) {
      add_rows<2>(from, cells.width, 2, each, to);
    } else if (cells.rows == 4) {
      add_rows<4>(from, cells.width, 4, each, to);
    } else {
      add_rows<0>(from, cells.width, cells.rows, each, to);
    }
  }
  int64_t count = cells.row_sums();
  for (int64_t left = cells.columns; left > 1;) {
    const int64_t size = left % 2 == 0 ? 2 : left;
    left /= size;
    count /= size;
    add_groups(sums, count, size, other);
    std::swap(sums, other);
  }
  return sums;
}

// line[i] = values[i / columns] share
template <int64_t kColumns, typename T, typename A>
void spread_row(const T* MAGSD_RESTRICT values, int64_t count, int64_t columns, A share,
                A* MAGSD_RESTRICT line) {
  const int64_t size = kColumns > 0 ? kColumns : columns;
  for (int64_t i = 0; i < count; ++i) {
    const A value = static_cast<A>(values[i]) * share;
    for (int64_t k = 0; k < size; ++k) line[i * size + k] = value;
  }
}

// Every pixel of `plane` becomes the value of its cell, times `share`.
template <typename T, typename A>
void spread_cells(const T* values, const Cells& cells, A share, A* plane) {
  const int64_t count = cells.width / cells.columns;
  for (int64_t y = 0; y < cells.height; y += cells.rows, values += count) {
    A* line = plane + y * cells.width;
    if (cells.columns == 2) {
      spread_row<2>(values, count, 2, share, line);
    } else if (cells.columns == 4) {
      spread_row<4>(values, count, 4, share, line);
    } else {
      spread_row<0>(values, count, cells.columns, share, line);
    }
    for (int64_t k = 1; k < cells.rows; ++k) {
      std::copy(line, line + cells.width, line + k * cells.width);
    }
  }
}

}  // namespace magsd::MAGSD_ISA
