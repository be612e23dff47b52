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
// Copies that a thread has under way, in groups; the last one is not closed yet.
struct PendingCopies {
  std::vector<std::vector<std::pair<void*, const void*>>> groups{1};

  // Makes the copies of all groups but the last `left`, which stay.
  void finish(size_t left) {
    while (groups.size() > left) {
      for (const auto& [to, from] : groups.front()) std::memcpy(to, from, 16);
      groups.erase(groups.begin());
    }
    if (groups.empty()) groups.emplace_back();
  }
};

inline PendingCopies& pending_copies() {
  static thread_local PendingCopies pending[simt::kMostClusterBlocks][simt::kMostThreads];
  return pending[simt::position().cluster_rank][threadIdx.x];
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
  pending_copies().groups.back().emplace_back(shared, global);
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
  pending_copies().finish(0);
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Closes a group: the copies of this thread since the last one.
__device__ __forceinline__ void close_copies() {
#if defined(MAGSD_SIMT)
  pending_copies().groups.emplace_back();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups of this thread but the last kLeft; all copies are in one.
template <int kLeft>
__device__ __forceinline__ void wait_groups_but() {
#if defined(MAGSD_SIMT)
  pending_copies().finish(kLeft + 1);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

}  // namespace magsd::MAGSD_ISA
