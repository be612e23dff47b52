// Bilinear attention pooling, forward: P = A F^T over the pixels, its signed square root and norm.
//
// Must move the features once in and P (B M C) once out. A warp makes P of 64 channels and 32 maps
// in registers; the norm couples all entries of an image, so that P is made twice: once for the sum
// of squares, once to be scaled and written. No matrix of the accumulation type is stored.
//   - With images enough to fill the GPU, a block keeps an image: one launch. The second time it
//     goes back, over what it read last and the second-level cache still holds.
//   - With fewer, a block takes the channels of its warps, and the two passes are two launches; the
//     second begins with the images that the first read last.
// Without normalization one pass does.
// Half precision on GPUs with clusters makes P once: bilinear_pool_cluster.cu.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>

#include "cuda/bilinear_pool.h"
#include "cuda/bilinear_pool_cluster.h"
#include "cuda/bilinear_pool_tile.h"

namespace magsd::MAGSD_ISA::bilinear_pool {
namespace {

constexpr int kMostWarps = 8;      // of a block that keeps an image
constexpr int kWarpsOfAShare = 4;  // of a block that takes some channels
constexpr int kBlocksOfAnSM = 2;   // that keep an image

// What a launch does with the pooled matrix: adds up its squares or, given a gradient, that times
// the root; then writes it. Both only in a block that keeps an image.
template <typename T>
struct Job {
  bool adds, writes;
  int shares;             // blocks of an image
  double* sums;           // (B, shares)
  const T* grad;          // (B, M, C) or null
  T* output;              // (B, M, C)
  accumulate_t<T>* norm;  // (B,)
  int32_t* argmax;        // (B, M, C) or null
  bool aligned_rows;
};

// One image's norm and the factor of its roots, known once the sums are.
template <typename T>
__device__ accumulate_t<T> normalize(const PoolCall<T>& call, double squares, int64_t b,
                                     bool writes_norm, accumulate_t<T>* norms) {
  using A = accumulate_t<T>;
  const A norm = static_cast<A>(std::sqrt(squares));
  if (writes_norm) norms[b] = norm;
  return static_cast<A>(static_cast<double>(call.scale) / clamped_norm(norm));
}

// The 8 channels of a lane from `c` on, of which `count` exist, and its maps.
template <typename T, Product kProduct>
struct Lane {
  using C = Partition<T, kProduct>;
  int count, maps;
  int64_t first;  // position in (B, M, C) of the first channel of slot 0

  __device__ Lane(const PoolCall<T>& call, int64_t b, int group, int c) {
    const int m = group * C::kMaps + 2 * (threadIdx.x % 4);
    c += 8 * chunk_of(threadIdx.x % kWarp / 4);
    count = call.channels - c;
    maps = call.maps - m;
    first = (b * call.maps + m) * call.channels + c;
  }

  // Calls function(slot, position in (B, M, C)) for the maps that exist, if channels do.
  template <typename Function>
  __device__ void for_slots(const PoolCall<T>& call, const Function& function) const {
    if (count <= 0) return;
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) {
      const int m = slot / 2 * 8 + slot % 2;
      if (m < maps) function(slot, first + static_cast<int64_t>(call.channels) * m);
    }
  }
};

// A lane's share of the sum of squares or, given a gradient, of scale root gradient.
template <typename T, Product kProduct>
__device__ accumulate_t<T> add_up(Pooled<T, kProduct>& pooled, const PoolCall<T>& call,
                                  const Job<T>& job, const Lane<T, kProduct>& lane) {
  using A = accumulate_t<T>;
  pooled.clear_from(lane.count);
  A sum = 0;
  if (job.grad != nullptr) {
    lane.for_slots(call, [&](int slot, int64_t at) {
      T grad[8];
      load_row(job.grad + at, lane.count, job.aligned_rows && lane.count >= 8, grad);
      A roots[8];
      call.take_roots(pooled.sum[slot], roots);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += roots[j] * upcast(grad[j]);
    });
    return sum * call.scale;
  }
  if (!call.signed_sqrt) {
    lane.for_slots(call, [&](int slot, int64_t) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += pooled.sum[slot][j] * pooled.sum[slot][j];
    });
    return sum * call.factor * call.factor;
  }
  // The square of a root is its radicand.
  int roots = 0;
  lane.for_slots(call, [&](int slot, int64_t) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      sum += std::abs(pooled.sum[slot][j]);
      roots += pooled.sum[slot][j] != 0;
    }
  });
  return sum * call.factor + static_cast<A>(roots) * call.eps;
}

