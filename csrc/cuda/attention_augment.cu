// Crop and mix-up, patch, dim and drop, and two or three views at once.
//
// Moves: the images read once from memory, each view written once; the rows that a crop or a patch
// gathers come from the caches. A first launch finds the boxes, and draws the maps where it is asked
// to (attention_augment_boxes.cu), a second one makes every view that is asked for. A block takes
// some rows of one plane, or a tile of them where rows are long: it first tabulates where the
// columns and the rows of its part sample the box and the map, and blends the rows of the box that
// its rows sample, an entry once for all outputs that read it. So the work per element is
// interpolations and stores. Four elements (eight in half precision) lie in one thread where rows
// allow accesses of 16 bytes. The first elements are asked for before the tables are made, the next
// before these are worked on.
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

#include "cuda/attention_augment_tables.h"

namespace magsd::MAGSD_ISA {
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
    if (plan.own != 0) value = plan.own * widen(own.at[k]) + plan.share * value;
    mixed.at[k] = narrow<T>(value);
  }
  return mixed;
}

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> dim(const Pack<accumulate_t<T>, N>& factor,
                                          const Pack<T, N>& own) {
  Pack<T, N> dimmed;
#pragma unroll
  for (int k = 0; k < N; ++k) dimmed.at[k] = narrow<T>(widen(own.at[k]) * factor.at[k]);
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
                                      int r, int v, int hidden, int extent,
                                      const Pack<T, N>& own) {
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
    views_kernel(const Plan<T> plan, const Cut cut) {
  MAGSD_DYNAMIC_SHARED(unsigned char, memory);
  MAGSD_SHARED(float, partial, [kAugmentWarps]);
  const ImageLayout& layout = plan.layout;
  const Place place(cut, layout);
  const Tables<T, N> tables(memory, cut);
  const int width = place.past_vector - place.first_vector;
  const int height = place.past_row - place.first_row;
  Walk at(cut.width);
  ImagePart<T> part{plan.images + place.b * layout.step_b + place.plane * layout.step_plane};
  Pack<T, N> own{};
  if (at.row < height && at.column < width) {
    own = load<N>(part.plane + (place.first_row + at.row) * layout.step_y +
                  (place.first_vector + at.column) * N);
  }

  // What all else waits for is asked for first.
  float u_y = 0, u_x = 0;
  if (plan.mixed != nullptr) part.mix = read_box(plan.mix_boxes + 4 * place.b);
  if (plan.patched != nullptr) {
    part.patch = read_box(plan.patch_boxes + 4 * place.b);
    u_y = plan.offsets(place.b, 0);
    u_x = plan.offsets(place.b, 1);
  }
  Guide guide(plan.maps);
  MapRows<N> map_rows(tables.map_rows, plan.maps, place, cut);
  if (plan.dimmed != nullptr) {
    guide.choose(plan.dim, place.b);
    if (plan.thresholds != nullptr) guide.threshold = plan.thresholds[place.b];
    map_rows.fill(guide, place, static_cast<int>(layout.inner));
    if (plan.thresholds == nullptr) guide.find_threshold(partial);
  }
  if (plan.mixed != nullptr) tabulate_columns(plan, place, part.mix.columns, tables);
  if (plan.patched != nullptr) {
    part.corner = paste_corner(part.patch, u_y, u_x, layout.height, layout.width);
  }
  tabulate_rows(plan, place, part, map_rows, tables);
  __syncthreads();
  if (plan.mixed != nullptr && tables.stride > 0) {
    blend_rows(plan, place, part, tables);
    __syncthreads();
  }

  const int hidden = static_cast<int>(part.corner.column * layout.inner) - place.first_vector * N;
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
  const Cut cut = cut_of(plan.layout, N, kAugmentThreads, kVectorsPerThread * kAugmentThreads,
                         plan.dimmed != nullptr ? &plan.maps : nullptr,
                         plan.mixed != nullptr ? sizeof(accumulate_t<T>) : 0);
  launch(scope, grid_of(cut, plan.layout), kAugmentThreads, Tables<T, N>::bytes(cut),
         views_kernel<T, N>, plan, cut);
}

template <typename T>
void make_views(const DeviceScope& scope, const Plan<T>& plan) {
  if (plan.layout.batch == 0) return;
  if (has_vectors(plan.layout, {plan.images, plan.mixed, plan.dimmed, plan.patched})) {
    launch_views<T, 16 / sizeof(T)>(scope, plan);
  } else {
    launch_views<T, 1>(scope, plan);
  }
}

// What mix-up and patch alike start with: images that can be read, their boxes, room for the view.
struct BoxedView {
  Images input;
  Tensor boxes, view;
};

BoxedView boxed_view(const DeviceScope& scope, const Tensor& images, const Tensor& attention,
                     const std::optional<Tensor>& index, const Tensor& theta, double padding,
                     bool align_corners) {
  check_images(images, "images", 4);
  check_guide(attention, index, theta, images.size(0), 0);
  check_shares(padding, 1);
  Images input = readable(images);
  const ImageLayout& layout = input.layout;
  const Tensor boxes = uninitialized({layout.batch, 4}, ScalarType::Int);
  BoxesPlan plan{maps_of(attention, layout.height, layout.width, align_corners), layout.batch,
                 padding};
  plan.first = choose(theta, index, 0);
  plan.boxes = 1;
  plan.found = mutable_data<int32_t>(boxes);
  find_boxes(scope, plan);
  const Tensor view = empty_images(0, layout, images.scalar_type());
  return {std::move(input), boxes, view};
}

std::tuple<Tensor, Tensor> attention_mixup(const Tensor& images, const Tensor& attention,
                                           const std::optional<Tensor>& index, const Tensor& theta,
                                           double padding, double weight, bool align_corners) {
  const DeviceScope scope(images);
  check_shares(padding, weight);
  const BoxedView made = boxed_view(scope, images, attention, index, theta, padding, align_corners);
  visit_floating(images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Plan<T> plan{made.input.layout, data<T>(made.input.tensor)};
    plan.mixed = mutable_data<T>(made.view);
    plan.mix_boxes = data<int32_t>(made.boxes);
    plan.own = static_cast<accumulate_t<T>>(1 - weight);
    plan.share = static_cast<accumulate_t<T>>(weight);
    plan.align_corners = align_corners;
    make_views(scope, plan);
  });
  return {made.view, made.boxes};
}

