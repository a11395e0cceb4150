// The words of some counters of Philox, for the loops that use them.
#pragma once

#include "../kernels.h"
#include "clones.h"

namespace lro {
namespace {

constexpr int kCounters = 64;  // drawn at once: their words stay in the nearest cache

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

LRO_HD uint32_t bits16(const uint32_t* w, int64_t i) { return w[i / 2] >> (i % 2 * 16) & 0xFFFFu; }

}  // namespace
}  // namespace lro
