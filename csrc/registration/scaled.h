// Operators of row and column norms, and of updates that are scaled by them. Only the CPU has kernels.
#pragma once

#include "checks.h"

namespace lro {
namespace {

#ifndef LRO_ONLY_SHARED
// Check sums over one dimension of x (..., m, n): `without` counts it from the end, 1 for n and 2 for m.
void check_sums(const Tensor& sums, const char* name, const char* line, const Tensor& x, int64_t without) {
  check_type(sums, name, ScalarType::Double, "float64");
  check_contiguous(sums, name);
  check_device(sums, name, x, "x");
  bool fits = sums.dim() == x.dim() - 1;
  for (int64_t i = 0, j = 0; fits && i < x.dim(); ++i)
    if (i != x.dim() - without) fits = sums.size(j++) == x.size(i);
  STD_TORCH_CHECK(fits, name, " must have one number per ", line, " of x ", shape_of(x), ", got ", shape_of(sums));
}

// Write the sums of squares of the rows, (..., m), and of the columns, (..., n), of x in float64, in one pass.
void squares_(Tensor rows, Tensor columns, Tensor x) {
  STD_TORCH_CHECK(is(x, ScalarType::Float) || is(x, ScalarType::Double) || is(x, ScalarType::BFloat16),
                  "x must be float32 or float64 or bfloat16, got ", type_of(x));
  check_contiguous(x, "x");
  STD_TORCH_CHECK(x.dim() >= 2, "x must have two dimensions or more, got ", shape_of(x));
  check_sums(rows, "rows", "row", x, 1);
  check_sums(columns, "columns", "column", x, 2);
  const int64_t m = x.size(x.dim() - 2), n = x.size(x.dim() - 1);
  int64_t matrices = 1;
  for (int64_t i = 0; i + 2 < x.dim(); ++i) matrices *= x.size(i);
  const On on(x);
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    squares(on.queue, write<double>(rows), write<double>(columns), read<T>(x), matrices, m, n);
  };
  if (is(x, ScalarType::Double)) run(static_cast<double*>(nullptr));
  else by_type(x, run);
}

// W <- keep W - x factors, with factors (..., m, 1), (..., 1, n) or (..., 1, 1).
void take_scaled_(Tensor w, Tensor x, Tensor factors, double keep) {
  STD_TORCH_CHECK(is(w, ScalarType::Float) || is(w, ScalarType::Double), "w must be float32 or float64, got ",
                  type_of(w));
  STD_TORCH_CHECK(w.dim() >= 2, "w must have two dimensions or more, got ", shape_of(w));
  STD_TORCH_CHECK(x.scalar_type() == w.scalar_type(), "x must have the dtype of w, got ", type_of(x));
  STD_TORCH_CHECK(factors.scalar_type() == w.scalar_type(), "factors must have the dtype of w, got ",
                  type_of(factors));
  check_shape(x, "x", w, "w");
  check_contiguous(w, "w");
  check_contiguous(x, "x");
  check_contiguous(factors, "factors");
  check_device(x, "x", w, "w");
  check_device(factors, "factors", w, "w");
  const int64_t dims = w.dim(), m = w.size(dims - 2), n = w.size(dims - 1);
  bool fits = factors.dim() == dims;
  for (int64_t i = 0; fits && i + 2 < dims; ++i) fits = factors.size(i) == w.size(i);
  const int64_t high = fits ? factors.size(dims - 2) : 0, wide = fits ? factors.size(dims - 1) : 0;
  fits = (high == 1 && (wide == 1 || wide == n)) || (high == m && wide == 1);
  STD_TORCH_CHECK(fits, "factors must have one number per row, per column or per matrix of w ", shape_of(w), ", got ",
                  shape_of(factors));
  if (!w.numel()) return;
  const On on(w);
  const bool per_row = high != 1, per_column = wide != 1;
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    take_scaled(on.queue, write<T>(w), read<T>(x), read<T>(factors), w.numel() / (m * n), m, n, per_row, per_column,
                static_cast<T>(keep));
  };
  if (is(w, ScalarType::Float)) run(static_cast<float*>(nullptr));
  else run(static_cast<double*>(nullptr));
}
#endif

}  // namespace
}  // namespace lro
