#include "../kernels.h"
#include "launch.h"

namespace lro {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) adam_kernel(T* exp_avg, T* exp_avg_sq, T* r, int64_t n, double beta1,
                                                        double beta2, double eps, Step step) {
  __shared__ AdamNumbers<T> numbers;  // powers in double are slow: once per block
  if (threadIdx.x == 0) {
    const double t = step.single ? *step.single : step.wide ? *step.wide : step.known;
    numbers = adam_numbers<T>(beta1, beta2, eps, t);
  }
  __syncthreads();
  const AdamNumbers<T> own = numbers;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride)
    adam(exp_avg[i], exp_avg_sq[i], r[i], own);
}

}  // namespace

template <class T>
void projected_adam(Queue queue, T* exp_avg, T* exp_avg_sq, T* r, int64_t n, double beta1, double beta2, double eps,
                    Step step) {
  LRO_LAUNCH(adam_kernel<T>, grid_for(n), kThreads, queue, exp_avg, exp_avg_sq, r, n, beta1, beta2, eps, step);
}

template void projected_adam(Queue, float*, float*, float*, int64_t, double, double, double, Step);
template void projected_adam(Queue, double*, double*, double*, int64_t, double, double, double, Step);

}  // namespace lro
