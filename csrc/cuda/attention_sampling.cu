// Draws attention maps with probability proportional to the root of their sum.
//
// Reads every map once (B M h w elements), writes B K indices. One block per image, one launch: the
// warps sum the maps, thread 0 adds up their weights, the threads share the division by the total,
// then a warp makes a draw (attention_sampling.h). Any strides are read in place: the maps are
// small and come from L2 right after they were written. Views that draw their own maps do so in the
// launch that finds their boxes (attention_augment_boxes.cu).
#include "common/attention_sampling_arguments.h"
#include "cuda/attention_sampling.h"

namespace magsd::MAGSD_ISA::attention_sampling {
namespace {

constexpr int64_t kSharedMaps = 512;  // cumulative weights of more maps lie in global memory

template <typename T>
__global__ void __launch_bounds__(kSamplingThreads)
    sample_kernel(const T* attention, MapSizes sizes, Uniforms uniforms, int64_t draws, double eps,
                  double* overflow, int64_t* drawn) {
  MAGSD_SHARED(double, near_weights, [kSharedMaps]);
  const int64_t b = blockIdx.x;
  double* weights = overflow == nullptr ? near_weights : overflow + b * sizes.maps;
  weigh_maps(attention + b * sizes.step_b, sizes, eps, weights);
  for (int64_t k = threadIdx.x / kWarp; k < draws; k += kSamplingThreads / kWarp) {
    const int64_t map = warp_sampled_map(weights, sizes.maps, uniforms(b, k));
    if (threadIdx.x % kWarp == 0) drawn[b * draws + k] = map;
  }
}

Tensor sample_attention(const Tensor& attention, const Tensor& uniforms, double eps) {
  const DeviceScope scope(attention);
  const Tensor index = empty_draws(attention, uniforms);
  const int64_t batch = attention.size(0), maps = attention.size(1);
  if (index.numel() == 0) return index;
  const bool overflows = maps > kSharedMaps;
  const Tensor overflow = uninitialized({overflows ? batch * maps : 0}, ScalarType::Double);
  visit_floating(attention.scalar_type(), [&](auto type) {
    using T = decltype(type);
    launch(scope, {grid_of(batch), kSamplingThreads}, sample_kernel<T>, data<T>(attention),
           map_sizes(attention), uniforms_of(uniforms), uniforms.size(1), eps,
           overflows ? mutable_data<double>(overflow) : nullptr, mutable_data<int64_t>(index));
  });
  return index;
}

}  // namespace

MAGSD_OPERATORS(library) { library.impl("sample_attention", TORCH_BOX(&sample_attention)); }

}  // namespace magsd::MAGSD_ISA::attention_sampling
