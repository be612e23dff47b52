// The operators of the guided views and their gradients, as far as the CPU and the CUDA kernels
// agree: checks, shapes, results. A backend of these operators is a class with
//   Maps                             attention maps and how pixels read them, from
//                                    (attention, height, width, align_corners)
//   Draws                            what draws maps while boxes are found
//   kFindsThresholds                 whether it finds dim's thresholds with the boxes
//   find_boxes(scope, BoxesCall)
//   make_views(scope, Views<T>)      writes the views
//   check_boxes(boxes, layout)       refuses boxes outside the image, or leaves that to its kernel
//   make_gradient(scope, Views<const T>)
// Forward and backward are different backends, as each is a file of its own.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/attention_augment_arguments.h"
#include "common/device_scope.h"

namespace magsd::MAGSD_ISA::attention_augment {

struct ViewSettings {
  double padding, weight, floor;
  bool align_corners;
};

// Boxes (boxed, B, 4) and, where the backend finds them, thresholds (B,) of dim.
template <typename Backend>
struct BoxesCall {
  const typename Backend::Maps& maps;
  int64_t batch;
  double padding;
  std::vector<Choice> boxed;  // one or two views
  int32_t* boxes;
  Choice dim{};
  float* thresholds = nullptr;
  typename Backend::Draws draws{};
};

// The views of a batch, T where they are written, const T where they are gradients; what is null is
// absent.
template <typename View, typename Maps>
struct Views {
  using T = std::remove_const_t<View>;
  ImageLayout layout;         // of the images, or of each view's gradient
  const T* images = nullptr;  // forward: what the views are made of
  T* grad = nullptr;          // backward: the images' gradient
  View* mixed = nullptr;
  View* dimmed = nullptr;
  View* patched = nullptr;
  const int32_t* mix_boxes = nullptr;
  const int32_t* patch_boxes = nullptr;
  const Maps* maps = nullptr;
  const float* thresholds = nullptr;  // of dim, where they are known
  Choice dim{};
  Uniforms offsets{};
  double weight = 1, floor = 0;
  bool align_corners = false;
};

template <typename Backend>
struct ViewOperators {
  using Maps = typename Backend::Maps;

  static Tensor attention_boxes(const Tensor& attention, const std::optional<Tensor>& index,
                                const Tensor& theta, const std::vector<int64_t>& size,
                                double padding, bool align_corners) {
    const DeviceScope scope(attention);
    check_tensor(attention, "attention", 4);
    const int64_t batch = attention.size(0);
    check_guide(attention, index, theta, batch, 0);
    check_shares(padding, 1);
    check_size(size);
    const Maps maps(attention, size[0], size[1], align_corners);
    return boxes_of(scope, maps, choose(theta, index, 0), batch, padding);
  }

  static std::tuple<Tensor, Tensor> attention_mixup(const Tensor& images, const Tensor& attention,
                                                    const std::optional<Tensor>& index,
                                                    const Tensor& theta, double padding,
                                                    double weight, bool align_corners) {
    const DeviceScope scope(images);
    check_shares(padding, weight);
    const BoxedView made =
        boxed_view(scope, images, attention, index, theta, padding, align_corners);
    visit_floating(images.scalar_type(), [&](auto type) {
      using T = decltype(type);
      Views<T, Maps> views{made.input.layout, data<T>(made.input.tensor)};
      views.mixed = mutable_data<T>(made.view);
      views.mix_boxes = data<int32_t>(made.boxes);
      views.weight = weight;
      views.align_corners = align_corners;
      Backend::make_views(scope, views);
    });
    return {made.view, made.boxes};
  }

  static std::tuple<Tensor, Tensor> attention_patch(const Tensor& images, const Tensor& attention,
                                                    const std::optional<Tensor>& index,
                                                    const Tensor& theta, const Tensor& offsets,
                                                    double padding, bool align_corners) {
    const DeviceScope scope(images);
    const BoxedView made =
        boxed_view(scope, images, attention, index, theta, padding, align_corners);
    check_offsets(offsets, images.size(0));
    visit_floating(images.scalar_type(), [&](auto type) {
      using T = decltype(type);
      Views<T, Maps> views{made.input.layout, data<T>(made.input.tensor)};
      views.patched = mutable_data<T>(made.view);
      views.patch_boxes = data<int32_t>(made.boxes);
      views.offsets = uniforms_of(offsets);
      Backend::make_views(scope, views);
    });
    return {made.view, made.boxes};
  }

