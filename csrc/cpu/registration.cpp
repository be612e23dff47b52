// Chooses the instruction set when the library is loaded and registers its operators.
//
// The schemas `magsd_cpu::<name>` are defined in Python (magsd_kernels/registry.py). The
// environment variable MAGSD_CPU_CAPABILITY (baseline, avx2, avx512) lowers the choice; Python has
// checked its spelling.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>

// Every csrc/cpu/<op>.cpp: its namespace, its name.
#define MAGSD_EVERY_FILE(X)                              \
  X(attention_augment, attention_augment)                \
  X(attention_augment, attention_augment_backward)       \
  X(attention_sampling, attention_sampling)              \
  X(batch_norm_act, batch_norm_act)                      \
  X(batch_norm_act, batch_norm_act_backward)             \
  X(bilinear_pool, bilinear_pool)                        \
  X(bilinear_pool, bilinear_pool_backward)               \
  X(multiscale_attention, multiscale_attention)          \
  X(multiscale_attention, multiscale_attention_backward) \
  X(soft_distance, soft_distance)

#define MAGSD_DECLARE(operation, file)                                 \
  namespace operation {                                                \
  void register_##file(torch::stable::detail::StableLibrary& library); \
  }
namespace magsd::baseline {
MAGSD_EVERY_FILE(MAGSD_DECLARE)
}
namespace magsd::avx2 {
MAGSD_EVERY_FILE(MAGSD_DECLARE)
}
namespace magsd::avx512 {
MAGSD_EVERY_FILE(MAGSD_DECLARE)
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
  const bool beyond_baseline = allowed("baseline");
  if (beyond_baseline && allowed("avx2") && processor_has(InstructionSet::kAvx512)) {
    return InstructionSet::kAvx512;
  }
  if (beyond_baseline && processor_has(InstructionSet::kAvx2)) return InstructionSet::kAvx2;
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
#define MAGSD_REGISTER(operation, file) magsd::avx512::operation::register_##file(library);
    case InstructionSet::kAvx512:
      MAGSD_EVERY_FILE(MAGSD_REGISTER)
      break;
#undef MAGSD_REGISTER
#endif
#if defined(MAGSD_HAVE_AVX2)
#define MAGSD_REGISTER(operation, file) magsd::avx2::operation::register_##file(library);
    case InstructionSet::kAvx2:
      MAGSD_EVERY_FILE(MAGSD_REGISTER)
      break;
#undef MAGSD_REGISTER
#endif
    default:
#define MAGSD_REGISTER(operation, file) magsd::baseline::operation::register_##file(library);
      MAGSD_EVERY_FILE(MAGSD_REGISTER)
#undef MAGSD_REGISTER
  }
}
