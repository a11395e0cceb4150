// The only file that knows torch: checks the tensors of each operator and hands their memory to the kernels.
//
// Compiled once per backend, for the CPU, with LRO_CUDA for CUDA and with LRO_EMULATED for CUDA sources that run on the CPU
// in tests. Schemas are defined in lowrank_optim/ops/schema.py; only the stable ABI of torch is used, so that one binary
// serves every torch from 2.10 on. The texts of errors are those of the schema's own checks.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "kernels.h"

#ifdef LRO_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#ifdef LRO_EMULATED
#define LRO_NAMESPACE lowrank_optim_emulated
#else
#define LRO_NAMESPACE lowrank_optim
#endif

#ifdef LRO_CUDA
#define LRO_KEY CUDA
// Weak: a torch without CUDA has no such symbol, and this library loads there all the same.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#else
#define LRO_KEY CPU
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace lro {

#ifndef LRO_CUDA
void parallel(int64_t n, int64_t grain, void (*work)(int64_t, int64_t, const void*), const void* context) {
  if (n <= grain) return work(0, n, context);
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { work(begin, end, context); });
}
#endif

namespace {

#ifdef LRO_CUDA
using GetStream = int32_t (*)(int32_t, void**);

GetStream stream_getter() {
  if (&aoti_torch_get_current_cuda_stream) return &aoti_torch_get_current_cuda_stream;
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
}

// The device of a tensor is current for as long as this lives, and `queue` is its stream.
struct On {
  torch::stable::accelerator::DeviceGuard guard;
  Queue queue{nullptr};

  explicit On(const Tensor& x) : guard(x.get_device_index()) {
    static const GetStream get = stream_getter();
    STD_TORCH_CHECK(get, "this torch has no CUDA streams; use one that was built with CUDA");
    STD_TORCH_CHECK(get(x.get_device_index(), &queue.stream) == 0, "torch did not give its current CUDA stream");
  }
};
#else
struct On {
  Queue queue{nullptr};
  explicit On(const Tensor&) {}
};
#endif

// As Python prints it.
std::string type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Bool: return "torch.bool";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    default: return torch::headeronly::toString(x.scalar_type());
  }
}

bool is(const Tensor& x, ScalarType type) { return x.scalar_type() == type; }

void check_contiguous(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous; use .contiguous()");
}

void check_type(const Tensor& x, const char* name, ScalarType type, const char* type_name) {
  STD_TORCH_CHECK(is(x, type), name, " must be ", type_name, ", got ", type_of(x));
}

void check_floating(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(is(x, ScalarType::Float) || is(x, ScalarType::BFloat16), name,
                  " must be float32 or bfloat16, got ", type_of(x));
}

bool same_shape(const Tensor& x, const Tensor& y) {
  if (x.dim() != y.dim()) return false;
  for (int64_t i = 0; i < x.dim(); ++i)
    if (x.size(i) != y.size(i)) return false;
  return true;
}

std::string shape_of(const Tensor& x) {
  std::string text = "(";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + (x.dim() == 1 ? ",)" : ")");
}

void check_shape(const Tensor& x, const char* name, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(same_shape(x, like), name, " must have the shape of ", like_name, " ", shape_of(like), ", got ",
                  shape_of(x));
}

// The time on the device must be where the output is, or a kernel would read another device's memory.
void check_device(const Tensor& x, const char* name, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(x.is_cpu() == like.is_cpu() && x.get_device_index() == like.get_device_index(), name,
                  " must be on the device of ", like_name);
}

Blocks blocks_of(const Tensor& elements, int64_t block) {
  STD_TORCH_CHECK(elements.dim() >= 1, "x must have a last dimension to be cut into blocks, got a scalar");
  STD_TORCH_CHECK(block >= 1, "block must be at least 1, got ", block);
  const int64_t k = elements.size(elements.dim() - 1);
  return {k ? elements.numel() / k : 0, k, block};
}

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

void check_codes(const Tensor& codes, const Tensor& x) {
  check_type(codes, "codes", ScalarType::Byte, "uint8");
  check_floating(x, "x");
  check_shape(x, "x", codes, "codes");
  check_device(x, "x", codes, "codes");
  check_contiguous(codes, "codes");
  check_contiguous(x, "x");
}

const float* noise_of(const OptionalTensor& noise, const Tensor& codes) {
  if (!noise) return nullptr;
  check_type(*noise, "noise", ScalarType::Float, "float32");
  check_shape(*noise, "noise", codes, "codes");
  check_device(*noise, "noise", codes, "codes");
  check_contiguous(*noise, "noise");
  return static_cast<const float*>(noise->const_data_ptr());
}

template <class T>
T* write(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}
template <class T>
const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

// Calls `run(pointer of the element type)` for a float32 or bfloat16 tensor.
template <class Run>
void by_type(const Tensor& x, const Run& run) {
  if (is(x, ScalarType::Float)) run(static_cast<float*>(nullptr));
  else run(static_cast<bfloat16*>(nullptr));
}

// -- operators --------------------------------------------------------------------------------------------------------

