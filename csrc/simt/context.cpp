// The change from one flow of control to another on x86-64; see context.h.
#include "simt/context.h"

#if !defined(MAGSD_SIMT_SWAPCONTEXT)
asm(R"(
  .text
  .globl magsd_simt_change
  .hidden magsd_simt_change
  .type magsd_simt_change, @function
magsd_simt_change:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size magsd_simt_change, .-magsd_simt_change
)");
#endif
