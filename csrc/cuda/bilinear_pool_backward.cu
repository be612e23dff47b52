// Bilinear attention pooling, backward: with W the gradient of the pooled matrix,
//
//   dF[p, c] = sum over m of A[p, m] W[c, m]
//   dA[p, m] = sum over c of F[p, c] W[c, m]
//
// Must move the features and the gradient of the output in, and the gradient of the features out.
// The output is not read: it is rounded in half precision, and where it is not, one way for all
// dtypes is worth more than the product that it would save. Three launches at most:
//   - normalized: the sum of root * gradient over an image (the forward's kernel);
//   - W: a warp makes the pooled matrix of 64 channels again, turns it into W in shared memory, and
//     goes over the pixels a second time for dF and its block's share of dA;
//   - the shares are added in order, resized back and rounded.
// Maps past the 32 of a group take another round each; what they add to dF is kept in the
// accumulation type between. With the maximum, sums take only the pixel that argmax names. Half
// precision on GPUs with clusters: bilinear_pool_cluster_backward.cu.
#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cuda/bilinear_pool.h"
#include "cuda/bilinear_pool_cluster.h"
#include "cuda/bilinear_pool_gradients.h"
#include "cuda/bilinear_pool_tile.h"

namespace magsd::MAGSD_ISA::bilinear_pool {
namespace {

constexpr int kMostWarps = 4;
template <typename T>
constexpr ScalarType kAccDtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
constexpr int kThreads = 128;  // of a block that adds shares

// Warps of a block: what fits in the shared memory of the smallest GPU.
template <typename T, Product kProduct>
constexpr int warps_of_block() {
  using C = Partition<T, kProduct>;
  constexpr int kLeft =
      99 * 1024 - C::kKept * C::kPitch * static_cast<int>(sizeof(accumulate_t<T>));
  return smaller(kMostWarps, kLeft / WarpGradients<T, kProduct>::kBytes);
}

// The shares of a block's warps, added up in order: `memory` is the first warp's stage.
template <typename T, Product kProduct>
__device__ void add_warps(const PoolCall<T>& call, const unsigned char* memory, int warps,
                          int group, int count, accumulate_t<T>* to) {
  using C = Partition<T, kProduct>;
  using A = accumulate_t<T>;
  for (int i = threadIdx.x; i < count * C::kMaps; i += blockDim.x) {
    const int p = i / C::kMaps, m = i % C::kMaps;
    if (group * C::kMaps + m >= call.maps) continue;
    A sum = 0;
    for (int w = 0; w < warps; ++w) {
      sum += reinterpret_cast<const A*>(memory +
                                        w * WarpGradients<T, kProduct>::kBytes)[p * C::kPitch + m];
    }
    to[int64_t{p} * call.maps + group * C::kMaps + m] = sum;
  }
}

template <typename T, Product kProduct>
__global__ void __launch_bounds__(kMostWarps* kWarp, 2)
    backward_kernel(const PoolCall<T> call, const GradientJob<T> job) {
  using C = Partition<T, kProduct>;
  using A = accumulate_t<T>;
  MAGSD_DYNAMIC_SHARED(unsigned char, memory);
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  const int blocks = ceil_div(call.channels, warps * kChannels);
  const int block = blockIdx.x % blocks, groups = ceil_div(call.maps, C::kMaps);
  const int b = blockIdx.x / blocks;
  const int c = (block * warps + warp) * kChannels;
  // Warps that have channels.
  const int busy = smaller(warps, ceil_div(call.channels - block * warps * kChannels, kChannels));
  const int stages = ceil_div(call.pixels, C::kStage);
  // Without root and norm W is the gradient of the output itself.
  const int rounds = call.signed_sqrt || call.normalize ? 2 : 1;

  AttentionTile<T, kProduct> attention(reinterpret_cast<A*>(memory), call, b);
  unsigned char* const shares = memory + attention.bytes(call.pixels);
  WarpGradients<T, kProduct> gradients(call, job, b, c, shares + warp * gradients.kBytes);
  const Chain<T> chain(call, job, b);
  for_steps(
      {groups, rounds, stages},
      [&](const Step& step, int buffer) {
        const bool read = step.middle < rounds - 1 || job.attention != nullptr;
        if (read) gradients.window().load(gradients.stage(buffer), step.inner * C::kStage);
      },
      [&](const Step& step, int buffer) {
        const int group = step.outer, p = step.inner * C::kStage;
        const int count = smaller(C::kStage, call.pixels - p);
        unsigned char* const stage = gradients.stage(buffer);
        const A* rows = attention.rows(group, p);
        if (step.middle == 0 && warp < busy) {
          if constexpr (kProduct == Product::kMaximum) {
            if (step.inner == 0) gradients.load_first(group);
          }
          if (rounds == 2) gradients.add(stage, rows, p, count);
          if (rounds == 1 ? step.inner == 0 : step.inner == stages - 1) {
            gradients.weigh(chain, group);
          }
        }
        if (step.middle < rounds - 1) return;
        if (job.attention != nullptr) {
          if (warp < busy) gradients.attention_gradient(stage, p);
          __syncthreads();
          const int64_t at = ((int64_t{b} * blocks + block) * call.pixels + p) * call.maps;
          add_warps<T, kProduct>(call, shares + gradients.stage_offset(buffer), busy, group, count,
                                 job.attention + at);
          __syncthreads();
        }
        if (job.features != nullptr && warp < busy) {
          gradients.feature_gradient(stage, rows, p, count, group, groups);
        }
        // Not later: so the pooled matrix takes no registers in this half of the loop.
        gradients.clear();
      });
}

// Adds up the blocks' shares of the gradient of attention and resizes the sum back.
template <typename T>
struct Resize {
  using A = accumulate_t<T>;
  AttentionMaps<T> maps;
  int count, blocks, to_height;
  bool channels_last;
  const A* shares;
  T* grad;

