// The arithmetic of one element, for every backend. No torch, no CUDA libraries: host compilers and nvcc both read this.
//
// Products and sums are rounded one by one: contraction is off in all compilers (-ffp-contract=off, -fmad=false), so that a
// CPU, a GPU and the reference in lowrank_optim/ops/reference.py give equal bits.
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

template <class To, class From>
LRO_HD To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

// -- bfloat16: the upper half of a float ------------------------------------------------------------------------------

struct bfloat16 {
  uint16_t bits;
};

LRO_HD float to_float(float x) { return x; }
LRO_HD float to_float(bfloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }

LRO_HD void assign(float& out, float x) { out = x; }

// To nearest, ties to even; what is not a number stays one.
LRO_HD void assign(bfloat16& out, float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// Up or down with probability proportional to the distance: 16 random bits below the last one kept, then cut off.
LRO_HD bfloat16 round_stochastic(float x, uint32_t noise16) {
  return bfloat16{static_cast<uint16_t>((bits_as<uint32_t>(x) + noise16) >> 16)};
}

// -- weights in bfloat16 ----------------------------------------------------------------------------------------------

// A weight after its step, before its one rounding. keep: what decay leaves of it; x: all else.
LRO_HD float moved(float w, float x, float keep) { return w * keep + x; }

LRO_HD void add_nearest(bfloat16& w, float x, float keep) { assign(w, moved(to_float(w), x, keep)); }

// `owed` is what rounding has kept from w so far, rounded itself.
LRO_HD void add_kahan(bfloat16& w, bfloat16& owed, float x, float keep) {
  const float y = moved(to_float(w) + to_float(owed), x, keep);
  bfloat16 kept;
  assign(kept, y);
  assign(owed, y - to_float(kept));
  w = kept;
}

LRO_HD void add_stochastic(bfloat16& w, float x, float keep, uint32_t noise16) {
  w = round_stochastic(moved(to_float(w), x, keep), noise16);
}
// Rounded once.
LRO_HD void add(float& out, float x) { out += x; }
LRO_HD void add(double& out, double x) { out += x; }
LRO_HD void add(bfloat16& out, bfloat16 x) { assign(out, to_float(out) + to_float(x)); }

// -- Adam -------------------------------------------------------------------------------------------------------------

// What all elements share; betas and corrections are computed in double and rounded once. Powers: beta^t.
template <class T>
struct AdamNumbers {
  T beta1, rest1, beta2, rest2, eps, gain, inverse_root;
};

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

// m, v: moments. r: the projected gradient, overwritten by the direction m^ / (sqrt(v^) + eps). One root, one division.
template <class T>
LRO_HD void adam(T& m, T& v, T& r, const AdamNumbers<T>& k) {
  m = m * k.beta1 + r * k.rest1;
  v = v * k.beta2 + r * k.rest2 * r;
  r = m * k.gain / (root(v) * k.inverse_root + k.eps);
}

// -- Adafactor --------------------------------------------------------------------------------------------------------

// 1 / sqrt(v) is the product of a row's factor and a column's, or `most` if that is less. What is not a number stays one.
template <class T>
LRO_HD T scaled(T x, T row, T column, T most) {
  const T factor = row * column;
  return x * (most < factor ? most : factor);
}

// -- Bases -----------------------------------------------------------------------------------------------------------

LRO_HD float magnitude(float x) { return fabsf(x); }
LRO_HD double magnitude(double x) { return fabs(x); }

// Magnitudes of at least this share of the largest one differ from it by no more than rounding errors.
template <class T>
LRO_HD constexpr T nearly() {
  return sizeof(T) == sizeof(float) ? T(1) - T(1) / (1 << 14) : T(1) - T(1) / (1 << 30);
}

// The one of larger magnitude, the first of equal ones.
template <class T>
LRO_HD T larger(T first, T second) {
  return magnitude(second) > magnitude(first) ? second : first;
}

// -- Philox4x32-10 (Salmon et al., SC 2011) ---------------------------------------------------------------------------

struct Stream {
  uint32_t key0, key1, purpose, time;
};

struct Words {
  uint32_t w[4];
};

// Eight numbers of 16 bits, the lower half of each word first.
LRO_HD uint32_t bits16(const Words& words, int lane) { return words.w[lane / 2] >> (lane % 2 * 16) & 0xFFFFu; }

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

// Midpoints of equal cells: 2^16 of them for dither, 2^23 (all of them floats) for numbers.
LRO_HD float noise_of(uint32_t bits16) { return (static_cast<float>(static_cast<int32_t>(bits16)) + 0.5f) * 0x1p-16f; }
LRO_HD float uniform_of(uint32_t word) {
  return static_cast<float>((static_cast<double>(static_cast<int32_t>(word >> 9)) + 0.5) * 0x1p-23);
}

// -- Normal numbers ---------------------------------------------------------------------------------------------------
//
// Box and Muller: sqrt(-2 log u) times the cosine and the sine of 2 pi v. Logarithm, cosine and sine are polynomials in
// double (minimax, relative errors below 2^-33) and not those of a library: made of sums and products only, they have the
// same bits everywhere, and compilers make vectors of them.

template <class... More>
LRO_HD double polynomial(double x, double first, More... more) {
  if constexpr (sizeof...(more) == 0) return first;
  else return first + x * polynomial(x, more...);
}

// sqrt(-2 log u) for the midpoint u of one of 2^32 cells of (0, 1).
LRO_HD float normal_length(uint32_t word) {
  constexpr uint64_t kOne = 1ull << 52;                      // of an exponent
  constexpr uint64_t kLeast = 0x3FE6A09E667F3BCDull - kOne;  // sqrt(1/2) / 2: no u 2^32 is less
  constexpr double kPlain = 0x1p52;                          // an integer in its last bits is added to it
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

// The turn is that of one of 2^32 midpoints, as at most half a quarter from the nearest of four quarters.
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
  const uint32_t odd = 0u - (quarter & 1u);  // all bits or none: what is exchanged
  first = bits_as<float>((along ^ ((along ^ across) & odd)) ^ ((quarter + 1) & 2u) << 30);
  second = bits_as<float>((across ^ ((along ^ across) & odd)) ^ (quarter & 2u) << 30);
}

// -- Blockwise codes --------------------------------------------------------------------------------------------------

constexpr float kTiny = 1.17549435e-38f;  // the smallest normal number: no block is divided by less

// Floats as integers in the same order, so that maxima are found by integer instructions.
LRO_HD int32_t ordered(float x) {
  const int32_t bits = bits_as<int32_t>(x);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
LRO_HD float unordered(int32_t key) { return bits_as<float>(key ^ ((key >> 31) & 0x7FFFFFFF)); }

// A map of values, and per upper half of a float the lowest code that it may get and the midpoint to the next one.
struct CodeMap {
  const float* values;
  const uint8_t* lower;
  const float* midpoint;
  int32_t size;
};

struct Peak {
  float kept, divisor;
};

LRO_HD Peak peak_of(float top, float bottom, bool with_sign) {
  const bool negative = -bottom > top;
  const float largest = negative ? -bottom : top;
  const float kept = with_sign && negative ? bottom : largest;
  return {kept, largest < kTiny ? kTiny : kept};
}

LRO_HD int32_t nearest_code(float unit, const CodeMap& map) {
  const int32_t upper = (bits_as<int32_t>(unit) >> 16) + (1 << 15);
  return map.lower[upper] + (unit > map.midpoint[upper] ? 1 : 0);
}

// The same without a midpoint per upper half: what is looked up then fits the nearest cache.
struct Levels {
  const float* values;
  const uint8_t* lower;
  int32_t size;
};

LRO_HD float midpoint_above(int32_t code, const Levels& levels) {
  return code + 1 < levels.size ? (levels.values[code + 1] + levels.values[code]) * 0.5f : INFINITY;
}

LRO_HD int32_t lowest_code(float unit, const Levels& levels) {
  return levels.lower[(bits_as<int32_t>(unit) >> 16) + (1 << 15)];
}

// The last entry that is not above a number.
LRO_HD int32_t code_below(float unit, const CodeMap& map) {
  const int32_t nearest = nearest_code(unit, map);
  return nearest - ((map.values[nearest] > unit) & (nearest > 0));
}

// To the next entry; nothing is above the last one.
LRO_HD float gap_above(int32_t code, const CodeMap& map) {
  return code + 1 < map.size ? map.values[code + 1] - map.values[code] : 1.0f;
}

// The entry below or the one above, the latter where noise is below the share of the gap.
LRO_HD int32_t dithered_code(float unit, const CodeMap& map, float noise) {
  const int32_t below = code_below(unit, map);
  return below + ((unit - map.values[below]) / gap_above(below, map) > noise);
}

struct Grid {
  float low, step;
};

LRO_HD Grid grid_of(float top, float bottom, float most) {
  const float step = (top - bottom) / most;
  return {bottom, step < kTiny ? kTiny : step};
}

// Places are not negative, so that to cut off is to round down; in integers, for which compilers find instructions.
LRO_HD uint8_t grid_code(float x, const Grid& grid, int32_t most) {
  const int32_t place = static_cast<int32_t>((x - grid.low) / grid.step + 0.5f);
  return static_cast<uint8_t>(place > most ? most : place);
}

// Compared and not added up: a sum would be rounded, and move what is on the grid.
LRO_HD int32_t rounded_up(float place, float noise) {
  const int32_t whole = static_cast<int32_t>(place);
  return whole + (place - static_cast<float>(whole) > noise ? 1 : 0);
}

LRO_HD uint8_t grid_code(float x, const Grid& grid, int32_t most, float noise) {
  const int32_t place = rounded_up((x - grid.low) / grid.step, noise);
  return static_cast<uint8_t>(place > most ? most : place);
}

// Two codes of 4 bits to a byte, the first in the lower half.
LRO_HD uint8_t packed(uint8_t first, uint8_t second) { return static_cast<uint8_t>(first | second << 4); }

// Sixteenths from 1 to 16, as 0 to 15. Halves go up: without noise that is to be `kHalf`.
constexpr float kHalf = 0.49999997f;  // the float below 1/2
LRO_HD uint8_t sixteenth_code(float x, float divisor, float noise) {
  const int32_t place = rounded_up(x / divisor * 16.0f, noise);
  return static_cast<uint8_t>((place < 1 ? 1 : place > 16 ? 16 : place) - 1);
}

// -- Selections -------------------------------------------------------------------------------------------------------

// Integers in the order of the numbers. Both zeros are equal, and what is not a number is the largest.
LRO_HD uint32_t rank_key(float x) {
  const uint32_t bits = bits_as<uint32_t>(x + 0.0f), sign = 1u << 31;
  return x != x ? static_cast<uint32_t>(-1) : bits & sign ? ~bits : bits | sign;
}
LRO_HD uint64_t rank_key(double x) {
  const uint64_t bits = bits_as<uint64_t>(x + 0.0), sign = 1ull << 63;
  return x != x ? static_cast<uint64_t>(-1) : bits & sign ? ~bits : bits | sign;
}
template <class Key>
LRO_HD constexpr Key highest_bit() {
  return static_cast<Key>(1) << (8 * sizeof(Key) - 1);
}

// -- Sums of lines: so many partial sums, which are added in halves ----------------------------------------------------

constexpr int kLanes = 16;

template <class T>
LRO_HD T in_halves(T (&sums)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
}

}  // namespace lro
