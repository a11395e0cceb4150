// Blockwise quantization on the CPU (elements.h has the arithmetic of a single code).
//
// A block is read twice, first for its extremes and then for its codes; the second read comes from cache. Divisions
// vectorize and table look-ups do not, so quotients go through a small buffer between the two loops.
#include <algorithm>
#include <cstdint>

#include "../kernels.h"
#include "clones.h"

namespace lro {
namespace {

constexpr int64_t kElements = 32768;  // elements that are worth a thread
constexpr int64_t kUnits = 512;       // quotients in the buffer between divisions and look-ups

// The extremes of a block.
struct Range {
  float top, bottom;
};

// Return the extremes of n numbers, compared as integers so that the loop vectorizes.
template <class In>
LRO_HD Range range_loop(const In* x, int64_t n) {
  int32_t top = INT32_MIN, bottom = INT32_MAX;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = ordered(to_float(x[i]));
    top = key > top ? key : top;
    bottom = key < bottom ? key : bottom;
  }
  return {unordered(top), unordered(bottom)};
}

template <class In>
LRO_HD void divide_loop(const In* LRO_RESTRICT x, int64_t n, float divisor, float* LRO_RESTRICT out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i]) / divisor;
}

// Encode n numbers of a block on its grid; `most` is the last code.
template <class In>
LRO_HD void grid_loop(const In* LRO_RESTRICT x, int64_t n, Grid grid, int32_t most, const float* LRO_RESTRICT noise,
                      uint8_t* LRO_RESTRICT codes) {
  if (noise)
    for (int64_t i = 0; i < n; ++i) codes[i] = grid_code(to_float(x[i]), grid, most, noise[i]);
  else
    for (int64_t i = 0; i < n; ++i) codes[i] = grid_code(to_float(x[i]), grid, most);
}

// Encode n numbers of a block in sixteenths of its largest.
template <class In>
LRO_HD void sixteenth_loop(const In* LRO_RESTRICT x, int64_t n, float divisor, const float* LRO_RESTRICT noise,
                           uint8_t* LRO_RESTRICT codes) {
  if (noise)
    for (int64_t i = 0; i < n; ++i) codes[i] = sixteenth_code(to_float(x[i]), divisor, noise[i]);
  else
    for (int64_t i = 0; i < n; ++i) codes[i] = sixteenth_code(to_float(x[i]), divisor, kHalf);
}

// Decode n codes of a map.
template <class Out>
LRO_HD void levels_loop(const uint8_t* LRO_RESTRICT codes, int64_t n, float peak, const float* LRO_RESTRICT map,
                        Out* LRO_RESTRICT x) {
  for (int64_t i = 0; i < n; ++i) assign(x[i], map[codes[i]] * peak);
}

// Decode n codes of a grid.
template <class Out>
LRO_HD void line_loop(const uint8_t* LRO_RESTRICT codes, int64_t n, float step, float low, Out* LRO_RESTRICT x) {
  for (int64_t i = 0; i < n; ++i) assign(x[i], static_cast<float>(codes[i]) * step + low);
}

// target_clones has no effect on instances of templates, so there is one plain function per type.
// Loops that look up in a table have no clones, since gathers are slower than loads on some processors.
#define LRO_PER_TYPE(T)                                                                                               \
  LRO_CLONES Range range(const T* x, int64_t n) { return range_loop(x, n); }                                          \
  LRO_CLONES void divide(const T* x, int64_t n, float divisor, float* out) { divide_loop(x, n, divisor, out); }       \
  LRO_CLONES void to_grid(const T* x, int64_t n, Grid grid, int32_t most, const float* noise, uint8_t* codes) {       \
    grid_loop(x, n, grid, most, noise, codes);                                                                        \
  }                                                                                                                   \
  LRO_CLONES void to_sixteenths(const T* x, int64_t n, float divisor, const float* noise, uint8_t* codes) {           \
    sixteenth_loop(x, n, divisor, noise, codes);                                                                      \
  }                                                                                                                   \
  void from_levels(const uint8_t* codes, int64_t n, float peak, const float* map, T* x) {                             \
    levels_loop(codes, n, peak, map, x);                                                                              \
  }                                                                                                                   \
  LRO_CLONES void from_grid(const uint8_t* codes, int64_t n, float step, float low, T* x) {                           \
    line_loop(codes, n, step, low, x);                                                                                \
  }
