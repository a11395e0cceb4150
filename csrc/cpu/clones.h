// One copy of a loop per instruction set, chosen when the library is loaded: fast without -march=native, so that a wheel or
// a cached build runs on any x86-64. Loops are written for the vectoriser; -fopt-info-vec-missed tells what it left.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && !defined(LRO_NO_CLONES)
#define LRO_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define LRO_CLONES
#endif

#define LRO_RESTRICT __restrict__
