// One copy of a loop per instruction set, chosen when the library is loaded: fast without -march=native, so that a wheel or
// a cached build runs on any x86-64. Loops are written for the vectoriser; -fopt-info-vec-missed tells what it left.
#pragma once

// By what a processor can do: "arch=haswell" and the like ask for its name, and leave all others to the slowest copy.
#if !defined(__x86_64__) || !defined(__linux__) || defined(LRO_NO_CLONES)
#define LRO_CLONES
#elif !defined(__clang__) && __GNUC__ >= 12
#define LRO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LRO_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

#define LRO_RESTRICT __restrict__
