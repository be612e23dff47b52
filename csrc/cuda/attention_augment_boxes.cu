// Boxes around what passes the thresholds of one or two views, and the threshold of a third.
//
// Reads one map per image and view (h w entries), writes four numbers. One block per image and
// view: the map goes to shared memory, every thread takes columns of the image and looks down and
// up each for the first and the last row that passes. So a box's inside is never evaluated, and
// outside it rows between two map rows are skipped where the column stays clearly below the
// threshold. U rounds as the definition writes it.
//
// Where the views draw their maps, every block first weighs all maps of its image, as
// attention_sampling.cu does, and makes its own view's draw: M h w entries more per view, which
// come from L2. One block per image would read them once, but look for its boxes one after another
// on a device that has more multiprocessors than images.
#include "cuda/attention_augment.h"

namespace magsd::MAGSD_ISA::attention_augment {
namespace {

using attention_sampling::kSamplingThreads;
using attention_sampling::warp_sampled_map;
using attention_sampling::weigh_maps;

static_assert(kSamplingThreads == kAugmentThreads, "weigh_maps is for blocks of this size");
constexpr int64_t kMostEntries = 10240;  // of a map and its bands in shared memory

// A map of the guide: in shared memory, with bands[i]..bands[i + 1] - 1 the rows of the image
// between rows i and i + 1 of the map, or, where that is too large, read where it lies.
template <bool kNear>
struct Map {
  const Guide& guide;
  const float* values;
  const int* bands;

