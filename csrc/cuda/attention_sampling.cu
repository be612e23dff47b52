// Draws attention maps with probability proportional to the root of their sum.
//
// Reads every map once (B M h w elements), writes B K indices. One block per image, one launch:
// each warp sums every eighth map in double, so that the order of adding does not decide a draw;
// thread 0 adds up the weights in order, as the CPU does; the threads share the division by
// the total, then the draws. A map whose rows follow one another, as in NCHW and channels_last, is
// read as one row; any strides are read in place: the maps are small and come from L2 right after
// they were written.
#include "common/sampling.h"
#include "cuda/kernel.h"

namespace magsd::MAGSD_ISA {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kSharedMaps = 512;  // cumulative weights of more maps lie in global memory

struct Sizes {
  int64_t maps, height, width, draws;
  int64_t step_b, step_m, step_y, step_x;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const T* attention, const float* uniforms, double eps, Sizes sizes,
                  double* overflow, int64_t* drawn) {
  MAGSD_SHARED(double, near_weights, [kSharedMaps]);
  const int64_t b = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double* weights = overflow == nullptr ? near_weights : overflow + b * sizes.maps;
  for (int64_t m = warp; m < sizes.maps; m += kThreads / kWarp) {
    const T* map = attention + b * sizes.step_b + m * sizes.step_m;
    double sum = 0;
    for (int64_t y = 0; y < sizes.height; ++y) {
      const T* row = map + y * sizes.step_y;
      for (int64_t x = lane; x < sizes.width; x += kWarp) {
        sum += static_cast<double>(widen(row[x * sizes.step_x]));
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) weights[m] = sampling_weight(sum, eps);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int64_t m = 1; m < sizes.maps; ++m) weights[m] += weights[m - 1];
  }
  __syncthreads();
  const double total = weights[sizes.maps - 1];
  __syncthreads();  // before the total itself is divided
  for (int64_t m = threadIdx.x; m < sizes.maps; m += kThreads) weights[m] /= total;
  __syncthreads();
  for (int64_t k = threadIdx.x; k < sizes.draws; k += kThreads) {
    const int64_t at = b * sizes.draws + k;
    drawn[at] = sampled_map(weights, sizes.maps, uniforms[at]);
  }
}

Tensor sample_attention(const Tensor& attention, const Tensor& uniforms, double eps) {
  const DeviceScope scope(attention);
  check_tensor(attention, "attention", 4);
  check_floating(attention, "attention");
  check_tensor(uniforms, "uniforms", 2);
  check_dtype(uniforms, "uniforms", ScalarType::Float);
  check_sizes(uniforms, "uniforms", {attention.size(0), -1});
  const int64_t batch = attention.size(0), maps = attention.size(1);
  STD_TORCH_CHECK(maps > 0, "attention must have at least one map");
  const Tensor rows = dense(uniforms);
  const Tensor index = uninitialized({batch, uniforms.size(1)}, ScalarType::Long);
  if (index.numel() == 0) return index;
  const bool overflows = maps > kSharedMaps;
  const Tensor overflow = uninitialized({overflows ? batch * maps : 0}, ScalarType::Double);
  Sizes sizes{maps,
              attention.size(2),
              attention.size(3),
              uniforms.size(1),
              attention.stride(0),
              attention.stride(1),
              attention.stride(2),
              attention.stride(3)};
  if (sizes.step_y == sizes.width * sizes.step_x) {
    sizes.width *= sizes.height;
    sizes.height = 1;
  }
  visit_floating(attention.scalar_type(), [&](auto type) {
    using T = decltype(type);
    launch(scope, grid_of(batch), kThreads, 0, sample_kernel<T>, data<T>(attention),
           data<float>(rows), eps, sizes, overflows ? mutable_data<double>(overflow) : nullptr,
           mutable_data<int64_t>(index));
  });
  return index;
}

}  // namespace
}  // namespace magsd::MAGSD_ISA

MAGSD_OPERATORS(library) {
  library.impl("sample_attention", TORCH_BOX(&magsd::MAGSD_ISA::sample_attention));
}
