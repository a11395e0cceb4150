#include <cstring>
#include <vector>

#include "../kernels.h"
#include "clones.h"

namespace lro {
namespace {

template <class T, class Key>
LRO_HD void keys_loop(const T* LRO_RESTRICT x, int64_t n, Key* LRO_RESTRICT keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = rank_key(x[i]);
}

template <class Key>
LRO_HD int32_t count_loop(const Key* keys, int64_t n, Key least) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= least;
  return count;
}

// Attributes do not reach the instances of templates, so there is one function per type.
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
      Key least = 0;  // the key of the last one that is selected, found bit by bit
      for (Key bit = highest_bit<Key>(); bit; bit >>= 1)
        if (count_from(keys.data(), n, least | bit) >= r) least |= bit;
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

// Upwards from the last row on, then downwards from the first one: sources ascend, so none is written before it was read.
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