template <typename T, Product kProduct>
__device__ void write(const Pooled<T, kProduct>& pooled, const PoolCall<T>& call, const Job<T>& job,
                      const Lane<T, kProduct>& lane, accumulate_t<T> factor) {
  using A = accumulate_t<T>;
  lane.for_slots(call, [&](int slot, int64_t at) {
    A row[8];
    call.take_roots(pooled.sum[slot], row);
#pragma unroll
    for (int j = 0; j < 8; ++j) row[j] *= factor;
    store_row(row, job.output + at, lane.count, job.aligned_rows && lane.count >= 8);
    if constexpr (kProduct == Product::kMaximum) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j < lane.count) job.argmax[at + j] = pooled.first[slot][j];
      }
    }
  });
}

template <typename T, Product kProduct>
__global__ void __launch_bounds__(kMostWarps* kWarp, Partition<T, kProduct>::kBlocks)
    pool_kernel(const PoolCall<T> call, const Job<T> job) {
  using C = Partition<T, kProduct>;
  using A = accumulate_t<T>;
  MAGSD_DYNAMIC_SHARED(unsigned char, memory);
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  const int share = blockIdx.x % job.shares, turn = blockIdx.x / job.shares;
  const int b = job.writes ? call.batch - 1 - turn : turn;
  const int tiles = ceil_div(call.channels, warps * kChannels);
  const int tasks = tiles * ceil_div(call.maps, C::kMaps) / job.shares;
  const int stages = ceil_div(call.pixels, C::kStage);
  AttentionTile<T, kProduct> attention(reinterpret_cast<A*>(memory), call, b);
  unsigned char* const buffers = memory + attention.bytes(call.pixels) + warp * 2 * kStageBytes;
  const auto task_of = [&](const Step& step) {
    if (job.shares > 1) return share;
    return step.outer == 0 ? step.middle : tasks - 1 - step.middle;
  };
  const auto window_of = [&](int task) {
    return Window<T>(call.features, b, (task % tiles * warps + warp) * kChannels, call.channels,
                     call.pixels);
  };

  A factor = call.scale;
  if (call.normalize && !job.adds) {
    double squares = 0;
    for (int i = 0; i < job.shares; ++i) squares += job.sums[int64_t{b} * job.shares + i];
    factor = normalize(call, squares, b, share == 0 && threadIdx.x == 0, job.norm);
  }
  MAGSD_SHARED(double, sums, [kMostWarps]);
  if (threadIdx.x % kWarp == 0) sums[warp] = 0;
  Pooled<T, kProduct> pooled;
  for_steps(
      {job.adds + job.writes, tasks, stages},
      [&](const Step& step, int buffer) {
        window_of(task_of(step)).load(buffers + buffer * kStageBytes, step.inner * C::kStage);
      },
      [&](const Step& step, int buffer) {
        const int task = task_of(step), group = task / tiles, p = step.inner * C::kStage;
        const bool adds = job.adds && step.outer == 0, last = step.inner == stages - 1;
        const A* rows = attention.rows(group, p);
        const Window<T> window = window_of(task);
        if (window.channels() > 0) {
          if (step.inner == 0) pooled.clear();
          pooled.add(window, buffers + buffer * kStageBytes, rows, p,
                     smaller(C::kStage, call.pixels - p), call.attention.resized);
          if (!last) return;
          const Lane<T, kProduct> lane(call, b, group, (task % tiles * warps + warp) * kChannels);
          if (adds) {
            const double sum = warp_sum(static_cast<double>(add_up(pooled, call, job, lane)));
            if (threadIdx.x % kWarp == 0) sums[warp] += sum;
          } else {
            write(pooled, call, job, lane, factor);
          }
        }
        if (!adds || !last || step.middle < tasks - 1) return;
        __syncthreads();
        double sum = 0;
        for (int i = 0; i < warps; ++i) sum += sums[i];
        if (job.writes) {
          factor = normalize(call, sum, b, threadIdx.x == 0, job.norm);
        } else if (threadIdx.x == 0) {
          job.sums[int64_t{b} * job.shares + share] = sum;
        }
      });
}

