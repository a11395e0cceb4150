// What operators ask of their tensors, and what they take from them. Nothing outside this folder knows torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "../kernels.h"

#ifdef LRO_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#ifdef LRO_CUDA
// Weak: a torch without CUDA has no such symbol, and this library loads there all the same.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
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

// A number that is known, or a tensor of one, on the device of `like`.
Step step_of(double known, const OptionalTensor& x, const Tensor& like, const char* name, const char* like_name) {
  if (!x) return {known, nullptr, nullptr};
  const bool single = is(*x, ScalarType::Float);
  STD_TORCH_CHECK(single || is(*x, ScalarType::Double), name, " must be float32 or float64, got ", type_of(*x));
  STD_TORCH_CHECK(x->numel() == 1, name, " must be one number, got ", shape_of(*x));
  check_device(*x, name, like, like_name);
  return {known, single ? read<float>(*x) : nullptr, single ? nullptr : read<double>(*x)};
}

const int64_t* time_of(const OptionalTensor& at, const Tensor& like, const char* like_name) {
  if (!at) return nullptr;
  check_type(*at, "at", ScalarType::Long, "int64");
  STD_TORCH_CHECK(at->numel() == 1, "at must be one number, got ", shape_of(*at));
  check_device(*at, "at", like, like_name);
  return read<int64_t>(*at);
}

}  // namespace
}  // namespace lro
