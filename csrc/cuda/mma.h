// A warp's product on tensor cores: D (16 x 8) += A (16 x 8) B (8 x 8) in TF32 with float sums.
//
// TF32 holds every float16 and bfloat16 number, so that half precision loses nothing here; float is
// rounded to 11 significant bits (to_tf32), or split into two such numbers (tf32_part, tf32_rest).
// What the hardware makes of the lower 13 bits of an operand is not specified, so they must be 0:
// the emulation refuses an operand in which they are not.
//
// Where the entries lie (PTX ISA, "Matrix Fragments for mma.m16n8k8"), lane = 4 g + t:
//   a0 (g, t)     a1 (g + 8, t)     a2 (g, t + 4)    a3 (g + 8, t + 4)
//   b0 (t, g)     b1 (t + 4, g)
//   d0 (g, 2 t)   d1 (g, 2 t + 1)   d2 (g + 8, 2 t)  d3 (g + 8, 2 t + 1)
#pragma once

#include <cstdint>

#include "cuda/kernel.h"

namespace magsd::MAGSD_ISA {

constexpr unsigned kTf32Bits = 0xffffe000u;

// The first 11 significant bits of a value.
__device__ __forceinline__ float tf32_part(float value) {
  return __uint_as_float(__float_as_uint(value) & kTf32Bits);
}

// The next 11 of them: value = part + rest, to 22 significant bits.
__device__ __forceinline__ float tf32_rest(float value) {
  return tf32_part(value - tf32_part(value));
}

// The nearest TF32 number, ties away from zero.
__device__ __forceinline__ float to_tf32(float value) {
#if defined(MAGSD_SIMT)
  return tf32_part(value != value ? __uint_as_float(0x7fffffffu)
                                  : __uint_as_float(__float_as_uint(value) + 0x1000u));
#else
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
#endif
}

// Operands are TF32 numbers. Every lane of the warp calls it.
__device__ __forceinline__ void mma_tf32(float& d0, float& d1, float& d2, float& d3, float a0,
                                         float a1, float a2, float a3, float b0, float b1) {
#if defined(MAGSD_SIMT)
  const float mine[6] = {a0, a1, a2, a3, b0, b1};
  for (const float operand : mine) {
    if ((__float_as_uint(operand) & ~kTf32Bits) != 0) {
      simt::fail("an operand of mma_tf32 has more than the 11 significant bits of TF32");
    }
  }
  const unsigned char* lanes =
      simt::exchange(mine, sizeof(mine), kAllLanes, {"mma_tf32", __LINE__});
  const auto operand = [lanes](int lane, int i) {
    float value;
    std::memcpy(&value, lanes + lane * simt::kExchangeBytes + i * sizeof(float), sizeof(value));
    return value;
  };
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  float* const sums[4] = {&d0, &d1, &d2, &d3};
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    for (int k = 0; k < 8; ++k) {
      *sums[i] +=
          operand(4 * g + k % 4, i / 2 + k / 4 * 2) * operand(4 * column + k % 4, 4 + k / 4);
    }
  }
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
        "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#endif
}

}  // namespace magsd::MAGSD_ISA
