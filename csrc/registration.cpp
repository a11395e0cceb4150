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
#include <vector>

#include "kernels.h"

#ifdef LRO_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#if defined(LRO_CUDA) || defined(LRO_EMULATED)
#define LRO_ONLY_SHARED  // not the operators that no CUDA source has a kernel for
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
  const int64_t dimensions = x.dim();  // each question is a call into torch
  if (dimensions != y.dim()) return false;
  for (int64_t i = 0; i < dimensions; ++i)
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
  const bool on_cpu = x.is_cpu();
  const bool same = on_cpu == like.is_cpu() && (on_cpu || x.get_device_index() == like.get_device_index());
  STD_TORCH_CHECK(same, name, " must be on the device of ", like_name);
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

void check_table(const Tensor& table, const char* name, ScalarType type, const char* type_name, const Tensor& like,
                 const char* like_name) {
  check_type(table, name, type, type_name);
  check_device(table, name, like, like_name);
  check_contiguous(table, name);
  STD_TORCH_CHECK(table.numel() == 1 << 16, name, " must have 65536 entries, got ", table.numel());
}

void check_map(const Tensor& code_map, const char* name, const Tensor& like, const char* like_name) {
  check_type(code_map, name, ScalarType::Float, "float32");
  check_device(code_map, name, like, like_name);
  check_contiguous(code_map, name);
  STD_TORCH_CHECK(code_map.dim() == 1 && code_map.numel() >= 1 && code_map.numel() <= 256, name,
                  " must have 1 to 256 entries, got ", shape_of(code_map));
}

void check_moment(const Tensor& x, const char* name, const Tensor& r) {
  check_shape(x, name, r, "r");
  check_device(x, name, r, "r");
  check_contiguous(x, name);
}

// A number that is known, or a tensor of one, on the device of `like`.
Step step_of(double known, const OptionalTensor& x, const Tensor& like, const char* name, const char* like_name) {
  if (!x) return {known, nullptr, nullptr};
  const bool single = is(*x, ScalarType::Float);
  STD_TORCH_CHECK(single || is(*x, ScalarType::Double), name, " must be float32 or float64, got ", type_of(*x));
  STD_TORCH_CHECK(x->numel() == 1, name, " must be one number, got ", shape_of(*x));
  check_device(*x, name, like, like_name);
  return {known, single ? read<float>(*x) : nullptr, single ? nullptr : read<double>(*x)};
}

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

template <class T>
PlainMoments<T> plain_moments(const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& r) {
  return {write<T>(exp_avg), write<T>(exp_avg_sq), write<T>(r), r.numel()};
}

void projected_adam_(Tensor exp_avg, Tensor exp_avg_sq, Tensor r, double beta1, double beta2, double eps, double t,
                     OptionalTensor step) {
  check_plain(exp_avg, exp_avg_sq, r);
  const AdamRule rule{beta1, beta2, eps, step_of(t, step, r, "step", "r")};
  if (!r.numel()) return;
  const On on(r);
  const auto update = [&](const auto& item) { projected_adam(on.queue, &item, 1, rule); };
  if (is(r, ScalarType::Float)) update(plain_moments<float>(exp_avg, exp_avg_sq, r));
  else update(plain_moments<double>(exp_avg, exp_avg_sq, r));
}

// -- the same for several tensors, all on one device

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

template <class List>
void check_length(const List& list, const char* name, const Tensors& r) {
  STD_TORCH_CHECK(list.size() == r.size(), name, " must have one entry for each of r, ", r.size(), ", got ",
                  list.size());
}

void check_single(const Tensor& r, const Tensor& first) {
  check_type(r, "r", ScalarType::Float, "float32");
  check_contiguous(r, "r");
  check_device(r, "r", first, "its first tensor");
}

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

