// Selections of the largest numbers, and moves of rows, on the CPU.
//
// The r-th largest key is found by binary search over its bits: a bit is set if at least r keys are that large. Each of
// the 32 or 64 steps counts keys, a loop that vectorizes. No sort is needed, and ties have a fixed order.
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "clones.h"

namespace lro {
namespace {

// Write the rank keys of n numbers.
template <class T, class Key>
LRO_HD void keys_loop(const T* LRO_RESTRICT x, int64_t n, Key* LRO_RESTRICT keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = rank_key(x[i]);
}

// Return how many keys are at least `least`.
template <class Key>
LRO_HD int32_t count_loop(const Key* keys, int64_t n, Key least) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= least;
  return count;
}

// target_clones has no effect on instances of templates, so there is one plain function per type.
#define LRO_PER_TYPE(T, Key)                                                                         \
  LRO_CLONES void to_keys(const T* x, int64_t n, Key* keys) { keys_loop(x, n, keys); }               \
  LRO_CLONES int32_t count_from(const Key* keys, int64_t n, Key least) { return count_loop(keys, n, least); }
LRO_PER_TYPE(float, uint32_t)
LRO_PER_TYPE(double, uint64_t)

}  // namespace

template <class T>
void select_top(Queue, int32_t* index, const T* scores, int64_t rows, int64_t n, int64_t r) {
  using Key = decltype(rank_key(T()));
  const auto select = [&](int64_t first, int64_t last) {
    std::vector<Key> keys(n);
    for (int64_t row = first; row < last; ++row) {
      to_keys(scores + row * n, n, keys.data());
      Key least = 0;  // the key of the last selected number
      for (Key bit = highest_bit<Key>(); bit; bit >>= 1)
        if (count_from(keys.data(), n, least | bit) >= r) least |= bit;
      // All larger keys are selected, and of the equal ones the first. least + 1 would overflow for the largest key.
      int64_t equals = r - (least == static_cast<Key>(-1) ? 0 : count_from(keys.data(), n, least + 1));
      int32_t* out = index + row * r;
      for (int64_t i = 0; i < n; ++i)
        if (keys[i] > least || (keys[i] == least && equals-- > 0)) *out++ = static_cast<int32_t>(i);
    }
  };
  parallel(rows, 1, select);
}

template void select_top(Queue, int32_t*, const float*, int64_t, int64_t, int64_t);
template void select_top(Queue, int32_t*, const double*, int64_t, int64_t, int64_t);

// Rows that move towards the end go first, from the last row down. Rows that move towards the start follow, from the
// first row up. Sources ascend, so in this order no row is overwritten before it is read. Threads divide the bytes of a
// row, not the rows, because the order of the rows matters.
void move_rows(char* x, const int64_t* source, int64_t rows, int64_t width) {
  parallel(width, 1 + (1 << 17) / rows, [&](int64_t begin, int64_t end) {
    const auto move = [&](int64_t row) {
      memcpy(x + row * width + begin, x + source[row] * width + begin, end - begin);
    };
    for (int64_t row = rows; row-- > 0;)
      if (0 <= source[row] && source[row] < row) move(row);
    for (int64_t row = 0; row < rows; ++row)
      if (source[row] > row) move(row);
    for (int64_t row = 0; row < rows; ++row)
      if (source[row] < 0) memset(x + row * width + begin, 0, end - begin);
  });
}

}  // namespace lro
