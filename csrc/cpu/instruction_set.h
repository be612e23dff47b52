// One library, several instruction sets.
//
// Every <op>.cpp is compiled once per instruction set, with MAGSD_ISA naming the namespace of that
// compilation (baseline, avx2, avx512); registration.cpp, compiled once for the baseline, asks the
// processor and registers the operators of one namespace. So a call costs no further choice.
//
// Functions of the standard library and of torch's headers are emitted by every compilation under
// one name, and the linker keeps the first: the baseline's objects come first on its command line.
#pragma once

#include <torch/csrc/stable/library.h>

#include "common/macros.h"

// Opens, in the operation's namespace, the function that registers the operators of one <op>.cpp:
//   MAGSD_OPERATORS(attention_sampling, library) {
//     library.impl("sample_attention", TORCH_BOX(&sample_attention));
//   }
#define MAGSD_OPERATORS(file, library)                                 \
  void register_##file(torch::stable::detail::StableLibrary& library); \
  void register_##file(torch::stable::detail::StableLibrary& library)
