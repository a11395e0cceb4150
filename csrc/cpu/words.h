// Random words of Philox for the loops of the CPU, and the way in which elements share counters.
//
// A counter gives 4 words: 4 numbers of 32 bits, or 8 of 16 bits. Element i of a stream is number i % lanes of counter
// i / lanes, with 4 or 8 lanes. A tensor may start within a counter, and then skips the first numbers of that counter.
#pragma once

#include <algorithm>

#include "../kernels.h"
#include "clones.h"

namespace lro {
namespace {

constexpr int kCounters = 64;            // counters drawn at once: their words, 1 KiB, stay in the nearest cache
constexpr int kBatch = 16;               // counters per round of the vectorized loop
constexpr int64_t kCounterGrain = 1024;  // counters that are worth a thread

// Write the words of counters `first` to `first + n` to out (n, 4). The loop writes them to w (4, n) first, one vector
// per word, and transposes at the end. n is at most kCounters.
LRO_CLONES void draw_words(uint64_t first, int n, const Stream stream, uint32_t* LRO_RESTRICT out) {
  uint32_t w[4][kCounters];
  for (int from = 0; from < n; from += kBatch)
    for (int i = from; i < from + kBatch; ++i) {  // of fixed length, so that no tail is compiled
      const Words four = philox(first + i, stream);
      w[0][i] = four.w[0], w[1][i] = four.w[1], w[2][i] = four.w[2], w[3][i] = four.w[3];
    }
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < 4; ++j) out[4 * i + j] = w[j][i];
}

// The halves of words as they are in memory, the lower half first. A loop over them needs no shifts. may_alias permits
// reading uint32_t memory through this type.
using Halfword = uint16_t __attribute__((may_alias));
LRO_HD const Halfword* halfwords(const uint32_t* w) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are halved in memory");
  return reinterpret_cast<const Halfword*>(w);
}

// Divide n elements, numbers `start` and up of a stream, among threads and pieces. Call
// `work(counter, count, from, position, n)` for each piece: elements `position` to `position + n` get the numbers from
// `from` on of the `count` counters that begin with `counter`. `from` is 0 except in the first piece.
template <class Work>
void for_each_piece(int64_t n, int lanes, int64_t start, const Work& work) {
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
