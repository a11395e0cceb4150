// Steps of bfloat16 weights on GPUs: W <- round(keep W + x) for some columns of W (rows, width) and x (rows, run).
#include "../kernels.h"
#include "launch.h"

namespace lro {
namespace {

constexpr int64_t kPerThread = 8;  // neighbors of one row per thread: the division that finds the row is slow

// Round to nearest.
__global__ void __launch_bounds__(kThreads) nearest_kernel(bfloat16* w, const float* x, Columns columns, Step keep) {
  const auto factor = static_cast<float>(number_of(keep));
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t per_row = (columns.run + kPerThread - 1) / kPerThread, total = columns.rows * per_row;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
    const int64_t row = i / per_row, begin = (i - row * per_row) * kPerThread;
    for (int64_t column = begin; column < begin + kPerThread && column < columns.run; ++column)
      add_nearest(w[columns.place(row, column)], x[row * columns.run + column], factor);
  }
}

// Round to nearest and keep the rounding errors in `owed`, which has the layout of w.
__global__ void __launch_bounds__(kThreads) kahan_kernel(bfloat16* w, bfloat16* owed, const float* x, Columns columns,
                                                         Step keep) {
  const auto factor = static_cast<float>(number_of(keep));
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t per_row = (columns.run + kPerThread - 1) / kPerThread, total = columns.rows * per_row;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
    const int64_t row = i / per_row, begin = (i - row * per_row) * kPerThread;
    for (int64_t column = begin; column < begin + kPerThread && column < columns.run; ++column) {
      const int64_t place = columns.place(row, column);
      add_kahan(w[place], owed[place], x[row * columns.run + column], factor);
    }
  }
}

// Round stochastically. A thread draws one counter, whose eight numbers round eight neighbors. A row may start and end
// within a counter, so it may need one more thread than run / 8, and threads skip lanes outside of the row.
__global__ void __launch_bounds__(kThreads) stochastic_kernel(bfloat16* w, const float* x, Columns columns, Step keep,
                                                              Draw draw, int64_t pitch) {
  if (draw.time) draw.stream.time = static_cast<uint32_t>(*draw.time);
  const auto factor = static_cast<float>(number_of(keep));
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t per_row = (columns.run + 7 + 7) / 8, total = columns.rows * per_row;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
    const int64_t row = i / per_row, start = draw.start + row * pitch, skip = (start % 8 + 8) % 8;
    const int64_t begin = (i - row * per_row) * 8 - skip;
    if (begin >= columns.run) continue;
    const Words words = philox(static_cast<uint64_t>((start - skip) / 8 + i - row * per_row), draw.stream);
    for (int lane = 0; lane < 8; ++lane) {
      const int64_t column = begin + lane;
      if (column < 0 || column >= columns.run) continue;
      const uint32_t bits = words.w[lane / 2] >> (lane % 2 * 16) & 0xFFFFu;
      add_stochastic(w[columns.place(row, column)], x[row * columns.run + column], factor, bits);
    }
  }
}

// Return the number of threads for kPerThread columns each.
int64_t threads_for(const Columns& columns) { return columns.rows * ((columns.run + kPerThread - 1) / kPerThread); }

}  // namespace

void add_nearest(Queue queue, bfloat16* w, const float* x, Columns columns, Step keep) {
  LRO_LAUNCH(nearest_kernel, grid_for(threads_for(columns)), kThreads, queue, w, x, columns, keep);
}

void add_kahan(Queue queue, bfloat16* w, bfloat16* owed, const float* x, Columns columns, Step keep) {
  LRO_LAUNCH(kahan_kernel, grid_for(threads_for(columns)), kThreads, queue, w, owed, x, columns, keep);
}

void add_stochastic(Queue queue, bfloat16* w, const float* x, Columns columns, Step keep, Draw draw, int64_t pitch) {
  LRO_LAUNCH(stochastic_kernel, grid_for(columns.rows * ((columns.run + 14) / 8)), kThreads, queue, w, x, columns, keep,
             draw, pitch);
}

}  // namespace lro
