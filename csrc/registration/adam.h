// Operators of Adam's direction: for one tensor, for rows of different ages, and for lists of tensors.
//
// The moments exp_avg and exp_avg_sq have the shape of the coordinates r, and r is overwritten by the direction. Lists
// have one variant per format of the moments: the dtype of r, bfloat16, or 8-bit codes. All variants take either the
// step count `t` or a tensor `step` on the device, which a captured graph reads at each replay.
#pragma once

#include "blocks.h"

namespace lro {
namespace {

// Check that a moment matches r, except for its dtype.
void check_moment(const Tensor& x, const char* name, const Tensor& r) {
  check_shape(x, name, r, "r");
  check_device(x, name, r, "r");
  check_contiguous(x, name);
}

// Check r and moments of its dtype, and return that dtype.
ScalarType check_plain(const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& r) {
  const ScalarType type = r.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "r must be float32 or float64, got ",
                  type_of(r));
  check_contiguous(r, "r");
  const Tensor* moments[] = {&exp_avg, &exp_avg_sq};
  const char* names[] = {"exp_avg", "exp_avg_sq"};
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(moments[i]->scalar_type() == type, names[i], " must have the dtype of r, got ",
                    type_of(*moments[i]));
    check_moment(*moments[i], names[i], r);
  }
  return type;
}

// Return the options of a step. The powers are computed here, on the host, and unused if `step` is given.
AdamRule rule_of(double beta1, double beta2, double eps, double t, const OptionalTensor& step, const Tensor& r) {
  return {beta1, beta2, eps, step_of(t, step, r, "step", "r"), std::pow(beta1, t), std::pow(beta2, t)};
}

template <class T>
PlainMoments<T> plain_moments(const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& r) {
  return {write<T>(exp_avg), write<T>(exp_avg_sq), write<T>(r), r.numel()};
}

// Update one tensor. A list of one item runs the same kernel.
void projected_adam_(Tensor exp_avg, Tensor exp_avg_sq, Tensor r, double beta1, double beta2, double eps, double t,
                     OptionalTensor step) {
  check_plain(exp_avg, exp_avg_sq, r);
  const AdamRule rule = rule_of(beta1, beta2, eps, t, step, r);
  if (!r.numel()) return;
  const On on(r);
  const auto update = [&](const auto& item) { projected_adam(on.queue, &item, 1, rule); };
  if (is(r, ScalarType::Float)) update(plain_moments<float>(exp_avg, exp_avg_sq, r));
  else update(plain_moments<double>(exp_avg, exp_avg_sq, r));
}

#ifndef LRO_ONLY_SHARED
// Update r (..., n) with one step count per row, ages (...) in the dtype of r.
void projected_adam_rows_(Tensor exp_avg, Tensor exp_avg_sq, Tensor r, double beta1, double beta2, double eps,
                          Tensor ages) {
  check_plain(exp_avg, exp_avg_sq, r);
  STD_TORCH_CHECK(r.dim() >= 1, "r must have one dimension or more, got ", shape_of(r));
  STD_TORCH_CHECK(ages.scalar_type() == r.scalar_type(), "ages must have the dtype of r, got ", type_of(ages));
  check_contiguous(ages, "ages");
  check_device(ages, "ages", r, "r");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < r.dim(); ++i) rows *= r.size(i);
  STD_TORCH_CHECK(ages.numel() == rows, "ages must have one number per row of r ", shape_of(r), ", got ",
                  shape_of(ages));
  if (!r.numel()) return;
  const AdamRule rule{beta1, beta2, eps, {0, nullptr, nullptr}, 0, 0};
  if (is(r, ScalarType::Float))
    projected_adam_rows(plain_moments<float>(exp_avg, exp_avg_sq, r), read<float>(ages), rows, rule);
  else projected_adam_rows(plain_moments<double>(exp_avg, exp_avg_sq, r), read<double>(ages), rows, rule);
}
#endif