LRO_PER_TYPE(float)
LRO_PER_TYPE(bfloat16)

// Encode n quotients to the nearest code. The map is passed by value: uint8_t may alias any type, and a store to codes
// would force the pointers of the map to be reloaded.
void nearest(const float* LRO_RESTRICT unit, int64_t n, const CodeMap map, uint8_t* LRO_RESTRICT codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(nearest_code(unit[i], map));
}

// Raise a code by 1 where the noise is below the distance to the lower value, as a fraction of the gap.
LRO_CLONES void round_up(const float* LRO_RESTRICT rest, const float* LRO_RESTRICT gap, const float* LRO_RESTRICT noise,
                         int64_t n, uint8_t* LRO_RESTRICT codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(codes[i] + (rest[i] / gap[i] > noise[i]));
}

// Encode n quotients with dither: look up the lower code and the gap above it, then round in a vectorized loop.
void dithered(const float* LRO_RESTRICT unit, int64_t n, const CodeMap map, const float* LRO_RESTRICT gaps,
              const float* LRO_RESTRICT noise, uint8_t* LRO_RESTRICT codes) {
  float rest[kUnits], gap[kUnits];
  for (int64_t i = 0; i < n; ++i) {
    const int32_t below = code_below(unit[i], map);
    rest[i] = unit[i] - map.values[below], gap[i] = gaps[below];
    codes[i] = static_cast<uint8_t>(below);
  }
  round_up(rest, gap, noise, n, codes);
}

// Pack and unpack whole bytes; rows of odd length are completed by the callers.
LRO_CLONES void pack(const uint8_t* LRO_RESTRICT codes, int64_t pairs, uint8_t* LRO_RESTRICT out) {
  for (int64_t i = 0; i < pairs; ++i) out[i] = packed(codes[2 * i], codes[2 * i + 1]);
}
LRO_CLONES void unpack(const uint8_t* LRO_RESTRICT bytes, int64_t pairs, uint8_t* LRO_RESTRICT codes) {
  for (int64_t i = 0; i < pairs; ++i) codes[2 * i] = bytes[i] & 15, codes[2 * i + 1] = bytes[i] >> 4;
}

// Call `work(row, first, pairs, odd)` for pieces of rows of k codes: `pairs` pairs from pair `first` on. `odd` says
// that the last code of the row follows, which has no partner.
template <class Work>
void for_each_pair_run(int64_t rows, int64_t k, const Work& work) {
  const int64_t bytes = (k + 1) / 2;
  parallel(rows * bytes, kElements, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / bytes, first = begin % bytes, last = std::min(bytes, first + end - begin);
      const int64_t whole = std::min(last, k / 2);
      work(row, first, whole - first, last > k / 2);
      begin += last - first;
    }
  });
}

// Call `work(i, begin, n)` for each block i, which has elements `begin` to `begin + n`.
template <class Work>
void for_each_block(Blocks blocks, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, kElements / std::min(blocks.block, blocks.k));
  parallel(blocks.count(), grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) work(i, blocks.begin(i), blocks.size(i));
  });
}

// Return the noise of a block, or null.
const float* noise_from(const float* noise, int64_t begin) { return noise ? noise + begin : nullptr; }

}  // namespace

