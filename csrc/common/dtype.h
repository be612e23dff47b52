// The four floating dtypes: what they accumulate in, and rows of them to and from that type.
//
// float16 and bfloat16 accumulate in float, so that one rounding happens, at the end.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__) && defined(__AVX2__) && !defined(__CUDACC__)
#define MAGSD_F16C
#include <immintrin.h>
#endif

#include "common/macros.h"

namespace magsd {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

MAGSD_HD uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
MAGSD_HD float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

MAGSD_HD float upcast(BFloat16 value) { return float_of(static_cast<uint32_t>(value.x) << 16); }
MAGSD_HD float upcast(Half value) { return static_cast<float>(value); }
MAGSD_HD float upcast(float value) { return value; }
MAGSD_HD double upcast(double value) { return value; }

// Rounds to nearest, ties to even.
template <typename T>
MAGSD_HD T downcast(accumulate_t<T> value) {
  return static_cast<T>(value);
}
template <>
MAGSD_HD BFloat16 downcast<BFloat16>(float value) {
  const uint32_t bits = float_bits(value);
  // No branch, so that a loop over it becomes vector code.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t result = value != value ? 0x7fc0u : rounded;
  return BFloat16(static_cast<uint16_t>(result), BFloat16::from_bits());
}

}  // namespace magsd

#if !defined(__CUDACC__)
namespace magsd::MAGSD_ISA {

// acc[0..count) = row[0..count)
template <typename T>
inline void load_row(const T* MAGSD_RESTRICT row, int64_t count,
                     accumulate_t<T>* MAGSD_RESTRICT acc) {
  int64_t i = 0;
#if defined(MAGSD_F16C)
  if constexpr (std::is_same_v<T, Half>) {
    for (; i + 8 <= count; i += 8) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i));
      _mm256_storeu_ps(acc + i, _mm256_cvtph_ps(half));
    }
  }
#endif
  for (; i < count; ++i) acc[i] = upcast(row[i]);
}

// The row itself where it has the accumulation type already, else a copy in `acc`.
template <typename T>
inline const accumulate_t<T>* upcast_row(const T* row, [[maybe_unused]] int64_t count,
                                         [[maybe_unused]] accumulate_t<T>* acc) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    return row;
  } else {
    load_row(row, count, acc);
    return acc;
  }
}

// row[0..count) = acc[0..count), rounded once
template <typename T>
inline void store_row(const accumulate_t<T>* MAGSD_RESTRICT acc, int64_t count,
                      T* MAGSD_RESTRICT row) {
  int64_t i = 0;
#if defined(MAGSD_F16C)
  if constexpr (std::is_same_v<T, Half>) {
    for (; i + 8 <= count; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(acc + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(row + i), half);
    }
  }
#endif
  for (; i < count; ++i) row[i] = downcast<T>(acc[i]);
}

}  // namespace magsd::MAGSD_ISA
#endif
