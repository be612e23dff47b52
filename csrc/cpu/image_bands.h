// Loops on torch's threads over images, split into bands of rows where the batch is small.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/image_layout.h"
#include "cpu/parallel.h"

namespace magsd::MAGSD_ISA {

constexpr int64_t kPixelsPerTask = 16384;

// Calls body(image, first row, past the last row) for bands of every image.
template <typename Body>
void for_bands(const ImageLayout& layout, const Body& body) {
  const int64_t image = layout.planes * layout.row * layout.height;
  const int64_t threads = torch::stable::get_num_threads();
  // Whole images when there are enough of them: tables and guides are prepared once per task.
  int64_t bands = 1;
  if (layout.batch < 4 * threads && threads > 1) {
    bands = std::clamp<int64_t>(image / kPixelsPerTask, 1, std::min(layout.height, 4 * threads));
  }
  const int64_t grain = 1 + kPixelsPerTask * bands / std::max<int64_t>(image, 1);
  parallel_for(layout.batch * bands, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end;) {
      const int64_t b = task / bands, first = task % bands;
      const int64_t count = std::min(end - task, bands - first);
      body(b, layout.height * first / bands, layout.height * (first + count) / bands);
      task += count;
    }
  });
}

}  // namespace magsd::MAGSD_ISA
