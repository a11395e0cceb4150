// Matrices scaled by the factors of their rows and columns.
#pragma once

#include <algorithm>

#include "checks.h"

namespace lro {
namespace {

#ifndef LRO_ONLY_SHARED
// One number per row, (..., m, 1), or per column, (..., 1, n), of x (..., m, n).
void check_factors(const Tensor& factors, const char* name, const char* line, const Tensor& x, int64_t summed) {
  STD_TORCH_CHECK(factors.scalar_type() == x.scalar_type(), name, " must have the dtype of x, got ",
                  type_of(factors));
  bool fits = factors.dim() == x.dim();
  for (int64_t i = 0; fits && i < x.dim(); ++i) fits = factors.size(i) == (i == summed ? 1 : x.size(i));
  STD_TORCH_CHECK(fits, name, " must have one number per ", line, " of x ", shape_of(x), ", got ", shape_of(factors));
  check_contiguous(factors, name);
  check_device(factors, name, x, "x");
}

void check_factored(const Tensor& x, const Tensor& rows, const Tensor& columns) {
  STD_TORCH_CHECK(is(x, ScalarType::Float) || is(x, ScalarType::Double), "x must be float32 or float64, got ",
                  type_of(x));
  check_contiguous(x, "x");
  STD_TORCH_CHECK(x.dim() >= 2, "x must have two dimensions or more, got ", shape_of(x));
  check_factors(rows, "rows", "row", x, x.dim() - 1);
  check_factors(columns, "columns", "column", x, x.dim() - 2);
}

void check_like_factored(const Tensor& one, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(one.scalar_type() == x.scalar_type(), name, " must have the dtype of x, got ", type_of(one));
  check_shape(one, name, x, "x");
  check_contiguous(one, name);
  check_device(one, name, x, "x");
}

template <class T>
Factored<T> factored_of(const Tensor& x, const Tensor& rows, const Tensor& columns, double most) {
  const int64_t m = x.size(x.dim() - 2), n = x.size(x.dim() - 1);
  return {x.numel() / (m * n), m, n, read<T>(x), read<T>(rows), read<T>(columns), most};
}

void scale_factored_(Tensor out, Tensor x, Tensor rows, Tensor columns, double most) {
  check_factored(x, rows, columns);
  check_like_factored(out, "out", x);
  if (!x.numel()) return;
  if (is(x, ScalarType::Float)) scale_factored(write<float>(out), factored_of<float>(x, rows, columns, most));
  else scale_factored(write<double>(out), factored_of<double>(x, rows, columns, most));
}

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
