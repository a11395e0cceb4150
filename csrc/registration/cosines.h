// Operators of cosine transforms. Only the CPU has kernels; GPUs use library transforms and matrix products.
//
// `third` selects DCT-III instead of DCT-II. `across` transforms the rows of a matrix instead of its columns.
#pragma once

#include "checks.h"

#ifndef LRO_ONLY_SHARED
namespace lro {
namespace {

// Whether kernels exist for this length: even, and made of the factors 2, 3, 5 and 7 only.
bool is_supported_length(int64_t m) {
  if (m < 2 || m % 2) return false;
  for (int64_t factor : {2, 3, 5, 7})
    while (m % factor == 0) m /= factor;
  return m == 1;
}

// Check x (m, n), or (n, m) if `across`, and return the transform of its n columns of length m.
Cosines cosines_of(const Tensor& x, const char* name, bool third, bool across) {
  STD_TORCH_CHECK(is(x, ScalarType::Float) || is(x, ScalarType::Double), name, " must be float32 or float64, got ",
                  type_of(x));
  check_contiguous(x, name);
  STD_TORCH_CHECK(x.dim() == 2, name, " must have two dimensions, got ", shape_of(x));
  const int64_t m = x.size(across ? 1 : 0), n = x.size(across ? 0 : 1);
  STD_TORCH_CHECK(is_supported_length(m), name, " must have an even length without prime factors above 7, got ", m);
  return {m, n, third, across};
}

// Check the coefficients d (r, columns) and their numbers, index (r,). A block of d starts at column `first` and has
// one column per column of x. Each index is checked, since it becomes an offset in memory.
void check_chosen(const Tensor& d, const char* name, const Tensor& index, const Tensor& x, const char* x_name,
                  const Cosines& shape, int64_t first = 0) {
  STD_TORCH_CHECK(d.scalar_type() == x.scalar_type(), name, " must have the dtype of ", x_name, ", got ", type_of(d));
  check_type(index, "index", ScalarType::Int, "int32");
  STD_TORCH_CHECK(index.dim() == 1, "index must have one dimension, got ", shape_of(index));
  const bool fits = d.dim() == 2 && d.size(0) == index.numel() && first >= 0 && first + shape.n <= d.size(1);
  STD_TORCH_CHECK(fits, name, " must have a row per index and the columns of ", x_name, ", (", index.numel(), ", ",
                  shape.n, ") from column ", first, " on, got ", shape_of(d));
  check_contiguous(d, name);
  check_contiguous(index, "index");
  check_device(d, name, x, x_name);
  check_device(index, "index", x, x_name);
  const auto* places = read<int32_t>(index);
  for (int64_t i = 0; i < index.numel(); ++i)
    STD_TORCH_CHECK(0 <= places[i] && places[i] < shape.m, "index must be from 0 to below ", shape.m, ", got ",
                    places[i]);
}

// Write to sums (m,) the sums over the columns of |coefficient|^power, in float64. They rank the vectors of a
// dictionary.
void cosine_scores_(Tensor sums, Tensor x, bool third, int64_t power, bool across) {
  const Cosines shape = cosines_of(x, "x", third, across);
  check_type(sums, "sums", ScalarType::Double, "float64");
  check_contiguous(sums, "sums");
  check_device(sums, "sums", x, "x");
  STD_TORCH_CHECK(sums.dim() == 1 && sums.numel() == shape.m, "sums must have one number per coefficient, (", shape.m,
                  ",), got ", shape_of(sums));
  STD_TORCH_CHECK(power == 1 || power == 2, "power must be 1 or 2, got ", power);
  if (is(x, ScalarType::Float)) cosine_scores(write<double>(sums), read<float>(x), shape, power == 2);
  else cosine_scores(write<double>(sums), read<double>(x), shape, power == 2);
}

// Write the coefficients number `index` (r,) of all columns of x to out (r, n).
void cosine_rows_(Tensor out, Tensor x, Tensor index, bool third, bool across) {
  const Cosines shape = cosines_of(x, "x", third, across);
  check_chosen(out, "out", index, x, "x", shape);
  STD_TORCH_CHECK(out.size(1) == shape.n, "out must have as many columns as x, ", shape.n, ", got ", shape_of(out));
  const Chosen chosen{read<int32_t>(index), index.numel(), shape.n};
  if (is(x, ScalarType::Float)) cosine_rows(write<float>(out), read<float>(x), chosen, shape);
  else cosine_rows(write<double>(out), read<double>(x), chosen, shape);
}

// W <- beta W + alpha C with C made of the vectors number `index` (r,) and n columns of d from `first` on.
void add_cosines_(Tensor w, Tensor d, Tensor index, double alpha, double beta, bool third, bool across,
                  int64_t first) {
  const Cosines shape = cosines_of(w, "w", third, across);
  check_chosen(d, "d", index, w, "w", shape, first);
  const Chosen chosen{read<int32_t>(index), index.numel(), d.size(1)};
  if (is(w, ScalarType::Float))
    add_cosines(write<float>(w), read<float>(d) + first, chosen, static_cast<float>(alpha), static_cast<float>(beta),
                shape);
  else add_cosines(write<double>(w), read<double>(d) + first, chosen, alpha, beta, shape);
}

}  // namespace
}  // namespace lro
#endif
