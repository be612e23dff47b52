// Chooses the instruction set when the library is loaded and registers its operators.
//
// The schemas `magsd_cpu::<name>` are defined in Python (magsd_kernels/registry.py). The
// environment variable MAGSD_CPU_CAPABILITY (baseline, avx2, avx512) lowers the choice; Python has
// checked its spelling.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>

// Every csrc/cpu/<op>.cpp.
#define MAGSD_EVERY_OPERATION(X) \
  X(attention_augment) \
  X(attention_augment_backward) \
  X(attention_sampling) \
  X(bilinear_pool) \
  X(bilinear_pool_backward) \
  X(multiscale_attention) \
  X(multiscale_attention_backward) \
  X(soft_distance)

#define MAGSD_DECLARE(operation) \
  void register_##operation(torch::stable::detail::StableLibrary& library);
namespace magsd::baseline {
MAGSD_EVERY_OPERATION(MAGSD_DECLARE)
}
namespace magsd::avx2 {
MAGSD_EVERY_OPERATION(MAGSD_DECLARE)
}
namespace magsd::avx512 {
MAGSD_EVERY_OPERATION(MAGSD_DECLARE)
}

namespace {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

bool processor_has([[maybe_unused]] InstructionSet set) {
#if defined(MAGSD_HAVE_AVX2)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (set == InstructionSet::kAvx2) return avx2;
#if defined(MAGSD_HAVE_AVX512)
  if (set == InstructionSet::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
#endif
  return set == InstructionSet::kBaseline;
}

InstructionSet choose() {
  const char* wanted = std::getenv("MAGSD_CPU_CAPABILITY");
  const auto allowed = [wanted](const char* refusing) {
    return wanted == nullptr || std::strcmp(wanted, refusing) != 0;
  };
  const bool wide = allowed("baseline");
  if (wide && allowed("avx2") && processor_has(InstructionSet::kAvx512)) {
    return InstructionSet::kAvx512;
  }
  if (wide && processor_has(InstructionSet::kAvx2)) return InstructionSet::kAvx2;
  return InstructionSet::kBaseline;
}

InstructionSet chosen() {
  static const InstructionSet set = choose();
  return set;
}

}  // namespace

// The name of the instruction set that runs; magsd_kernels/native.py asks.
extern "C" __attribute__((visibility("default"))) const char* magsd_cpu_instruction_set() {
  switch (chosen()) {
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

STABLE_TORCH_LIBRARY_IMPL(magsd_cpu, CPU, library) {
  switch (chosen()) {
#if defined(MAGSD_HAVE_AVX512)
#define MAGSD_REGISTER(operation) magsd::avx512::register_##operation(library);
    case InstructionSet::kAvx512:
      MAGSD_EVERY_OPERATION(MAGSD_REGISTER)
      break;
#undef MAGSD_REGISTER
#endif
#if defined(MAGSD_HAVE_AVX2)
#define MAGSD_REGISTER(operation) magsd::avx2::register_##operation(library);
    case InstructionSet::kAvx2:
      MAGSD_EVERY_OPERATION(MAGSD_REGISTER)
      break;
#undef MAGSD_REGISTER
#endif
    default:
#define MAGSD_REGISTER(operation) magsd::baseline::register_##operation(library);
      MAGSD_EVERY_OPERATION(MAGSD_REGISTER)
#undef MAGSD_REGISTER
  }
}