std::tuple<Tensor, Tensor> attention_patch(const Tensor& images, const Tensor& attention,
                                           const std::optional<Tensor>& index, const Tensor& theta,
                                           const Tensor& offsets, double padding,
                                           bool align_corners) {
  const DeviceScope scope(images);
  const BoxedView made = boxed_view(scope, images, attention, index, theta, padding, align_corners);
  check_offsets(offsets, images.size(0));
  visit_floating(images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Plan<T> plan{made.input.layout, data<T>(made.input.tensor)};
    plan.patched = mutable_data<T>(made.view);
    plan.patch_boxes = data<int32_t>(made.boxes);
    plan.offsets = offsets_of(offsets);
    make_views(scope, plan);
  });
  return {made.view, made.boxes};
}

Tensor attention_dim(const Tensor& images, const Tensor& attention,
                     const std::optional<Tensor>& index, const Tensor& theta, double floor,
                     bool align_corners) {
  const DeviceScope scope(images);
  check_images(images, "images", 4);
  check_guide(attention, index, theta, images.size(0), 0);
  const Images input = readable(images);
  const Tensor dimmed = empty_images(0, input.layout, images.scalar_type());
  visit_floating(images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Plan<T> plan{input.layout, data<T>(input.tensor)};
    plan.dimmed = mutable_data<T>(dimmed);
    plan.maps = maps_of(attention, input.layout.height, input.layout.width, align_corners);
    plan.dim = choose(theta, index, 0);
    plan.floor = static_cast<accumulate_t<T>>(floor);
    make_views(scope, plan);
  });
  return dimmed;
}

struct ViewsSettings {
  double padding, weight, floor;
  bool align_corners;
};

