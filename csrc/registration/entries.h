// Operators on single entries of a matrix, by flat row-major position.
//
// Positions must ascend without repetition: threads then share no element, and every sum has a fixed order. The CPU
// checks the order before it writes. On a GPU that check would make the host wait for the device.
#pragma once

#include "checks.h"

namespace lro {
namespace {

#ifndef LRO_CUDA
// Whether each position is greater than the previous position. The loop has no early exit, so it can be vectorized.
template <class Index>
bool ascends(const Index* positions, int64_t count) {
  bool ascending = true;
  for (int64_t i = 1; i < count; ++i) ascending &= positions[i - 1] < positions[i];
  return ascending;
}
#endif

// Check positions (count,) from `start` to below `stop`, and one number per position. The first and the last position
// are the extremes of an ascending list, so only they are compared with the limits.
void check_positions(const Tensor& positions, const Tensor& numbers, const char* name, int64_t start, int64_t stop) {
  STD_TORCH_CHECK(is(positions, ScalarType::Int) || is(positions, ScalarType::Long),
                  "positions must be int32 or int64, got ", type_of(positions));
  STD_TORCH_CHECK(positions.dim() == 1, "positions must have one dimension, got ", shape_of(positions));
  check_shape(numbers, name, positions, "positions");
  check_device(positions, "positions", numbers, name);
  check_contiguous(positions, "positions");
  check_contiguous(numbers, name);
#ifndef LRO_CUDA
  const auto fits = [&](const auto* all, int64_t count) {
    return !count || (all[0] >= start && all[count - 1] < stop && ascends(all, count));
  };
  const int64_t count = positions.numel();
  STD_TORCH_CHECK(is(positions, ScalarType::Int) ? fits(read<int32_t>(positions), count)
                                                 : fits(read<int64_t>(positions), count),
                  "positions must ascend from at least ", start, " to below ", stop, ", none of them twice");
#endif
}

// Check `dense`, the local part of a flat tensor from global index `start` on, and positions and numbers for it.
void check_at(const Tensor& dense, const Tensor& positions, const Tensor& numbers, const char* name, int64_t start) {
  STD_TORCH_CHECK(is(dense, ScalarType::Float) || is(dense, ScalarType::Double) || is(dense, ScalarType::BFloat16),
                  "dense must be float32 or float64 or bfloat16, got ", type_of(dense));
  check_contiguous(dense, "dense");
  STD_TORCH_CHECK(numbers.scalar_type() == dense.scalar_type(), name, " must have the dtype of dense, got ",
                  type_of(numbers));
  check_device(numbers, name, dense, "dense");
  check_positions(positions, numbers, name, start, start + dense.numel());
}

// Call `run` with null pointers of the element type and of the type of the positions, which carry only the types.
template <class Run>
void by_types(const Tensor& x, const Tensor& positions, const Run& run) {
  const auto dispatch = [&](auto* type) {
    if (is(positions, ScalarType::Int)) run(type, static_cast<int32_t*>(nullptr));
    else run(type, static_cast<int64_t*>(nullptr));
  };
  if (is(x, ScalarType::Float)) dispatch(static_cast<float*>(nullptr));
  else if (is(x, ScalarType::Double)) dispatch(static_cast<double*>(nullptr));
  else dispatch(static_cast<bfloat16*>(nullptr));
}

// Add values (count,) to the elements of `dense` at these positions.
void add_at_(Tensor dense, Tensor positions, Tensor values, int64_t start) {
  check_at(dense, positions, values, "values", start);
  if (!positions.numel()) return;
  const On on(dense);
  by_types(dense, positions, [&](auto* type, auto* place) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Index = std::remove_pointer_t<decltype(place)>;
    add_at(on.queue, write<T>(dense), dense.numel(), read<Index>(positions), read<T>(values), positions.numel(), start);
  });
}

// Read the elements of `dense` at these positions into out (count,).
void gather_at_(Tensor out, Tensor dense, Tensor positions, int64_t start) {
  check_at(dense, positions, out, "out", start);
  if (!positions.numel()) return;
  const On on(dense);
  by_types(dense, positions, [&](auto* type, auto* place) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Index = std::remove_pointer_t<decltype(place)>;
    gather_at(on.queue, write<T>(out), read<T>(dense), dense.numel(), read<Index>(positions), positions.numel(), start);
  });
}

#ifndef LRO_ONLY_SHARED
// Add to out (count,) the entries at `positions` of left (m, k) times right (n, k) transposed. Both factors have rows
// of length k, so that each entry is a product of two contiguous lines.
void add_sampled_product_(Tensor out, Tensor left, Tensor right, Tensor positions) {
  STD_TORCH_CHECK(is(left, ScalarType::Float) || is(left, ScalarType::Double),
                  "left must be float32 or float64, got ", type_of(left));
  STD_TORCH_CHECK(right.scalar_type() == left.scalar_type(), "right must have the dtype of left, got ",
                  type_of(right));
  STD_TORCH_CHECK(out.scalar_type() == left.scalar_type(), "out must have the dtype of left, got ", type_of(out));
  STD_TORCH_CHECK(left.dim() == 2 && right.dim() == 2 && left.size(1) == right.size(1),
                  "left and right must have lines of one length, got ", shape_of(left), " and ", shape_of(right));
  check_contiguous(left, "left");
  check_contiguous(right, "right");
  check_device(right, "right", left, "left");
  check_device(out, "out", left, "left");
  const int64_t n = right.size(0), k = left.size(1);
  check_positions(positions, out, "out", 0, left.size(0) * n);
  if (!positions.numel()) return;
  by_types(left, positions, [&](auto* type, auto* place) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Index = std::remove_pointer_t<decltype(place)>;
    if constexpr (!std::is_same_v<T, bfloat16>)
      add_sampled_product(write<T>(out), read<T>(left), read<T>(right), read<Index>(positions), positions.numel(), n,
                          k);
  });
}
#endif

}  // namespace
}  // namespace lro
