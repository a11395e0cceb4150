// Launches of kernels, for .cu files only. With LRO_EMULATED the same files run on the CPU (emulate.h).
//
// Kernels use grid-stride loops: a grid of limited size walks over any number of items. Each launch goes to the stream
// in `queue`, and is checked, because an invalid launch is otherwise reported by a later, unrelated call.
#pragma once

#include <stdexcept>
#include <string>

#ifdef LRO_EMULATED
#include "../emulate.h"
#else
#define LRO_LAUNCH(kernel, grid, threads, queue, ...)                                         \
  do {                                                                                        \
    kernel<<<(grid), (threads), 0, static_cast<cudaStream_t>((queue).stream)>>>(__VA_ARGS__); \
    ::lro::check_launch(#kernel);                                                             \
  } while (0)

namespace lro {
// Raise an error that names the kernel, if its launch was refused. Errors of a running kernel come later, from torch.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(kernel) + " was not launched: " + cudaGetErrorString(error));
}
}  // namespace lro
#endif

namespace lro {

// The emulation has few threads and blocks, so that kernels must loop, even for the small tensors of tests.
#ifdef LRO_EMULATED
constexpr int kThreads = 32;  // each is a thread of the host
constexpr int64_t kMostBlocks = 3;
#else
constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 4096;  // several waves on any GPU; kernels loop over the rest
#endif

// Return the number of thread blocks for one item per thread, limited to kMostBlocks.
inline unsigned grid_for(int64_t items) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

}  // namespace lro