void projected_adam_list_(Tensors exp_avg, Tensors exp_avg_sq, Tensors r, double beta1, double beta2, double eps,
                          double t, OptionalTensor step) {
  check_length(exp_avg, "exp_avg", r);
  check_length(exp_avg_sq, "exp_avg_sq", r);
  if (r.empty()) return;
  const ScalarType first = r[0].scalar_type();
  for (size_t i = 0; i < r.size(); ++i) {
    STD_TORCH_CHECK(check_plain(exp_avg[i], exp_avg_sq[i], r[i]) == first, "r must have the dtype of its first tensor, got ",
                    type_of(r[i]));
    check_device(r[i], "r", r[0], "its first tensor");
  }
  const AdamRule rule{beta1, beta2, eps, step_of(t, step, r[0], "step", "r")};
  if (first == ScalarType::Float) update_plain<float>(exp_avg, exp_avg_sq, r, rule);
  else update_plain<double>(exp_avg, exp_avg_sq, r, rule);
}

const int64_t* time_of(const OptionalTensor& at, const Tensor& like, const char* like_name) {
  if (!at) return nullptr;
  check_type(*at, "at", ScalarType::Long, "int64");
  STD_TORCH_CHECK(at->numel() == 1, "at must be one number, got ", shape_of(*at));
  check_device(*at, "at", like, like_name);
  return read<int64_t>(*at);
}

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
    const auto bits = static_cast<uint64_t>(key[i]);
    if (r[i].numel())
      items.push_back({write<bfloat16>(exp_avg[i]), write<bfloat16>(exp_avg_sq[i]), write<float>(r[i]), r[i].numel(),
                       static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), start[i]});
  }
  const AdamRule rule{beta1, beta2, eps, step_of(t, step, r[0], "step", "r")};
  const Streams streams{static_cast<uint32_t>(purpose), static_cast<uint32_t>(purpose_sq), static_cast<uint32_t>(time),
                        time_of(at, r[0], "r")};
  if (items.empty()) return;
  const On on(r[0]);
  projected_adam(on.queue, items.data(), static_cast<int64_t>(items.size()), rule, streams);
}

Levels levels_of(const Tensor& code_map, const char* name, const Tensor& lower, const char* lower_name,
                 const Tensor& r) {
  check_map(code_map, name, r, "r");
  check_table(lower, lower_name, ScalarType::Byte, "uint8", r, "r");
  return {read<float>(code_map), read<uint8_t>(lower), static_cast<int32_t>(code_map.numel())};
}

// `peaks (..., blocks)`: as many rows as there are, the last dimension aside.
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
  const AdamRule rule{beta1, beta2, eps, step_of(t, step, r[0], "step", "r")};
  if (items.empty()) return;
  const On on(r[0]);
  projected_adam(on.queue, items.data(), static_cast<int64_t>(items.size()), rule, m, v);
}

#ifndef LRO_ONLY_SHARED
void gram_(Tensor out, Tensor y, bool across) {
  check_type(y, "y", ScalarType::Float, "float32");
  check_type(out, "out", ScalarType::Double, "float64");
  check_contiguous(y, "y");
  check_contiguous(out, "out");
  check_device(out, "out", y, "y");
  STD_TORCH_CHECK(y.dim() >= 2, "y must have two dimensions or more, got ", shape_of(y));
  const int64_t rows = y.size(y.dim() - (across ? 1 : 2)), columns = y.size(y.dim() - (across ? 2 : 1));
  bool fits = out.dim() == y.dim();
  for (int64_t i = 0; fits && i + 2 < y.dim(); ++i) fits = out.size(i) == y.size(i);
  for (int64_t i = 1; fits && i <= 2; ++i) fits = out.size(out.dim() - i) == columns;
  STD_TORCH_CHECK(fits, "out must have one number per two columns of y ", shape_of(y), ", got ", shape_of(out));
  if (!out.numel()) return;
  const On on(y);
  const Thin shape{rows, columns, across ? 1 : columns, across ? rows : 1};
  gram(on.queue, write<double>(out), read<float>(y), out.numel() / (columns * columns), shape);
}
#endif

void fix_signs_(Tensor basis) {
  STD_TORCH_CHECK(is(basis, ScalarType::Float) || is(basis, ScalarType::Double),
                  "basis must be float32 or float64, got ", type_of(basis));
  check_contiguous(basis, "basis");
  STD_TORCH_CHECK(basis.dim() >= 2, "basis must have two dimensions or more, got ", shape_of(basis));
  if (!basis.numel()) return;
  const On on(basis);
  const int64_t rows = basis.size(basis.dim() - 2), columns = basis.size(basis.dim() - 1);
  const int64_t matrices = basis.numel() / (rows * columns);
  if (is(basis, ScalarType::Float)) fix_signs(on.queue, write<float>(basis), matrices, rows, columns);
  else fix_signs(on.queue, write<double>(basis), matrices, rows, columns);
}

