// Coefficients of the columns of a matrix in a dictionary of cosines, and back.
#include <algorithm>
#include <type_traits>

#include "../kernels.h"
#include "fourier.h"

namespace lro {
namespace {

using namespace fourier;

constexpr int64_t kDoubles = kBytes / sizeof(double);  // of a vector
constexpr int64_t kGroup = 16;  // vectors of columns that one thread sums: sums do not know how many threads add

// Attributes do not reach the instances of templates, so there is one function per type.
LRO_CLONES void transform(float* rows, const Plan<float>& plan, bool back) { transform_all(rows, plan, back); }
LRO_CLONES void transform(double* rows, const Plan<double>& plan, bool back) { transform_all(rows, plan, back); }

// -- columns in memory to rows in cache, and back ----------------------------------------------------------------------

// Some columns of a matrix (n, columns), or the lines of one that is stored turned.
struct Window {
  int64_t n, columns, first, count;
  bool across;
};

#if defined(__clang__) || __GNUC__ >= 12
#define LRO_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LRO_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Tile<T>::Places{__VA_ARGS__})
#endif

// Tiles of four numbers by four (two in double), which every processor turns in its registers.
template <class T>
struct Tile {
  static constexpr int64_t side = 16 / sizeof(T);
  typedef T Side __attribute__((vector_size(16)));
  typedef std::conditional_t<side == 4, int32_t, int64_t> Places __attribute__((vector_size(16)));
  Side x[side];

  LRO_INLINE void turn() {
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

// Calls `tile(i, lane)` for whole tiles of lines, and `one(i, lane)` for numbers beside them; each line of the cache once.
template <class T, class Whole, class One>
LRO_INLINE void each_tile(const Window window, const Whole& tile, const One& one) {
  constexpr int64_t side = Tile<T>::side;
  for (int64_t start = 0; start < window.n; start += kAbreast<T>) {
    const int64_t stop = std::min(window.n, start + kAbreast<T>);
    for (int64_t lane = 0; lane < window.count; lane += side) {
      int64_t i = start;
      if (lane + side <= window.count)
        for (; i + side <= stop; i += side) tile(i, lane);
      for (; i < stop; ++i)
        for (int64_t k = lane; k < std::min(window.count, lane + side); ++k) one(i, k);
    }
  }
}

template <class T>
void fetch(T* rows, const int64_t* place, const T* x, const Window& window) {
  const int64_t lanes = kAbreast<T>, bytes = window.count * sizeof(T);
  if (window.count < lanes) memset(rows, 0, window.n * kBytes);
  if (window.across) {
    const T* first = x + window.first * window.n;
    const int64_t n = window.n;
    const auto tile = [=](int64_t i, int64_t lane) {
      Tile<T> some;
      for (int64_t k = 0; k < some.side; ++k) memcpy(&some.x[k], first + (lane + k) * n + i, 16);
      some.turn();
      for (int64_t k = 0; k < some.side; ++k) memcpy(rows + place[i + k] * lanes + lane, &some.x[k], 16);
    };
    each_tile<T>(window, tile, [=](int64_t i, int64_t lane) { rows[place[i] * lanes + lane] = first[lane * n + i]; });
  } else if (window.count == lanes) {
    const T* first = x + window.first;
    for (int64_t i = 0; i < window.n; ++i) memcpy(rows + place[i] * lanes, first + i * window.columns, kBytes);
  } else {
    const T* first = x + window.first;
    for (int64_t i = 0; i < window.n; ++i) memcpy(rows + place[i] * lanes, first + i * window.columns, bytes);
  }
}

// w <- beta w + x, where w is not read if beta is 0.
template <class T, class X>
LRO_INLINE void add_one(T* w, const X& x, T beta) {
  X sum = x;
  if (beta != 0) {
    memcpy(&sum, w, sizeof(X));
    sum = sum * beta + x;
  }
  memcpy(w, &sum, sizeof(X));
}

template <class T>
LRO_INLINE void add_to(T* w, const int64_t* place, const T* rows, T beta, const Window& window) {
  const int64_t lanes = kAbreast<T>;
  if (window.across) {
    T* first = w + window.first * window.n;
    const int64_t n = window.n;
    const auto tile = [=](int64_t i, int64_t lane) {
      Tile<T> some;
      for (int64_t k = 0; k < some.side; ++k) memcpy(&some.x[k], rows + place[i + k] * lanes + lane, 16);
      some.turn();
      for (int64_t k = 0; k < some.side; ++k) add_one(first + (lane + k) * n + i, some.x[k], beta);
    };
    each_tile<T>(window, tile, [=](int64_t i, int64_t lane) {
      add_one(first + lane * n + i, rows[place[i] * lanes + lane], beta);
    });
    return;
  }
  for (int64_t i = 0; i < window.n; ++i) {
    T* line = w + i * window.columns + window.first;
    const T* row = rows + place[i] * lanes;
    if (window.count == lanes) add_one(line, load(row), beta);
    else
      for (int64_t lane = 0; lane < window.count; ++lane) add_one(line + lane, row[lane], beta);
  }
}

LRO_CLONES void put(float* w, const int64_t* place, const float* rows, float beta, const Window window) {
  add_to(w, place, rows, beta, window);
}
LRO_CLONES void put(double* w, const int64_t* place, const double* rows, double beta, const Window window) {
  add_to(w, place, rows, beta, window);
}

// sums (n, kDoubles) += |rows|^power, several columns in each.
template <class T>
LRO_INLINE void add_powers(double* LRO_RESTRICT sums, const int64_t* place, const T* LRO_RESTRICT rows, int64_t n,
                           bool squares) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t part = 0; part < kAbreast<T>; part += kDoubles)
      for (int64_t lane = 0; lane < kDoubles; ++lane) {
        const double one = rows[place[i] * kAbreast<T> + part + lane];
        sums[i * kDoubles + lane] += squares ? one * one : std::abs(one);
      }
}

LRO_CLONES void sum_squares(double* sums, const int64_t* place, const float* rows, int64_t n) {
  add_powers(sums, place, rows, n, true);
}
LRO_CLONES void sum_squares(double* sums, const int64_t* place, const double* rows, int64_t n) {
  add_powers(sums, place, rows, n, true);
}
LRO_CLONES void sum_sizes(double* sums, const int64_t* place, const float* rows, int64_t n) {
  add_powers(sums, place, rows, n, false);
}
LRO_CLONES void sum_sizes(double* sums, const int64_t* place, const double* rows, int64_t n) {
  add_powers(sums, place, rows, n, false);
}

// Memory that begins with a line of the cache, so that no vector lies in two.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t count) : memory_(count + kAbreast<T>) {}
  T* data() {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + (kBytes - address % kBytes) % kBytes / sizeof(T);
  }

