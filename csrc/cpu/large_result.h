// Pages of large results.
//
// Memory of this size often comes from the system anew, and the first write to each of its pages is
// a fault: glibc maps 32 MiB and more for every tensor, and returns the end of its heap where much
// of it is free. Pages of 2 MiB make that 512 times fewer.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/instruction_set.h"

namespace magsd::MAGSD_ISA {

constexpr int64_t kLargeBytes = int64_t{1} << 23;  // writing it takes far longer than asking

// Asks for huge pages where a result that nobody has written yet is large. It is advice: a system
// that has none, or may give none, changes nothing.
template <typename T>
void expect_writes([[maybe_unused]] T* result, [[maybe_unused]] int64_t count) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  if (bytes < kLargeBytes) return;
  const uintptr_t start = reinterpret_cast<uintptr_t>(result);
  const uintptr_t first = (start + kPage - 1) & ~(kPage - 1);
  const uintptr_t past = (start + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  if (first < past) madvise(reinterpret_cast<void*>(first), past - first, MADV_HUGEPAGE);
#endif
}

}  // namespace magsd::MAGSD_ISA
