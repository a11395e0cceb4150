// Adafactor's scaling on the CPU, fused with its use.
//
// Element (i, j) of x is scaled by factors of row i and column j. Each loop computes the scaled element y where it is
// needed, so neither a matrix of second moments nor one of scaled gradients is ever written.
#include <vector>

#include "../kernels.h"
#include "clones.h"

namespace lro {
namespace {

constexpr int64_t kGrain = 32768;  // elements that are worth a thread

// One row of a scaled matrix: x and by_column have n elements each.
template <class T>
struct Line {
  const T *x, *by_column;
  T by_row, most;
  int64_t n;
};

// The numbers of a step, rounded to T.
template <class T>
struct Numbers {
  T beta, gain, length, keep;
};

// Write a scaled row. Fields are copied to restricted locals, which promises that `out` does not alias them.
template <class T>
LRO_HD void scale_line(T* LRO_RESTRICT out, const Line<T>& y) {
  const T *LRO_RESTRICT x = y.x, *LRO_RESTRICT by_column = y.by_column;
  const T by_row = y.by_row, most = y.most;
  for (int64_t j = 0; j < y.n; ++j) out[j] = scaled(x[j], by_row, by_column[j], most);
}

// Return the sum of squares of a scaled row, in double, by kLanes partial sums (elements.h).
template <class T>
LRO_HD double energy_of_line(const Line<T>& y) {
  const T *LRO_RESTRICT x = y.x, *LRO_RESTRICT by_column = y.by_column;
  const T by_row = y.by_row, most = y.most;
  double sums[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= y.n; j += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const double value = scaled(x[j + lane], by_row, by_column[j + lane], most);
      sums[lane] += value * value;
    }
  for (int lane = 0; j + lane < y.n; ++lane) {
    const double value = scaled(x[j + lane], by_row, by_column[j + lane], most);
    sums[lane] += value * value;
  }
  return sum_in_halves(sums);
}

// Step a row of the weight by the scaled row.
template <class T>
LRO_HD void step_line(T* LRO_RESTRICT w, const Line<T>& y, const Numbers<T>& k) {
  const T *LRO_RESTRICT x = y.x, *LRO_RESTRICT by_column = y.by_column;
  const T by_row = y.by_row, most = y.most, gain = k.gain, length = k.length, keep = k.keep;
  for (int64_t j = 0; j < y.n; ++j)
    w[j] = w[j] * keep - scaled(x[j], by_row, by_column[j], most) * gain * length;
}

// Average the scaled row into the momentum m, and step a row of the weight by m.
template <class T>
LRO_HD void average_line(T* LRO_RESTRICT w, T* LRO_RESTRICT m, const Line<T>& y, const Numbers<T>& k) {
  const T *LRO_RESTRICT x = y.x, *LRO_RESTRICT by_column = y.by_column;
  const T by_row = y.by_row, most = y.most, beta = k.beta, gain = k.gain, length = k.length, keep = k.keep;
  for (int64_t j = 0; j < y.n; ++j) {
    const T mean = m[j] * beta + scaled(x[j], by_row, by_column[j], most) * gain;
    m[j] = mean;
    w[j] = w[j] * keep - mean * length;
  }
}

// target_clones has no effect on instances of templates, so there is one plain function per type.
#define LRO_PER_TYPE(T)                                                                                          \
  LRO_CLONES void scale(T* out, const Line<T>& y) { scale_line(out, y); }                                        \
  LRO_CLONES double energy(const Line<T>& y) { return energy_of_line(y); }                                       \
  LRO_CLONES void step(T* w, const Line<T>& y, const Numbers<T>& k) { step_line(w, y, k); }                      \
  LRO_CLONES void average(T* w, T* m, const Line<T>& y, const Numbers<T>& k) { average_line(w, m, y, k); }
LRO_PER_TYPE(float)
LRO_PER_TYPE(double)

// Call `work(i, first, line)` for row i of all matrices, whose first element has index `first`.
template <class T, class Work>
void for_each_line(const Factored<T>& y, const Work& work) {
  parallel(y.matrices * y.rows, 1 + kGrain / y.columns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* by_column = y.by_column + i / y.rows * y.columns;
      work(i, i * y.columns, Line<T>{y.x + i * y.columns, by_column, y.by_row[i], static_cast<T>(y.most), y.columns});
    }
  });
}

}  // namespace

template <class T>
void scale_factored(T* out, const Factored<T>& y) {
  for_each_line(y, [&](int64_t, int64_t first, const Line<T>& line) { scale(out + first, line); });
}

// Threads compute one sum per row. The rows are then added in order, so that the number of threads changes no bit.
template <class T>
void factored_energy(double* sums, const Factored<T>& y) {
  std::vector<double> of_lines(y.matrices * y.rows);
  for_each_line(y, [&](int64_t i, int64_t, const Line<T>& line) { of_lines[i] = energy(line); });
  for (int64_t matrix = 0; matrix < y.matrices; ++matrix) {
    sums[matrix] = 0;
    for (int64_t row = 0; row < y.rows; ++row) sums[matrix] += of_lines[matrix * y.rows + row];
  }
}

template <class T>
void step_factored(T* w, T* m, const Factored<T>& y, Move move) {
  const Numbers<T> k{static_cast<T>(move.beta), static_cast<T>(move.gain), static_cast<T>(move.length),
                     static_cast<T>(move.keep)};
  for_each_line(y, [&](int64_t, int64_t first, const Line<T>& line) {
    if (m) average(w + first, m + first, line, k);
    else step(w + first, line, k);
  });
}

template void scale_factored(float*, const Factored<float>&);
template void scale_factored(double*, const Factored<double>&);
template void factored_energy(double*, const Factored<float>&);
template void factored_energy(double*, const Factored<double>&);
template void step_factored(float*, float*, const Factored<float>&, Move);
template void step_factored(double*, double*, const Factored<double>&, Move);

}  // namespace lro