// Views (views, B, C, H, W), mix-up and dim and, with offsets, patch; boxes of all but dim. `index`
// names the maps of the views, or takes what `draws` draws.
std::tuple<Tensor, Tensor> guided_views(const DeviceScope& scope, const Tensor& images,
                                        const Tensor& attention, const Tensor& index,
                                        const Tensor& theta, const std::optional<Tensor>& offsets,
                                        const Draws& draws, const ViewsSettings& settings) {
  const int64_t count = offsets ? kViews : kViews - 1;
  check_images(images, "images", 4);
  check_guide(attention, index, theta, images.size(0), count);
  if (offsets) check_offsets(*offsets, images.size(0));
  check_shares(settings.padding, settings.weight);
  const Images input = readable(images);
  const ImageLayout& layout = input.layout;
  const Tensor boxes = uninitialized({count - 1, layout.batch, 4}, ScalarType::Int);
  const Tensor thresholds = uninitialized({layout.batch}, ScalarType::Float);
  BoxesPlan search{maps_of(attention, layout.height, layout.width, settings.align_corners),
                   layout.batch, settings.padding};
  search.first = choose(theta, index, 0);
  if (offsets) search.second = choose(theta, index, 2);
  search.third = choose(theta, index, 1);
  search.boxes = static_cast<int>(count - 1);
  search.found = mutable_data<int32_t>(boxes);
  search.thresholds = mutable_data<float>(thresholds);
  search.draws = draws;
  find_boxes(scope, search);
  const Tensor views = empty_images(count, layout, images.scalar_type());
  visit_floating(images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const int64_t view = layout.batch * layout.planes * layout.height * layout.row;
    Plan<T> plan{layout, data<T>(input.tensor)};
    plan.mixed = mutable_data<T>(views);
    plan.dimmed = plan.mixed + view;
    plan.mix_boxes = search.found;
    if (offsets) {
      plan.patched = plan.dimmed + view;
      plan.patch_boxes = search.found + 4 * layout.batch;
      plan.offsets = offsets_of(*offsets);
    }
    plan.thresholds = search.thresholds;
    plan.maps = search.maps;
    plan.dim = search.third;
    plan.own = static_cast<accumulate_t<T>>(1 - settings.weight);
    plan.share = static_cast<accumulate_t<T>>(settings.weight);
    plan.floor = static_cast<accumulate_t<T>>(settings.floor);
    plan.align_corners = settings.align_corners;
    make_views(scope, plan);
  });
  return {views, boxes};
}

std::tuple<Tensor, Tensor> attention_views(const Tensor& images, const Tensor& attention,
                                           const Tensor& index, const Tensor& theta,
                                           const Tensor& offsets, double padding, double weight,
                                           double floor, bool align_corners) {
  const DeviceScope scope(images);
  return guided_views(scope, images, attention, index, theta, offsets, {},
                      {padding, weight, floor, align_corners});
}

std::tuple<Tensor, Tensor, Tensor> sampled_views(const Tensor& images, const Tensor& attention,
                                                 const Tensor& uniforms, const Tensor& theta,
                                                 const std::optional<Tensor>& offsets, double eps,
                                                 double padding, double weight, double floor,
                                                 bool align_corners) {
  const DeviceScope scope(images);
  check_images(images, "images", 4);
  check_tensor(attention, "attention", 4);
  check_tensor(uniforms, "uniforms", 2);
  check_dtype(uniforms, "uniforms", ScalarType::Float);
  const int64_t batch = images.size(0), count = offsets ? kViews : kViews - 1;
  check_sizes(uniforms, "uniforms", {batch, count});
  const Tensor index = uninitialized({batch, count}, ScalarType::Long);
  const Draws draws{uniforms_of(uniforms), map_sizes(attention), eps, static_cast<int>(count),
                    mutable_data<int64_t>(index)};
  const auto [views, boxes] = guided_views(scope, images, attention, index, theta, offsets, draws,
                                           {padding, weight, floor, align_corners});
  return {views, index, boxes};
}

}  // namespace
}  // namespace magsd::MAGSD_ISA

MAGSD_OPERATORS(library) {
  using namespace magsd::MAGSD_ISA;
  library.impl("attention_mixup", TORCH_BOX(&attention_mixup));
  library.impl("attention_patch", TORCH_BOX(&attention_patch));
  library.impl("attention_dim", TORCH_BOX(&attention_dim));
  library.impl("attention_views", TORCH_BOX(&attention_views));
  library.impl("sampled_views", TORCH_BOX(&sampled_views));
}
