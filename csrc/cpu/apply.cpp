// Steps of bfloat16 weights on the CPU: W <- round(keep W + x) for some columns of W.
#include <algorithm>

#include "words.h"

namespace lro {
namespace {

constexpr int64_t kPiece = 8 * kCounters;  // elements of a piece: the random numbers that are drawn at once
constexpr int64_t kGrain = 64;             // pieces that are worth a thread

// Each loop steps n neighboring elements of one row.
LRO_CLONES void nearest(bfloat16* LRO_RESTRICT w, const float* LRO_RESTRICT x, int64_t n, float keep) {
  for (int64_t i = 0; i < n; ++i) add_nearest(w[i], x[i], keep);
}
LRO_CLONES void kahan(bfloat16* LRO_RESTRICT w, bfloat16* LRO_RESTRICT owed, const float* LRO_RESTRICT x, int64_t n,
                      float keep) {
  for (int64_t i = 0; i < n; ++i) add_kahan(w[i], owed[i], x[i], keep);
}
LRO_CLONES void stochastic(bfloat16* LRO_RESTRICT w, const float* LRO_RESTRICT x, const Halfword* LRO_RESTRICT noise,
                           int64_t n, float keep) {
  for (int64_t i = 0; i < n; ++i) add_stochastic(w[i], x[i], keep, noise[i]);
}

// Return the lane of a number within its counter; % may be negative in C++.
int64_t lane_of(int64_t number) { return (number % 8 + 8) % 8; }

// Call `work(row, column, n)` for all pieces of all rows. Pieces start at multiples of kPiece minus `ahead(row)`, the
// lane of the row's first number. Every piece but the first therefore starts with a whole counter, and no counter is
// drawn twice. `ahead` is at most 7, which may add a piece to a row; empty pieces are skipped.
template <class Ahead, class Work>
void for_each_line_piece(const Columns& columns, const Ahead& ahead, const Work& work) {
  const int64_t per_row = (columns.run + 7 + kPiece - 1) / kPiece;
  parallel(columns.rows * per_row, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / per_row, start = i % per_row * kPiece - ahead(row);
      const int64_t column = std::max<int64_t>(0, start), stop = std::min(columns.run, start + kPiece);
      if (column < stop) work(row, column, stop - column);
    }
  });
}

int64_t no_offset(int64_t) { return 0; }

}  // namespace

void add_nearest(Queue, bfloat16* w, const float* x, Columns columns, Step keep) {
  const auto factor = static_cast<float>(number_of(keep));
  for_each_line_piece(columns, no_offset, [&](int64_t row, int64_t column, int64_t n) {
    nearest(w + columns.place(row, column), x + row * columns.run + column, n, factor);
  });
}

void add_kahan(Queue, bfloat16* w, bfloat16* owed, const float* x, Columns columns, Step keep) {
  const auto factor = static_cast<float>(number_of(keep));
  for_each_line_piece(columns, no_offset, [&](int64_t row, int64_t column, int64_t n) {
    const int64_t place = columns.place(row, column);
    kahan(w + place, owed + place, x + row * columns.run + column, n, factor);
  });
}

void add_stochastic(Queue, bfloat16* w, const float* x, Columns columns, Step keep, Draw draw, int64_t pitch) {
  if (draw.time) draw.stream.time = static_cast<uint32_t>(*draw.time);
  const auto factor = static_cast<float>(number_of(keep));
  const auto ahead = [&](int64_t row) { return lane_of(draw.start + row * pitch); };
  for_each_line_piece(columns, ahead, [&](int64_t row, int64_t column, int64_t n) {
    const int64_t number = draw.start + row * pitch + column, from = lane_of(number);
    uint32_t drawn[4 * kCounters];
    // Draw the counters that contain numbers `number` to `number + n`, and skip the first `from` numbers.
    draw_words(static_cast<uint64_t>((number - from) / 8), static_cast<int>((from + n + 7) / 8), draw.stream, drawn);
    stochastic(w + columns.place(row, column), x + row * columns.run + column, halfwords(drawn) + from, n, factor);
  });
}

}  // namespace lro
