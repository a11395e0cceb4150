// Cosine transforms of the columns of a matrix, and back, on the CPU.
//
// A vector of columns (16 in float32) at a time is copied into cache, transformed there (fourier.h) and used: its
// coefficients are summed, selected, or added to a weight. The matrix of all coefficients is never stored.
#include <algorithm>
#include <type_traits>

#include "../kernels.h"
#include "fourier.h"

namespace lro {
namespace {

using namespace fourier;

constexpr int64_t kDoubles = kBytes / sizeof(double);  // doubles of a vector
constexpr int64_t kGroup = 16;  // vectors of columns per partial sum, which fixes the order for any number of threads

// target_clones has no effect on instances of templates, so there is one plain function per type.
LRO_CLONES void transform(float* rows, const Plan<float>& plan, bool back) { transform_all(rows, plan, back); }
LRO_CLONES void transform(double* rows, const Plan<double>& plan, bool back) { transform_all(rows, plan, back); }

// -- Columns in memory to rows in cache, and back ---------------------------------------------------------------------

// Columns `first` to `first + count` of a matrix (n, columns) row-major. With `across` the matrix is stored transposed,
// (columns, n), and the columns are rows in memory.
struct Window {
  int64_t n, columns, first, count;
  bool across;
};

#if defined(__clang__) || __GNUC__ >= 12
#define LRO_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LRO_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Tile<T>::Places{__VA_ARGS__})
#endif

// A tile of 4 x 4 floats or 2 x 2 doubles, transposed in registers. 16-byte vectors exist on every processor.
template <class T>
struct Tile {
  static constexpr int64_t side = 16 / sizeof(T);
  typedef T Side __attribute__((vector_size(16)));
  typedef std::conditional_t<side == 4, int32_t, int64_t> Places __attribute__((vector_size(16)));
  Side x[side];

