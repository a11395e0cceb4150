// Operators that step weights in bfloat16: W <- round(keep W + x), with one rounding (elements.h has the three kinds).
//
// w is (rows, width), and x (rows, run) in float32 updates its columns from `first` on. `factor`, a tensor on the
// device, replaces `keep` if it is given.
#pragma once

#include "random.h"

namespace lro {
namespace {

// Check a weight, or the rounding errors that are stored with it.
void check_weight(const Tensor& w, const char* name) {
  check_type(w, name, ScalarType::BFloat16, "bfloat16");
  check_contiguous(w, name);
}

// Check w and x, and return which columns of w are updated.
Columns columns_of(const Tensor& w, const Tensor& x, int64_t first) {
  check_weight(w, "w");
  check_type(x, "x", ScalarType::Float, "float32");
  check_contiguous(x, "x");
  check_device(x, "x", w, "w");
  STD_TORCH_CHECK(w.dim() == 2, "w must have two dimensions, got ", shape_of(w));
  const bool fits = x.dim() == 2 && x.size(0) == w.size(0) && first >= 0 && first + x.size(1) <= w.size(1);
  STD_TORCH_CHECK(fits, "x must have the rows of w ", shape_of(w), " and fit into its columns from ", first,
                  " on, got ", shape_of(x));
  return {w.size(0), x.size(1), w.size(1), first};
}

// Round to nearest.
void add_nearest_(Tensor w, Tensor x, double keep, OptionalTensor factor, int64_t first) {
  const Columns columns = columns_of(w, x, first);
  const Step step = step_of(keep, factor, w, "factor", "w");
  if (!x.numel()) return;
  const On on(w);
  add_nearest(on.queue, write<bfloat16>(w), read<float>(x), columns, step);
}

// Round to nearest and keep the rounding errors in `owed` (rows, width).
void add_kahan_(Tensor w, Tensor owed, Tensor x, double keep, OptionalTensor factor, int64_t first) {
  const Columns columns = columns_of(w, x, first);
  const Step step = step_of(keep, factor, w, "factor", "w");
  check_weight(owed, "owed");
  check_shape(owed, "owed", w, "w");
  check_device(owed, "owed", w, "w");
  if (!x.numel()) return;
  const On on(w);
  add_kahan(on.queue, write<bfloat16>(w), write<bfloat16>(owed), read<float>(x), columns, step);
}

// Round stochastically; row i of x starts with number `start + i pitch` of the stream.
void add_stochastic_(Tensor w, Tensor x, double keep, int64_t key, int64_t purpose, int64_t time, OptionalTensor at,
                     int64_t start, int64_t pitch, OptionalTensor factor, int64_t first) {
  const Columns columns = columns_of(w, x, first);
  const Step step = step_of(keep, factor, w, "factor", "w");
  const Draw numbers = draw_of(w, key, purpose, time, at, start, "w");
  if (!x.numel()) return;
  const On on(w);
  add_stochastic(on.queue, write<bfloat16>(w), read<float>(x), columns, step, numbers, pitch);
}

}  // namespace
}  // namespace lro
