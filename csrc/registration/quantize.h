// Operators that quantize in blocks: codes (..., k) of one byte, and packed codes of half a byte.
//
// x is float32 or bfloat16. Block by block, a quantizer writes codes and the float32 numbers that decode them.
#pragma once

#include "blocks.h"

namespace lro {
namespace {

// Write the nearest value of a code map for each element over its block's peak, absmax (..., ceil(k / block)).
void quantize_blockwise_(Tensor codes, Tensor absmax, Tensor x, Tensor code_map, Tensor lower, Tensor midpoint,
                         int64_t block, bool signed_peak, OptionalTensor noise) {
  check_codes(codes, x);
  const Blocks blocks = blocks_of(codes, block);
  check_numbers(absmax, "absmax", codes, blocks);
  check_map(code_map, "code_map", codes, "codes");
  check_table(lower, "lower", ScalarType::Byte, "uint8", codes, "codes");
  check_table(midpoint, "midpoint", ScalarType::Float, "float32", codes, "codes");
  const float* dither = noise_of(noise, codes);
  if (!codes.numel()) return;
  const On on(codes);
  const CodeMap map{read<float>(code_map), read<uint8_t>(lower), read<float>(midpoint),
                    static_cast<int32_t>(code_map.numel())};
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    quantize_blockwise(on.queue, write<uint8_t>(codes), write<float>(absmax), read<T>(x), map, blocks, signed_peak,
                       dither);
  });
}

// Write points of a uniform grid of 2^bits values per block, described by `scale` (its step) and `low` (its start).
void quantize_affine_(Tensor codes, Tensor scale, Tensor low, Tensor x, int64_t bits, int64_t block,
                      OptionalTensor noise) {
  check_codes(codes, x);
  STD_TORCH_CHECK(bits >= 1 && bits <= 8, "bits must be 1 to 8, got ", bits);
  const Blocks blocks = blocks_of(codes, block);
  check_numbers(scale, "scale", codes, blocks);
  check_numbers(low, "low", codes, blocks);
  const float* dither = noise_of(noise, codes);
  if (!codes.numel()) return;
  const On on(codes);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    quantize_affine(on.queue, write<uint8_t>(codes), write<float>(scale), write<float>(low), read<T>(x),
                    static_cast<int>(bits), blocks, dither);
  });
}

// Write sixteenths of the block's largest element; x is not negative.
void quantize_sixteenths_(Tensor codes, Tensor largest, Tensor x, int64_t block, OptionalTensor noise) {
  check_codes(codes, x);
  const Blocks blocks = blocks_of(codes, block);
  check_numbers(largest, "largest", codes, blocks);
  const float* dither = noise_of(noise, codes);
  if (!codes.numel()) return;
  const On on(codes);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    quantize_sixteenths(on.queue, write<uint8_t>(codes), write<float>(largest), read<T>(x), blocks, dither);
  });
}

// Decode a code map: x = code_map[code] absmax.
void dequantize_blockwise_(Tensor x, Tensor codes, Tensor absmax, Tensor code_map, int64_t block) {
  check_codes(codes, x);
  const Blocks blocks = blocks_of(codes, block);
  check_numbers(absmax, "absmax", codes, blocks);
  check_map(code_map, "code_map", codes, "codes");
  if (!codes.numel()) return;
  const On on(codes);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dequantize_blockwise(on.queue, write<T>(x), read<uint8_t>(codes), read<float>(absmax), read<float>(code_map),
                         blocks);
  });
}

// Decode a grid: x = code scale + low.
void dequantize_affine_(Tensor x, Tensor codes, Tensor scale, Tensor low, int64_t block) {
  check_codes(codes, x);
  const Blocks blocks = blocks_of(codes, block);
  check_numbers(scale, "scale", codes, blocks);
  check_numbers(low, "low", codes, blocks);
  if (!codes.numel()) return;
  const On on(codes);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dequantize_affine(on.queue, write<T>(x), read<uint8_t>(codes), read<float>(scale), read<float>(low), blocks);
  });
}

// Check codes (..., k) and their packed form (..., ceil(k / 2)).
void check_pack4(const Tensor& packed, const Tensor& codes) {
  check_type(packed, "packed", ScalarType::Byte, "uint8");
  check_contiguous(packed, "packed");
  check_type(codes, "codes", ScalarType::Byte, "uint8");
  check_contiguous(codes, "codes");
  check_device(packed, "packed", codes, "codes");
  STD_TORCH_CHECK(codes.dim() >= 1, "codes must have a last dimension, got a scalar");
  bool fits = packed.dim() == codes.dim();
  for (int64_t i = 0; fits && i + 1 < codes.dim(); ++i) fits = packed.size(i) == codes.size(i);
  fits = fits && packed.size(codes.dim() - 1) == (codes.size(codes.dim() - 1) + 1) / 2;
  STD_TORCH_CHECK(fits, "packed must have one byte for two codes ", shape_of(codes), ", got ", shape_of(packed));
}

// Pack codes below 16, two per byte, the first in the lower half.
void pack4_(Tensor packed, Tensor codes) {
  check_pack4(packed, codes);
  if (!codes.numel()) return;
  const On on(codes);
  const int64_t k = codes.size(codes.dim() - 1);
  pack4(on.queue, write<uint8_t>(packed), read<uint8_t>(codes), codes.numel() / k, k);
}

// Write each half of a byte as a code.
void unpack4_(Tensor codes, Tensor packed) {
  check_pack4(packed, codes);
  if (!codes.numel()) return;
  const On on(codes);
  const int64_t k = codes.size(codes.dim() - 1);
  unpack4(on.queue, write<uint8_t>(codes), read<uint8_t>(packed), codes.numel() / k, k);
}

}  // namespace
}  // namespace lro