  static Tensor attention_dim(const Tensor& images, const Tensor& attention,
                              const std::optional<Tensor>& index, const Tensor& theta, double floor,
                              bool align_corners) {
    const DeviceScope scope(images);
    check_images(images, "images", 4);
    check_guide(attention, index, theta, images.size(0), 0);
    const Images input = readable(images);
    const Maps maps(attention, input.layout.height, input.layout.width, align_corners);
    const Tensor dimmed = empty_images(0, input.layout, images.scalar_type());
    visit_floating(images.scalar_type(), [&](auto type) {
      using T = decltype(type);
      Views<T, Maps> views{input.layout, data<T>(input.tensor)};
      views.dimmed = mutable_data<T>(dimmed);
      views.maps = &maps;
      views.dim = choose(theta, index, 0);
      views.floor = floor;
      Backend::make_views(scope, views);
    });
    return dimmed;
  }

  static std::tuple<Tensor, Tensor> attention_views(const Tensor& images, const Tensor& attention,
                                                    const Tensor& index, const Tensor& theta,
                                                    const Tensor& offsets, double padding,
                                                    double weight, double floor,
                                                    bool align_corners) {
    const DeviceScope scope(images);
    return guided_views(scope, images, attention, index, theta, offsets,
                        {padding, weight, floor, align_corners}, {});
  }

  // Views (views, B, C, H, W), mix-up and dim and, with offsets, patch; boxes of all but dim.
  // `index` names the maps of the views, or takes what `draws` draws.
  static std::tuple<Tensor, Tensor> guided_views(const DeviceScope& scope, const Tensor& images,
                                                 const Tensor& attention, const Tensor& index,
                                                 const Tensor& theta,
                                                 const std::optional<Tensor>& offsets,
                                                 const ViewSettings& settings,
                                                 const typename Backend::Draws& draws) {
    const int64_t count = offsets ? kViews : kViews - 1;
    check_images(images, "images", 4);
    check_guide(attention, index, theta, images.size(0), count);
    if (offsets) check_offsets(*offsets, images.size(0));
    check_shares(settings.padding, settings.weight);
    const Images input = readable(images);
    const ImageLayout& layout = input.layout;
    const Maps maps(attention, layout.height, layout.width, settings.align_corners);
    const Tensor boxes = uninitialized({count - 1, layout.batch, 4}, ScalarType::Int);
    int32_t* box = mutable_data<int32_t>(boxes);
    const Choice dim = choose(theta, index, 1);
    BoxesCall<Backend> search{maps, layout.batch, settings.padding, {choose(theta, index, 0)}, box};
    if (offsets) search.boxed.push_back(choose(theta, index, 2));
    Tensor thresholds;
    if constexpr (Backend::kFindsThresholds) {
      thresholds = uninitialized({layout.batch}, ScalarType::Float);
      search.dim = dim;
      search.thresholds = mutable_data<float>(thresholds);
    }
    search.draws = draws;
    Backend::find_boxes(scope, search);
    const Tensor result = empty_images(count, layout, images.scalar_type());
    visit_floating(images.scalar_type(), [&](auto type) {
      using T = decltype(type);
      const int64_t view = layout.batch * layout.planes * layout.height * layout.row;
      Views<T, Maps> views{layout, data<T>(input.tensor)};
      views.mixed = mutable_data<T>(result);
      views.dimmed = views.mixed + view;
      views.mix_boxes = box;
      if (offsets) {
        views.patched = views.dimmed + view;
        views.patch_boxes = box + 4 * layout.batch;
        views.offsets = uniforms_of(*offsets);
      }
      views.maps = &maps;
      views.thresholds = search.thresholds;
      views.dim = dim;
      views.weight = settings.weight;
      views.floor = settings.floor;
      views.align_corners = settings.align_corners;
      Backend::make_views(scope, views);
    });
    return {result, boxes};
  }

 private:
  // What mix-up and patch alike start with: images that can be read, their boxes, room for the
  // view.
  struct BoxedView {
    Images input;
    Tensor boxes, view;
  };

  static Tensor boxes_of(const DeviceScope& scope, const Maps& maps, const Choice& choice,
                         int64_t batch, double padding) {
    const Tensor boxes = uninitialized({batch, 4}, ScalarType::Int);
    Backend::find_boxes(
        scope, BoxesCall<Backend>{maps, batch, padding, {choice}, mutable_data<int32_t>(boxes)});
    return boxes;
  }

