// The words of some counters of Philox, for the loops that use them.
#pragma once

#include <algorithm>

#include "../kernels.h"
#include "clones.h"

namespace lro {
namespace {

constexpr int kCounters = 64;  // drawn at once: their words stay in the nearest cache
constexpr int kTogether = 16;  // in one round of the vectorised loop
constexpr int64_t kCounterGrain = 1024;

// Four words per counter, in order.
LRO_CLONES void words(uint64_t first, int n, const Stream stream, uint32_t* LRO_RESTRICT out) {
  uint32_t w[4][kCounters];
  for (int from = 0; from < n; from += kTogether)
    for (int i = from; i < from + kTogether; ++i) {  // always so many: a loop of fixed length needs no tail
      const Words four = philox(first + i, stream);
      w[0][i] = four.w[0], w[1][i] = four.w[1], w[2][i] = four.w[2], w[3][i] = four.w[3];
    }
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < 4; ++j) out[4 * i + j] = w[j][i];
}

// Halves of words as they lie in memory, the lower one first: a loop over them needs no shifts.
using Half = uint16_t __attribute__((may_alias));
LRO_HD const Half* halves(const uint32_t* w) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are halved in memory");
  return reinterpret_cast<const Half*>(w);
}

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
