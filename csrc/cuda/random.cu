// Random numbers and stochastic rounding on GPUs: a thread draws one counter and uses all of its numbers.
#include "../kernels.h"
#include "launch.h"

namespace lro {
namespace {

// Turn the words of a counter into its 4 or 8 numbers. The kind is known at compile time, so the arrays stay in
// registers.
template <Kind kind>
LRO_HD void emit(const Words& words, int32_t* bits, float* numbers) {
  if constexpr (kind == Kind::normal) {
    normal_pair(words.w[0], words.w[1], numbers[0], numbers[1]);
    normal_pair(words.w[2], words.w[3], numbers[2], numbers[3]);
  } else {
    for (int lane = 0; lane < lanes(kind); ++lane) {
      if (kind == Kind::bits16) bits[lane] = static_cast<int32_t>(bits16(words, lane));
      if (kind == Kind::noise16) numbers[lane] = noise_of(bits16(words, lane));
      if (kind == Kind::uniform) numbers[lane] = uniform_of(words.w[lane]);
    }
  }
}

// The counters of n elements: the first counter, how many of its numbers precede element 0, and how many counters there
// are.
struct Span {
  int64_t first, skip, counters;
};

// Return the counters of elements `start` to `start + n` of a stream.
Span span_of(int64_t n, int per_counter, int64_t start) {
  const int64_t skip = ((start % per_counter) + per_counter) % per_counter;
  return {(start - skip) / per_counter, skip, (skip + n + per_counter - 1) / per_counter};
}

// Write n numbers to one of the two outputs. The first and the last counter may have lanes outside of the output.
template <Kind kind>
__global__ void __launch_bounds__(kThreads) draw_kernel(int32_t* integers, float* floats, int64_t n, Draw draw,
                                                        Span span) {
  if (draw.time) draw.stream.time = static_cast<uint32_t>(*draw.time);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; c < span.counters; c += stride) {
    int32_t bits[8];
    float numbers[8];
    emit<kind>(philox(static_cast<uint64_t>(span.first + c), draw.stream), bits, numbers);
    const int64_t begin = c * lanes(kind) - span.skip;
    for (int lane = 0; lane < lanes(kind); ++lane) {
      const int64_t i = begin + lane;
      if (i < 0 || i >= n) continue;
      if constexpr (kind == Kind::bits16) integers[i] = bits[lane];
      else floats[i] = numbers[lane];
    }
  }
}

// Round x (n,) to bfloat16, eight elements per counter.
__global__ void __launch_bounds__(kThreads) round_kernel(bfloat16* out, const float* x, int64_t n, Draw draw,
                                                         Span span) {
  if (draw.time) draw.stream.time = static_cast<uint32_t>(*draw.time);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; c < span.counters; c += stride) {
    const Words words = philox(static_cast<uint64_t>(span.first + c), draw.stream);
    const int64_t begin = c * 8 - span.skip;
    for (int lane = 0; lane < 8; ++lane) {
      const int64_t i = begin + lane;
      if (i >= 0 && i < n) out[i] = round_stochastic(x[i], bits16(words, lane));
    }
  }
}

// Launch the kernel of one kind of numbers.
template <Kind kind>
void launch(Queue queue, void* out, int64_t n, const Draw& draw) {
  const Span span = span_of(n, lanes(kind), draw.start);
  LRO_LAUNCH(draw_kernel<kind>, grid_for(span.counters), kThreads, queue, static_cast<int32_t*>(out),
             static_cast<float*>(out), n, draw, span);
}

}  // namespace

void draw(Queue queue, Kind kind, void* out, int64_t n, Draw draw) {
  if (kind == Kind::bits16) launch<Kind::bits16>(queue, out, n, draw);
  if (kind == Kind::noise16) launch<Kind::noise16>(queue, out, n, draw);
  if (kind == Kind::uniform) launch<Kind::uniform>(queue, out, n, draw);
  if (kind == Kind::normal) launch<Kind::normal>(queue, out, n, draw);
}

void round_to_bfloat16(Queue queue, bfloat16* out, const float* x, int64_t n, Draw draw) {
  const Span span = span_of(n, 8, draw.start);
  LRO_LAUNCH(round_kernel, grid_for(span.counters), kThreads, queue, out, x, n, draw, span);
}

}  // namespace lro