 private:
  std::vector<T> memory_;
};

// Calls `work(rows in cache, first column, how many)` for vectors of columns.
template <class T, class Work>
void each_vector(const Cosines& shape, const Work& work) {
  const int64_t vectors = (shape.n + kAbreast<T> - 1) / kAbreast<T>, grain = 1 + (1 << 15) / (shape.m * kAbreast<T>);
  parallel(vectors, grain, [&](int64_t begin, int64_t end) {
    Aligned<T> memory(shape.m * kAbreast<T>);
    for (int64_t first = begin * kAbreast<T>; first < end * kAbreast<T>; first += kAbreast<T>)
      work(memory.data(), first, std::min(kAbreast<T>, shape.n - first));
  });
}

}  // namespace

template <class T>
void cosine_scores(double* sums, const T* x, Cosines shape, bool squares) {
  const Plan<T>& plan = plan_of<T>(shape.m);
  const auto &in = shape.back ? plan.coefficient : plan.sample, &out = shape.back ? plan.sample : plan.coefficient;
  const int64_t m = shape.m, width = kGroup * kAbreast<T>, groups = (shape.n + width - 1) / width;
  std::vector<double> totals(groups * m);
  parallel(groups, 1, [&](int64_t begin, int64_t end) {
    Aligned<T> memory(m * kAbreast<T>);
    Aligned<double> partial(m * kDoubles);
    T* rows = memory.data();
    double* sum = partial.data();
    for (int64_t group = begin; group < end; ++group) {
      memset(sum, 0, m * kBytes);
      const int64_t stop = std::min(shape.n, (group + 1) * width);
      for (int64_t first = group * width; first < stop; first += kAbreast<T>) {
        fetch(rows, in.data(), x, {m, shape.n, first, std::min(kAbreast<T>, stop - first), shape.across});
        transform(rows, plan, shape.back);
        (squares ? sum_squares(sum, out.data(), rows, m) : sum_sizes(sum, out.data(), rows, m));
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
  each_vector<T>(shape, [&](T* rows, int64_t first, int64_t some) {
    fetch(rows, in.data(), x, {shape.m, shape.n, first, some, shape.across});
    transform(rows, plan, shape.back);
    for (int64_t i = 0; i < chosen.count; ++i)
      memcpy(d + i * chosen.pitch + first, rows + out[chosen.index[i]] * kAbreast<T>, some * sizeof(T));
  });
}

template <class T>
void add_cosines(T* w, const T* d, Chosen chosen, T alpha, T beta, Cosines shape) {
  const Plan<T>& plan = plan_of<T>(shape.m);
  const auto &in = shape.back ? plan.sample : plan.coefficient, &out = shape.back ? plan.coefficient : plan.sample;
  each_vector<T>(shape, [&](T* rows, int64_t first, int64_t some) {
    memset(rows, 0, shape.m * kBytes);
    for (int64_t i = 0; i < chosen.count; ++i) {
      T* row = rows + in[chosen.index[i]] * kAbreast<T>;
      const T* from = d + i * chosen.pitch + first;
      for (int64_t lane = 0; lane < some; ++lane) row[lane] += alpha * from[lane];
    }
    transform(rows, plan, !shape.back);
    put(w, out.data(), rows, beta, {shape.m, shape.n, first, some, shape.across});
  });
}

template void cosine_scores(double*, const float*, Cosines, bool);
template void cosine_scores(double*, const double*, Cosines, bool);
template void cosine_rows(float*, const float*, Chosen, Cosines);
template void cosine_rows(double*, const double*, Chosen, Cosines);
template void add_cosines(float*, const float*, Chosen, float, float, Cosines);
template void add_cosines(double*, const double*, Chosen, double, double, Cosines);

}  // namespace lro