template <typename T, Product kProduct>
void launch_job(const DeviceScope& scope, const PoolCall<T>& call, const Job<T>& job, int warps) {
  const size_t shared = AttentionTile<T, kProduct>::bytes(call.pixels) + warps * 2 * kStageBytes;
  launch(scope, {grid_of(int64_t{call.batch} * job.shares), warps * kWarp, shared},
         pool_kernel<T, kProduct>, call, job);
}

// Warps of a block, at most `most`, and blocks of an image that share its tasks.
template <typename T, Product kProduct>
std::pair<int, int> partition_of(const PoolCall<T>& call, int most) {
  const int warps = smaller(most, ceil_div(call.channels, kChannels));
  const int groups = ceil_div(call.maps, Partition<T, kProduct>::kMaps);
  return {warps, ceil_div(call.channels, warps * kChannels) * groups};
}

// Whether blocks that keep an image keep three quarters of the GPU busy.
bool fills_device(int64_t images) {
  const int64_t blocks = int64_t{kBlocksOfAnSM} * multiprocessors();
  return 4 * images >= 3 * blocks * ceil_div(images, blocks);
}

template <typename T>
void pool(const DeviceScope& scope, const PoolCall<T>& call, const PoolSettings& settings,
          bool allow_tf32, const PoolResults& results) {
  using A = accumulate_t<T>;
  T* output = mutable_data<T>(results.output);
  Job<T> job{};
  job.writes = true;
  job.output = output;
  job.norm = settings.normalize ? mutable_data<A>(results.norm) : nullptr;
  if constexpr (sizeof(T) == 2) {
    if (!settings.maximum && pool_by_clusters(scope, call, output, job.norm)) return;
  }
  job.argmax = settings.maximum ? mutable_data<int32_t>(results.argmax) : nullptr;
  job.aligned_rows = call.has_aligned_rows(output);
  visit_product<T>(settings.maximum, allow_tf32, [&](auto product) {
    constexpr Product kProduct = decltype(product)::value;
    if (settings.normalize && fills_device(call.batch)) {
      job.adds = true;
      job.shares = 1;
      return launch_job<T, kProduct>(scope, call, job,
                                     partition_of<T, kProduct>(call, kMostWarps).first);
    }
    const auto [warps, shares] = partition_of<T, kProduct>(call, kWarpsOfAShare);
    job.shares = shares;
    const Tensor sums =
        uninitialized({settings.normalize ? call.batch : 0, shares}, ScalarType::Double);
    job.sums = mutable_data<double>(sums);
    if (settings.normalize) {
      Job<T> first = job;
      first.adds = true;
      first.writes = false;
      launch_job<T, kProduct>(scope, call, first, warps);
    }
    launch_job<T, kProduct>(scope, call, job, warps);
  });
}

struct Backend {
  template <typename T>
  static void forward(const DeviceScope& scope, const Tensor& features, const Tensor& attention,
                      const PoolShape& shape, const PoolSettings& settings, bool allow_tf32,
                      const PoolResults& results) {
    const FeatureMap map(features);
    pool(scope, PoolCall<T>(map, attention, shape, settings), settings, allow_tf32, results);
  }
};

}  // namespace

template <typename T>
Tensor projection_sums(const DeviceScope& scope, const PoolCall<T>& call, bool maximum,
                       bool allow_tf32, const T* grad) {
  Tensor sums;
  visit_product<T>(maximum, allow_tf32, [&](auto product) {
    constexpr Product kProduct = decltype(product)::value;
    const auto [warps, shares] = partition_of<T, kProduct>(call, kWarpsOfAShare);
    sums = uninitialized({call.batch, shares}, ScalarType::Double);
    Job<T> job{};
    job.adds = true;
    job.shares = shares;
    job.sums = mutable_data<double>(sums);
    job.grad = grad;
    job.aligned_rows = call.has_aligned_rows(grad);
    launch_job<T, kProduct>(scope, call, job, warps);
  });
  return sums;
}

#define MAGSD_PROJECTION_SUMS(T) \
  template Tensor projection_sums(const DeviceScope&, const PoolCall<T>&, bool, bool, const T*);
MAGSD_PROJECTION_SUMS(Half)
MAGSD_PROJECTION_SUMS(BFloat16)
MAGSD_PROJECTION_SUMS(float)
MAGSD_PROJECTION_SUMS(double)

MAGSD_OPERATORS(library) {
  library.impl("bilinear_attention_pool", TORCH_BOX(&pool_forward<Backend>));
}

}  // namespace magsd::MAGSD_ISA::bilinear_pool