// -- Lists of tensors, all on one device ------------------------------------------------------------------------------
//
// A list becomes an array of items, each with the pointers of one tensor. Empty tensors are left out, since kernels
// expect at least one element. The whole list is checked before the first tensor is changed.

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

// Check that a list has one entry per tensor of r.
template <class List>
void check_length(const List& list, const char* name, const Tensors& r) {
  STD_TORCH_CHECK(list.size() == r.size(), name, " must have one entry for each of r, ", r.size(), ", got ",
                  list.size());
}

// Check one r of a list whose moments have fewer bits: arithmetic is in float32.
void check_single(const Tensor& r, const Tensor& first) {
  check_type(r, "r", ScalarType::Float, "float32");
  check_contiguous(r, "r");
  check_device(r, "r", first, "its first tensor");
}

// Collect the items of a list and update them in one call.
template <class T>
void update_plain(const Tensors& exp_avg, const Tensors& exp_avg_sq, const Tensors& r, const AdamRule& rule) {
  std::vector<PlainMoments<T>> items;
  items.reserve(r.size());
  for (size_t i = 0; i < r.size(); ++i) {
    const PlainMoments<T> item = plain_moments<T>(exp_avg[i], exp_avg_sq[i], r[i]);
    if (item.n) items.push_back(item);
  }
  if (items.empty()) return;
  const On on(r[0]);
  projected_adam(on.queue, items.data(), static_cast<int64_t>(items.size()), rule);
}

// Update moments that have the dtype of r, float32 or float64, the same for the whole list.
void projected_adam_list_(Tensors exp_avg, Tensors exp_avg_sq, Tensors r, double beta1, double beta2, double eps,
                          double t, OptionalTensor step) {
  check_length(exp_avg, "exp_avg", r);
  check_length(exp_avg_sq, "exp_avg_sq", r);
  if (r.empty()) return;
  const ScalarType first = r[0].scalar_type();
  for (size_t i = 0; i < r.size(); ++i) {
    const bool alike = check_plain(exp_avg[i], exp_avg_sq[i], r[i]) == first;
    STD_TORCH_CHECK(alike, "r must have the dtype of its first tensor, got ", type_of(r[i]));
    check_device(r[i], "r", r[0], "its first tensor");
  }
  const AdamRule rule = rule_of(beta1, beta2, eps, t, step, r[0]);
  if (first == ScalarType::Float) update_plain<float>(exp_avg, exp_avg_sq, r, rule);
  else update_plain<double>(exp_avg, exp_avg_sq, r, rule);
}

// Update moments in bfloat16. key[i] and start[i] say which random numbers round tensor i, so that shards and resumed
// runs round alike.
void projected_adam_bfloat16_list_(Tensors exp_avg, Tensors exp_avg_sq, Tensors r, double beta1, double beta2,
                                   double eps, double t, OptionalTensor step, Integers key, int64_t purpose,
                                   int64_t purpose_sq, int64_t time, OptionalTensor at, Integers start) {
  check_length(exp_avg, "exp_avg", r);
  check_length(exp_avg_sq, "exp_avg_sq", r);
  check_length(key, "key", r);
  check_length(start, "start", r);
  if (r.empty()) return;
  std::vector<HalfMoments> items;
  items.reserve(r.size());
  for (size_t i = 0; i < r.size(); ++i) {
    check_single(r[i], r[0]);
    check_type(exp_avg[i], "exp_avg", ScalarType::BFloat16, "bfloat16");
    check_moment(exp_avg[i], "exp_avg", r[i]);
    check_type(exp_avg_sq[i], "exp_avg_sq", ScalarType::BFloat16, "bfloat16");
    check_moment(exp_avg_sq[i], "exp_avg_sq", r[i]);
    const auto bits = static_cast<uint64_t>(key[i]);  // schemas have signed integers; a key is 64 unsigned bits
    if (r[i].numel())
      items.push_back({write<bfloat16>(exp_avg[i]), write<bfloat16>(exp_avg_sq[i]), write<float>(r[i]), r[i].numel(),
                       static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), start[i]});
  }
  const AdamRule rule = rule_of(beta1, beta2, eps, t, step, r[0]);
  const Streams streams{static_cast<uint32_t>(purpose), static_cast<uint32_t>(purpose_sq), static_cast<uint32_t>(time),
                        time_of(at, r[0], "r")};
  if (items.empty()) return;
  const On on(r[0]);
  projected_adam(on.queue, items.data(), static_cast<int64_t>(items.size()), rule, streams);
}