  static BoxedView boxed_view(const DeviceScope& scope, const Tensor& images,
                              const Tensor& attention, const std::optional<Tensor>& index,
                              const Tensor& theta, double padding, bool align_corners) {
    check_images(images, "images", 4);
    check_guide(attention, index, theta, images.size(0), 0);
    check_shares(padding, 1);
    Images input = readable(images);
    const ImageLayout& layout = input.layout;
    const Maps maps(attention, layout.height, layout.width, align_corners);
    const Tensor boxes = boxes_of(scope, maps, choose(theta, index, 0), layout.batch, padding);
    const Tensor view = empty_images(0, layout, images.scalar_type());
    return {std::move(input), boxes, view};
  }
};

template <typename Backend>
struct GradientOperators {
  using Maps = typename Backend::Maps;

  static Tensor attention_mixup_backward(const Tensor& grad, const Tensor& boxes, double weight,
                                         bool align_corners) {
    const DeviceScope scope(grad);
    check_images(grad, "grad", 4);
    check_shares(0, weight);
    const Images input = readable(grad);
    const Tensor rows = checked_boxes(boxes, 0, input.layout);
    const Tensor result = empty_images(0, input.layout, grad.scalar_type());
    visit_floating(grad.scalar_type(), [&](auto type) {
      using T = decltype(type);
      Views<const T, Maps> views{input.layout};
      views.mixed = data<T>(input.tensor);
      views.mix_boxes = data<int32_t>(rows);
      views.weight = weight;
      views.align_corners = align_corners;
      views.grad = mutable_data<T>(result);
      Backend::make_gradient(scope, views);
    });
    return result;
  }

  static Tensor attention_patch_backward(const Tensor& grad, const Tensor& boxes,
                                         const Tensor& offsets) {
    const DeviceScope scope(grad);
    check_images(grad, "grad", 4);
    check_offsets(offsets, grad.size(0));
    const Images input = readable(grad);
    const Tensor rows = checked_boxes(boxes, 0, input.layout);
    const Tensor result = empty_images(0, input.layout, grad.scalar_type());
    visit_floating(grad.scalar_type(), [&](auto type) {
      using T = decltype(type);
      Views<const T, Maps> views{input.layout};
      views.patched = data<T>(input.tensor);
      views.patch_boxes = data<int32_t>(rows);
      views.offsets = uniforms_of(offsets);
      views.grad = mutable_data<T>(result);
      Backend::make_gradient(scope, views);
    });
    return result;
  }

  static Tensor attention_views_backward(const Tensor& grad, const Tensor& attention,
                                         const Tensor& index, const Tensor& theta,
                                         const std::optional<Tensor>& offsets, const Tensor& boxes,
                                         double weight, double floor, bool align_corners) {
    const DeviceScope scope(grad);
    const int64_t count = offsets ? kViews : kViews - 1;
    check_images(grad, "grad", 5);
    check_sizes(grad, "grad", {count, -1, -1, -1, -1});
    check_guide(attention, index, theta, grad.size(1), count);
    if (offsets) check_offsets(*offsets, grad.size(1));
    check_shares(0, weight);
    std::vector<Images> input;
    for (int64_t view = 0; view < count; ++view) {
      input.push_back(readable(torch::stable::select(grad, 0, view)));
    }
    const ImageLayout& layout = input[0].layout;
    const Tensor rows = checked_boxes(boxes, count - 1, layout);
    const Maps maps(attention, layout.height, layout.width, align_corners);
    const Tensor result = empty_images(0, layout, grad.scalar_type());
    visit_floating(grad.scalar_type(), [&](auto type) {
      using T = decltype(type);
      Views<const T, Maps> views{layout};
      views.mixed = data<T>(input[0].tensor);
      views.dimmed = data<T>(input[1].tensor);
      views.mix_boxes = data<int32_t>(rows);
      if (offsets) {
        views.patched = data<T>(input[2].tensor);
        views.patch_boxes = views.mix_boxes + 4 * layout.batch;
        views.offsets = uniforms_of(*offsets);
      }
      views.maps = &maps;
      views.dim = choose(theta, index, 1);
      views.weight = weight;
      views.floor = floor;
      views.align_corners = align_corners;
      views.grad = mutable_data<T>(result);
      Backend::make_gradient(scope, views);
    });
    return result;
  }

 private:
  static Tensor checked_boxes(const Tensor& boxes, int64_t views, const ImageLayout& layout) {
    const Tensor rows = dense_boxes(boxes, views, layout.batch);
    Backend::check_boxes(rows, layout);
    return rows;
  }
};

}  // namespace magsd::MAGSD_ISA::attention_augment
