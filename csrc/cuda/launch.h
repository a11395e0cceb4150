// What CUDA sources need beside the arithmetic. Included by .cu files only; the CPU runs them in tests through emulate.h.
#pragma once

#include <stdexcept>
#include <string>

#ifdef LRO_EMULATED
#include "../emulate.h"
#else
#define LRO_LAUNCH(kernel, grid, threads, queue, ...)                                    \
  do {                                                                                   \
    kernel<<<(grid), (threads), 0, static_cast<cudaStream_t>((queue).stream)>>>(__VA_ARGS__); \
    ::lro::check_launch(#kernel);                                                        \
  } while (0)

namespace lro {
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(kernel) + " was not launched: " + cudaGetErrorString(error));
}
}  // namespace lro
#endif

namespace lro {

#ifdef LRO_EMULATED
constexpr int kThreads = 32;  // each is a thread of the host
constexpr int64_t kMostBlocks = 3;
#else
constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 4096;  // some waves on any GPU; kernels walk the rest
#endif

inline unsigned grid_for(int64_t items) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

}  // namespace lro
