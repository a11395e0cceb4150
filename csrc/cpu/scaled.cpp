// Row and column norms, and updates scaled by them, on the CPU.
//
// Both norms of a matrix come from one pass over it. It is cut into tiles, whose sums stay in cache: a tile adds the
// squares of each row, and of each column. Partial sums are added in the order of the tiles, for any number of threads.
#include <algorithm>
#include <vector>

#include "../kernels.h"
#include "clones.h"

namespace lro {
namespace {

constexpr int64_t kHigh = 256, kWide = 1024;  // rows and columns of a tile; threads get whole tiles
constexpr int64_t kGrain = 1 << 15;           // elements that are worth a thread

// Widen to double, so that squares of float32 neither overflow nor lose bits.
LRO_HD double wide(float x) { return x; }
LRO_HD double wide(double x) { return x; }
LRO_HD double wide(bfloat16 x) { return to_float(x); }

// Add the squares of a row of n elements to `columns` (n,), and return their sum.
template <class T>
LRO_HD double line(const T* LRO_RESTRICT x, int64_t n, double* LRO_RESTRICT columns) {
  double part[kLanes] = {};
  const int64_t even = n / kLanes * kLanes;
  for (int64_t j = 0; j < even; j += kLanes)
    for (int i = 0; i < kLanes; ++i) {
      const double square = wide(x[j + i]) * wide(x[j + i]);
      columns[j + i] += square, part[i] += square;
    }
  for (int64_t j = even; j < n; ++j) {
    const double square = wide(x[j]) * wide(x[j]);
    columns[j] += square, part[j - even] += square;
  }
  return sum_in_halves(part);
}

// Add the squares of a tile (high, n) to the sums of its columns, and write the sums of its rows. target_clones has no
// effect on instances of templates, so there is one plain function per type.
#define LRO_PER_TYPE(T)                                                                                      \
  LRO_CLONES void tile(const T* x, int64_t high, int64_t n, int64_t stride, double* rows, double* columns) { \
    for (int64_t i = 0; i < high; ++i) rows[i] = line(x + i * stride, n, columns);                           \
  }
LRO_PER_TYPE(float)
LRO_PER_TYPE(double)
LRO_PER_TYPE(bfloat16)

// W <- keep W - x f for a row of n elements, with one factor per column.
template <class T>
LRO_HD void take_columns(T* LRO_RESTRICT w, const T* LRO_RESTRICT x, const T* LRO_RESTRICT f, int64_t n, T keep) {
  for (int64_t j = 0; j < n; ++j) w[j] = keep * w[j] - x[j] * f[j];
}
// The same step with one factor for the whole row.
template <class T>
LRO_HD void take_line(T* LRO_RESTRICT w, const T* LRO_RESTRICT x, T f, int64_t n, T keep) {
  for (int64_t j = 0; j < n; ++j) w[j] = keep * w[j] - x[j] * f;
}
// The steps for keep = 0. w may be uninitialized, and 0 times a NaN would be a NaN, so w is not read.
template <class T>
LRO_HD void put_columns(T* LRO_RESTRICT w, const T* LRO_RESTRICT x, const T* LRO_RESTRICT f, int64_t n) {
  for (int64_t j = 0; j < n; ++j) w[j] = -(x[j] * f[j]);
}
template <class T>
LRO_HD void put_line(T* LRO_RESTRICT w, const T* LRO_RESTRICT x, T f, int64_t n) {
  for (int64_t j = 0; j < n; ++j) w[j] = -(x[j] * f);
}

// target_clones has no effect on instances of templates, so there is one plain function per type.
#define LRO_TAKE(T)                                                                        \
  LRO_CLONES void take(T* w, const T* x, const T* f, bool per_column, int64_t n, T keep) { \
    if (keep == 0) per_column ? put_columns(w, x, f, n) : put_line(w, x, *f, n);           \
    else per_column ? take_columns(w, x, f, n, keep) : take_line(w, x, *f, n, keep);       \
  }
LRO_TAKE(float)
LRO_TAKE(double)

}  // namespace

template <class T>
void squares(Queue, double* rows, double* columns, const T* x, int64_t matrices, int64_t m, int64_t n) {
  const int64_t down = (m + kHigh - 1) / kHigh, across = (n + kWide - 1) / kWide;
  // One partial sum per tile: of_rows (across, m) and of_columns (down, n). An empty x has sums of 0.
  std::vector<double> of_rows(m * (across ? across : 1)), of_columns(n * (down ? down : 1));
  for (int64_t matrix = 0; matrix < matrices; ++matrix) {
    std::fill(of_columns.begin(), of_columns.end(), 0.0);
    parallel(down * across, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / across * kHigh, column = i % across * kWide;
        tile(x + (matrix * m + row) * n + column, std::min(kHigh, m - row), std::min(kWide, n - column), n,
             of_rows.data() + i % across * m + row, of_columns.data() + i / across * n + column);
      }
    });
    for (int64_t i = 1; i < across; ++i)
      for (int64_t row = 0; row < m; ++row) of_rows[row] += of_rows[i * m + row];
    for (int64_t i = 1; i < down; ++i)
      for (int64_t column = 0; column < n; ++column) of_columns[column] += of_columns[i * n + column];
    std::copy_n(of_rows.begin(), m, rows + matrix * m);
    std::copy_n(of_columns.begin(), n, columns + matrix * n);
  }
}

template void squares(Queue, double*, double*, const float*, int64_t, int64_t, int64_t);
template void squares(Queue, double*, double*, const double*, int64_t, int64_t, int64_t);
template void squares(Queue, double*, double*, const bfloat16*, int64_t, int64_t, int64_t);

template <class T>
void take_scaled(Queue, T* w, const T* x, const T* factors, int64_t matrices, int64_t m, int64_t n, bool per_row,
                 bool per_column, T keep) {
  // The number of factors of one matrix.
  const int64_t of_matrix = per_row ? m : per_column ? n : 1;
  parallel(matrices * m, 1 + kGrain / n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* f = factors + i / m * of_matrix + (per_row ? i % m : 0);
      take(w + i * n, x + i * n, f, per_column, n, keep);
    }
  });
}

template void take_scaled(Queue, float*, const float*, const float*, int64_t, int64_t, int64_t, bool, bool, float);
template void take_scaled(Queue, double*, const double*, const double*, int64_t, int64_t, int64_t, bool, bool, double);

}  // namespace lro
