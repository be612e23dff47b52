// Rows written past the caches.
//
// An ordinary store first reads the line it writes. Results too large to be found in a cache again
// are written with streaming stores instead, which move each byte once.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/instruction_set.h"

namespace magsd::MAGSD_ISA {

constexpr int64_t kStreamedBytes = int64_t{1} << 21;  // a result from here on is streamed

// to[0..count) = from[0..count), which lies in the first cache.
template <typename T>
inline void write_row(const T* from, int64_t count, T* to, [[maybe_unused]] bool streamed) {
  const char* source = reinterpret_cast<const char*>(from);
  char* target = reinterpret_cast<char*>(to);
  int64_t bytes = count * static_cast<int64_t>(sizeof(T));
#if defined(__SSE2__)
#if defined(__AVX512F__)
  constexpr int64_t kLine = 64;
#elif defined(__AVX2__)
  constexpr int64_t kLine = 32;
#else
  constexpr int64_t kLine = 16;
#endif
  if (streamed && bytes >= 256) {
    const int64_t head = -reinterpret_cast<intptr_t>(target) & (kLine - 1);
    std::memcpy(target, source, head);
    source += head;
    target += head;
    bytes -= head;
    for (; bytes >= kLine; bytes -= kLine, source += kLine, target += kLine) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target), _mm512_loadu_si512(source));
#elif defined(__AVX2__)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#else
      _mm_stream_si128(reinterpret_cast<__m128i*>(target),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#endif
    }
  }
#endif
  std::memcpy(target, source, bytes);
}

// Makes streamed rows visible to other threads; at the end of every task.
inline void finish_rows([[maybe_unused]] bool streamed) {
#if defined(__SSE2__)
  if (streamed) _mm_sfence();
#endif
}

}  // namespace magsd::MAGSD_ISA
