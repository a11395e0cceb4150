// Gram matrices and signs of bases on the CPU.
//
// A Gram matrix Y^T Y in float32 loses the small singular values, since it squares them. Here products and sums are
// double, although Y is float32. The result (k, k) is symmetric, so only tiles of its upper triangle are computed. Each
// tile keeps a block of sums in registers while it runs through the rows, as in a matrix product. The order of every
// sum is that of the rows, for any number of threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "clones.h"

// The product of two floats is exact in double (24 + 24 <= 53 bits), so a fused multiply-add gives the same bits as two
// instructions. Contraction is therefore safe in this file, and only in this file.
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif

namespace lro {
namespace {

constexpr int kWide = 8, kTile = 2 * kWide, kHigh = 4;  // a vector, a tile, and rows of sums in registers
constexpr int64_t kDepth = 128;                         // rows of Y converted at once, so that they stay in cache
// A vector of doubles that may be unaligned in memory.
using Lanes = double __attribute__((vector_size(kWide * sizeof(double)), aligned(8)));

// sums (kTile, kTile) += left^T right for two tiles of columns, each (depth, kTile) row-major. kHigh rows of sums are
// held in registers at once, 8 vectors, while all terms are added.
LRO_CLONES void add_products(double* LRO_RESTRICT sums, const double* left, const double* right, int64_t depth) {
  for (int top = 0; top < kTile; top += kHigh) {
    Lanes held[kHigh][2];
    for (int i = 0; i < kHigh; ++i)
      for (int half = 0; half < 2; ++half)
        memcpy(&held[i][half], sums + (top + i) * kTile + half * kWide, sizeof(Lanes));
    for (int64_t term = 0; term < depth; ++term) {
      Lanes first, second;
      memcpy(&first, right + term * kTile, sizeof(Lanes));
      memcpy(&second, right + term * kTile + kWide, sizeof(Lanes));
      for (int i = 0; i < kHigh; ++i) {
        const double factor = left[term * kTile + top + i];
        held[i][0] += factor * first;
        held[i][1] += factor * second;
      }
    }
    for (int i = 0; i < kHigh; ++i)
      for (int half = 0; half < 2; ++half)
        memcpy(sums + (top + i) * kTile + half * kWide, &held[i][half], sizeof(Lanes));
  }
}

// Convert rows `from` to `from + depth` of Y to double, as tiles of columns (tiles, depth, kTile). Columns beyond the
// last become zeros, so that all tiles have one size.
LRO_CLONES void convert(double* LRO_RESTRICT tiles, const float* y, const Thin shape, int64_t from, int64_t depth) {
  for (int64_t tile = 0; tile * kTile < shape.columns; ++tile)
    for (int64_t term = 0; term < depth; ++term) {
      double* out = tiles + (tile * depth + term) * kTile;
      const int64_t first = tile * kTile, count = std::min<int64_t>(kTile, shape.columns - first);
      const float* in = y + (from + term) * shape.row_stride + first * shape.column_stride;
      for (int64_t i = 0; i < count; ++i) out[i] = in[i * shape.column_stride];
      for (int64_t i = count; i < kTile; ++i) out[i] = 0;
    }
}

// Two tiles of columns, whose product is one tile of the result.
struct Pair {
  int64_t left, right;
};

// Compute tiles `begin` to `end` of the upper triangle of one matrix and write them with their mirror images.
void gram_tiles(double* out, const float* y, const Thin shape, const std::vector<Pair>& pairs, int64_t begin,
                int64_t end) {
  const int64_t count = (shape.columns + kTile - 1) / kTile, k = shape.columns;
  std::vector<double> tiles(count * kTile * kDepth), sums((end - begin) * kTile * kTile, 0.0);
  for (int64_t from = 0; from < shape.rows; from += kDepth) {
    const int64_t depth = std::min(kDepth, shape.rows - from);
    convert(tiles.data(), y, shape, from, depth);
    for (int64_t pair = begin; pair < end; ++pair)
      add_products(sums.data() + (pair - begin) * kTile * kTile, tiles.data() + pairs[pair].left * depth * kTile,
                   tiles.data() + pairs[pair].right * depth * kTile, depth);
  }
  for (int64_t pair = begin; pair < end; ++pair)
    for (int64_t i = 0; i < kTile; ++i)
      for (int64_t j = 0; j < kTile; ++j) {
        const int64_t row = pairs[pair].left * kTile + i, column = pairs[pair].right * kTile + j;
        if (row > column || column >= k) continue;
        const double sum = sums[((pair - begin) * kTile + i) * kTile + j];
        out[row * k + column] = out[column * k + row] = sum;
      }
}

// -- Signs ------------------------------------------------------------------------------------------------------------
//
// A strip of 64 columns is read row by row, which follows the memory, and keeps one peak per column.

constexpr int kColumns = 64;

// Find the entry of each column of a strip (rows, count) that decides its sign: the first whose magnitude is at least
// `limit`, nearly the largest (elements.h). The search runs from the last row up, so that no condition ends it early.
template <class T>
LRO_HD void peaks(T* LRO_RESTRICT peak, T* LRO_RESTRICT limit, const T* x, int64_t rows, int64_t stride, int count) {
  for (int64_t row = 0; row < rows; ++row)
    for (int i = 0; i < count; ++i) limit[i] = larger(limit[i], x[row * stride + i]);
  for (int i = 0; i < count; ++i) limit[i] = magnitude(limit[i]) * nearly<T>();
  for (int64_t row = rows; row-- > 0;)
    for (int i = 0; i < count; ++i)
      peak[i] = magnitude(x[row * stride + i]) >= limit[i] ? x[row * stride + i] : peak[i];
}

// Negate the columns whose peak is negative. The condition is a select, not a branch, so that the loop vectorizes.
template <class T>
LRO_HD void flip(T* LRO_RESTRICT x, const T* peak, int64_t rows, int64_t stride, int count) {
  for (int64_t row = 0; row < rows; ++row)
    for (int i = 0; i < count; ++i) x[row * stride + i] = peak[i] < 0 ? -x[row * stride + i] : x[row * stride + i];
}

// Fix the signs of one strip.
template <class T>
LRO_HD void fix(T* x, int64_t rows, int64_t stride, int count) {
  T peak[kColumns] = {}, limit[kColumns] = {};
  peaks(peak, limit, x, rows, stride, count);
  flip(x, peak, rows, stride, count);
}

// target_clones has no effect on instances of templates, so there is one plain function per type.
LRO_CLONES void run(float* x, int64_t rows, int64_t stride, int count) { fix(x, rows, stride, count); }
LRO_CLONES void run(double* x, int64_t rows, int64_t stride, int count) { fix(x, rows, stride, count); }

}  // namespace

void gram(Queue, double* out, const float* y, int64_t matrices, Thin shape) {
  const int64_t count = (shape.columns + kTile - 1) / kTile, k = shape.columns;
  std::vector<Pair> pairs;
  for (int64_t left = 0; left < count; ++left)
    for (int64_t right = left; right < count; ++right) pairs.push_back({left, right});
  // Threads share the tiles of one matrix after another. A thread converts Y itself, so it should get several tiles.
  const auto total = static_cast<int64_t>(pairs.size()), grain = 1 + (1 << 13) / (shape.rows + 1);
  for (int64_t matrix = 0; matrix < matrices; ++matrix)
    parallel(total, grain, [&](int64_t begin, int64_t end) {
      gram_tiles(out + matrix * k * k, y + matrix * shape.rows * k, shape, pairs, begin, end);
    });
}

template <class T>
void fix_signs(Queue, T* basis, int64_t matrices, int64_t rows, int64_t columns) {
  const int64_t strips = (columns + kColumns - 1) / kColumns;
  parallel(matrices * strips, 1 + (1 << 14) / (rows * kColumns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % strips * kColumns;
      const int count = static_cast<int>(std::min<int64_t>(kColumns, columns - first));
      run(basis + i / strips * rows * columns + first, rows, columns, count);
    }
  });
}

template void fix_signs(Queue, float*, int64_t, int64_t, int64_t);
template void fix_signs(Queue, double*, int64_t, int64_t, int64_t);

}  // namespace lro
