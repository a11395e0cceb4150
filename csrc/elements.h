// The arithmetic of one element, for every backend.
//
// The loops in cpu/ and cuda/ decide which thread handles which element. They call the functions below for the numbers.
// Host compilers and nvcc both compile this file, so it includes neither torch nor a CUDA library.
//
// Every product and every sum is rounded separately: all compilers run without contraction (-ffp-contract=off,
// -fmad=false). A CPU, a GPU and the reference in lowrank_optim/ops/reference/ therefore give equal bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define LRO_HD __host__ __device__ __forceinline__
#else
#define LRO_HD inline __attribute__((always_inline))
#endif

namespace lro {

// Return the bits of `x` as a value of another type of the same size. memcpy is the form that C++17 allows.
template <class To, class From>
LRO_HD To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

// -- bfloat16 ---------------------------------------------------------------------------------------------------------
//
// A bfloat16 is the upper 16 bits of a float: the same 8 bits of exponent, and 7 bits of fraction instead of 23.
// Reading a bfloat16 is exact. Writing it cuts off 16 bits, and three ways of rounding are needed:
//
// - Rounding to nearest has the smallest error. It loses every update below half a unit in the last place.
// - Stochastic rounding adds 16 random bits below the cut and then truncates. The result is the upper neighbor with a
//   probability equal to the distance from the lower one, so that E[rounded] = x and small updates survive on average.
// - A compensated sum (Kahan) rounds to nearest and stores the error as a second bfloat16. The next step adds it back.

struct bfloat16 {
  uint16_t bits;
};

// Widen to float32, exactly. The overload for float lets loops be written once for both types.
LRO_HD float to_float(float x) { return x; }
LRO_HD float to_float(bfloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }

// Store a float32 in either type.
LRO_HD void assign(float& out, float x) { out = x; }

// Round to nearest, ties to even. Adding 0x7FFF plus the lowest kept bit carries into the kept half exactly when the
// value must go up. That carry could turn a NaN into another number, so every NaN becomes the quiet NaN 0x7FC0.
LRO_HD void assign(bfloat16& out, float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// Round stochastically. `noise16` is uniform below 2^16; its carry into the kept half is the decision to round up.
LRO_HD bfloat16 round_stochastic(float x, uint32_t noise16) {
  return bfloat16{static_cast<uint16_t>((bits_as<uint32_t>(x) + noise16) >> 16)};
}

// -- Weights in bfloat16 ----------------------------------------------------------------------------------------------
//
// A step W <- keep W + x is computed in float32 and rounded once, weight decay included. A rounding of its own would
// lose the decay, which is far smaller than a unit in the last place of a bfloat16.

// Return a weight after its step and before its rounding. keep: the factor that weight decay leaves; x: the update.
LRO_HD float moved(float w, float x, float keep) { return w * keep + x; }

// Step a weight and round it to nearest.
LRO_HD void add_nearest(bfloat16& w, float x, float keep) { assign(w, moved(to_float(w), x, keep)); }

// Add with compensation. `owed` is the part of the exact sum that earlier roundings have withheld from w. It is itself
// rounded to bfloat16, so w + owed has about 16 significant bits.
LRO_HD void add_kahan(bfloat16& w, bfloat16& owed, float x, float keep) {
  const float exact = moved(to_float(w) + to_float(owed), x, keep);
  bfloat16 rounded;
  assign(rounded, exact);
  assign(owed, exact - to_float(rounded));
  w = rounded;
}

// Step a weight and round it stochastically by 16 random bits.
LRO_HD void add_stochastic(bfloat16& w, float x, float keep, uint32_t noise16) {
  w = round_stochastic(moved(to_float(w), x, keep), noise16);
}

// Add to an element of a dense tensor; bfloat16 is widened, added and rounded once.
LRO_HD void add(float& out, float x) { out += x; }
LRO_HD void add(double& out, double x) { out += x; }
LRO_HD void add(bfloat16& out, bfloat16 x) { assign(out, to_float(out) + to_float(x)); }

// -- Adam -------------------------------------------------------------------------------------------------------------
//
//   m <- beta1 m + (1 - beta1) r,   v <- beta2 v + (1 - beta2) r^2,   r <- m gain / (sqrt(v) inverse_root + eps)
//
// with gain = 1 / (1 - beta1^t) and inverse_root = 1 / sqrt(1 - beta2^t). The direction overwrites the gradient, which
// saves a tensor. An element costs one square root and one division; both corrections are multiplications.

// The factors that all elements share. They are computed in double and rounded once to T.
template <class T>
struct AdamNumbers {
  T beta1, rest1, beta2, rest2, eps, gain, inverse_root;
};

// Return the shared factors. power1 and power2 are beta1^t and beta2^t, computed by the caller.
template <class T>
LRO_HD AdamNumbers<T> adam_numbers(double beta1, double beta2, double eps, double power1, double power2) {
  return {static_cast<T>(beta1),
          static_cast<T>(1 - beta1),
          static_cast<T>(beta2),
          static_cast<T>(1 - beta2),
          static_cast<T>(eps),
          static_cast<T>(1 / (1 - power1)),
          static_cast<T>(1 / sqrt(1 - power2))};
}

LRO_HD float root(float x) { return sqrtf(x); }
LRO_HD double root(double x) { return sqrt(x); }

// Update both moments of one element, and overwrite the projected gradient r with Adam's direction.
template <class T>
LRO_HD void adam(T& m, T& v, T& r, const AdamNumbers<T>& k) {
  m = m * k.beta1 + r * k.rest1;
  v = v * k.beta2 + r * k.rest2 * r;
  r = m * k.gain / (root(v) * k.inverse_root + k.eps);
}

// -- Adafactor --------------------------------------------------------------------------------------------------------

//
// Adafactor keeps one number per row and one per column of the second moment (m, n), m + n numbers instead of m n. The
// scale of element (i, j) is then a product of two factors, and no (m, n) matrix of scales is ever stored.

// Scale x by the factor of its row times the factor of its column, or by `most` if that is less. The comparison is
// written so that a NaN in a factor reaches the result instead of being replaced by `most`.
template <class T>
LRO_HD T scaled(T x, T row, T column, T most) {
  const T factor = row * column;
  return x * (most < factor ? most : factor);
}

// -- Bases ------------------------------------------------------------------------------------------------------------
//
// A singular vector is unique up to its sign, and solvers of different devices choose different signs. Here the entry
// of largest magnitude in each column becomes positive, so that CPUs, GPUs and ranks agree on the basis. Several
// entries may be equal up to rounding errors, which differ between devices. Then the first of them becomes positive.

LRO_HD float magnitude(float x) { return fabsf(x); }
LRO_HD double magnitude(double x) { return fabs(x); }

// Return the share of the largest magnitude from which on a magnitude counts as equal to it. The difference is then no
// more than rounding errors.
template <class T>
LRO_HD constexpr T nearly() {
  return sizeof(T) == sizeof(float) ? T(1) - T(1) / (1 << 14) : T(1) - T(1) / (1 << 30);
}

// Return the number of larger magnitude, and the first number if both magnitudes are equal.
template <class T>
LRO_HD T larger(T first, T second) {
  return magnitude(second) > magnitude(first) ? second : first;
}

// -- Philox4x32-10 (Salmon et al., SC 2011) ---------------------------------------------------------------------------
//
// A counter-based generator has no state. It is a keyed mixing function from a 128-bit counter to 128 random bits.
// Element i of a stream is therefore a pure function of (key, purpose, time, i). Any thread, shard or device can draw
// its own elements, in any order, and get the numbers that a single process would have drawn. A resumed run stores
// nothing.
//
// The counter is (number of the counter: 64 bits, purpose: 32 bits, time: 32 bits). The key is a hash of the seed and
// of the parameter's name. Purpose separates uses within one step; time is a step or a refresh count.

struct Stream {
  uint32_t key0, key1, purpose, time;
};

struct Words {
  uint32_t w[4];
};

// Return number `lane` of the eight 16-bit numbers of a counter; each word gives its lower half first.
LRO_HD uint32_t bits16(const Words& words, int lane) { return words.w[lane / 2] >> (lane % 2 * 16) & 0xFFFFu; }

// Return the four 32-bit words of one counter: ten rounds of two 32 x 32 -> 64 bit products. The halves of the products
// are exchanged and combined with the key, to which a constant is added in every round.
LRO_HD Words philox(uint64_t counter, const Stream& s) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = s.purpose, c3 = s.time;
  uint32_t k0 = s.key0, k1 = s.key1;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Both functions return midpoints of equal cells of (0, 1), so that 0 and 1 never occur. There are 2^16 cells for the
// noise of rounding and 2^23 cells for uniform numbers; all of these midpoints are exact floats.
LRO_HD float noise_of(uint32_t bits16) { return (static_cast<float>(static_cast<int32_t>(bits16)) + 0.5f) * 0x1p-16f; }
LRO_HD float uniform_of(uint32_t word) {
  return static_cast<float>((static_cast<double>(static_cast<int32_t>(word >> 9)) + 0.5) * 0x1p-23);
}

// -- Normal numbers ---------------------------------------------------------------------------------------------------
//
// Box and Muller: two uniform numbers u and v give two normal numbers, sqrt(-2 log u) times the cosine and the sine of
// 2 pi v. Libraries differ in the last bits of these functions. Here they are minimax polynomials in double, with
// relative errors below 2^-33: made of sums and products only, they have equal bits everywhere and can be vectorized.

// Return the polynomial of x with these coefficients, from the constant term upwards, by Horner's rule.

template <class... More>
LRO_HD double polynomial(double x, double first, More... more) {
  if constexpr (sizeof...(more) == 0) return first;
  else return first + x * polynomial(x, more...);
}

// Return sqrt(-2 log u) for u = (word + 1/2) 2^-32.
//
// u 2^32 is split into 2^(exponent - 1) (1 + x) with 1 + x in [sqrt(1/2), sqrt(2)). Then -2 log u is a multiple of
// 2 log 2 plus x times a polynomial in x. The split is integer arithmetic on the bits of a double. Conversions from
// unsigned and from 64-bit integers have no vector instruction before AVX-512, so two tricks replace them. The sign bit
// of `word` is flipped and 2^31 is added back as a double. The exponent is inserted into the last bits of 2^52.
LRO_HD float normal_length(uint32_t word) {
  constexpr uint64_t kOne = 1ull << 52;                      // an exponent of 1, in the bits of a double
  constexpr uint64_t kLeast = 0x3FE6A09E667F3BCDull - kOne;  // the bits of sqrt(1/2) / 2, a lower bound of u 2^32
  constexpr double kPlain = 0x1p52;                          // its last bits count units: an integer can be inserted
  constexpr double kPerHalving = 1.3862943611198906;         // 2 log 2
  const double scaled = static_cast<double>(static_cast<int32_t>(word ^ 0x80000000u)) + 2147483648.5;  // u 2^32
  const uint64_t bits = bits_as<uint64_t>(scaled), exponent = (bits - kLeast) / kOne;
  const double halvings = kPlain + 33.0 - bits_as<double>(bits_as<uint64_t>(kPlain) | exponent);
  const double x = bits_as<double>(bits - exponent * kOne + kOne) - 1.0;  // from sqrt(1/2) - 1 to sqrt(2) - 1
  const double log = x * polynomial(x, -2.000000000069894, 1.0000000066099737, -0.6666666302869585, 0.4999986696525973,
                                    -0.4000022680367106, 0.3334095800110999, -0.28571005412477596, 0.24821176285110688,
                                    -0.2204231241325923, 0.21762395628763806, -0.2146772654188622, 0.1196994964197827);
  return sqrtf(static_cast<float>(halvings * kPerHalving + log));
}

// Return two normal numbers. The angle is (angle + 1/2) 2^-32 of a full turn. It is reduced to the nearest quarter turn
// plus at most an eighth of a turn, where the polynomials hold. An odd quarter exchanges cosine and sine, and quarters
// 1 to 3 change signs. Both are done by masks, since a branch would prevent vectorization.
LRO_HD void normal_pair(uint32_t radius, uint32_t angle, float& first, float& second) {
  const uint32_t turn = angle + (1u << 29), quarter = turn >> 30;
  const int32_t past = static_cast<int32_t>(turn & 0x3FFFFFFFu) - (1 << 29);
  const double x = (static_cast<double>(past) + 0.5) * 0x1p-30, square = x * x, length = normal_length(radius);
  const double cosine = polynomial(square, 0.9999999999439587, -1.2337005395654945, 0.25366918260255533,
                                   -0.020859936041659748, 0.0009033629646812772);
  const double sine = x * polynomial(square, 1.5707963267877518, -0.6459640961024318, 0.07969258184293669,
                                     -0.0046812606280718936, 0.00015819507558202523);
  const uint32_t along = bits_as<uint32_t>(static_cast<float>(length * cosine));
  const uint32_t across = bits_as<uint32_t>(static_cast<float>(length * sine));
  const uint32_t odd = 0u - (quarter & 1u);  // a mask of all bits if cosine and sine are exchanged, else 0
  first = bits_as<float>((along ^ ((along ^ across) & odd)) ^ ((quarter + 1) & 2u) << 30);
  second = bits_as<float>((across ^ ((along ^ across) & odd)) ^ (quarter & 2u) << 30);
}

// -- Blockwise quantization -------------------------------------------------------------------------------------------
//
// A line of k elements is cut into blocks. Every block stores one or two floats and a code per element, so an outlier
// costs precision in its own block only (Dettmers et al., ICLR 2022). There are three kinds of codes:
//
// - code map: x / absmax is rounded to the nearest of at most 256 ascending values, or to a random neighbor (dither);
// - affine: a uniform grid from the minimum of the block to its maximum;
// - sixteenths: k / 16 of the largest element, k = 1 ... 16, for second moments, where a 0 would make updates explode.
//
// A search for the nearest value would cost log2(256) dependent steps. Instead, tables are indexed by the upper 16 bits
// of the float: they give the lowest code that such a float may get. Floats that share these bits differ by less than
// 1/128, and the values of a map are further apart. At most one midpoint is among them, and one comparison decides.

constexpr float kTiny = 1.17549435e-38f;  // the smallest normal number: no block is divided by less

// Return an integer that orders like the float. Integer maxima are associative and vectorize without -ffast-math.
// The map is its own inverse.
LRO_HD int32_t ordered(float x) {
  const int32_t bits = bits_as<int32_t>(x);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
LRO_HD float unordered(int32_t key) { return bits_as<float>(key ^ ((key >> 31) & 0x7FFFFFFF)); }

// A code map and its two tables.
struct CodeMap {
  const float* values;    // (size,) ascending
  const uint8_t* lower;   // (65536,) the lowest code, by the upper half of a float plus 2^15
  const float* midpoint;  // (65536,) the midpoint between that code and the next one
  int32_t size;
};

// The stored peak of a block, and the number that its elements are divided by.
struct Peak {
  float stored, divisor;
};

// Return the peak of a block from its largest and smallest element. `with_sign` stores the sign of the element of
// largest magnitude, which then maps to 1: signed maps have 1 but no -1. A block of zeros is divided by kTiny.
LRO_HD Peak peak_of(float top, float bottom, bool with_sign) {
  const bool negative = -bottom > top;
  const float largest = negative ? -bottom : top;
  const float stored = with_sign && negative ? bottom : largest;
  return {stored, largest < kTiny ? kTiny : stored};
}

// Return the code of the value nearest to `unit`; the midpoint itself goes to the lower code.
LRO_HD int32_t nearest_code(float unit, const CodeMap& map) {
  const int32_t upper = (bits_as<int32_t>(unit) >> 16) + (1 << 15);
  return map.lower[upper] + (unit > map.midpoint[upper] ? 1 : 0);
}

// A code map without the 256 KiB table of midpoints. Adam's loop reads and writes two maps at once, and the remaining
// tables, 64 KiB each, fit the near caches. Midpoints are computed from the values.
struct Levels {
  const float* values;   // (size,) ascending
  const uint8_t* lower;  // (65536,) the lowest code, by the upper half of a float plus 2^15
  int32_t size;
};

// Return the midpoint between a code and the next one; above the last code there is none.
LRO_HD float midpoint_above(int32_t code, const Levels& levels) {
  return code + 1 < levels.size ? (levels.values[code + 1] + levels.values[code]) * 0.5f : INFINITY;
}

// Return the lowest code that `unit` may get; the next code is right if `unit` is above the midpoint.
LRO_HD int32_t lowest_code(float unit, const Levels& levels) {
  return levels.lower[(bits_as<int32_t>(unit) >> 16) + (1 << 15)];
}

// Return the last code whose value is not above `unit`, or 0. The nearest code is at most one too high.
LRO_HD int32_t code_below(float unit, const CodeMap& map) {
  const int32_t nearest = nearest_code(unit, map);
  return nearest - ((map.values[nearest] > unit) & (nearest > 0));
}

// Return the distance to the next value. The last code has no next value; 1 avoids a division by zero.
LRO_HD float gap_above(int32_t code, const CodeMap& map) {
  return code + 1 < map.size ? map.values[code + 1] - map.values[code] : 1.0f;
}

// Return the code below `unit` or the code above it, so that the expected value is `unit`. The upper code is chosen if
// the uniform `noise` is below the distance to the lower value, as a fraction of the gap.
LRO_HD int32_t dithered_code(float unit, const CodeMap& map, float noise) {
  const int32_t below = code_below(unit, map);
  return below + ((unit - map.values[below]) / gap_above(below, map) > noise);
}

// The uniform grid of a block: code c stands for low + c step.
struct Grid {
  float low, step;
};

// Return the grid from the minimum of a block to its maximum, with codes 0 to `most`. A constant block has step kTiny.
LRO_HD Grid grid_of(float top, float bottom, float most) {
  const float step = (top - bottom) / most;
  return {bottom, step < kTiny ? kTiny : step};
}

// Return the code of the grid point nearest to x. Places are never negative, so that truncation rounds down. The limit
// is applied to integers, which compilers vectorize.
LRO_HD uint8_t grid_code(float x, const Grid& grid, int32_t most) {
  const int32_t place = static_cast<int32_t>((x - grid.low) / grid.step + 0.5f);
  return static_cast<uint8_t>(place > most ? most : place);
}

// Round `place` stochastically: up if the uniform noise is below its fraction. The fraction is compared instead of
// adding the noise and truncating: the sum would be rounded, and could move a number that is exactly on the grid.
LRO_HD int32_t rounded_up(float place, float noise) {
  const int32_t whole = static_cast<int32_t>(place);
  return whole + (place - static_cast<float>(whole) > noise ? 1 : 0);
}

// Return the code of the grid point below x or above it, chosen by noise.
LRO_HD uint8_t grid_code(float x, const Grid& grid, int32_t most, float noise) {
  const int32_t place = rounded_up((x - grid.low) / grid.step, noise);
  return static_cast<uint8_t>(place > most ? most : place);
}

// Return two 4-bit codes in one byte, the first code in the lower half.
LRO_HD uint8_t packed(uint8_t first, uint8_t second) { return static_cast<uint8_t>(first | second << 4); }

// Return the code 0 ... 15 of 1 ... 16 sixteenths of `divisor`. A noise of `kHalf` rounds to nearest, with halves up,
// because `rounded_up` goes up only if the fraction is greater than the noise.
constexpr float kHalf = 0.49999997f;  // the largest float below 1/2
LRO_HD uint8_t sixteenth_code(float x, float divisor, float noise) {
  const int32_t place = rounded_up(x / divisor * 16.0f, noise);
  return static_cast<uint8_t>((place < 1 ? 1 : place > 16 ? 16 : place) - 1);
}

// -- Selections -------------------------------------------------------------------------------------------------------
//
// The r largest of n numbers are found without sorting: unsigned keys order like the numbers, and the key of the last
// selected number is determined bit by bit from counts of keys (cpu/select.cpp, cuda/select.cu).

// Return an unsigned key that orders like the number. Adding zero turns -0 into +0, so both zeros are equal. A NaN gets
// the largest key, as in torch.topk.
LRO_HD uint32_t rank_key(float x) {
  const uint32_t bits = bits_as<uint32_t>(x + 0.0f), sign = 1u << 31;
  return x != x ? static_cast<uint32_t>(-1) : bits & sign ? ~bits : bits | sign;
}
LRO_HD uint64_t rank_key(double x) {
  const uint64_t bits = bits_as<uint64_t>(x + 0.0), sign = 1ull << 63;
  return x != x ? static_cast<uint64_t>(-1) : bits & sign ? ~bits : bits | sign;
}
// Return the key that has only its highest bit set.
template <class Key>
LRO_HD constexpr Key highest_bit() {
  return static_cast<Key>(1) << (8 * sizeof(Key) - 1);
}

// -- Sums of lines ----------------------------------------------------------------------------------------------------
//
// A sum in the order of memory is one chain of dependent additions, and a compiler may not reorder it. Loops therefore
// keep kLanes partial sums, lane j of which adds the elements j, j + kLanes, ... The lanes are a few vectors of any
// instruction set, with the same order and the same bits on all of them. At the end the upper half is added to the
// lower half, repeatedly.

constexpr int kLanes = 16;

// Return the sum of the lanes; overwrites them.
template <class T>
LRO_HD T sum_in_halves(T (&sums)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
}

}  // namespace lro