  LRO_INLINE void transpose() {
    if constexpr (side == 4) {
      const Side a = LRO_SHUFFLE(x[0], x[1], 0, 4, 1, 5), b = LRO_SHUFFLE(x[0], x[1], 2, 6, 3, 7);
      const Side c = LRO_SHUFFLE(x[2], x[3], 0, 4, 1, 5), d = LRO_SHUFFLE(x[2], x[3], 2, 6, 3, 7);
      x[0] = LRO_SHUFFLE(a, c, 0, 1, 4, 5), x[1] = LRO_SHUFFLE(a, c, 2, 3, 6, 7);
      x[2] = LRO_SHUFFLE(b, d, 0, 1, 4, 5), x[3] = LRO_SHUFFLE(b, d, 2, 3, 6, 7);
    } else {
      const Side a = LRO_SHUFFLE(x[0], x[1], 0, 2);
      x[1] = LRO_SHUFFLE(x[0], x[1], 1, 3), x[0] = a;
    }
  }
};

// Call `tile(i, lane)` for each whole tile of a window, from row i and column `lane` on, and `single(i, lane)` for each
// element that is in no whole tile. The outer step is one cache line of elements, so that each line is loaded once.
template <class T, class Whole, class Single>
LRO_INLINE void for_each_tile(const Window window, const Whole& tile, const Single& single) {
  constexpr int64_t side = Tile<T>::side;
  for (int64_t start = 0; start < window.n; start += kVectorLanes<T>) {
    const int64_t stop = std::min(window.n, start + kVectorLanes<T>);
    for (int64_t lane = 0; lane < window.count; lane += side) {
      int64_t i = start;
      if (lane + side <= window.count)
        for (; i + side <= stop; i += side) tile(i, lane);
      for (; i < stop; ++i)
        for (int64_t k = lane; k < std::min(window.count, lane + side); ++k) single(i, k);
    }
  }
}

// Copy a window of x to rows (n, lanes), row i to row place[i]. Lanes without a column become 0. Of the last two
// branches, the first has a size that the compiler knows, and its memcpy becomes one vector move.
template <class T>
void fetch(T* rows, const int64_t* place, const T* x, const Window& window) {
  const int64_t lanes = kVectorLanes<T>, bytes = window.count * sizeof(T);
  if (window.count < lanes) memset(rows, 0, window.n * kBytes);
  if (window.across) {
    const T* first = x + window.first * window.n;
    const int64_t n = window.n;
    const auto tile = [=](int64_t i, int64_t lane) {
      Tile<T> square;
      for (int64_t k = 0; k < square.side; ++k) memcpy(&square.x[k], first + (lane + k) * n + i, 16);
      square.transpose();
      for (int64_t k = 0; k < square.side; ++k) memcpy(rows + place[i + k] * lanes + lane, &square.x[k], 16);
    };
    for_each_tile<T>(window, tile,
                     [=](int64_t i, int64_t lane) { rows[place[i] * lanes + lane] = first[lane * n + i]; });
  } else if (window.count == lanes) {
    const T* first = x + window.first;
    for (int64_t i = 0; i < window.n; ++i) memcpy(rows + place[i] * lanes, first + i * window.columns, kBytes);
  } else {
    const T* first = x + window.first;
    for (int64_t i = 0; i < window.n; ++i) memcpy(rows + place[i] * lanes, first + i * window.columns, bytes);
  }
}

// w <- beta w + x for a number or a vector. If beta is 0, w is not read and may be uninitialized.
template <class T, class X>
LRO_INLINE void accumulate(T* w, const X& x, T beta) {
  X sum = x;
  if (beta != 0) {
    memcpy(&sum, w, sizeof(X));
    sum = sum * beta + x;
  }
  memcpy(w, &sum, sizeof(X));
}

// W <- beta W + rows for a window of W, where row place[i] belongs to row i of W.
template <class T>
LRO_INLINE void add_to(T* w, const int64_t* place, const T* rows, T beta, const Window& window) {
  const int64_t lanes = kVectorLanes<T>;
  if (window.across) {
    T* first = w + window.first * window.n;
    const int64_t n = window.n;
    const auto tile = [=](int64_t i, int64_t lane) {
      Tile<T> square;
      for (int64_t k = 0; k < square.side; ++k) memcpy(&square.x[k], rows + place[i + k] * lanes + lane, 16);
      square.transpose();
      for (int64_t k = 0; k < square.side; ++k) accumulate(first + (lane + k) * n + i, square.x[k], beta);
    };
    for_each_tile<T>(window, tile, [=](int64_t i, int64_t lane) {
      accumulate(first + lane * n + i, rows[place[i] * lanes + lane], beta);
    });
    return;
  }
  for (int64_t i = 0; i < window.n; ++i) {
    T* line = w + i * window.columns + window.first;
    const T* row = rows + place[i] * lanes;
    if (window.count == lanes) accumulate(line, load(row), beta);
    else
      for (int64_t lane = 0; lane < window.count; ++lane) accumulate(line + lane, row[lane], beta);
  }
}

LRO_CLONES void put(float* w, const int64_t* place, const float* rows, float beta, const Window window) {
  add_to(w, place, rows, beta, window);
}
LRO_CLONES void put(double* w, const int64_t* place, const double* rows, double beta, const Window window) {
  add_to(w, place, rows, beta, window);
}

// sums (n, kDoubles) += rows^2, or |rows|. Lane j of the sums adds columns j, j + kDoubles, ... of a vector, in double.
template <class T>
LRO_INLINE void add_powers(double* LRO_RESTRICT sums, const int64_t* place, const T* LRO_RESTRICT rows, int64_t n,
                           bool squares) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t part = 0; part < kVectorLanes<T>; part += kDoubles)
      for (int64_t lane = 0; lane < kDoubles; ++lane) {
        const double value = rows[place[i] * kVectorLanes<T> + part + lane];
        sums[i * kDoubles + lane] += squares ? value * value : std::abs(value);
      }
}

// There is one plain function per type and power. The constant last argument removes the choice from the loop.
LRO_CLONES void sum_squares(double* sums, const int64_t* place, const float* rows, int64_t n) {
  add_powers(sums, place, rows, n, true);
}
LRO_CLONES void sum_squares(double* sums, const int64_t* place, const double* rows, int64_t n) {
  add_powers(sums, place, rows, n, true);
}
LRO_CLONES void sum_magnitudes(double* sums, const int64_t* place, const float* rows, int64_t n) {
  add_powers(sums, place, rows, n, false);
}
LRO_CLONES void sum_magnitudes(double* sums, const int64_t* place, const double* rows, int64_t n) {
  add_powers(sums, place, rows, n, false);
}

// Memory that starts at a line of the cache, so that no vector crosses two lines.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t count) : memory_(count + kVectorLanes<T>) {}
  T* data() {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + (kBytes - address % kBytes) % kBytes / sizeof(T);
  }

 private:
  std::vector<T> memory_;
};

