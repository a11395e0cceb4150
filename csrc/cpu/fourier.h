// Cosine transforms of columns that lie in cache, a vector of columns at a time: one real transform of Fourier's per column
// (Makhoul 1980), of half the length in complex numbers, and a rotation. Inlined into the copies of cosines.cpp.
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
#pragma GCC diagnostic ignored "-Wpsabi"  // no vector is passed: all of it is inlined
#endif

namespace lro::fourier {

constexpr int64_t kBytes = 64;  // of a vector
constexpr double kPi = 3.14159265358979323846;

template <class T>
struct Vector {
  typedef T Type __attribute__((vector_size(kBytes)));
  static constexpr int64_t lanes = kBytes / sizeof(T);
};
template <class T>
using Line = typename Vector<T>::Type;
template <class T>
constexpr int64_t kAbreast = Vector<T>::lanes;

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

// -- the plan of one length --------------------------------------------------------------------------------------------

// Joins `radix` transforms of `length`; turns: (length, radix - 1) roots of unity.
template <class T>
struct Stage {
  int radix;
  int64_t length;
  const T* turns;
};

// A column of n numbers is n rows of vectors, which are half as many complex numbers: (2 q, 2 q + 1) are number q.
template <class T>
struct Plan {
  int64_t n;
  std::vector<int64_t> sample, coefficient;  // the rows of each
  std::vector<Stage<T>> stages;
  std::vector<std::vector<T>> turns;
  std::vector<T> rotations;  // 6 numbers for each pair of complex ones
  T ends, middle_cos, middle_sin;

