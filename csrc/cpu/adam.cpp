// Adam's direction on the CPU: moments are read, updated, used and written back in a single pass.
//
// A step of Adam is limited by memory. Separate torch operations would read and write every tensor several times. Each
// loop below touches a moment once, in its stored format: the dtype of r, bfloat16, or 8-bit codes of blocks.
#include "words.h"

namespace lro {
namespace {

constexpr int64_t kGrain = 32768;  // elements that are worth a thread

// Update n elements. The numbers are passed by value, so that they stay in registers.
template <class T>
LRO_HD void loop(T* LRO_RESTRICT m, T* LRO_RESTRICT v, T* LRO_RESTRICT r, int64_t n, const AdamNumbers<T> numbers) {
  for (int64_t i = 0; i < n; ++i) adam(m[i], v[i], r[i], numbers);
}

// target_clones has no effect on instances of templates, so there is one plain function per type.
LRO_CLONES void run(float* m, float* v, float* r, int64_t n, const AdamNumbers<float> numbers) {
  loop(m, v, r, n, numbers);
}
LRO_CLONES void run(double* m, double* v, double* r, int64_t n, const AdamNumbers<double> numbers) {
  loop(m, v, r, n, numbers);
}

// Update n elements whose moments are bfloat16: widen, step, and round by 16 random bits each.
LRO_CLONES void run_half(const Halfword* LRO_RESTRICT m_noise, const Halfword* LRO_RESTRICT v_noise,
                         bfloat16* LRO_RESTRICT m, bfloat16* LRO_RESTRICT v, float* LRO_RESTRICT r, int64_t n,
                         const AdamNumbers<float> numbers) {
  for (int64_t i = 0; i < n; ++i) {
    float first = to_float(m[i]), second = to_float(v[i]);
    adam(first, second, r[i], numbers);
    m[i] = round_stochastic(first, m_noise[i]);
    v[i] = round_stochastic(second, v_noise[i]);
  }
}

// -- Moments as codes -------------------------------------------------------------------------------------------------
//
// One block at a time is decoded into float32 buffers on the stack, updated and encoded again. No float32 copy of a
// whole moment exists. Loops that look up in a table have no clones: with AVX2 and AVX-512 the compiler would use
// gather instructions, which are slower than single loads on some processors.

// The moments of one block in float32.
struct Decoded {
  float m[kMostCoded], v[kMostCoded];
};

// The new peaks of both moments of a block.
struct PeakPair {
  Peak m, v;
};

// Decode n codes, up to the factor of their block.
void look_up(const uint8_t* LRO_RESTRICT codes, int64_t n, const float* LRO_RESTRICT values, float* LRO_RESTRICT x) {
  for (int64_t i = 0; i < n; ++i) x[i] = values[codes[i]];
}

// Update one decoded block and return its new peaks. On entry the moments are still divided by their old peaks, so they
// are multiplied first. Extremes are found on integer keys, which vectorize (elements.h).
LRO_CLONES PeakPair step_decoded(float* LRO_RESTRICT m, float* LRO_RESTRICT v, float* LRO_RESTRICT r, int64_t n,
                                 float m_peak, float v_peak, const AdamNumbers<float> numbers) {
  int32_t m_top = INT32_MIN, m_bottom = INT32_MAX, v_top = INT32_MIN, v_bottom = INT32_MAX;
  for (int64_t i = 0; i < n; ++i) {
    float first = m[i] * m_peak, second = v[i] * v_peak;
    adam(first, second, r[i], numbers);
    m[i] = first, v[i] = second;
    const int32_t m_key = ordered(first), v_key = ordered(second);
    m_top = m_key > m_top ? m_key : m_top, m_bottom = m_key < m_bottom ? m_key : m_bottom;
    v_top = v_key > v_top ? v_key : v_top, v_bottom = v_key < v_bottom ? v_key : v_bottom;
  }
  return {peak_of(unordered(m_top), unordered(m_bottom), true), peak_of(unordered(v_top), unordered(v_bottom), true)};
}

// Divide by the new peak, before encoding; divisions vectorize and look-ups do not.
LRO_CLONES void divide(float* x, int64_t n, float divisor) {
  for (int64_t i = 0; i < n; ++i) x[i] /= divisor;
}

// Encode n numbers in [-1, 1]. `above` holds the midpoint above each code; `least` is the lowest permitted code. The
// levels are passed by value: uint8_t may alias any type, and a store to codes would force their pointers to be
// reloaded.
void to_codes(const float* LRO_RESTRICT unit, int64_t n, const Levels levels, const float* LRO_RESTRICT above,
              int32_t least, uint8_t* LRO_RESTRICT codes) {
  for (int64_t i = 0; i < n; ++i) {
    const int32_t low = lowest_code(unit[i], levels), code = low + (unit[i] > above[low] ? 1 : 0);
    codes[i] = static_cast<uint8_t>(code < least ? least : code);
  }
}

// The midpoint above each code, computed once per call.
struct Midpoints {
  float above[256];

