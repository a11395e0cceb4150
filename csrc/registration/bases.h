// Operators that build a basis: Gram matrices, signs of columns, selections of the largest, and moves of rows.
#pragma once

#include "checks.h"

namespace lro {
namespace {

#ifndef LRO_ONLY_SHARED
// Write Y^T Y of y (..., m, k) to out (..., k, k) in float64, or Y Y^T of y (..., k, m) if `across`. The transpose is
// expressed by strides, so that no copy is made.
void gram_(Tensor out, Tensor y, bool across) {
  check_type(y, "y", ScalarType::Float, "float32");
  check_type(out, "out", ScalarType::Double, "float64");
  check_contiguous(y, "y");
  check_contiguous(out, "out");
  check_device(out, "out", y, "y");
  STD_TORCH_CHECK(y.dim() >= 2, "y must have two dimensions or more, got ", shape_of(y));
  const int64_t rows = y.size(y.dim() - (across ? 1 : 2)), columns = y.size(y.dim() - (across ? 2 : 1));
  bool fits = out.dim() == y.dim();
  for (int64_t i = 0; fits && i + 2 < y.dim(); ++i) fits = out.size(i) == y.size(i);
  for (int64_t i = 1; fits && i <= 2; ++i) fits = out.size(out.dim() - i) == columns;
  STD_TORCH_CHECK(fits, "out must have one number per two columns of y ", shape_of(y), ", got ", shape_of(out));
  if (!out.numel()) return;
  const On on(y);
  const Thin shape{rows, columns, across ? 1 : columns, across ? rows : 1};
  gram(on.queue, write<double>(out), read<float>(y), out.numel() / (columns * columns), shape);
}
#endif

// Make the entry of largest magnitude in each column of basis (..., rows, columns) positive.
void fix_signs_(Tensor basis) {
  STD_TORCH_CHECK(is(basis, ScalarType::Float) || is(basis, ScalarType::Double),
                  "basis must be float32 or float64, got ", type_of(basis));
  check_contiguous(basis, "basis");
  STD_TORCH_CHECK(basis.dim() >= 2, "basis must have two dimensions or more, got ", shape_of(basis));
  if (!basis.numel()) return;
  const On on(basis);
  const int64_t rows = basis.size(basis.dim() - 2), columns = basis.size(basis.dim() - 1);
  const int64_t matrices = basis.numel() / (rows * columns);
  if (is(basis, ScalarType::Float)) fix_signs(on.queue, write<float>(basis), matrices, rows, columns);
  else fix_signs(on.queue, write<double>(basis), matrices, rows, columns);
}

// Write to index (..., r) the positions of the r largest of scores (..., n). Counts and positions are int32, so n is
// limited to 2^30.
void select_top_(Tensor index, Tensor scores) {
  check_type(index, "index", ScalarType::Int, "int32");
  STD_TORCH_CHECK(is(scores, ScalarType::Float) || is(scores, ScalarType::Double),
                  "scores must be float32 or float64, got ", type_of(scores));
  check_contiguous(index, "index");
  check_contiguous(scores, "scores");
  check_device(index, "index", scores, "scores");
  const int64_t last = scores.dim() - 1;
  bool fits = last >= 0 && index.dim() == scores.dim() && index.size(last) <= scores.size(last);
  for (int64_t i = 0; fits && i < last; ++i) fits = index.size(i) == scores.size(i);
  STD_TORCH_CHECK(fits, "index must have the shape of scores ", shape_of(scores),
                  ", its last dimension not longer, got ", shape_of(index));
  STD_TORCH_CHECK(scores.size(last) < (1ll << 30), "scores must have fewer than 2^30 numbers in a line, got ",
                  shape_of(scores));
  if (!index.numel()) return;
  const On on(scores);
  const int64_t n = scores.size(last), rows = scores.numel() / n, r = index.size(last);
  if (is(scores, ScalarType::Float)) select_top(on.queue, write<int32_t>(index), read<float>(scores), rows, n, r);
  else select_top(on.queue, write<int32_t>(index), read<double>(scores), rows, n, r);
}

#ifndef LRO_ONLY_SHARED
// Move the rows of x (rows, ...) in place, source (rows,) being int64. The order of the sources is checked because the
// kernel relies on it: a source out of order would be overwritten before it is read.
void move_rows_(Tensor x, Tensor source) {
  STD_TORCH_CHECK(is(x, ScalarType::Float) || is(x, ScalarType::Double) || is(x, ScalarType::Int),
                  "x must be float32 or float64 or int32, got ", type_of(x));
  check_type(source, "source", ScalarType::Long, "int64");
  check_contiguous(x, "x");
  check_contiguous(source, "source");
  check_device(source, "source", x, "x");
  STD_TORCH_CHECK(x.dim() >= 1 && source.dim() == 1 && source.numel() == x.size(0),
                  "source must have one number per row of x ", shape_of(x), ", got ", shape_of(source));
  const auto* sources = read<int64_t>(source);
  const int64_t rows = source.numel();
  int64_t last = -1;
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(sources[row] == -1 || (last < sources[row] && sources[row] < rows),
                    "source must ascend from at least 0 to below ", rows, ", none of them twice, or be -1");
    if (sources[row] >= 0) last = sources[row];
  }
  if (!x.numel()) return;
  move_rows(write<char>(x), sources, rows, x.numel() / rows * (is(x, ScalarType::Double) ? 8 : 4));
}
#endif

}  // namespace
}  // namespace lro
