// Signs of bases on GPUs. Gram matrices have no kernel here: libraries use tensor cores for them.
#include "../kernels.h"
#include "launch.h"

namespace lro {
namespace {

// Fix the sign of each column of a basis (matrices, rows, columns). A thread walks down one column. Neighboring threads
// have neighboring columns, so that their reads are contiguous.
template <class T>
__global__ void __launch_bounds__(kThreads) fix_kernel(T* basis, int64_t matrices, int64_t rows, int64_t columns) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < matrices * columns; i += stride) {
    T* column = basis + i / columns * rows * columns + i % columns;
    T peak = 0;
    for (int64_t row = 0; row < rows; ++row) peak = larger(peak, column[row * columns]);
    // The first entry that is equal to the largest up to rounding errors decides the sign (elements.h).
    const T limit = magnitude(peak) * nearly<T>();
    for (int64_t row = rows; row-- > 0;)
      if (magnitude(column[row * columns]) >= limit) peak = column[row * columns];
    if (peak < 0)
      for (int64_t row = 0; row < rows; ++row) column[row * columns] = -column[row * columns];
  }
}

}  // namespace

template <class T>
void fix_signs(Queue queue, T* basis, int64_t matrices, int64_t rows, int64_t columns) {
  LRO_LAUNCH(fix_kernel<T>, grid_for(matrices * columns), kThreads, queue, basis, matrices, rows, columns);
}

template void fix_signs(Queue, float*, int64_t, int64_t, int64_t);
template void fix_signs(Queue, double*, int64_t, int64_t, int64_t);

}  // namespace lro