  explicit Midpoints(const Levels& levels) {
    for (int32_t code = 0; code < levels.size; ++code) above[code] = midpoint_above(code, levels);
  }
};

// Return the shared factors. A step count from a tensor needs powers here; otherwise the host has computed them.
template <class T>
AdamNumbers<T> numbers_of(const AdamRule& rule) {
  if (rule.knows_powers()) return adam_numbers<T>(rule.beta1, rule.beta2, rule.eps, rule.power1, rule.power2);
  const double t = number_of(rule.step);
  return adam_numbers<T>(rule.beta1, rule.beta2, rule.eps, pow(rule.beta1, t), pow(rule.beta2, t));
}

}  // namespace

template <class T>
void projected_adam(Queue, const PlainMoments<T>* items, int64_t count, AdamRule rule) {
  const auto numbers = numbers_of<T>(rule);
  for (const auto* item = items; item < items + count; ++item)
    parallel(item->n, kGrain, [&](int64_t begin, int64_t end) {
      run(item->m + begin, item->v + begin, item->r + begin, end - begin, numbers);
    });
}

template void projected_adam(Queue, const PlainMoments<float>*, int64_t, AdamRule);
template void projected_adam(Queue, const PlainMoments<double>*, int64_t, AdamRule);

template <class T>
void projected_adam_rows(PlainMoments<T> item, const T* ages, int64_t rows, AdamRule rule) {
  const int64_t n = item.n / rows;
  parallel(rows, 1 + kGrain / n, [&](int64_t begin, int64_t end) {
    AdamNumbers<T> numbers;
    for (int64_t row = begin; row < end; ++row) {
      // Most neighbors have the same age, and powers are slow.
      if (row == begin || ages[row] != ages[row - 1]) {
        const double t = ages[row];
        numbers = adam_numbers<T>(rule.beta1, rule.beta2, rule.eps, pow(rule.beta1, t), pow(rule.beta2, t));
      }
      run(item.m + row * n, item.v + row * n, item.r + row * n, n, numbers);
    }
  });
}

template void projected_adam_rows(PlainMoments<float>, const float*, int64_t, AdamRule);
template void projected_adam_rows(PlainMoments<double>, const double*, int64_t, AdamRule);

void projected_adam(Queue, const HalfMoments* items, int64_t count, AdamRule rule, Streams streams) {
  const auto numbers = numbers_of<float>(rule);
  const uint32_t now = streams.now();
  for (const auto* item = items; item < items + count; ++item) {
    const Stream m = streams.of(*item, false, now), v = streams.of(*item, true, now);
    for_each_piece(item->n, 8, item->start, [&](uint64_t counter, int counters, int64_t from, int64_t at, int64_t n) {
      uint32_t m_words[4 * kCounters], v_words[4 * kCounters];
      draw_words(counter, counters, m, m_words);
      draw_words(counter, counters, v, v_words);
      run_half(halfwords(m_words) + from, halfwords(v_words) + from, item->m + at, item->v + at, item->r + at, n,
               numbers);
    });
  }
}

void projected_adam(Queue, const CodedMoments* items, int64_t count, AdamRule rule, Levels m, Levels v) {
  const auto numbers = numbers_of<float>(rule);
  const Midpoints m_midpoints(m), v_midpoints(v);
  for (const auto* item = items; item < items + count; ++item) {
    const Blocks& blocks = item->blocks;
    parallel(blocks.count(), kGrain / blocks.block, [&](int64_t first, int64_t last) {
      Decoded decoded;
      for (int64_t i = first; i < last; ++i) {
        const int64_t at = blocks.begin(i), n = blocks.size(i);
        look_up(item->m + at, n, m.values, decoded.m);
        look_up(item->v + at, n, v.values, decoded.v);
        const PeakPair peak =
            step_decoded(decoded.m, decoded.v, item->r + at, n, item->m_peak[i], item->v_peak[i], numbers);
        item->m_peak[i] = peak.m.stored, item->v_peak[i] = peak.v.stored;
        divide(decoded.m, n, peak.m.divisor);
        divide(decoded.v, n, peak.v.divisor);
        to_codes(decoded.m, n, m, m_midpoints.above, 0, item->m + at);
        // Code 0 of the second moment stands for zero and is never written (kernels.h).
        to_codes(decoded.v, n, v, v_midpoints.above, 1, item->v + at);
      }
    });
  }
}

}  // namespace lro
