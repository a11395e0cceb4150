// Selections of the largest numbers on GPUs: one thread block per row.
//
// The r-th largest key is found by binary search over its bits, as on the CPU: all threads count keys, and share their
// counts. For the output, each thread takes a contiguous share of the row. From the counts of the threads before it, it
// knows where its own selected positions start, so that positions ascend without a sort.
#include "../kernels.h"
#include "launch.h"

namespace lro {
namespace {

// Sums of a count over the threads before this one, and over all threads.
struct Counts {
  int32_t before, all;
};

// Return the sums of `own` over threads. Every thread of the block must call this function.
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
  __syncthreads();  // all threads have read the counts before the next call overwrites them
  return sums;
}

// Write the positions of the r largest of each row of scores (rows, n) to index (rows, r). Shares differ by at most one
// element: the first n % kThreads threads have one more.
template <class T>
__global__ void __launch_bounds__(kThreads) select_kernel(int32_t* index, const T* scores, int64_t rows, int32_t n,
                                                          int32_t r) {
  using Key = decltype(rank_key(T()));
  const int32_t thread = static_cast<int32_t>(threadIdx.x), share = n / kThreads, remainder = n % kThreads;
  const int32_t first = thread * share + (thread < remainder ? thread : remainder);
  const int32_t last = first + share + (thread < remainder ? 1 : 0);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* x = scores + row * n;
    Key least = 0;
    for (Key bit = highest_bit<Key>(); bit; bit >>= 1) {
      int32_t own = 0;
      for (int32_t i = thread; i < n; i += kThreads) own += rank_key(x[i]) >= (least | bit);
      if (counted(own).all >= r) least |= bit;
    }
    int32_t above = 0, equal = 0;
    for (int32_t i = first; i < last; ++i) {
      const Key key = rank_key(x[i]);
      above += key > least, equal += key == least;
    }
    const Counts larger = counted(above), equals = counted(equal);
    const int32_t wanted = r - larger.all;  // of the numbers equal to the last selected one
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
