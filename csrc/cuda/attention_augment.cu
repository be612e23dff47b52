// Crop and mix-up, patch, dim and drop, and two or three views at once.
//
// Moves: the images read once from memory, each view written once; the rows that a crop or a patch
// gathers come from the caches. A first launch finds the boxes, and draws the maps where it is
// asked to (attention_augment_boxes.cu), a second one makes every view that is asked for. A block
// takes some rows of one plane, or a tile of them where rows are long: it first tabulates where the
// columns and the rows of its part read the box and the map, and blends the rows of the box that
// its rows read, an entry once for all outputs. So the work per element is
// interpolations and stores. Four elements (eight in half precision) lie in one thread where rows
// allow accesses of 16 bytes. The first elements are asked for before the tables are made, the next
// before these are worked on.
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

#include "common/attention_sampling_arguments.h"
#include "cuda/attention_augment_tables.h"

namespace magsd::MAGSD_ISA::attention_augment {
namespace {

constexpr int kVectorsPerThread = 4;  // in a block's part

// (1 - weight) own + weight crop of one vector, whose entries between the crop's rows
// `between(entry)` gives.
template <typename T, int N, typename Between>
__device__ __forceinline__ Pack<T, N> mix(const Plan<T>& plan, const Pack<unsigned, N>& columns,
                                          const Pack<accumulate_t<T>, N>& weights,
                                          const Pack<T, N>& own, const Between& between) {
  using Real = accumulate_t<T>;
  const unsigned inner = static_cast<unsigned>(plan.layout.inner);
  Pack<T, N> mixed;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const unsigned left = columns.at[k] >> 1, right = left + (columns.at[k] & 1u) * inner;
    const Real first = between(left), second = between(right);
    Real value = first + weights.at[k] * (second - first);
    if (plan.own != 0) value = plan.own * upcast(own.at[k]) + plan.share * value;
    mixed.at[k] = downcast<T>(value);
  }
  return mixed;
}

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> dim(const Pack<accumulate_t<T>, N>& factor,
                                          const Pack<T, N>& own) {
  Pack<T, N> dimmed;
#pragma unroll
  for (int k = 0; k < N; ++k) dimmed.at[k] = downcast<T>(upcast(own.at[k]) * factor.at[k]);
  return dimmed;
}

// One vector with what is pasted over it: `extent` elements, of which `first` is the vector's
// first.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> paste(const T* pasted, int first, int extent,
                                            Pack<T, N> own) {
  if (pasted == nullptr) return own;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (first + k >= 0 && first + k < extent) own.at[k] = load<1>(pasted + (first + k)).at[0];
  }
  return own;
}