  // Outputs that may read input i are first .. last.
  __device__ static void readers(int i, A step, int size, int& first, int& last) {
    const A low = larger(A{0}, static_cast<A>(i - 1)), high = static_cast<A>(i + 1);
    first = step > 0 ? larger(0, static_cast<int>(low / step) - 1) : 0;
    last = step > 0 ? smaller(size - 1, static_cast<int>(high / step) + 1) : size - 1;
  }

  // What output o takes of input i.
  __device__ static A weight(int o, int i, int length, A step) {
    const LinearTaps<A> taps = linear_taps(o, length, step, true);
    return (taps.lower == i ? A{1} - taps.weight : A{0}) + (taps.upper == i ? taps.weight : A{0});
  }

  __device__ A sum(int64_t b, int64_t p, int m) const {
    const int64_t pixels = int64_t{to_height} * maps.to_width;
    A total = 0;
    for (int64_t i = 0; i < blocks; ++i)
      total += shares[((b * blocks + i) * pixels + p) * count + m];
    return total;
  }

  __device__ A value(int64_t b, int p, int m) const {
    if (!maps.resized) return sum(b, p, m);
    const int y = p / maps.width, x = p % maps.width;
    int top, bottom, left, right;
    readers(y, maps.rows_apart, to_height, top, bottom);
    readers(x, maps.columns_apart, maps.to_width, left, right);
    A total = 0;
    for (int row = top; row <= bottom; ++row) {
      const A of_row = weight(row, y, maps.height, maps.rows_apart);
      if (of_row == 0) continue;
      for (int column = left; column <= right; ++column) {
        const A of_column = weight(column, x, maps.width, maps.columns_apart);
        if (of_column == 0) continue;
        total += of_row * of_column * sum(b, int64_t{row} * maps.to_width + column, m);
      }
    }
    return total;
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 8)
    attention_kernel(const Resize<T> resize, int blocks) {
  const int64_t b = blockIdx.x / blocks, pixels = int64_t{resize.maps.height} * resize.maps.width;
  const int64_t i = int64_t{blockIdx.x % blocks} * kThreads + threadIdx.x;
  if (i >= pixels * resize.count) return;
  // Neighboring threads read neighbors: the shares have a column per map.
  const int64_t p = i / resize.count, m = i % resize.count;
  const int64_t at = resize.channels_last ? (b * pixels + p) * resize.count + m
                                          : (b * resize.count + m) * pixels + p;
  resize.grad[at] = downcast<T>(resize.value(b, static_cast<int>(p), static_cast<int>(m)));
}

template <typename T>
void write_gradients(const DeviceScope& scope, const PoolCall<T>& call,
                     const PoolSettings& settings, bool allow_tf32, GradientJob<T> job,
                     const PoolGradients& results, const Tensor& attention) {
  using A = accumulate_t<T>;
  if constexpr (sizeof(T) == 2) {
    const bool last = is_channels_last(attention);
    const ClusterGradients<T> gradients{
        job.grad,
        job.norm,
        job.features,
        results.attention.numel() > 0 ? mutable_data<T>(results.attention) : nullptr,
        last ? 1 : call.pixels,
        last ? call.maps : 1};
    if (!settings.maximum && gradients_by_clusters(scope, call, gradients)) return;
  }
  Tensor sums, grad_acc, shares;
  if (settings.normalize) {
    sums = projection_sums(scope, call, settings.maximum, allow_tf32, job.grad);
    job.sums = data<double>(sums);
    job.shares = static_cast<int>(sums.size(1));
  }
  visit_product<T>(settings.maximum, allow_tf32, [&](auto product) {
    constexpr Product kProduct = decltype(product)::value;
    using S = WarpGradients<T, kProduct>;
    const int warps = smaller(warps_of_block<T, kProduct>(), ceil_div(call.channels, kChannels));
    const int blocks = ceil_div(call.channels, warps * kChannels);
    if (job.features != nullptr && call.maps > Partition<T, kProduct>::kMaps) {
      if constexpr (std::is_same_v<T, A>) {
        job.grad_acc = job.features;
      } else {
        grad_acc = uninitialized({results.features.numel()}, kAccDtype<T>);
        job.grad_acc = mutable_data<A>(grad_acc);
      }
    }
    if (results.attention.numel() > 0) {
      shares = uninitialized({call.batch, blocks, call.pixels, call.maps}, kAccDtype<T>);
      job.attention = mutable_data<A>(shares);
    }
    launch(scope,
           {grid_of(int64_t{call.batch} * blocks), warps * kWarp,
            AttentionTile<T, kProduct>::bytes(call.pixels) + warps * S::kBytes},
           backward_kernel<T, kProduct>, call, job);
    if (job.attention == nullptr) return;
    const Resize<T> resize{call.attention,
                           call.maps,
                           blocks,
                           call.pixels / call.attention.to_width,
                           is_channels_last(attention),
                           job.attention,
                           mutable_data<T>(results.attention)};
    const int64_t entries = attention.numel() / call.batch;
    const int64_t pieces = ceil_div(entries, int64_t{kThreads});
    launch(scope, {grid_of(call.batch * pieces), kThreads}, attention_kernel<T>, resize,
           static_cast<int>(pieces));
  });
}

struct Backend {
  template <typename T>
  static void backward(const DeviceScope& scope, const Tensor& features, const Tensor& attention,
                       const PoolSaved& saved, const PoolShape& shape, const PoolSettings& settings,
                       bool allow_tf32, const PoolGradients& results) {
    using A = accumulate_t<T>;
    const FeatureMap map(features);
    const PoolCall<T> call(map, attention, shape, settings);
    GradientJob<T> job{};
    job.grad = data<T>(saved.grad);
    job.norm = settings.normalize ? data<A>(saved.norm) : nullptr;
    job.argmax = settings.maximum ? data<int32_t>(saved.argmax) : nullptr;
    job.features = results.needs_features ? mutable_data<T>(results.features) : nullptr;
    job.channels_last = is_channels_last(features);
    job.aligned_grad = call.has_aligned_rows(job.grad);
    job.aligned_features = call.has_aligned_rows(job.features);
    write_gradients(scope, call, settings, allow_tf32, job, results, attention);
  }
};

}  // namespace

MAGSD_OPERATORS(library) {
  library.impl("bilinear_attention_pool_backward", TORCH_BOX(&pool_backward<Backend>));
}

}  // namespace magsd::MAGSD_ISA::bilinear_pool
