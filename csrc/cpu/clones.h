// One copy of a loop per instruction set, chosen when the library is loaded: fast without -march=native, so that a wheel or
// a cached build runs on any x86-64. Loops are written for the vectoriser; -fopt-info-vec-missed tells what it left.
//
// Levels of the instruction set and not names of processors, which only these very processors are taken for: with
// "arch=skylake-avx512" nothing but Skylake, and no AMD, would ever leave the copy for the oldest x86-64.
#pragma once

#if !defined(__x86_64__) || !defined(__linux__) || defined(LRO_NO_CLONES)
#define LRO_CLONES
#elif defined(__clang__) || __GNUC__ < 12
#define LRO_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define LRO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif

#define LRO_RESTRICT __restrict__