// Call `work(rows, first, count)` for each vector of columns `first` to `first + count`, with memory for rows (m,
// lanes) in cache. Each thread has memory of its own.
template <class T, class Work>
void for_each_vector(const Cosines& shape, const Work& work) {
  const int64_t vectors = (shape.n + kVectorLanes<T> - 1) / kVectorLanes<T>;
  const int64_t grain = 1 + (1 << 15) / (shape.m * kVectorLanes<T>);
  parallel(vectors, grain, [&](int64_t begin, int64_t end) {
    Aligned<T> memory(shape.m * kVectorLanes<T>);
    for (int64_t first = begin * kVectorLanes<T>; first < end * kVectorLanes<T>; first += kVectorLanes<T>)
      work(memory.data(), first, std::min(kVectorLanes<T>, shape.n - first));
  });
}

}  // namespace

template <class T>
void cosine_scores(double* sums, const T* x, Cosines shape, bool squares) {
  const Plan<T>& plan = plan_of<T>(shape.m);
  const auto &in = shape.back ? plan.coefficient : plan.sample, &out = shape.back ? plan.sample : plan.coefficient;
  const int64_t m = shape.m, width = kGroup * kVectorLanes<T>, groups = (shape.n + width - 1) / width;
  std::vector<double> totals(groups * m);
  parallel(groups, 1, [&](int64_t begin, int64_t end) {
    Aligned<T> memory(m * kVectorLanes<T>);
    Aligned<double> partial(m * kDoubles);
    T* rows = memory.data();
    double* sum = partial.data();
    // The lanes of a group are added at its end. The groups are added in order below, after all threads.
    for (int64_t group = begin; group < end; ++group) {
      memset(sum, 0, m * kBytes);
      const int64_t stop = std::min(shape.n, (group + 1) * width);
      for (int64_t first = group * width; first < stop; first += kVectorLanes<T>) {
        fetch(rows, in.data(), x, {m, shape.n, first, std::min(kVectorLanes<T>, stop - first), shape.across});
        transform(rows, plan, shape.back);
        (squares ? sum_squares(sum, out.data(), rows, m) : sum_magnitudes(sum, out.data(), rows, m));
      }
      for (int64_t i = 0; i < m; ++i)
        for (int64_t lane = 0; lane < kDoubles; ++lane) totals[group * m + i] += sum[i * kDoubles + lane];
    }
  });
  std::fill(sums, sums + m, 0.0);
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t i = 0; i < m; ++i) sums[i] += totals[group * m + i];
}

template <class T>
void cosine_rows(T* d, const T* x, Chosen chosen, Cosines shape) {
  const Plan<T>& plan = plan_of<T>(shape.m);
  const auto &in = shape.back ? plan.coefficient : plan.sample, &out = shape.back ? plan.sample : plan.coefficient;
  for_each_vector<T>(shape, [&](T* rows, int64_t first, int64_t count) {
    fetch(rows, in.data(), x, {shape.m, shape.n, first, count, shape.across});
    transform(rows, plan, shape.back);
    for (int64_t i = 0; i < chosen.count; ++i)
      memcpy(d + i * chosen.pitch + first, rows + out[chosen.index[i]] * kVectorLanes<T>, count * sizeof(T));
  });
}

template <class T>
void add_cosines(T* w, const T* d, Chosen chosen, T alpha, T beta, Cosines shape) {
  const Plan<T>& plan = plan_of<T>(shape.m);
  // The transform runs in the opposite direction: from coefficients to samples for DCT-II.
  const auto &in = shape.back ? plan.sample : plan.coefficient, &out = shape.back ? plan.coefficient : plan.sample;
  for_each_vector<T>(shape, [&](T* rows, int64_t first, int64_t count) {
    memset(rows, 0, shape.m * kBytes);
    for (int64_t i = 0; i < chosen.count; ++i) {
      T* row = rows + in[chosen.index[i]] * kVectorLanes<T>;
      const T* from = d + i * chosen.pitch + first;
      for (int64_t lane = 0; lane < count; ++lane) row[lane] += alpha * from[lane];
    }
    transform(rows, plan, !shape.back);
    put(w, out.data(), rows, beta, {shape.m, shape.n, first, count, shape.across});
  });
}

template void cosine_scores(double*, const float*, Cosines, bool);
template void cosine_scores(double*, const double*, Cosines, bool);
template void cosine_rows(float*, const float*, Chosen, Cosines);
template void cosine_rows(double*, const double*, Chosen, Cosines);
template void add_cosines(float*, const float*, Chosen, float, float, Cosines);
template void add_cosines(double*, const double*, Chosen, double, double, Cosines);

}  // namespace lro