// Vector v of row r in every view; a patch covers `extent` elements of its row from `hidden` on.
template <typename T, int N>
__device__ __forceinline__ void write(const Plan<T>& plan, const Tables<T, N>& tables,
                                      const MapRows<N>& map_rows, float threshold, int blended,
                                      int r, int v, int hidden, int extent, const Pack<T, N>& own) {
  const Row<T>& row = tables.rows[r];
  const int64_t out = row.out + v * N;
  if (plan.mixed != nullptr) {
    const Pack<unsigned, N>& columns = tables.lower[v];
    const Pack<accumulate_t<T>, N>& weights = tables.weights[v];
    if (tables.stride > 0) {
      const accumulate_t<T>* entries = tables.blended + r * tables.stride;
      store_past_caches(plan.mixed + out, mix(plan, columns, weights, own, [&](unsigned at) {
                          return entries[spread(static_cast<int>(at) - blended)];
                        }));
    } else {
      store_past_caches(plan.mixed + out, mix(plan, columns, weights, own,
                                              [&](unsigned at) { return blend(row, at); }));
    }
  }
  if (plan.dimmed != nullptr) {
    store_past_caches(plan.dimmed + out,
                      dim(map_rows.factors(row.map, v, threshold, plan.floor), own));
  }
  if (plan.patched != nullptr) {
    store_past_caches(plan.patched + out, paste(row.pasted, v * N - hidden, extent, own));
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kAugmentThreads, sizeof(T) == 8 ? 3 : 4)
    views_kernel(const Plan<T> plan, const Partition partition) {
  MAGSD_DYNAMIC_SHARED(unsigned char, memory);
  MAGSD_SHARED(float, partial, [kAugmentWarps]);
  const ImageLayout& layout = plan.layout;
  const BlockPosition position(partition, layout);
  const Tables<T, N> tables(memory, partition);
  const int width = position.past_vector - position.first_vector;
  const int height = position.past_row - position.first_row;
  StridedIter at(partition.width);
  ImagePart<T> part{plan.images + position.b * layout.step_b + position.plane * layout.step_plane};
  Pack<T, N> own{};
  if (at.row < height && at.column < width) {
    own = load<N>(part.plane + (position.first_row + at.row) * layout.step_y +
                  (position.first_vector + at.column) * N);
  }

  // What all else waits for is asked for first.
  float u_y = 0, u_x = 0;
  if (plan.mixed != nullptr) part.mix = read_box(plan.mix_boxes + 4 * position.b);
  if (plan.patched != nullptr) {
    part.patch = read_box(plan.patch_boxes + 4 * position.b);
    u_y = plan.offsets(position.b, 0);
    u_x = plan.offsets(position.b, 1);
  }
  Guide guide(plan.maps);
  MapRows<N> map_rows(tables.map_rows, plan.maps, position, partition);
  if (plan.dimmed != nullptr) {
    guide.choose(plan.dim, position.b);
    if (plan.thresholds != nullptr) guide.threshold = plan.thresholds[position.b];
    map_rows.fill(guide, position, static_cast<int>(layout.inner));
    if (plan.thresholds == nullptr) guide.find_threshold(partial);
  }
  if (plan.mixed != nullptr) tabulate_columns(plan, position, part.mix.columns, tables);
  if (plan.patched != nullptr) {
    part.corner = paste_corner(part.patch, u_y, u_x, layout.height, layout.width);
  }
  tabulate_rows(plan, position, part, map_rows, tables);
  __syncthreads();
  if (plan.mixed != nullptr && tables.stride > 0) {
    blend_rows(plan, position, part, tables);
    __syncthreads();
  }

  const int hidden =
      static_cast<int>(part.corner.column * layout.inner) - position.first_vector * N;
  const int extent = static_cast<int>(part.patch.columns.extent() * layout.inner);
  while (at.row < height) {
    const int r = at.row, v = at.column;
    const Pack<T, N> held = own;
    at.step();
    if (at.row < height && at.column < width) {
      own = load<N>(tables.rows[at.row].own + at.column * N);
    }
    if (v < width) {
      write(plan, tables, map_rows, guide.threshold, part.blended, r, v, hidden, extent, held);
    }
  }
}

template <typename T, int N>
void launch_views(const DeviceScope& scope, const Plan<T>& plan) {
  const Partition partition = partition_of(
      plan.layout,
      {N, kVectorsPerThread * kAugmentThreads, plan.dimmed != nullptr ? &plan.maps : nullptr,
       plan.mixed != nullptr ? static_cast<int>(sizeof(accumulate_t<T>)) : 0});
  launch(scope, {grid_for(partition, plan.layout), kAugmentThreads, Tables<T, N>::bytes(partition)},
         views_kernel<T, N>, plan, partition);
}

struct Backend {
  using Maps = AttentionMaps;
  using Draws = attention_augment::Draws;
  static constexpr bool kFindsThresholds = true;

  static void find_boxes(const DeviceScope& scope, const BoxesCall<Backend>& call) {
    BoxesPlan plan{call.maps, call.batch, call.padding};
    plan.first = call.boxed[0];
    if (call.boxed.size() > 1) plan.second = call.boxed[1];
    plan.third = call.dim;
    plan.boxes = static_cast<int>(call.boxed.size());
    plan.found = call.boxes;
    plan.thresholds = call.thresholds;
    plan.draws = call.draws;
    attention_augment::find_boxes(scope, plan);
  }

  template <typename T>
  static void make_views(const DeviceScope& scope, const Views<T, AttentionMaps>& views) {
    if (views.layout.batch == 0) return;
    const Plan<T> plan(views);
    if (has_vectors(plan.layout, {plan.images, plan.mixed, plan.dimmed, plan.patched})) {
      launch_views<T, 16 / sizeof(T)>(scope, plan);
    } else {
      launch_views<T, 1>(scope, plan);
    }
  }
};
using Operators = ViewOperators<Backend>;

std::tuple<Tensor, Tensor, Tensor> sampled_views(const Tensor& images, const Tensor& attention,
                                                 const Tensor& uniforms, const Tensor& theta,
                                                 const std::optional<Tensor>& offsets, double eps,
                                                 double padding, double weight, double floor,
                                                 bool align_corners) {
  const DeviceScope scope(images);
  check_images(images, "images", 4);
  const int64_t count = offsets ? kViews : kViews - 1;
  const Tensor index = attention_sampling::empty_draws(attention, uniforms);
  check_sizes(uniforms, "uniforms", {images.size(0), count});
  const Draws draws{uniforms_of(uniforms), attention_sampling::map_sizes(attention), eps,
                    static_cast<int>(count), mutable_data<int64_t>(index)};
  const auto [views, boxes] =
      Operators::guided_views(scope, images, attention, index, theta, offsets,
                              {padding, weight, floor, align_corners}, draws);
  return {views, index, boxes};
}

}  // namespace

MAGSD_OPERATORS(library) {
  library.impl("attention_boxes", TORCH_BOX(&Operators::attention_boxes));
  library.impl("attention_mixup", TORCH_BOX(&Operators::attention_mixup));
  library.impl("attention_patch", TORCH_BOX(&Operators::attention_patch));
  library.impl("attention_dim", TORCH_BOX(&Operators::attention_dim));
  library.impl("attention_views", TORCH_BOX(&Operators::attention_views));
  library.impl("sampled_views", TORCH_BOX(&sampled_views));
}

}  // namespace magsd::MAGSD_ISA::attention_augment