template <class In>
void quantize_blockwise(Queue, uint8_t* codes, float* absmax, const In* x, CodeMap map, Blocks blocks, bool signed_peak,
                        const float* noise) {
  float gaps[256];
  for (int32_t code = 0; code < map.size; ++code) gaps[code] = gap_above(code, map);
  for_each_block(blocks, [&](int64_t i, int64_t begin, int64_t n) {
    const Range extremes = range(x + begin, n);
    const Peak peak = peak_of(extremes.top, extremes.bottom, signed_peak);
    absmax[i] = peak.stored;
    float unit[kUnits];
    for (int64_t start = begin; start < begin + n; start += kUnits) {
      const int64_t count = std::min(kUnits, begin + n - start);
      divide(x + start, count, peak.divisor, unit);
      if (noise) dithered(unit, count, map, gaps, noise + start, codes + start);
      else nearest(unit, count, map, codes + start);
    }
  });
}

template <class In>
void quantize_affine(Queue, uint8_t* codes, float* scale, float* low, const In* x, int bits, Blocks blocks,
                     const float* noise) {
  const int32_t most = (1 << bits) - 1;
  for_each_block(blocks, [&](int64_t i, int64_t begin, int64_t n) {
    const Range extremes = range(x + begin, n);
    const Grid grid = grid_of(extremes.top, extremes.bottom, static_cast<float>(most));
    scale[i] = grid.step, low[i] = grid.low;
    to_grid(x + begin, n, grid, most, noise_from(noise, begin), codes + begin);
  });
}

template <class In>
void quantize_sixteenths(Queue, uint8_t* codes, float* largest, const In* x, Blocks blocks, const float* noise) {
  for_each_block(blocks, [&](int64_t i, int64_t begin, int64_t n) {
    largest[i] = range(x + begin, n).top;
    to_sixteenths(x + begin, n, std::max(largest[i], kTiny), noise_from(noise, begin), codes + begin);
  });
}

template <class Out>
void dequantize_blockwise(Queue, Out* x, const uint8_t* codes, const float* absmax, const float* code_map,
                          Blocks blocks) {
  for_each_block(blocks, [&](int64_t i, int64_t begin, int64_t n) {
    from_levels(codes + begin, n, absmax[i], code_map, x + begin);
  });
}

template <class Out>
void dequantize_affine(Queue, Out* x, const uint8_t* codes, const float* scale, const float* low, Blocks blocks) {
  for_each_block(blocks, [&](int64_t i, int64_t begin, int64_t n) {
    from_grid(codes + begin, n, scale[i], low[i], x + begin);
  });
}

void pack4(Queue, uint8_t* packed, const uint8_t* codes, int64_t rows, int64_t k) {
  for_each_pair_run(rows, k, [&](int64_t row, int64_t first, int64_t pairs, bool odd) {
    const uint8_t* from = codes + row * k + 2 * first;
    uint8_t* to = packed + row * ((k + 1) / 2) + first;
    pack(from, pairs, to);
    if (odd) to[pairs] = from[2 * pairs];
  });
}

void unpack4(Queue, uint8_t* codes, const uint8_t* packed, int64_t rows, int64_t k) {
  for_each_pair_run(rows, k, [&](int64_t row, int64_t first, int64_t pairs, bool odd) {
    const uint8_t* from = packed + row * ((k + 1) / 2) + first;
    uint8_t* to = codes + row * k + 2 * first;
    unpack(from, pairs, to);
    if (odd) to[2 * pairs] = from[pairs] & 15;
  });
}

#define LRO_INSTANCES(T)                                                                                              \
  template void quantize_blockwise(Queue, uint8_t*, float*, const T*, CodeMap, Blocks, bool, const float*);           \
  template void quantize_affine(Queue, uint8_t*, float*, float*, const T*, int, Blocks, const float*);                \
  template void quantize_sixteenths(Queue, uint8_t*, float*, const T*, Blocks, const float*);                         \
  template void dequantize_blockwise(Queue, T*, const uint8_t*, const float*, const float*, Blocks);                  \
  template void dequantize_affine(Queue, T*, const uint8_t*, const float*, const float*, Blocks);
LRO_INSTANCES(float)
LRO_INSTANCES(bfloat16)

}  // namespace lro
