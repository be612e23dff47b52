// The last of several blocks to end takes up what the others left: a sum over blocks in one launch.
//
// Each block draws a ticket when it has written its part, and the one that draws the last combines
// the parts, in an order that does not depend on who came when. Counters are zero between launches:
// they begin so, and who draws the last ticket puts 0 back. So no launch clears them. Two calls
// that may run at the same time never share counters: those of a stream serve its calls one after
// another, and a captured call, which may be replayed on any stream, gets its own for good.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "cuda/kernel.h"

namespace magsd::MAGSD_ISA {

constexpr int64_t kMostTickets = 16384;  // counters of a file that draws tickets: 64 KiB a device

// Hands out the counters 0 to kMostTickets - 1.
class TicketDesk {
 public:
  using Key = std::pair<int, uint64_t>;  // device and stream

  // First of `count` counters of a stream, or, without one, of a captured call; -1 where there are
  // none left.
  int64_t take(const Key* stream, int64_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (stream == nullptr) return reserve(count);
    Range& range = streams_[*stream];
    if (range.count < count) {
      const int64_t first = reserve(count);
      if (first < 0) return first;
      range = {first, count};
    }
    return range.first;
  }

 private:
  struct Range {
    int64_t first = 0, count = 0;
  };

  int64_t reserve(int64_t count) {
    if (count > kMostTickets - used_) return -1;
    const int64_t first = used_;
    used_ += count;
    return first;
  }

  std::mutex mutex_;
  std::map<Key, Range> streams_;
  int64_t used_ = 0;
};

// What a kernel draws tickets from.
struct Tickets {
  unsigned* cleared;  // null: those of the file, from `first` on
  int64_t first;
};

// Keeps alive what its tickets point at.
struct TicketBook {
  Tickets tickets;
  Tensor memory;
};

// Counters for a call on the stream of `scope`. Where there are none left, memory that is cleared
// on the stream.
inline TicketBook tickets_for(const DeviceScope& scope, int64_t count) {
  static TicketDesk desk;
#if defined(MAGSD_SIMT)
  (void)scope;
  const TicketDesk::Key key{0, 0};
  const int64_t first = desk.take(&key, count);
#else
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(scope.stream(), &capture), "cudaStreamIsCapturing");
  int64_t first = -1;
  if (capture != cudaStreamCaptureStatusNone) {
    first = desk.take(nullptr, count);
  } else {
    int device = 0;
    unsigned long long stream = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaStreamGetId(scope.stream(), &stream), "cudaStreamGetId");
    const TicketDesk::Key key{device, stream};
    first = desk.take(&key, count);
  }
#endif
  if (first >= 0) return {{nullptr, first}, Tensor()};
  const Tensor memory = uninitialized({count}, ScalarType::Int);
  auto* counters = static_cast<unsigned*>(memory.mutable_data_ptr());
#if defined(MAGSD_SIMT)
  std::fill(counters, counters + count, 0u);
#else
  check_cuda(cudaMemsetAsync(counters, 0, count * sizeof(unsigned), scope.stream()),
             "cudaMemsetAsync");
#endif
  return {{counters, 0}, memory};
}

#if defined(__CUDACC__) || defined(MAGSD_SIMT)
#if defined(MAGSD_SIMT)
static unsigned ticket_counters[kMostTickets];
#else
static __device__ unsigned ticket_counters[kMostTickets];
#endif

// Whether this block is the last of `blocks` that come here with the same `which`; it sees what the
// others wrote before. Every thread of the block comes here.
__device__ __forceinline__ bool is_last_block(const Tickets& tickets, int64_t which, int blocks) {
  MAGSD_SHARED(bool, last, [1]);
  __syncthreads();
  if (threadIdx.x == 0) {
    last[0] = true;
    if (blocks > 1) {
      unsigned* counter =
          (tickets.cleared != nullptr ? tickets.cleared : ticket_counters + tickets.first) + which;
      __threadfence();
      last[0] = atomicAdd(counter, 1u) + 1 == static_cast<unsigned>(blocks);
      if (last[0]) *counter = 0;
      __threadfence();
    }
  }
  __syncthreads();
  return last[0];
}
#endif

}  // namespace magsd::MAGSD_ISA
