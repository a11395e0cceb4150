// Cosine transforms of columns in cache, one vector of columns at a time.
//
// The DCT-II of n real numbers x is computed by Makhoul's algorithm (IEEE Trans. ASSP 28, 1980), for even n:
//
//   1. Reorder: even places ascending, then odd places descending, v = (x_0, x_2, x_4, ..., x_5, x_3, x_1).
//   2. Take the real Fourier transform V of v. Neighbors (v_2q, v_2q+1) are read as n/2 complex numbers z_q, so a
//      complex transform Z of length n/2 is enough. With w = exp(-2 pi i / n) and h = n/2,
//          V_k = (Z_k + conj Z_(h-k)) / 2 + w^k (Z_k - conj Z_(h-k)) / 2i.
//   3. Rotate: with u_k = V_k exp(-pi i k / 2n), coefficient k is Re u_k, and coefficient n - k is -Im u_k. Both are
//      multiplied by sqrt(2/n), and coefficient 0 by sqrt(1/n). With these factors the transform is orthonormal.
//
// The complex transform has mixed radix: n/2 is a product of 2, 3, 4, 5 and 7, and each factor is a stage. A stage
// joins `radix` transforms of one length to a transform of `radix` times that length: it multiplies by roots of unity
// ("twiddles") and takes small transforms of `radix` numbers ("butterflies"). The first stage needs its input in
// digit-reversed order. That order and the reordering of step 1 are merged into one table, which is applied when
// columns are copied into cache (cosines.cpp).
//
// The inverse (DCT-III) is the transpose of an orthonormal transform. So it runs the transposed steps in reverse order.
//
// Memory: a vector holds the same element of several columns, 64 bytes (16 floats or 8 doubles). A transform of length
// n works in place on `rows` (n, lanes). Rows 2q and 2q + 1 are the real and the imaginary part of complex number q,
// for all columns of the vector. No instruction works across lanes, and everything is inlined into the clones of
// cosines.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "clones.h"

#define LRO_INLINE inline __attribute__((always_inline))
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are never passed to a function: every call is inlined
#endif

namespace lro::fourier {

constexpr int64_t kBytes = 64;  // of a vector: one line of the cache
constexpr double kPi = 3.14159265358979323846;

// The compiler's vector type, which it maps to one AVX-512 register, two AVX2 registers or four SSE registers.
template <class T>
struct Vector {
  typedef T Type __attribute__((vector_size(kBytes)));
  static constexpr int64_t lanes = kBytes / sizeof(T);
};
template <class T>
using Line = typename Vector<T>::Type;
template <class T>
constexpr int64_t kVectorLanes = Vector<T>::lanes;

// Load and store a vector. memcpy permits addresses that are not aligned, and compiles to moves.
template <class T>
LRO_INLINE Line<T> load(const T* x) {
  Line<T> line;
  memcpy(&line, x, kBytes);
  return line;
}
template <class T>
LRO_INLINE void store(T* x, const Line<T>& line) {
  memcpy(x, &line, kBytes);
}

// -- The plan of one length -------------------------------------------------------------------------------------------

// A stage joins `radix` transforms of `length`. twiddles (length, radix - 1, 2) holds real and imaginary parts of the
// roots exp(-2 pi i j k / N) for number k of transform j = 1 ... radix - 1, where N = length radix.
template <class T>
struct Stage {
  int radix;
  int64_t length;
  const T* twiddles;
};

// The tables for transforms of length n.
template <class T>
struct Plan {
  int64_t n;
  std::vector<int64_t> sample, coefficient;  // the row of sample i before the transform, of coefficient k after it
  std::vector<Stage<T>> stages;
  std::vector<std::vector<T>> twiddles;  // the memory of the stages' twiddles
  std::vector<T> rotations;              // (pairs, 6): the numbers of step 3 for k and h - k
  T ends, middle_cos, middle_sin;        // step 3 for k = 0 and h, and for k = h/2

