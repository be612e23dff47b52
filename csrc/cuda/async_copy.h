// Copies from global to shared memory that pass no register and run under the thread's next
// instructions. On the host a copy is made when the thread waits for it, so that a forgotten wait
// reads the poison of shared memory.
#pragma once

#include "cuda/kernel.h"

#if defined(MAGSD_SIMT)
#include <utility>
#include <vector>
#endif

namespace magsd::MAGSD_ISA {

#if defined(MAGSD_SIMT)
// Copies that each thread of the running block has under way.
inline std::vector<std::pair<void*, const void*>>& pending_copies() {
  static thread_local std::vector<std::pair<void*, const void*>> pending[1024];
  return pending[threadIdx.x];
}
#endif

// 16 bytes; both addresses are multiples of 16. They are there for this thread after wait_copies(),
// for others after a barrier that follows.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if defined(MAGSD_SIMT)
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    simt::fail("an asynchronous copy of 16 bytes is not aligned");
  }
  pending_copies().emplace_back(shared, global);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global))
               : "memory");
#endif
}

// Waits for all copies of this thread.
__device__ __forceinline__ void wait_copies() {
#if defined(MAGSD_SIMT)
  for (const auto& [to, from] : pending_copies()) std::memcpy(to, from, 16);
  pending_copies().clear();
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace magsd::MAGSD_ISA
