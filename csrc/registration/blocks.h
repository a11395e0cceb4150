// Checks of tensors that are quantized in blocks: codes (..., k), and one number per block (..., ceil(k / block)).
#pragma once

#include "checks.h"

namespace lro {
namespace {

// Return the blocks of a tensor (..., k); leading dimensions become rows.
Blocks blocks_of(const Tensor& elements, int64_t block) {
  STD_TORCH_CHECK(elements.dim() >= 1, "x must have a last dimension to be cut into blocks, got a scalar");
  STD_TORCH_CHECK(block >= 1, "block must be at least 1, got ", block);
  const int64_t k = elements.size(elements.dim() - 1);
  return {k ? elements.numel() / k : 0, k, block};
}

// Check a tensor that has one float32 per block: scales, peaks or minima.
void check_numbers(const Tensor& numbers, const char* name, const Tensor& elements, const Blocks& blocks) {
  check_type(numbers, name, ScalarType::Float, "float32");
  check_contiguous(numbers, name);
  check_device(numbers, name, elements, "codes");
  bool fits = numbers.dim() == elements.dim();
  for (int64_t i = 0; fits && i + 1 < elements.dim(); ++i) fits = numbers.size(i) == elements.size(i);
  fits = fits && numbers.size(numbers.dim() - 1) == blocks.per_row();
  STD_TORCH_CHECK(fits, name, " must have one number per block of ", blocks.block, " of codes ", shape_of(elements),
                  ", got ", shape_of(numbers));
}

// Check codes and the numbers x that they stand for, both (..., k).
void check_codes(const Tensor& codes, const Tensor& x) {
  check_type(codes, "codes", ScalarType::Byte, "uint8");
  check_floating(x, "x");
  check_shape(x, "x", codes, "codes");
  check_device(x, "x", codes, "codes");
  check_contiguous(codes, "codes");
  check_contiguous(x, "x");
}

// Return the noise for dithering, of the shape of the codes, or null for rounding to nearest.
const float* noise_of(const OptionalTensor& noise, const Tensor& codes) {
  if (!noise) return nullptr;
  check_type(*noise, "noise", ScalarType::Float, "float32");
  check_shape(*noise, "noise", codes, "codes");
  check_device(*noise, "noise", codes, "codes");
  check_contiguous(*noise, "noise");
  return static_cast<const float*>(noise->const_data_ptr());
}

}  // namespace
}  // namespace lro
