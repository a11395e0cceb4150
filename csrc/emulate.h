// CUDA on the CPU, for tests. Each CUDA thread of a block is a thread of the host, and each barrier is a real barrier.
//
// The same .cu files are compiled as C++ with the macros below. A wrong index or a missing __syncthreads() then shows
// without a GPU: sanitizers find the first, and ThreadSanitizer reports the second as a data race.
//
// Thread blocks run one after another, so a static variable can play the role of __shared__ memory. Warp shuffles are
// not emulated, and kernels do not use them.
#pragma once

#include <barrier>
#include <thread>
#include <vector>

struct dim3 {
  unsigned x, y = 1, z = 1;
};

namespace lro {
// The position of a thread, and the shape of the launch.
inline thread_local dim3 thread_index{0}, block_index{0};
inline dim3 block_shape{1}, grid_shape{1};
inline std::barrier<>* block_barrier = nullptr;

// Run `kernel` once per thread and block. The barrier after each block keeps fast threads from starting the next block
// while other threads still read the shared memory of this one.
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
  for (auto& host_thread : all) host_thread.join();
}
}  // namespace lro

// What CUDA's keywords and built-in variables mean on the CPU.
#define __global__ static
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx ::lro::thread_index
#define blockIdx ::lro::block_index
#define blockDim ::lro::block_shape
#define gridDim ::lro::grid_shape
// tests/kernels/races.cpp leaves out one barrier at a time, to see the race reported, and prints the names of kernels.
#ifdef LRO_DROP_BARRIERS
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
