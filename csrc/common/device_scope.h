// The device of a call: operators that the CPU and the CUDA kernels share open a scope first.
#pragma once

#if defined(MAGSD_DEVICE_CUDA)
#include <cuda_runtime.h>
#endif

#include "common/tensor.h"

namespace magsd::MAGSD_ISA {

#if defined(MAGSD_DEVICE_CUDA)
using Stream = cudaStream_t;

// The current device is that of `main` while a scope lives; `stream` is torch's current one on it.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& main) : guard_(index_of(main)) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_of(main), &stream));
    stream_ = static_cast<Stream>(stream);
  }
  Stream stream() const { return stream_; }

 private:
  static int32_t index_of(const Tensor& main) {
    STD_TORCH_CHECK(main.defined() && main.is_cuda(), "CUDA operators take CUDA tensors");
    return main.get_device_index();
  }
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_ = nullptr;
};
#else
// A call on the host, where the tensor checks see to the device.
class DeviceScope {
 public:
  explicit DeviceScope([[maybe_unused]] const Tensor& main) {
#if defined(MAGSD_SIMT)
    STD_TORCH_CHECK(main.defined() && main.is_cpu(), "emulated CUDA operators take CPU tensors");
#endif
  }
};
#endif

}  // namespace magsd::MAGSD_ISA
