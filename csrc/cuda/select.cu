// One thread block per line: the key of the last number that is selected, bit by bit, then each thread writes its share.
#include "../kernels.h"
#include "launch.h"

namespace lro {
namespace {

struct Counts {
  int32_t before, all;  // of the threads before this one, and of all
};

// All threads of the block must call it.
__device__ Counts counted(int32_t own) {
  __shared__ int32_t counts[kThreads];
  counts[threadIdx.x] = own;
  __syncthreads();
  Counts sums{0, 0};
#pragma unroll 4
  for (unsigned i = 0; i < kThreads; ++i) {
    if (i < threadIdx.x) sums.before += counts[i];
    sums.all += counts[i];
  }
  __syncthreads();  // before the next call overwrites them
  return sums;
}

template <class T>
__global__ void __launch_bounds__(kThreads) select_kernel(int32_t* index, const T* scores, int64_t rows, int32_t n,
                                                          int32_t r) {
  using Key = decltype(rank_key(T()));
  const int32_t me = static_cast<int32_t>(threadIdx.x), share = n / kThreads, more = n % kThreads;
  const int32_t first = me * share + (me < more ? me : more), last = first + share + (me < more ? 1 : 0);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* x = scores + row * n;
    Key least = 0;
    for (Key bit = highest_bit<Key>(); bit; bit >>= 1) {
      int32_t own = 0;
      for (int32_t i = me; i < n; i += kThreads) own += rank_key(x[i]) >= (least | bit);
      if (counted(own).all >= r) least |= bit;
    }
    int32_t above = 0, equal = 0;
    for (int32_t i = first; i < last; ++i) {
      const Key key = rank_key(x[i]);
      above += key > least, equal += key == least;
    }
    const Counts larger = counted(above), equals = counted(equal);
    const int32_t wanted = r - larger.all;  // of those that equal the last one, the first
    int32_t seen = equals.before;
    int32_t* out = index + row * r + larger.before + (seen < wanted ? seen : wanted);
    for (int32_t i = first; i < last; ++i) {
      const Key key = rank_key(x[i]);
      if (key > least || (key == least && seen++ < wanted)) *out++ = i;
    }
  }
}

}  // namespace

template <class T>
void select_top(Queue queue, int32_t* index, const T* scores, int64_t rows, int64_t n, int64_t r) {
  const auto blocks = static_cast<unsigned>(rows < kMostBlocks ? rows : kMostBlocks);
  LRO_LAUNCH(select_kernel<T>, blocks, kThreads, queue, index, scores, rows, static_cast<int32_t>(n),
             static_cast<int32_t>(r));
}

template void select_top(Queue, int32_t*, const float*, int64_t, int64_t, int64_t);
template void select_top(Queue, int32_t*, const double*, int64_t, int64_t, int64_t);

}  // namespace lro
