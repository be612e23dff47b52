// A flow of control with a stack of its own, and the change from one to another.
//
// On x86-64 a change saves the registers that a call preserves; elsewhere it is swapcontext, which
// costs two system calls more, most of the time of a kernel full of barriers. AddressSanitizer is
// told of every change.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__) || !defined(__linux__) || defined(MAGSD_SIMT_UCONTEXT)
#define MAGSD_SIMT_SWAPCONTEXT
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define MAGSD_SIMT_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MAGSD_SIMT_ASAN
#endif
#endif
#if defined(MAGSD_SIMT_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(MAGSD_SIMT_SWAPCONTEXT)
// Leaves the registers on the stack that runs and its pointer in *from, goes on from those at `to`.
// See context.cpp.
extern "C" __attribute__((visibility("hidden"))) void magsd_simt_change(void** from, void* to);
#endif

namespace simt {

// The default one is the flow that runs already; `start` makes it another.
class Context {
 public:
  // The next change to it enters `entry`, which must call `arrived` and never return.
  void start(void (*entry)()) {
    if (memory_ == nullptr) memory_.reset(new unsigned char[kStackBytes]);
    bottom_ = memory_.get();
    bytes_ = kStackBytes;
#if defined(MAGSD_SIMT_SWAPCONTEXT)
    getcontext(&state_);
    state_.uc_stack.ss_sp = memory_.get();
    state_.uc_stack.ss_size = kStackBytes;
    state_.uc_link = nullptr;
    makecontext(&state_, entry, 0);
#else
    // As `entry` finds it after a call: aligned to 16 bytes below a return address, here none.
    const std::uintptr_t top = reinterpret_cast<std::uintptr_t>(memory_.get()) + kStackBytes;
    void** frame = reinterpret_cast<void**>(top / 16 * 16) - 8;
    for (int i = 0; i < 8; ++i) frame[i] = nullptr;
    frame[6] = reinterpret_cast<void*>(entry);
    state_ = frame;
#endif
  }

  // First thing in a new flow, which `from` changed to.
  static void arrived([[maybe_unused]] Context& from) {
#if defined(MAGSD_SIMT_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &from.bottom_, &from.bytes_);
#endif
  }

  // Returns when another flow changes back to this one; never, where this was its `last`.
  void change_to(Context& other, [[maybe_unused]] bool last = false) {
#if defined(MAGSD_SIMT_ASAN)
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, other.bottom_, other.bytes_);
#endif
#if defined(MAGSD_SIMT_SWAPCONTEXT)
    swapcontext(&state_, &other.state_);
#else
    magsd_simt_change(&state_, other.state_);
#endif
#if defined(MAGSD_SIMT_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

 private:
  static constexpr std::size_t kStackBytes = 256 * 1024;

#if defined(MAGSD_SIMT_SWAPCONTEXT)
  ucontext_t state_;
#else
  void* state_ = nullptr;
#endif
  std::unique_ptr<unsigned char[]> memory_;
  [[maybe_unused]] const void* bottom_ = nullptr;
  [[maybe_unused]] std::size_t bytes_ = 0;
  [[maybe_unused]] void* fake_stack_ = nullptr;
};

}  // namespace simt
