// Single entries of a tensor on GPUs: adding to them and reading them.
//
// The host cannot check positions without waiting for the device. So each thread asserts that its position is inside,
// and a wrong position stops the kernel instead of writing elsewhere. Positions are unique, so no atomics are needed.
#include <cassert>

#include "../kernels.h"
#include "launch.h"

namespace lro {
namespace {

// Add values (count,) to the elements at these global positions; `dense` (n,) starts at global index `start`.
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

// Read the elements at these global positions into out (count,).
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
