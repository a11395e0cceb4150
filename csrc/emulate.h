// CUDA on the CPU, for tests: one thread of the host per CUDA thread, and barriers that are barriers. The same .cu files run
// here, so a wrong index or a missing __syncthreads() shows without a GPU (ThreadSanitizer sees the latter).
//
// Blocks run one after another, so __shared__ is static. There are no warp shuffles.
#pragma once

#include <barrier>
#include <thread>
#include <vector>

struct dim3 {
  unsigned x, y = 1, z = 1;
};

namespace lro {
inline thread_local dim3 thread_index{0}, block_index{0};
inline dim3 block_shape{1}, grid_shape{1};
inline std::barrier<>* block_barrier = nullptr;

template <class Kernel>
void emulate(unsigned grid, unsigned threads, const Kernel& kernel) {
  std::barrier<> barrier(threads);
  block_barrier = &barrier;
  block_shape = {threads}, grid_shape = {grid};
  std::vector<std::thread> all;
  for (unsigned thread = 0; thread < threads; ++thread)
    all.emplace_back([&, thread] {
      thread_index = {thread};
      for (unsigned block = 0; block < grid; ++block) {
        block_index = {block};
        kernel();
        barrier.arrive_and_wait();
      }
    });
  for (auto& one : all) one.join();
}
}  // namespace lro

#define __global__ static
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx ::lro::thread_index
#define blockIdx ::lro::block_index
#define blockDim ::lro::block_shape
#define gridDim ::lro::grid_shape
#ifdef LRO_DROP_BARRIERS  // tests/kernels/races.cpp leaves one out, to see it reported, and names every kernel
namespace lro {
bool dropped(const char* file, int line);
void launched(const char* kernel);
}  // namespace lro
#define __syncthreads() \
  (::lro::dropped(__FILE__, __LINE__) ? void() : ::lro::block_barrier->arrive_and_wait())
#else
#define __syncthreads() ::lro::block_barrier->arrive_and_wait()
namespace lro {
inline void launched(const char*) {}
}  // namespace lro
#endif
#define LRO_LAUNCH(kernel, grid, threads, queue, ...) \
  (::lro::launched(#kernel), ::lro::emulate((grid), (threads), [&] { kernel(__VA_ARGS__); }))