void projected_adam_(Tensor exp_avg, Tensor exp_avg_sq, Tensor r, double beta1, double beta2, double eps, double t,
                     OptionalTensor step) {
  STD_TORCH_CHECK(is(r, ScalarType::Float) || is(r, ScalarType::Double), "r must be float32 or float64, got ",
                  type_of(r));
  check_contiguous(r, "r");
  const Tensor* moments[] = {&exp_avg, &exp_avg_sq};
  const char* names[] = {"exp_avg", "exp_avg_sq"};
  for (int i = 0; i < 2; ++i) {
    const Tensor& x = *moments[i];
    STD_TORCH_CHECK(x.scalar_type() == r.scalar_type(), names[i], " must have the dtype of r, got ",
                    type_of(x));
    check_shape(x, names[i], r, "r");
    check_device(x, names[i], r, "r");
    check_contiguous(x, names[i]);
  }
  Step number{t, nullptr, nullptr};
  if (step) {
    const bool single = is(*step, ScalarType::Float);
    STD_TORCH_CHECK(single || is(*step, ScalarType::Double), "step must be float32 or float64, got ",
                    type_of(*step));
    STD_TORCH_CHECK(step->numel() == 1, "step must be one number, got ", shape_of(*step));
    check_device(*step, "step", r, "r");
    if (single) number.single = read<float>(*step);
    else number.wide = read<double>(*step);
  }
  if (!r.numel()) return;
  const On on(r);
  if (is(r, ScalarType::Float))
    projected_adam(on.queue, write<float>(exp_avg), write<float>(exp_avg_sq), write<float>(r), r.numel(), beta1, beta2,
                   eps, number);
  else
    projected_adam(on.queue, write<double>(exp_avg), write<double>(exp_avg_sq), write<double>(r), r.numel(), beta1,
                   beta2, eps, number);
}

Draw draw_of(const Tensor& out, int64_t key, int64_t purpose, int64_t time, const OptionalTensor& at, int64_t start) {
  const auto bits = static_cast<uint64_t>(key);
  const Stream stream{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), static_cast<uint32_t>(purpose),
                      static_cast<uint32_t>(time)};
  if (!at) return {stream, nullptr, start};
  check_type(*at, "at", ScalarType::Long, "int64");
  STD_TORCH_CHECK(at->numel() == 1, "at must be one number, got ", shape_of(*at));
  check_device(*at, "at", out, "out");
  return {stream, read<int64_t>(*at), start};
}

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

void check_table(const Tensor& table, const char* name, ScalarType type, const char* type_name, const Tensor& codes) {
  check_type(table, name, type, type_name);
  check_device(table, name, codes, "codes");
  check_contiguous(table, name);
  STD_TORCH_CHECK(table.numel() == 1 << 16, name, " must have 65536 entries, got ", table.numel());
}

void check_map(const Tensor& code_map, const Tensor& codes) {
  check_type(code_map, "code_map", ScalarType::Float, "float32");
  check_device(code_map, "code_map", codes, "codes");
  check_contiguous(code_map, "code_map");
  STD_TORCH_CHECK(code_map.dim() == 1 && code_map.numel() >= 1 && code_map.numel() <= 256,
                  "code_map must have 1 to 256 entries, got ", shape_of(code_map));
}

void quantize_blockwise_(Tensor codes, Tensor absmax, Tensor x, Tensor code_map, Tensor lower, Tensor midpoint,
                         int64_t block, bool signed_peak, OptionalTensor noise) {
  check_codes(codes, x);
  const Blocks blocks = blocks_of(codes, block);
  check_numbers(absmax, "absmax", codes, blocks);
  check_map(code_map, codes);
  check_table(lower, "lower", ScalarType::Byte, "uint8", codes);
  check_table(midpoint, "midpoint", ScalarType::Float, "float32", codes);
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

void dequantize_blockwise_(Tensor x, Tensor codes, Tensor absmax, Tensor code_map, int64_t block) {
  check_codes(codes, x);
  const Blocks blocks = blocks_of(codes, block);
  check_numbers(absmax, "absmax", codes, blocks);
  check_map(code_map, codes);
  if (!codes.numel()) return;
  const On on(codes);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dequantize_blockwise(on.queue, write<T>(x), read<uint8_t>(codes), read<float>(absmax), read<float>(code_map),
                         blocks);
  });
}

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

void pack4_(Tensor packed, Tensor codes) {
  check_pack4(packed, codes);
  if (!codes.numel()) return;
  const On on(codes);
  const int64_t k = codes.size(codes.dim() - 1);
  pack4(on.queue, write<uint8_t>(packed), read<uint8_t>(codes), codes.numel() / k, k);
}

void unpack4_(Tensor codes, Tensor packed) {
  check_pack4(packed, codes);
  if (!codes.numel()) return;
  const On on(codes);
  const int64_t k = codes.size(codes.dim() - 1);
  unpack4(on.queue, write<uint8_t>(codes), read<uint8_t>(packed), codes.numel() / k, k);
}

