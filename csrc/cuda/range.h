// The extremes of the numbers that the threads of a block have seen.
//
// Each thread collects the extremes of its own numbers, as integers that order like the floats (elements.h). A tree
// reduction in shared memory then combines them: in each round, half of the remaining threads take over a neighbor's.
#pragma once

#include "../kernels.h"
#include "launch.h"

namespace lro {
namespace {

// The extremes of a block, as floats.
struct Range {
  float top, bottom;
};

// The extremes of one thread, as integer keys.
struct Extremes {
  int32_t most = INT32_MIN, least = INT32_MAX;

  LRO_HD void add(float x) {
    const int32_t key = ordered(x);
    most = key > most ? key : most;
    least = key < least ? key : least;
  }
};

// Return the extremes of all threads to all threads. Every thread of the block must call this function, because it
// contains barriers.
__device__ Range range_of(const Extremes& own) {
  __shared__ int32_t top[kThreads], bottom[kThreads];
  const unsigned thread = threadIdx.x;
  top[thread] = own.most, bottom[thread] = own.least;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      if (top[thread + half] > top[thread]) top[thread] = top[thread + half];
      if (bottom[thread + half] < bottom[thread]) bottom[thread] = bottom[thread + half];
    }
  }
  __syncthreads();
  const Range range{unordered(top[0]), unordered(bottom[0])};
  __syncthreads();  // all threads have read the result before the next call overwrites it
  return range;
}

}  // namespace
}  // namespace lro
