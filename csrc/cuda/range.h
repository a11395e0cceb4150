// The largest and the least of the numbers that the threads of a block have seen.
#pragma once

#include "../kernels.h"
#include "launch.h"

namespace lro {
namespace {

struct Range {
  float top, bottom;
};

struct Extremes {
  int32_t most = INT32_MIN, least = INT32_MAX;

  LRO_HD void add(float x) {
    const int32_t key = ordered(x);
    most = key > most ? key : most;
    least = key < least ? key : least;
  }
};

// To all threads, through shared memory. All threads of the block must call it.
__device__ Range range_of(const Extremes& own) {
  __shared__ int32_t top[kThreads], bottom[kThreads];
  const unsigned me = threadIdx.x;
  top[me] = own.most, bottom[me] = own.least;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (me < half) {
      if (top[me + half] > top[me]) top[me] = top[me + half];
      if (bottom[me + half] < bottom[me]) bottom[me] = bottom[me + half];
    }
  }
  __syncthreads();
  const Range range{unordered(top[0]), unordered(bottom[0])};
  __syncthreads();  // before the next numbers overwrite them
  return range;
}

}  // namespace
}  // namespace lro
