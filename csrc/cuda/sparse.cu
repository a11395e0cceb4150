// Positions are not looked through here, which would stop the host: one that is outside stops the kernel.
#include <cassert>

#include "../kernels.h"
#include "launch.h"

namespace lro {
namespace {

template <class T, class Index>
__global__ void __launch_bounds__(kThreads) add_kernel(T* dense, int64_t n, const Index* positions, const T* values,
                                                       int64_t count, int64_t start) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    const int64_t place = positions[i] - start;
    assert(place >= 0 && place < n);
    add(dense[place], values[i]);
  }
}

template <class T, class Index>
__global__ void __launch_bounds__(kThreads) gather_kernel(T* out, const T* dense, int64_t n, const Index* positions,
                                                          int64_t count, int64_t start) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    const int64_t place = positions[i] - start;
    assert(place >= 0 && place < n);
    out[i] = dense[place];
  }
}

}  // namespace

template <class T, class Index>
void add_at(Queue queue, T* dense, int64_t n, const Index* positions, const T* values, int64_t count, int64_t start) {
  LRO_LAUNCH((add_kernel<T, Index>), grid_for(count), kThreads, queue, dense, n, positions, values, count, start);
}

template <class T, class Index>
void gather_at(Queue queue, T* out, const T* dense, int64_t n, const Index* positions, int64_t count, int64_t start) {
  LRO_LAUNCH((gather_kernel<T, Index>), grid_for(count), kThreads, queue, out, dense, n, positions, count, start);
}

#define LRO_INSTANCES(T, Index)                                                                  \
  template void add_at(Queue, T*, int64_t, const Index*, const T*, int64_t, int64_t);            \
  template void gather_at(Queue, T*, const T*, int64_t, const Index*, int64_t, int64_t);
LRO_INSTANCES(float, int32_t)
LRO_INSTANCES(float, int64_t)
LRO_INSTANCES(double, int32_t)
LRO_INSTANCES(double, int64_t)
LRO_INSTANCES(bfloat16, int32_t)
LRO_INSTANCES(bfloat16, int64_t)

}  // namespace lro