  __device__ float value(int i, const LinearTaps<float, int>& x) const {
    if constexpr (kNear) {
      const float* row = values + i * guide.maps.columns.length;
      return interpolate(row[x.lower], row[x.upper], x.weight);
    } else {
      float value = 0;
      guide.maps.visit([&](const auto* entries) {
        value = interpolate(static_cast<float>(upcast(entries[guide.entry(i, x.lower)])),
                            static_cast<float>(upcast(entries[guide.entry(i, x.upper)])), x.weight);
      });
      return value;
    }
  }
  __device__ int band(int i) const { return kNear ? bands[i] : guide.maps.rows.first_output(i); }
};

// First row, or last row, of the image at which U reaches the threshold in the column that reads
// at `x`; -1 where none does.
template <bool kNear>
__device__ int passing_row(const Map<kNear>& map, const LinearTaps<float, int>& x, bool last) {
  const Resize<float>& rows = map.guide.maps.rows;
  const float threshold = map.guide.threshold;
  float carried = map.value(last ? rows.length - 1 : 0, x);
  for (int k = 0; k < rows.length; ++k) {
    const int i = last ? rows.length - 1 - k : k;
    const float fresh = map.value(last || i + 1 == rows.length ? i : i + 1, x);
    const float lower = last ? fresh : carried, upper = last ? carried : fresh;
    carried = fresh;
    if (clearly_below(lower > upper ? lower : upper, threshold)) continue;
    const int begin = map.band(i), past = map.band(i + 1);
    for (int r = 0; r < past - begin; ++r) {
      const int y = last ? past - 1 - r : begin + r;
      const float weight =
          resize_position(y, rows.step, rows.align_corners) - static_cast<float>(i);
      if (interpolate(lower, upper, weight) >= threshold) return y;
    }
  }
  return -1;
}

// least[0..3]: the least top, -bottom, left and -right of what passes in the thread's columns.
template <bool kNear>
__device__ void search(const Map<kNear>& map, int* least) {
  const Resize<float>& columns = map.guide.maps.columns;
  for (int x = threadIdx.x; x < columns.size; x += kAugmentThreads) {
    const LinearTaps<float, int> at = columns.at(x);
    const int top = passing_row(map, at, false);
    if (top < 0) continue;
    const int bottom = passing_row(map, at, true);
    least[0] = top < least[0] ? top : least[0];
    least[1] = -bottom < least[1] ? -bottom : least[1];
    least[2] = x < least[2] ? x : least[2];
    least[3] = -x;
  }
}

// The map that a view draws, noted in its column; `weights` is free again behind it.
__device__ int64_t draw_map(const BoxesPlan& plan, int64_t b, int column, double* weights) {
  const Draws& draws = plan.draws;
  plan.maps.visit([&](const auto* entries) {
    weigh_maps(entries + b * draws.sizes.step_b, draws.sizes, draws.eps, weights);
  });
  const int64_t map = warp_sampled_map(weights, draws.sizes.maps, draws.uniforms(b, column));
  if (threadIdx.x == 0) draws.index[b * draws.views + column] = map;
  __syncthreads();
  return map;
}

__global__ void __launch_bounds__(kAugmentThreads, 5)
    boxes_kernel(const BoxesPlan plan, bool near) {
  MAGSD_DYNAMIC_SHARED(float, values);
  MAGSD_SHARED(float, partial, [kAugmentWarps]);
  MAGSD_SHARED(int, extremes, [4]);
  const Resize<float>&rows = plan.maps.rows, &columns = plan.maps.columns;
  const int views = plan.boxes + (plan.thresholds != nullptr);
  const int view = static_cast<int>(blockIdx.x % views);
  const int64_t b = blockIdx.x / views;
  const int thread = threadIdx.x;
  Guide guide(plan.maps);
  const Choice& choice = view == plan.boxes ? plan.third : (view == 0 ? plan.first : plan.second);
  if (plan.draws.index == nullptr) {
    guide.choose(choice, b);
  } else {
    double* weights = plan.draws.overflow == nullptr
                          ? reinterpret_cast<double*>(values)
                          : plan.draws.overflow + blockIdx.x * plan.draws.sizes.maps;
    const int column = view == plan.boxes ? 1 : 2 * view;
    guide.choose(b, draw_map(plan, b, column, weights), choice.theta[b]);
  }
  int* bands = nullptr;
  if (near) {
    bands = reinterpret_cast<int*>(values + rows.length * columns.length);
    for (int i = thread; i <= rows.length; i += kAugmentThreads) bands[i] = rows.first_output(i);
  }
  if (thread < 4) extremes[thread] = INT32_MAX;
  guide.find_threshold(partial, near ? values : nullptr);
  if (view == plan.boxes) {
    if (thread == 0) plan.thresholds[b] = guide.threshold;
    return;
  }
  int least[4] = {INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX};
  if (guide.threshold == guide.threshold) {
    if (near) {
      search(Map<true>{guide, values, bands}, least);
    } else {
      search(Map<false>{guide, nullptr, nullptr}, least);
    }
  }
  for (int side = 0; side < 4; ++side) {
    const int side_least = warp_reduce(least[side], [](int a, int c) { return a < c ? a : c; });
    if (thread % kWarp == 0) atomicMin(&extremes[side], side_least);
  }
  __syncthreads();
  if (thread != 0) return;
  const bool none = extremes[0] == INT32_MAX;
  const auto extent = [&](int side, int size) {
    return none ? padded_extent(size, -1, size, plan.padding)
                : padded_extent(extremes[side], -extremes[side + 1], size, plan.padding);
  };
  write_box({extent(0, rows.size), extent(2, columns.size)},
            plan.found + (view * plan.batch + b) * 4);
}

}  // namespace

void find_boxes(const DeviceScope& scope, BoxesPlan plan) {
  if (plan.batch == 0) return;
  constexpr size_t kMostBytes = kMostEntries * sizeof(float);
  const int64_t entries = int64_t{plan.maps.rows.length} * plan.maps.columns.length;
  const int64_t room = entries + plan.maps.rows.length + 1;
  const bool fits = room <= kMostEntries;
  const int64_t blocks = plan.batch * (plan.boxes + (plan.thresholds != nullptr));
  size_t shared = fits ? room * sizeof(float) : 0;
  Tensor overflow;
  if (plan.draws.index != nullptr) {
    const size_t weights = plan.maps.count * sizeof(double);
    if (weights <= kMostBytes) {
      shared = std::max(shared, weights);
    } else {
      overflow = uninitialized({blocks * plan.maps.count}, ScalarType::Double);
      plan.draws.overflow = mutable_data<double>(overflow);
    }
  }
  launch(scope, {grid_of(blocks), kAugmentThreads, shared}, boxes_kernel, plan, fits);
}

}  // namespace magsd::MAGSD_ISA::attention_augment
