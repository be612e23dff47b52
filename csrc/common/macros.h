// Marks of functions that the CPU kernels and the CUDA kernels share, and the namespace of code
// that is compiled several times (see cpu/instruction_set.h). Each operation has one of its own in
// it.
#pragma once

#ifndef MAGSD_ISA
#define MAGSD_ISA baseline
#endif

#if defined(__CUDACC__)
#define MAGSD_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define MAGSD_HD inline __attribute__((always_inline))
#else
#define MAGSD_HD inline
#endif

#if defined(__GNUC__) || defined(__CUDACC__)
#define MAGSD_RESTRICT __restrict__
#else
#define MAGSD_RESTRICT
#endif
