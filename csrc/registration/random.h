// Operators of counter-based random numbers, and of stochastic rounding by them (Philox in elements.h).
//
// (key, purpose, time) name a stream; `start` is the number of the output's first element. A tensor `at` holds the time
// on the device and replaces `time`, so that a captured graph draws new numbers at each replay.
#pragma once

#include "checks.h"

namespace lro {
namespace {

// Return the stream and the first number of a draw. The 64-bit key is split into the two words that Philox takes.
Draw draw_of(const Tensor& out, int64_t key, int64_t purpose, int64_t time, const OptionalTensor& at, int64_t start,
             const char* name = "out") {
  const auto bits = static_cast<uint64_t>(key);
  const Stream stream{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), static_cast<uint32_t>(purpose),
                      static_cast<uint32_t>(time)};
  return {stream, time_of(at, out, name), start};
}

// Fill `out`, of any shape, with numbers in row-major order.
template <Kind kind>
void philox_(Tensor out, int64_t key, int64_t purpose, int64_t time, OptionalTensor at, int64_t start) {
  if (kind == Kind::bits16) check_type(out, "out", ScalarType::Int, "int32");
  else check_type(out, "out", ScalarType::Float, "float32");
  check_contiguous(out, "out");
  const Draw numbers = draw_of(out, key, purpose, time, at, start);
  if (!out.numel()) return;
  const On on(out);
  draw(on.queue, kind, out.mutable_data_ptr(), out.numel(), numbers);
}

// Round x to `out`, element i by the 16 random bits of number `start + i`.
void round_to_bfloat16_(Tensor out, Tensor x, int64_t key, int64_t purpose, int64_t time, OptionalTensor at,
                        int64_t start) {
  check_type(out, "out", ScalarType::BFloat16, "bfloat16");
  check_type(x, "x", ScalarType::Float, "float32");
  check_shape(x, "x", out, "out");
  check_device(x, "x", out, "out");
  check_contiguous(out, "out");
  check_contiguous(x, "x");
  const Draw numbers = draw_of(out, key, purpose, time, at, start);
  if (!out.numel()) return;
  const On on(out);
  round_to_bfloat16(on.queue, write<bfloat16>(out), read<float>(x), out.numel(), numbers);
}

}  // namespace
}  // namespace lro