  explicit Plan(int64_t n);
};

// Return the radices of the stages. 4 comes before 2: a radix-4 butterfly needs fewer passes over the cache.
inline std::vector<int> radices(int64_t n) {
  std::vector<int> found;
  for (int radix : {4, 2, 3, 5, 7})
    for (; n % radix == 0; n /= radix) found.push_back(radix);
  return found;
}

template <class T>
Plan<T>::Plan(int64_t n) : n(n), sample(n), coefficient(n) {
  const int64_t half = n / 2;
  // order[place] is the complex number that a place holds before the first stage (digit reversal). It grows by a digit
  // per stage: part j of the longer order holds the numbers that are j modulo the radix of the last stage.
  std::vector<int64_t> order(1, 0), longer;
  int64_t length = 1;
  for (int radix : radices(half)) {
    longer.resize(length * radix);
    for (int64_t j = 0; j < radix; ++j)
      for (int64_t k = 0; k < length; ++k) longer[j * length + k] = order[k] * radix + j;
    order = longer;
    std::vector<T> roots;
    for (int64_t k = 0; k < length; ++k)
      for (int64_t j = 1; j < radix; ++j) {
        const double angle = -2 * kPi * static_cast<double>(j * k) / static_cast<double>(length * radix);
        roots.push_back(static_cast<T>(std::cos(angle)));
        roots.push_back(static_cast<T>(std::sin(angle)));
      }
    twiddles.push_back(std::move(roots));
    stages.push_back({radix, length, twiddles.back().data()});
    length *= radix;
  }
  // `place` is the index in v of step 1. Its first half holds the even samples ascending, its second half the odd
  // samples descending. After the rotation, row 2k holds coefficient k and row 2k + 1 coefficient n - k; row 1 holds
  // number h.
  for (int64_t row = 0; row < n; ++row) {
    const int64_t place = 2 * order[row / 2] + row % 2;
    sample[2 * place < n ? 2 * place : 2 * (n - place) - 1] = row;
    coefficient[row == 1 ? half : row % 2 ? n - row / 2 : row / 2] = row;
  }
  // For each k: w^k, and the rotations of V_k and of V_(h-k), with the scale and the halves of step 2.
  const double scale = std::sqrt(2.0 / static_cast<double>(n)), angle = kPi / static_cast<double>(2 * n);
  for (int64_t k = 1; 2 * k < half; ++k)
    for (double number : {std::cos(4 * angle * k), -std::sin(4 * angle * k), scale / 2 * std::cos(angle * k),
                          scale / 2 * std::sin(angle * k), scale / 2 * std::cos(angle * (half - k)),
                          scale / 2 * std::sin(angle * (half - k))})
      rotations.push_back(static_cast<T>(number));
  ends = static_cast<T>(1 / std::sqrt(static_cast<double>(n)));
  middle_cos = static_cast<T>(scale * std::cos(kPi / 8));
  middle_sin = static_cast<T>(scale * std::sin(kPi / 8));
}

// Return the plan of a length. Plans are made once and kept for the life of the process; each has a few numbers per
// row.
template <class T>
const Plan<T>& plan_of(int64_t n) {
  static std::mutex mutex;
  static std::map<int64_t, std::unique_ptr<Plan<T>>> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& plan = plans[n];
  if (!plan) plan = std::make_unique<Plan<T>>(n);
  return *plan;
}

// -- Transforms of rows in cache --------------------------------------------------------------------------------------
//
// The transposed transform needs the conjugate roots. Exchanging the pointers of real and imaginary parts conjugates
// all of them, so both directions share the tables and the butterflies.

// Multiply a complex number, re + i im, by a root of unity.
template <class T>
LRO_INLINE void twiddle(Line<T>& re, Line<T>& im, const T* root) {
  const Line<T> old = re;
  re = old * root[0] - im * root[1];
  im = old * root[1] + im * root[0];
}

// Fourier transforms of 2 and of 4 numbers, which need no multiplication.
template <class T>
LRO_INLINE void butterfly2(Line<T> (&re)[2], Line<T> (&im)[2]) {
  const Line<T> a = re[0], b = im[0];
  re[0] = a + re[1], im[0] = b + im[1];
  re[1] = a - re[1], im[1] = b - im[1];
}

template <class T>
LRO_INLINE void butterfly4(Line<T> (&re)[4], Line<T> (&im)[4]) {
  const Line<T> a = re[0] + re[2], b = im[0] + im[2], c = re[0] - re[2], d = im[0] - im[2];
  const Line<T> e = re[1] + re[3], f = im[1] + im[3], g = re[1] - re[3], h = im[1] - im[3];
  re[0] = a + e, im[0] = b + f;
  re[1] = c + h, im[1] = d - g;
  re[2] = a - e, im[2] = b - f;
  re[3] = c - h, im[3] = d + g;
}

// cos(2 pi j / kOdd) and sin(2 pi j / kOdd) for j = 0 ... kOdd - 1.
template <int kOdd>
struct Roots;
template <>
struct Roots<3> {
  static constexpr double cos[] = {1, -0.5, -0.5}, sin[] = {0, 0.86602540378443864676, -0.86602540378443864676};
};
template <>
struct Roots<5> {
  static constexpr double cos1 = 0.30901699437494742410, cos2 = -0.80901699437494742410;
  static constexpr double sin1 = 0.95105651629515357212, sin2 = 0.58778525229247312917;
  static constexpr double cos[] = {1, cos1, cos2, cos2, cos1}, sin[] = {0, sin1, sin2, -sin2, -sin1};
};
template <>
struct Roots<7> {
  static constexpr double cos1 = 0.62348980185873353053, cos2 = -0.22252093395631440429;
  static constexpr double cos3 = -0.90096886790241912624, sin1 = 0.78183148246802980871;
  static constexpr double sin2 = 0.97492791218182360702, sin3 = 0.43388373911755812048;
  static constexpr double cos[] = {1, cos1, cos2, cos3, cos3, cos2, cos1};
  static constexpr double sin[] = {0, sin1, sin2, sin3, -sin3, -sin2, -sin1};
};

// Fourier transform of 3, 5 or 7 numbers. Outputs q and kOdd - q share their products: the sums of mirrored inputs meet
// the cosines, and their differences meet the sines.
template <class T, int kOdd>
LRO_INLINE void butterfly_odd(Line<T> (&re)[kOdd], Line<T> (&im)[kOdd]) {
  constexpr int kPairs = kOdd / 2;
  Line<T> sum_re[kPairs], sum_im[kPairs], gap_re[kPairs], gap_im[kPairs];
  const Line<T> first_re = re[0], first_im = im[0];
  for (int j = 0; j < kPairs; ++j) {
    sum_re[j] = re[j + 1] + re[kOdd - 1 - j], sum_im[j] = im[j + 1] + im[kOdd - 1 - j];
    gap_re[j] = re[j + 1] - re[kOdd - 1 - j], gap_im[j] = im[j + 1] - im[kOdd - 1 - j];
    re[0] += sum_re[j], im[0] += sum_im[j];
  }
  for (int q = 1; q <= kPairs; ++q) {
    Line<T> even_re = first_re, even_im = first_im, odd_re = {}, odd_im = {};
    for (int j = 0; j < kPairs; ++j) {
      const T cos = static_cast<T>(Roots<kOdd>::cos[(j + 1) * q % kOdd]);
      const T sin = static_cast<T>(Roots<kOdd>::sin[(j + 1) * q % kOdd]);
      even_re += cos * sum_re[j], even_im += cos * sum_im[j];
      odd_re += sin * gap_im[j], odd_im += sin * gap_re[j];
    }
    re[q] = even_re + odd_re, im[q] = even_im - odd_im;
    re[kOdd - q] = even_re - odd_re, im[kOdd - q] = even_im + odd_im;
  }
}

// Take the butterfly of F complex numbers in place: number `at` and those at distances of `length` after it. Forward,
// the twiddles come before the butterfly; backward, which is the transpose, they come after it.
template <int F, bool kTwiddled, bool kBack, class T>
LRO_INLINE void apply_butterfly(T* re, T* im, int64_t at, int64_t length, const T* twiddles) {
  Line<T> x[F], y[F];
  for (int j = 0; j < F; ++j) {
    x[j] = load(re + (at + j * length) * 2 * kVectorLanes<T>);
    y[j] = load(im + (at + j * length) * 2 * kVectorLanes<T>);
    if (kTwiddled && !kBack && j) twiddle<T>(x[j], y[j], twiddles + 2 * (j - 1));
  }
  if constexpr (F == 2) butterfly2<T>(x, y);
  else if constexpr (F == 4) butterfly4<T>(x, y);
  else butterfly_odd<T, F>(x, y);
  for (int j = 0; j < F; ++j) {
    if (kTwiddled && kBack && j) twiddle<T>(x[j], y[j], twiddles + 2 * (j - 1));
    store<T>(re + (at + j * length) * 2 * kVectorLanes<T>, x[j]);
    store<T>(im + (at + j * length) * 2 * kVectorLanes<T>, y[j]);
  }
}

// Run one stage over all numbers, twiddle by twiddle, so that each root is loaded once. Number 0 has roots of 1. With
// even radices it has code without multiplications, which pays for the first stages of powers of 2.
template <int F, bool kBack, class T>
LRO_INLINE void run_stage(T* re, T* im, int64_t half, const Stage<T>& stage) {
  constexpr int64_t plain = F % 2 ? 0 : 1;
  if constexpr (plain)
    for (int64_t at = 0; at < half; at += F * stage.length)
      apply_butterfly<F, false, kBack>(re, im, at, stage.length, stage.twiddles);
  for (int64_t k = plain; k < stage.length; ++k)
    for (int64_t at = k; at < half; at += F * stage.length)
      apply_butterfly<F, true, kBack>(re, im, at, stage.length, stage.twiddles + 2 * k * (F - 1));
}

// Select the code of a radix, which is known at run time.
template <bool kBack, class T>
LRO_INLINE void run_any(T* re, T* im, int64_t half, const Stage<T>& stage) {
  if (stage.radix == 4) run_stage<4, kBack>(re, im, half, stage);
  else if (stage.radix == 2) run_stage<2, kBack>(re, im, half, stage);
  else if (stage.radix == 3) run_stage<3, kBack>(re, im, half, stage);
  else if (stage.radix == 5) run_stage<5, kBack>(re, im, half, stage);
  else run_stage<7, kBack>(re, im, half, stage);
}

// Steps 2 and 3 for the pair k and h - k, in place: four real rows in, four coefficients out. `first` and `mirror` are
// the rows of Z_k and Z_(h-k). Backward is the transpose. numbers: w^k, and cosine and sine of both scaled rotations.
template <bool kBack, class T>
LRO_INLINE void rotate(T* first, T* mirror, const T* numbers) {
  Line<T> a = load(first), b = load(first + kVectorLanes<T>), c = load(mirror), d = load(mirror + kVectorLanes<T>);
  const T re = numbers[0], im = numbers[1], cos1 = numbers[2], sin1 = numbers[3], cos2 = numbers[4], sin2 = numbers[5];
  if (kBack) {
    const Line<T> x = a * cos1 + b * sin1, y = a * sin1 - b * cos1, u = c * cos2 + d * sin2, v = c * sin2 - d * cos2;
    const Line<T> p = x - u, q = y + v, even = x + u, odd = y - v, s = re * p + im * q, t = re * q - im * p;
    a = even - t, b = odd + s, c = even + t, d = s - odd;
  } else {
    const Line<T> p = a - c, q = b + d, even = a + c, odd = b - d, s = re * q + im * p, t = im * q - re * p;
    const Line<T> x = even + s, y = odd + t, u = even - s, v = t - odd;
    a = x * cos1 + y * sin1, b = x * sin1 - y * cos1, c = u * cos2 + v * sin2, d = u * sin2 - v * cos2;
  }
  store<T>(first, a), store<T>(first + kVectorLanes<T>, b), store<T>(mirror, c), store<T>(mirror + kVectorLanes<T>, d);
}

// Steps 2 and 3 for all pairs. k = 0 pairs with h, and both coefficients are real. If h is even, k = h/2 is its own
// mirror image, and its rotation by pi / 8 is all that is left to do.
template <bool kBack, class T>
LRO_INLINE void rotate_all(T* rows, const Plan<T>& plan) {
  const int64_t half = plan.n / 2, pitch = 2 * kVectorLanes<T>;
  const T* numbers = plan.rotations.data();
  for (int64_t k = 1; 2 * k < half; ++k, numbers += 6)
    rotate<kBack, T>(rows + k * pitch, rows + (half - k) * pitch, numbers);
  const Line<T> first = load(rows), last = load(rows + kVectorLanes<T>);
  store<T>(rows, (first + last) * plan.ends), store<T>(rows + kVectorLanes<T>, (first - last) * plan.ends);
  if (half % 2) return;
  T* middle = rows + half / 2 * pitch;
  const T cos = plan.middle_cos, sin = kBack ? -plan.middle_sin : plan.middle_sin;
  const Line<T> a = load(middle), b = load(middle + kVectorLanes<T>);
  store<T>(middle, a * cos - b * sin), store<T>(middle + kVectorLanes<T>, a * sin + b * cos);
}

// Transform rows (n, lanes) in place: samples to coefficients, or back.
template <class T>
LRO_INLINE void transform_all(T* rows, const Plan<T>& plan, bool back) {
  const int64_t half = plan.n / 2, count = static_cast<int64_t>(plan.stages.size());
  if (back) {
    rotate_all<true>(rows, plan);
    for (int64_t i = count; i-- > 0;) run_any<true>(rows + kVectorLanes<T>, rows, half, plan.stages[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) run_any<false>(rows, rows + kVectorLanes<T>, half, plan.stages[i]);
    rotate_all<false>(rows, plan);
  }
}

}  // namespace lro::fourier
