// Random numbers and stochastic rounding on the CPU. words.h draws the words, and the loops below turn them into
// numbers.
#include "words.h"

namespace lro {
namespace {

// Each loop writes n numbers. Numbers of 16 bits read halfwords, and the other loops read words from index `from` on.
LRO_CLONES void emit_bits16(const Halfword* LRO_RESTRICT w, int64_t n, int32_t* LRO_RESTRICT out) {
  for (int64_t i = 0; i < n; ++i) out[i] = w[i];
}
LRO_CLONES void emit_noise16(const Halfword* LRO_RESTRICT w, int64_t n, float* LRO_RESTRICT out) {
  for (int64_t i = 0; i < n; ++i) out[i] = noise_of(w[i]);
}
LRO_CLONES void emit_uniform(const uint32_t* w, int64_t from, int64_t n, float* LRO_RESTRICT out) {
  for (int64_t i = 0; i < n; ++i) out[i] = uniform_of(w[from + i]);
}
LRO_CLONES void emit_rounded(const Halfword* LRO_RESTRICT w, int64_t n, const float* LRO_RESTRICT x,
                             bfloat16* LRO_RESTRICT out) {
  for (int64_t i = 0; i < n; ++i) out[i] = round_stochastic(x[i], w[i]);
}

// Turn n words into n normal numbers, two at a time; n is even. A piece may start or end within a pair. So all pairs
// that it touches are computed, and the numbers that were asked for are copied.
LRO_CLONES void normals(const uint32_t* LRO_RESTRICT w, int64_t n, float* LRO_RESTRICT out) {
  for (int64_t i = 0; i < n; i += 2) normal_pair(w[i], w[i + 1], out[i], out[i + 1]);
}
void emit_normal(const uint32_t* w, int64_t from, int64_t n, float* out) {
  float all[4 * kCounters];
  normals(w, (from + n + 1) / 2 * 2, all);
  std::copy_n(all + from, n, out);
}

// Draw n numbers piece by piece. Call `emit(words, from, position, n)`, which writes elements `position` to `position +
// n` from the numbers of the words, starting at number `from`.
template <class Emit>
void for_each_draw(int64_t n, int lanes, Draw draw, const Emit& emit) {
  if (draw.time) draw.stream.time = static_cast<uint32_t>(*draw.time);
  for_each_piece(n, lanes, draw.start, [&](uint64_t counter, int count, int64_t from, int64_t position, int64_t size) {
    uint32_t w[4 * kCounters];
    draw_words(counter, count, draw.stream, w);
    emit(w, from, position, size);
  });
}

}  // namespace

void draw(Queue, Kind kind, void* out, int64_t n, Draw draw) {
  auto* integers = static_cast<int32_t*>(out);
  auto* floats = static_cast<float*>(out);
  for_each_draw(n, lanes(kind), draw, [&](const uint32_t* w, int64_t from, int64_t position, int64_t count) {
    if (kind == Kind::bits16) emit_bits16(halfwords(w) + from, count, integers + position);
    if (kind == Kind::noise16) emit_noise16(halfwords(w) + from, count, floats + position);
    if (kind == Kind::uniform) emit_uniform(w, from, count, floats + position);
    if (kind == Kind::normal) emit_normal(w, from, count, floats + position);
  });
}

void round_to_bfloat16(Queue, bfloat16* out, const float* x, int64_t n, Draw draw) {
  for_each_draw(n, lanes(Kind::bits16), draw, [&](const uint32_t* w, int64_t from, int64_t position, int64_t count) {
    emit_rounded(halfwords(w) + from, count, x + position, out + position);
  });
}

}  // namespace lro
