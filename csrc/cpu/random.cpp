#include "words.h"

namespace lro {
namespace {

LRO_CLONES void emit_bits16(const Half* LRO_RESTRICT w, int64_t n, int32_t* LRO_RESTRICT out) {
  for (int64_t i = 0; i < n; ++i) out[i] = w[i];
}
LRO_CLONES void emit_noise16(const Half* LRO_RESTRICT w, int64_t n, float* LRO_RESTRICT out) {
  for (int64_t i = 0; i < n; ++i) out[i] = noise_of(w[i]);
}
LRO_CLONES void emit_uniform(const uint32_t* w, int64_t from, int64_t n, float* LRO_RESTRICT out) {
  for (int64_t i = 0; i < n; ++i) out[i] = uniform_of(w[from + i]);
}
LRO_CLONES void emit_rounded(const Half* LRO_RESTRICT w, int64_t n, const float* LRO_RESTRICT x,
                             bfloat16* LRO_RESTRICT out) {
  for (int64_t i = 0; i < n; ++i) out[i] = round_stochastic(x[i], w[i]);
}

// Of all words, n of them, an even number.
LRO_CLONES void normals(const uint32_t* LRO_RESTRICT w, int64_t n, float* LRO_RESTRICT out) {
  for (int64_t i = 0; i < n; i += 2) normal_pair(w[i], w[i + 1], out[i], out[i + 1]);
}
void emit_normal(const uint32_t* w, int64_t from, int64_t n, float* out) {
  float all[4 * kCounters];
  normals(w, (from + n + 1) / 2 * 2, all);
  std::copy_n(all + from, n, out);
}

// Calls `emit(words, from, position, n)` for n numbers from element `position` on, the first one number `from` of the words.
template <class Emit>
void each(int64_t n, int lanes, Draw draw, const Emit& emit) {
  if (draw.time) draw.stream.time = static_cast<uint32_t>(*draw.time);
  each_piece(n, lanes, draw.start, [&](uint64_t counter, int count, int64_t from, int64_t position, int64_t some) {
    uint32_t w[4 * kCounters];
    words(counter, count, draw.stream, w);
    emit(w, from, position, some);
  });
}

}  // namespace

void draw(Queue, Kind kind, void* out, int64_t n, Draw draw) {
  auto* integers = static_cast<int32_t*>(out);
  auto* floats = static_cast<float*>(out);
  each(n, lanes(kind), draw, [&](const uint32_t* w, int64_t from, int64_t position, int64_t count) {
    if (kind == Kind::bits16) emit_bits16(halves(w) + from, count, integers + position);
    if (kind == Kind::noise16) emit_noise16(halves(w) + from, count, floats + position);
    if (kind == Kind::uniform) emit_uniform(w, from, count, floats + position);
    if (kind == Kind::normal) emit_normal(w, from, count, floats + position);
  });
}

void round_to_bfloat16(Queue, bfloat16* out, const float* x, int64_t n, Draw draw) {
  each(n, lanes(Kind::bits16), draw, [&](const uint32_t* w, int64_t from, int64_t position, int64_t count) {
    emit_rounded(halves(w) + from, count, x + position, out + position);
  });
}

}  // namespace lro