// Return a code map and its table of lowest codes, both on the device of r.
Levels levels_of(const Tensor& code_map, const char* name, const Tensor& lower, const char* lower_name,
                 const Tensor& r) {
  check_map(code_map, name, r, "r");
  check_table(lower, lower_name, ScalarType::Byte, "uint8", r, "r");
  return {read<float>(code_map), read<uint8_t>(lower), static_cast<int32_t>(code_map.numel())};
}

// Return the blocks of r from the shape of its peaks (..., blocks per row). r itself may have any shape: its elements
// are divided evenly among the rows of the peaks.
Blocks blocks_of(const Tensor& r, const Tensor& peaks, const char* name, int64_t block) {
  check_type(peaks, name, ScalarType::Float, "float32");
  check_contiguous(peaks, name);
  check_device(peaks, name, r, "r");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < peaks.dim(); ++i) rows *= peaks.size(i);
  const Blocks blocks{rows, rows ? r.numel() / rows : 0, block};
  const bool whole = peaks.dim() >= 1 && blocks.rows * blocks.k == r.numel();
  STD_TORCH_CHECK(whole && peaks.size(peaks.dim() - 1) == blocks.per_row(), name,
                  " must have one number per block of ", block, " of r ", shape_of(r), ", got ", shape_of(peaks));
  return blocks;
}

// Update moments that are codes (shape of r) and peaks (..., blocks per row), in blocks of at most 256 elements.
void projected_adam_int8_list_(Tensors exp_avg, Tensors peak, Tensors exp_avg_sq, Tensors peak_sq, Tensors r,
                               Tensor code_map, Tensor lower, Tensor code_map_sq, Tensor lower_sq, int64_t block,
                               double beta1, double beta2, double eps, double t, OptionalTensor step) {
  check_length(exp_avg, "exp_avg", r);
  check_length(peak, "peak", r);
  check_length(exp_avg_sq, "exp_avg_sq", r);
  check_length(peak_sq, "peak_sq", r);
  STD_TORCH_CHECK(block >= 1 && block <= kMostCoded, "block must be 1 to 256, got ", block);
  if (r.empty()) return;
  std::vector<CodedMoments> items;
  items.reserve(r.size());
  for (size_t i = 0; i < r.size(); ++i) {
    check_single(r[i], r[0]);
    check_type(exp_avg[i], "exp_avg", ScalarType::Byte, "uint8");
    check_moment(exp_avg[i], "exp_avg", r[i]);
    check_type(exp_avg_sq[i], "exp_avg_sq", ScalarType::Byte, "uint8");
    check_moment(exp_avg_sq[i], "exp_avg_sq", r[i]);
    const Blocks blocks = blocks_of(r[i], peak[i], "peak", block);
    blocks_of(r[i], peak_sq[i], "peak_sq", block);
    check_shape(peak_sq[i], "peak_sq", peak[i], "peak");
    if (r[i].numel())
      items.push_back({write<uint8_t>(exp_avg[i]), write<uint8_t>(exp_avg_sq[i]), write<float>(peak[i]),
                       write<float>(peak_sq[i]), write<float>(r[i]), blocks});
  }
  const Levels m = levels_of(code_map, "code_map", lower, "lower", r[0]);
  const Levels v = levels_of(code_map_sq, "code_map_sq", lower_sq, "lower_sq", r[0]);
  const AdamRule rule = rule_of(beta1, beta2, eps, t, step, r[0]);
  if (items.empty()) return;
  const On on(r[0]);
  projected_adam(on.queue, items.data(), static_cast<int64_t>(items.size()), rule, m, v);
}

}  // namespace
}  // namespace lro
