// Operators on matrices that are scaled by one factor per row and one per column (Adafactor). x is (..., m, n), rows
// (..., m, 1) and columns (..., 1, n). The scaled matrix y is computed on the fly and never stored.
#pragma once

#include <algorithm>

#include "checks.h"

namespace lro {
namespace {

#ifndef LRO_ONLY_SHARED
// Check factors that have one number per row or column of x. `summed` is the dimension of size 1.
void check_factors(const Tensor& factors, const char* name, const char* line, const Tensor& x, int64_t summed) {
  STD_TORCH_CHECK(factors.scalar_type() == x.scalar_type(), name, " must have the dtype of x, got ",
                  type_of(factors));
  bool fits = factors.dim() == x.dim();
  for (int64_t i = 0; fits && i < x.dim(); ++i) fits = factors.size(i) == (i == summed ? 1 : x.size(i));
  STD_TORCH_CHECK(fits, name, " must have one number per ", line, " of x ", shape_of(x), ", got ", shape_of(factors));
  check_contiguous(factors, name);
  check_device(factors, name, x, "x");
}

// Check x and both of its factors.
void check_factored(const Tensor& x, const Tensor& rows, const Tensor& columns) {
  STD_TORCH_CHECK(is(x, ScalarType::Float) || is(x, ScalarType::Double), "x must be float32 or float64, got ",
                  type_of(x));
  check_contiguous(x, "x");
  STD_TORCH_CHECK(x.dim() >= 2, "x must have two dimensions or more, got ", shape_of(x));
  check_factors(rows, "rows", "row", x, x.dim() - 1);
  check_factors(columns, "columns", "column", x, x.dim() - 2);
}

// Check a tensor that is updated element by element with x.
void check_like_factored(const Tensor& tensor, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, " must have the dtype of x, got ", type_of(tensor));
  check_shape(tensor, name, x, "x");
  check_contiguous(tensor, name);
  check_device(tensor, name, x, "x");
}

// Return the pointers and sizes; leading dimensions become a stack of matrices.
template <class T>
Factored<T> factored_of(const Tensor& x, const Tensor& rows, const Tensor& columns, double most) {
  const int64_t m = x.size(x.dim() - 2), n = x.size(x.dim() - 1);
  return {x.numel() / (m * n), m, n, read<T>(x), read<T>(rows), read<T>(columns), most};
}

// Write y to out.
void scale_factored_(Tensor out, Tensor x, Tensor rows, Tensor columns, double most) {
  check_factored(x, rows, columns);
  check_like_factored(out, "out", x);
  if (!x.numel()) return;
  if (is(x, ScalarType::Float)) scale_factored(write<float>(out), factored_of<float>(x, rows, columns, most));
  else scale_factored(write<double>(out), factored_of<double>(x, rows, columns, most));
}

// Write the sum of squares of each matrix of y to sums (...), in float64. An empty matrix has the sum 0.
void factored_energy_(Tensor sums, Tensor x, Tensor rows, Tensor columns, double most) {
  check_factored(x, rows, columns);
  check_type(sums, "sums", ScalarType::Double, "float64");
  bool fits = sums.dim() + 2 == x.dim();
  for (int64_t i = 0; fits && i < sums.dim(); ++i) fits = sums.size(i) == x.size(i);
  STD_TORCH_CHECK(fits, "sums must have one number per matrix of x ", shape_of(x), ", got ", shape_of(sums));
  check_contiguous(sums, "sums");
  check_device(sums, "sums", x, "x");
  const int64_t matrices = sums.numel();
  if (!x.numel()) std::fill_n(write<double>(sums), matrices, 0.0);
  else if (is(x, ScalarType::Float)) factored_energy(write<double>(sums), factored_of<float>(x, rows, columns, most));
  else factored_energy(write<double>(sums), factored_of<double>(x, rows, columns, most));
}

// Step the weight w by y, or by its average exp_avg if there is one.
void step_factored_(Tensor w, OptionalTensor exp_avg, Tensor x, Tensor rows, Tensor columns, double most, double beta,
                    double gain, double length, double keep) {
  check_factored(x, rows, columns);
  check_like_factored(w, "w", x);
  if (exp_avg) check_like_factored(*exp_avg, "exp_avg", x);
  if (!x.numel()) return;
  const Move move{beta, gain, length, keep};
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* m = exp_avg ? write<T>(*exp_avg) : nullptr;
    step_factored(write<T>(w), m, factored_of<T>(x, rows, columns, most), move);
  };
  if (is(x, ScalarType::Float)) run(static_cast<float*>(nullptr));
  else run(static_cast<double*>(nullptr));
}
#endif

}  // namespace
}  // namespace lro
