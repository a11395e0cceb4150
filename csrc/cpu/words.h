// Random words on the CPU, as many at once as fill the vectors and stay in the nearest cache.
#pragma once

#include <algorithm>

#include "../kernels.h"
#include "clones.h"

namespace lro {
namespace {

constexpr int kCounters = 64;  // drawn at once
constexpr int64_t kCounterGrain = 1024;

// Four words per counter, in order.
LRO_CLONES void words(uint64_t first, int n, const Stream stream, uint32_t* LRO_RESTRICT out) {
  uint32_t w[4][kCounters];
  for (int i = 0; i < kCounters; ++i) {  // always all of them: a loop of fixed length needs no tail
    const Words four = philox(first + i, stream);
    w[0][i] = four.w[0], w[1][i] = four.w[1], w[2][i] = four.w[2], w[3][i] = four.w[3];
  }
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < 4; ++j) out[4 * i + j] = w[j][i];
}

// The numbers of 16 bits in words: their memory, as bytes are ordered in all that torch runs on.
struct Halves {
  const uint32_t* words;

  LRO_HD uint32_t operator[](int64_t i) const {
    uint16_t half;
    memcpy(&half, reinterpret_cast<const char*>(words) + 2 * i, 2);
    return half;
  }
};

// Calls `work(counter, count, from, position, n)` for n numbers from element `position` on: those from number `from` on
// of `count` counters, the first of which is `counter`.
template <class Work>
void each_piece(int64_t n, int lanes, int64_t start, const Work& work) {
  const int64_t skip = ((start % lanes) + lanes) % lanes, first = (start - skip) / lanes;
  parallel((skip + n + lanes - 1) / lanes, kCounterGrain, [&](int64_t begin, int64_t end) {
    for (int64_t counter = begin; counter < end; counter += kCounters) {
      const int count = static_cast<int>(std::min<int64_t>(kCounters, end - counter));
      const int64_t from = counter ? 0 : skip, position = counter * lanes + from - skip;
      work(static_cast<uint64_t>(first + counter), count, from, position, std::min(n - position, count * lanes - from));
    }
  });
}

}  // namespace
}  // namespace lro
