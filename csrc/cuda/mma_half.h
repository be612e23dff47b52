// A warp's product of half precision on tensor cores: D (16 x 8) += A (16 x 16) B (16 x 8), exact
// products with float sums.
//
// What a warp does as one is volatile, so that no compiler moves it to where lanes have come apart.
//
// Where the entries lie (PTX ISA, "Matrix Fragments for mma.m16n8k16"), lane = 4 g + t, two
// neighbors along k in a register:
//   a0 (g, 2 t)      a1 (g + 8, 2 t)  a2 (g, 2 t + 8)  a3 (g + 8, 2 t + 8)
//   b0 (2 t, g)      b1 (2 t + 8, g)
//   d0 (g, 2 t)      d1 (g, 2 t + 1)  d2 (g + 8, 2 t)  d3 (g + 8, 2 t + 1)
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/kernel.h"

namespace magsd::MAGSD_ISA {

// Four matrices of 8 x 8 from shared memory. Lane 8 i + r points at row r of matrix i, 16 bytes at
// a multiple of 16. Lane 4 g + t gets of matrix i the entries (g, 2 t) and (g, 2 t + 1) in
// matrices[i]; transposed, (2 t, g) and (2 t + 1, g). Every lane of the warp calls it.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(const void* row, unsigned (&matrices)[4]) {
#if defined(MAGSD_SIMT)
  simt::load_matrices(row, kTransposed, matrices, {"load_matrices", __LINE__});
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// Transposes a matrix of 8 x 8 of which lane 4 g + t holds the entries (g, 2 t) and (g, 2 t + 1).
// Every lane of the warp calls it.
__device__ __forceinline__ unsigned transpose_matrix(unsigned two) {
  unsigned result;
#if defined(MAGSD_SIMT)
  const unsigned char* lanes =
      simt::exchange(&two, sizeof(two), kAllLanes, {"transpose_matrix", __LINE__});
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  for (int e = 0; e < 2; ++e) {
    const int lane = 4 * (2 * t + e) + g / 2;
    std::memcpy(reinterpret_cast<unsigned char*>(&result) + 2 * e,
                lanes + lane * simt::kExchangeBytes + 2 * (g % 2), 2);
  }
#else
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(two));
#endif
  return result;
}

// T is Half or BFloat16. Every lane of the warp calls it.
template <typename T>
__device__ __forceinline__ void mma_half(float& d0, float& d1, float& d2, float& d3,
                                         const unsigned (&a)[4], unsigned b0, unsigned b1) {
  static_assert(sizeof(T) == 2);
#if defined(MAGSD_SIMT)
  const unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const unsigned char* lanes =
      simt::exchange(mine, sizeof(mine), kAllLanes, {"mma_half", __LINE__});
  // Entry e of register r of a lane.
  const auto operand = [lanes](int lane, int r, int e) {
    T value;
    std::memcpy(&value, lanes + lane * simt::kExchangeBytes + 4 * r + 2 * e, sizeof(value));
    return upcast(value);
  };
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  float* const sums[4] = {&d0, &d1, &d2, &d3};
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int lane = k % 8 / 2, high = k / 8;
      *sums[i] += operand(4 * g + lane, i / 2 + 2 * high, k % 2) *
                  operand(4 * column + lane, 4 + high, k % 2);
    }
  }
#else
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

}  // namespace magsd::MAGSD_ISA
