#include <algorithm>

#include "words.h"

namespace lro {
namespace {

constexpr int64_t kPiece = 8 * kCounters;  // elements: as many as there are random numbers drawn at once
constexpr int64_t kGrain = 64;             // pieces

LRO_CLONES void nearest(bfloat16* LRO_RESTRICT w, const float* LRO_RESTRICT x, int64_t n, float keep) {
  for (int64_t i = 0; i < n; ++i) add_nearest(w[i], x[i], keep);
}
LRO_CLONES void kahan(bfloat16* LRO_RESTRICT w, bfloat16* LRO_RESTRICT owed, const float* LRO_RESTRICT x, int64_t n,
                      float keep) {
  for (int64_t i = 0; i < n; ++i) add_kahan(w[i], owed[i], x[i], keep);
}
LRO_CLONES void stochastic(bfloat16* LRO_RESTRICT w, const float* LRO_RESTRICT x, const Half* LRO_RESTRICT noise,
                           int64_t n, float keep) {
  for (int64_t i = 0; i < n; ++i) add_stochastic(w[i], x[i], keep, noise[i]);
}

int64_t skipped(int64_t number) { return (number % 8 + 8) % 8; }  // numbers of its counter that come before it

// Calls `work(row, column, n)` for pieces of lines, which begin at a column that is a multiple of kPiece, less `ahead(row)`.
template <class Ahead, class Work>
void each(const Columns& columns, const Ahead& ahead, const Work& work) {
  const int64_t per_row = (columns.run + 7 + kPiece - 1) / kPiece;
  parallel(columns.rows * per_row, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / per_row, start = i % per_row * kPiece - ahead(row);
      const int64_t column = std::max<int64_t>(0, start), stop = std::min(columns.run, start + kPiece);
      if (column < stop) work(row, column, stop - column);
    }
  });
}

int64_t none(int64_t) { return 0; }

}  // namespace

void add_nearest(Queue, bfloat16* w, const float* x, Columns columns, Step keep) {
  const auto factor = static_cast<float>(number_of(keep));
  each(columns, none, [&](int64_t row, int64_t column, int64_t n) {
    nearest(w + columns.place(row, column), x + row * columns.run + column, n, factor);
  });
}

void add_kahan(Queue, bfloat16* w, bfloat16* owed, const float* x, Columns columns, Step keep) {
  const auto factor = static_cast<float>(number_of(keep));
  each(columns, none, [&](int64_t row, int64_t column, int64_t n) {
    const int64_t place = columns.place(row, column);
    kahan(w + place, owed + place, x + row * columns.run + column, n, factor);
  });
}

void add_stochastic(Queue, bfloat16* w, const float* x, Columns columns, Step keep, Draw draw, int64_t pitch) {
  if (draw.time) draw.stream.time = static_cast<uint32_t>(*draw.time);
  const auto factor = static_cast<float>(number_of(keep));
  const auto ahead = [&](int64_t row) { return skipped(draw.start + row * pitch); };
  each(columns, ahead, [&](int64_t row, int64_t column, int64_t n) {
    const int64_t number = draw.start + row * pitch + column, from = skipped(number);
    uint32_t drawn[4 * kCounters];
    words(static_cast<uint64_t>((number - from) / 8), static_cast<int>((from + n + 7) / 8), draw.stream, drawn);
    stochastic(w + columns.place(row, column), x + row * columns.run + column, halves(drawn) + from, n, factor);
  });
}

}  // namespace lro