Draw draw_of(const Tensor& out, int64_t key, int64_t purpose, int64_t time, const OptionalTensor& at, int64_t start,
             const char* name = "out") {
  const auto bits = static_cast<uint64_t>(key);
  const Stream stream{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), static_cast<uint32_t>(purpose),
                      static_cast<uint32_t>(time)};
  return {stream, time_of(at, out, name), start};
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

void check_weight(const Tensor& w, const char* name) {
  check_type(w, name, ScalarType::BFloat16, "bfloat16");
  check_contiguous(w, name);
}

Columns columns_of(const Tensor& w, const Tensor& x, int64_t first) {
  check_weight(w, "w");
  check_type(x, "x", ScalarType::Float, "float32");
  check_contiguous(x, "x");
  check_device(x, "x", w, "w");
  STD_TORCH_CHECK(w.dim() == 2, "w must have two dimensions, got ", shape_of(w));
  const bool fits = x.dim() == 2 && x.size(0) == w.size(0) && first >= 0 && first + x.size(1) <= w.size(1);
  STD_TORCH_CHECK(fits, "x must have the rows of w ", shape_of(w), " and fit into its columns from ", first, " on, got ",
                  shape_of(x));
  return {w.size(0), x.size(1), w.size(1), first};
}

void add_nearest_(Tensor w, Tensor x, double keep, OptionalTensor factor, int64_t first) {
  const Columns columns = columns_of(w, x, first);
  const Step step = step_of(keep, factor, w, "factor", "w");
  if (!x.numel()) return;
  const On on(w);
  add_nearest(on.queue, write<bfloat16>(w), read<float>(x), columns, step);
}

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

void add_stochastic_(Tensor w, Tensor x, double keep, int64_t key, int64_t purpose, int64_t time, OptionalTensor at,
                     int64_t start, int64_t pitch, OptionalTensor factor, int64_t first) {
  const Columns columns = columns_of(w, x, first);
  const Step step = step_of(keep, factor, w, "factor", "w");
  const Draw numbers = draw_of(w, key, purpose, time, at, start, "w");
  if (!x.numel()) return;
  const On on(w);
  add_stochastic(on.queue, write<bfloat16>(w), read<float>(x), columns, step, numbers, pitch);
}

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
  check_map(code_map, "code_map", codes, "codes");
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

#ifndef LRO_ONLY_SHARED
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
  m.impl("projected_adam_list_", TORCH_BOX(&lro::projected_adam_list_));
  m.impl("projected_adam_bfloat16_list_", TORCH_BOX(&lro::projected_adam_bfloat16_list_));
  m.impl("projected_adam_int8_list_", TORCH_BOX(&lro::projected_adam_int8_list_));
#ifndef LRO_ONLY_SHARED
  m.impl("gram_", TORCH_BOX(&lro::gram_));
#endif
  m.impl("fix_signs_", TORCH_BOX(&lro::fix_signs_));
  m.impl("philox_bits16_", TORCH_BOX(&lro::philox_<lro::Kind::bits16>));
  m.impl("philox_noise16_", TORCH_BOX(&lro::philox_<lro::Kind::noise16>));
  m.impl("philox_uniform_", TORCH_BOX(&lro::philox_<lro::Kind::uniform>));
  m.impl("philox_normal_", TORCH_BOX(&lro::philox_<lro::Kind::normal>));
  m.impl("round_to_bfloat16_", TORCH_BOX(&lro::round_to_bfloat16_));
  m.impl("add_nearest_", TORCH_BOX(&lro::add_nearest_));
  m.impl("add_kahan_", TORCH_BOX(&lro::add_kahan_));
  m.impl("add_stochastic_", TORCH_BOX(&lro::add_stochastic_));
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
#ifndef LRO_ONLY_SHARED
  m.impl("add_sampled_product_", TORCH_BOX(&lro::add_sampled_product_));
#endif
}
