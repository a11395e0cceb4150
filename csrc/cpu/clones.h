// Copies of a loop for several instruction sets; the loader picks the best copy for the processor.
//
// A wheel or a cached build must run on every x86-64, so -march=native is not possible. The attribute target_clones
// compiles a function once per level and resolves the call when the library is loaded. Loops are written for the
// compiler's vectorizer; -fopt-info-vec-missed reports the loops that it could not vectorize.
//
// The targets are levels of the instruction set (x86-64-v3 is AVX2, v4 is AVX-512) and not names of processors. A name
// matches that processor only: with "arch=skylake-avx512" every AMD would use the copy for the oldest x86-64.
#pragma once

#if !defined(__x86_64__) || !defined(__linux__) || defined(LRO_NO_CLONES)
#define LRO_CLONES
#elif defined(__clang__) || __GNUC__ < 12
#define LRO_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define LRO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif

// A promise that no other pointer reaches the same memory; without it, stores prevent vectorization.
#define LRO_RESTRICT __restrict__