void select_top_(Tensor index, Tensor scores) {
  check_type(index, "index", ScalarType::Int, "int32");
  STD_TORCH_CHECK(is(scores, ScalarType::Float) || is(scores, ScalarType::Double),
                  "scores must be float32 or float64, got ", type_of(scores));
  check_contiguous(index, "index");
  check_contiguous(scores, "scores");
  check_device(index, "index", scores, "scores");
  const int64_t last = scores.dim() - 1;
  bool fits = last >= 0 && index.dim() == scores.dim() && index.size(last) <= scores.size(last);
  for (int64_t i = 0; fits && i < last; ++i) fits = index.size(i) == scores.size(i);
  STD_TORCH_CHECK(fits, "index must have the shape of scores ", shape_of(scores),
                  ", its last dimension not longer, got ", shape_of(index));
  STD_TORCH_CHECK(scores.size(last) < (1ll << 30), "scores must have fewer than 2^30 numbers in a line, got ",
                  shape_of(scores));
  if (!index.numel()) return;
  const On on(scores);
  const int64_t n = scores.size(last), rows = scores.numel() / n, r = index.size(last);
  if (is(scores, ScalarType::Float)) select_top(on.queue, write<int32_t>(index), read<float>(scores), rows, n, r);
  else select_top(on.queue, write<int32_t>(index), read<double>(scores), rows, n, r);
}

#ifndef LRO_CUDA
template <class Index>
bool ascends(const Index* positions, int64_t count) {
  bool so = true;
  for (int64_t i = 1; i < count; ++i) so &= positions[i - 1] < positions[i];
  return so;
}
#endif

// One number per position. Their order is looked at on the CPU only: elsewhere that would stop the host.
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

// The same for `dense`, of whose dtype the numbers are.
void check_at(const Tensor& dense, const Tensor& positions, const Tensor& numbers, const char* name, int64_t start) {
  STD_TORCH_CHECK(is(dense, ScalarType::Float) || is(dense, ScalarType::Double) || is(dense, ScalarType::BFloat16),
                  "dense must be float32 or float64 or bfloat16, got ", type_of(dense));
  check_contiguous(dense, "dense");
  STD_TORCH_CHECK(numbers.scalar_type() == dense.scalar_type(), name, " must have the dtype of dense, got ",
                  type_of(numbers));
  check_device(numbers, name, dense, "dense");
  check_positions(positions, numbers, name, start, start + dense.numel());
}

// Calls `run(pointer of the element type, pointer of the type of positions)`.
template <class Run>
void by_types(const Tensor& x, const Tensor& positions, const Run& run) {
  const auto with = [&](auto* type) {
    if (is(positions, ScalarType::Int)) run(type, static_cast<int32_t*>(nullptr));
    else run(type, static_cast<int64_t*>(nullptr));
  };
  if (is(x, ScalarType::Float)) with(static_cast<float*>(nullptr));
  else if (is(x, ScalarType::Double)) with(static_cast<double*>(nullptr));
  else with(static_cast<bfloat16*>(nullptr));
}

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

#if !defined(LRO_CUDA) && !defined(LRO_EMULATED)
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
      add_sampled_product(write<T>(out), read<T>(left), read<T>(right), read<Index>(positions), positions.numel(), n, k);
  });
}
#endif

}  // namespace
}  // namespace lro

STABLE_TORCH_LIBRARY_IMPL(LRO_NAMESPACE, LRO_KEY, m) {
  m.impl("projected_adam_", TORCH_BOX(&lro::projected_adam_));
  m.impl("philox_bits16_", TORCH_BOX(&lro::philox_<lro::Kind::bits16>));
  m.impl("philox_noise16_", TORCH_BOX(&lro::philox_<lro::Kind::noise16>));
  m.impl("philox_uniform_", TORCH_BOX(&lro::philox_<lro::Kind::uniform>));
  m.impl("philox_normal_", TORCH_BOX(&lro::philox_<lro::Kind::normal>));
  m.impl("round_to_bfloat16_", TORCH_BOX(&lro::round_to_bfloat16_));
  m.impl("quantize_blockwise_", TORCH_BOX(&lro::quantize_blockwise_));
  m.impl("quantize_affine_", TORCH_BOX(&lro::quantize_affine_));
  m.impl("quantize_sixteenths_", TORCH_BOX(&lro::quantize_sixteenths_));
  m.impl("dequantize_blockwise_", TORCH_BOX(&lro::dequantize_blockwise_));
  m.impl("pack4_", TORCH_BOX(&lro::pack4_));
  m.impl("unpack4_", TORCH_BOX(&lro::unpack4_));
  m.impl("dequantize_affine_", TORCH_BOX(&lro::dequantize_affine_));
  m.impl("select_top_", TORCH_BOX(&lro::select_top_));
  m.impl("add_at_", TORCH_BOX(&lro::add_at_));
  m.impl("gather_at_", TORCH_BOX(&lro::gather_at_));
#if !defined(LRO_CUDA) && !defined(LRO_EMULATED)
  m.impl("add_sampled_product_", TORCH_BOX(&lro::add_sampled_product_));
#endif
}