  explicit Plan(int64_t n);
};

inline std::vector<int> radices(int64_t n) {
  std::vector<int> found;
  for (int radix : {4, 2, 3, 5, 7})
    for (; n % radix == 0; n /= radix) found.push_back(radix);
  return found;
}

template <class T>
Plan<T>::Plan(int64_t n) : n(n), sample(n), coefficient(n) {
  const int64_t half = n / 2;
  std::vector<int64_t> order(1, 0), wider;  // which complex number each place has before the first stage
  int64_t length = 1;
  for (int radix : radices(half)) {
    wider.resize(length * radix);
    for (int64_t j = 0; j < radix; ++j)
      for (int64_t k = 0; k < length; ++k) wider[j * length + k] = order[k] * radix + j;
    order = wider;
    std::vector<T> roots;
    for (int64_t k = 0; k < length; ++k)
      for (int64_t j = 1; j < radix; ++j) {
        const double angle = -2 * kPi * static_cast<double>(j * k) / static_cast<double>(length * radix);
        roots.push_back(static_cast<T>(std::cos(angle)));
        roots.push_back(static_cast<T>(std::sin(angle)));
      }
    turns.push_back(std::move(roots));
    stages.push_back({radix, length, turns.back().data()});
    length *= radix;
  }
  for (int64_t row = 0; row < n; ++row) {
    const int64_t place = 2 * order[row / 2] + row % 2;  // even numbers ascend, odd ones descend
    sample[2 * place < n ? 2 * place : 2 * (n - place) - 1] = row;
    coefficient[row == 1 ? half : row % 2 ? n - row / 2 : row / 2] = row;
  }
  const double scale = std::sqrt(2.0 / static_cast<double>(n)), turn = kPi / static_cast<double>(2 * n);
  for (int64_t k = 1; 2 * k < half; ++k)
    for (double number : {std::cos(4 * turn * k), -std::sin(4 * turn * k), scale / 2 * std::cos(turn * k),
                          scale / 2 * std::sin(turn * k), scale / 2 * std::cos(turn * (half - k)),
                          scale / 2 * std::sin(turn * (half - k))})
      rotations.push_back(static_cast<T>(number));
  ends = static_cast<T>(1 / std::sqrt(static_cast<double>(n)));
  middle_cos = static_cast<T>(scale * std::cos(kPi / 8));
  middle_sin = static_cast<T>(scale * std::sin(kPi / 8));
}

// Made once per length, and kept: a few numbers per row.
template <class T>
const Plan<T>& plan_of(int64_t n) {
  static std::mutex mutex;
  static std::map<int64_t, std::unique_ptr<Plan<T>>> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& plan = plans[n];
  if (!plan) plan = std::make_unique<Plan<T>>(n);
  return *plan;
}

// -- transforms of rows in cache. Backwards, real and imaginary parts have changed places, which conjugates all roots. ----

template <class T>
LRO_INLINE void turn(Line<T>& re, Line<T>& im, const T* root) {
  const Line<T> kept = re;
  re = kept * root[0] - im * root[1];
  im = kept * root[1] + im * root[0];
}

template <class T>
LRO_INLINE void by_two(Line<T> (&re)[2], Line<T> (&im)[2]) {
  const Line<T> a = re[0], b = im[0];
  re[0] = a + re[1], im[0] = b + im[1];
  re[1] = a - re[1], im[1] = b - im[1];
}

template <class T>
LRO_INLINE void by_four(Line<T> (&re)[4], Line<T> (&im)[4]) {
  const Line<T> a = re[0] + re[2], b = im[0] + im[2], c = re[0] - re[2], d = im[0] - im[2];
  const Line<T> e = re[1] + re[3], f = im[1] + im[3], g = re[1] - re[3], h = im[1] - im[3];
  re[0] = a + e, im[0] = b + f;
  re[1] = c + h, im[1] = d - g;
  re[2] = a - e, im[2] = b - f;
  re[3] = c - h, im[3] = d + g;
}

template <int kOdd>
struct Roots;  // cosines and sines of 2 pi j / kOdd
template <>
struct Roots<3> {
  static constexpr double cos[] = {1, -0.5, -0.5}, sin[] = {0, 0.86602540378443864676, -0.86602540378443864676};
};
template <>
struct Roots<5> {
  static constexpr double one = 0.30901699437494742410, two = -0.80901699437494742410;
  static constexpr double up = 0.95105651629515357212, low = 0.58778525229247312917;
  static constexpr double cos[] = {1, one, two, two, one}, sin[] = {0, up, low, -low, -up};
};
template <>
struct Roots<7> {
  static constexpr double one = 0.62348980185873353053, two = -0.22252093395631440429, three = -0.90096886790241912624;
  static constexpr double up = 0.78183148246802980871, top = 0.97492791218182360702, low = 0.43388373911755812048;
  static constexpr double cos[] = {1, one, two, three, three, two, one}, sin[] = {0, up, top, low, -low, -top, -up};
};

template <class T, int kOdd>
LRO_INLINE void by_odd(Line<T> (&re)[kOdd], Line<T> (&im)[kOdd]) {
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

// The F numbers from number `at` on, `length` apart; turned before they are joined, or when they have been parted.
template <int F, bool kTurned, bool kBack, class T>
LRO_INLINE void join(T* re, T* im, int64_t at, int64_t length, const T* turns) {
  Line<T> x[F], y[F];
  for (int j = 0; j < F; ++j) {
    x[j] = load(re + (at + j * length) * 2 * kAbreast<T>), y[j] = load(im + (at + j * length) * 2 * kAbreast<T>);
    if (kTurned && !kBack && j) turn<T>(x[j], y[j], turns + 2 * (j - 1));
  }
  if constexpr (F == 2) by_two<T>(x, y);
  else if constexpr (F == 4) by_four<T>(x, y);
  else by_odd<T, F>(x, y);
  for (int j = 0; j < F; ++j) {
    if (kTurned && kBack && j) turn<T>(x[j], y[j], turns + 2 * (j - 1));
    store<T>(re + (at + j * length) * 2 * kAbreast<T>, x[j]), store<T>(im + (at + j * length) * 2 * kAbreast<T>, y[j]);
  }
}

template <int F, bool kBack, class T>
LRO_INLINE void run_stage(T* re, T* im, int64_t half, const Stage<T>& stage) {
  constexpr int64_t plain = F % 2 ? 0 : 1;  // number 0 needs no turn: worth code of its own where lengths are powers of 2
  if constexpr (plain)
    for (int64_t at = 0; at < half; at += F * stage.length) join<F, false, kBack>(re, im, at, stage.length, stage.turns);
  for (int64_t k = plain; k < stage.length; ++k)
    for (int64_t at = k; at < half; at += F * stage.length)
      join<F, true, kBack>(re, im, at, stage.length, stage.turns + 2 * k * (F - 1));
}

template <bool kBack, class T>
LRO_INLINE void run_any(T* re, T* im, int64_t half, const Stage<T>& stage) {
  if (stage.radix == 4) run_stage<4, kBack>(re, im, half, stage);
  else if (stage.radix == 2) run_stage<2, kBack>(re, im, half, stage);
  else if (stage.radix == 3) run_stage<3, kBack>(re, im, half, stage);
  else if (stage.radix == 5) run_stage<5, kBack>(re, im, half, stage);
  else run_stage<7, kBack>(re, im, half, stage);
}

// Number k of half the length and its mirror image are two of the real transform; each rotated is two coefficients.
template <bool kBack, class T>
LRO_INLINE void rotate(T* one, T* other, const T* numbers) {
  Line<T> a = load(one), b = load(one + kAbreast<T>), c = load(other), d = load(other + kAbreast<T>);
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
  store<T>(one, a), store<T>(one + kAbreast<T>, b), store<T>(other, c), store<T>(other + kAbreast<T>, d);
}

template <bool kBack, class T>
LRO_INLINE void rotate_all(T* rows, const Plan<T>& plan) {
  const int64_t half = plan.n / 2, pitch = 2 * kAbreast<T>;
  const T* numbers = plan.rotations.data();
  for (int64_t k = 1; 2 * k < half; ++k, numbers += 6)
    rotate<kBack, T>(rows + k * pitch, rows + (half - k) * pitch, numbers);
  const Line<T> first = load(rows), last = load(rows + kAbreast<T>);
  store<T>(rows, (first + last) * plan.ends), store<T>(rows + kAbreast<T>, (first - last) * plan.ends);
  if (half % 2) return;
  T* middle = rows + half / 2 * pitch;
  const T cos = plan.middle_cos, sin = kBack ? -plan.middle_sin : plan.middle_sin;
  const Line<T> a = load(middle), b = load(middle + kAbreast<T>);
  store<T>(middle, a * cos - b * sin), store<T>(middle + kAbreast<T>, a * sin + b * cos);
}

template <class T>
LRO_INLINE void transform_all(T* rows, const Plan<T>& plan, bool back) {
  const int64_t half = plan.n / 2, count = static_cast<int64_t>(plan.stages.size());
  if (back) {
    rotate_all<true>(rows, plan);
    for (int64_t i = count; i-- > 0;) run_any<true>(rows + kAbreast<T>, rows, half, plan.stages[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) run_any<false>(rows, rows + kAbreast<T>, half, plan.stages[i]);
    rotate_all<false>(rows, plan);
  }
}

}  // namespace lro::fourier
