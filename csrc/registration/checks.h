// Checks of tensors, and access to their memory. Only this folder includes torch.
//
// A native kernel replaces the plain torch kernel of an operator, together with the checks that Python makes there. Raw
// pointers make wrong arguments dangerous: a short tensor would be read past its end. So every operator checks dtype,
// shape, device and contiguity again before it takes a pointer. The texts of the errors equal those of
// lowrank_optim/ops/schema.py, and a test compares them. A user sees the same message with and without native kernels.
//
// STD_TORCH_CHECK throws, and torch turns the exception into a RuntimeError. All checks come before the first write, so
// a refused call changes nothing.
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
// The symbol is weak, because a torch without CUDA does not have it. The library can then still be loaded.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace lro {

#ifndef LRO_CUDA
// Run `work` on pieces of [0, n). A short range runs in the calling thread, without a call into torch.
void parallel(int64_t n, int64_t grain, void (*work)(int64_t, int64_t, const void*), const void* context) {
  if (n <= grain) return work(0, n, context);
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { work(begin, end, context); });
}
#endif

namespace {

#ifdef LRO_CUDA
using GetStream = int32_t (*)(int32_t, void**);

// Return torch's function for the current stream, or null. If the weak symbol was not bound when this library was
// loaded, look it up in the libtorch_cuda.so that is already in the process. RTLD_NOLOAD never loads another copy.
GetStream stream_getter() {
  if (&aoti_torch_get_current_cuda_stream) return &aoti_torch_get_current_cuda_stream;
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
}

// A guard that makes the device of a tensor current during its lifetime. `queue` is the current stream of that device,
// so that kernels are ordered with torch's own.
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
// The CPU has no current device and no stream. Operators are written once for all backends.
struct On {
  Queue queue{nullptr};
  explicit On(const Tensor&) {}
};
#endif

// Return the dtype as Python prints it.
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

// Whether the tensor has this dtype.
bool is(const Tensor& x, ScalarType type) { return x.scalar_type() == type; }

// Check that the memory is row-major without gaps, as all kernels assume.
void check_contiguous(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous; use .contiguous()");
}

void check_type(const Tensor& x, const char* name, ScalarType type, const char* type_name) {
  STD_TORCH_CHECK(is(x, type), name, " must be ", type_name, ", got ", type_of(x));
}

// Check for the two dtypes that quantizers read and write.
void check_floating(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(is(x, ScalarType::Float) || is(x, ScalarType::BFloat16), name,
                  " must be float32 or bfloat16, got ", type_of(x));
}

bool same_shape(const Tensor& x, const Tensor& y) {
  const int64_t dimensions = x.dim();  // each of these calls crosses the ABI, so it is made once
  if (dimensions != y.dim()) return false;
  for (int64_t i = 0; i < dimensions; ++i)
    if (x.size(i) != y.size(i)) return false;
  return true;
}

// Return the shape as Python prints a tuple.
std::string shape_of(const Tensor& x) {
  std::string text = "(";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + (x.dim() == 1 ? ",)" : ")");
}

void check_shape(const Tensor& x, const char* name, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(same_shape(x, like), name, " must have the shape of ", like_name, " ", shape_of(like), ", got ",
                  shape_of(x));
}

// Check that two tensors are on one device. A kernel would otherwise read another device's memory, which crashes or is
// slow. CPU tensors have no device index.
void check_device(const Tensor& x, const char* name, const Tensor& like, const char* like_name) {
  const bool on_cpu = x.is_cpu();
  const bool same = on_cpu == like.is_cpu() && (on_cpu || x.get_device_index() == like.get_device_index());
  STD_TORCH_CHECK(same, name, " must be on the device of ", like_name);
}

// Return a pointer to write to, and a pointer to read from. T is not checked here; the caller has checked the dtype.
template <class T>
T* write(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}
template <class T>
const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

// Call `run` with a null pointer of the element type, float or bfloat16. The pointer carries only the type: C++17
// lambdas have no template arguments of their own.
template <class Run>
void by_type(const Tensor& x, const Run& run) {
  if (is(x, ScalarType::Float)) run(static_cast<float*>(nullptr));
  else run(static_cast<bfloat16*>(nullptr));
}

// Check a table with one entry per upper half of a float: 2^16 entries of any shape.
void check_table(const Tensor& table, const char* name, ScalarType type, const char* type_name, const Tensor& like,
                 const char* like_name) {
  check_type(table, name, type, type_name);
  check_device(table, name, like, like_name);
  check_contiguous(table, name);
  STD_TORCH_CHECK(table.numel() == 1 << 16, name, " must have 65536 entries, got ", table.numel());
}

// Check the ascending values of a code map, (1 ... 256,). A code is one byte.
void check_map(const Tensor& code_map, const char* name, const Tensor& like, const char* like_name) {
  check_type(code_map, name, ScalarType::Float, "float32");
  check_device(code_map, name, like, like_name);
  check_contiguous(code_map, name);
  STD_TORCH_CHECK(code_map.dim() == 1 && code_map.numel() >= 1 && code_map.numel() <= 256, name,
                  " must have 1 to 256 entries, got ", shape_of(code_map));
}

// Return a number that is known to the host, or a reference to a tensor of one element on the device of `like`. Neither
// case waits for the device.
Step step_of(double known, const OptionalTensor& x, const Tensor& like, const char* name, const char* like_name) {
  if (!x) return {known, nullptr, nullptr};
  const bool single = is(*x, ScalarType::Float);
  STD_TORCH_CHECK(single || is(*x, ScalarType::Double), name, " must be float32 or float64, got ", type_of(*x));
  STD_TORCH_CHECK(x->numel() == 1, name, " must be one number, got ", shape_of(*x));
  check_device(*x, name, like, like_name);
  return {known, single ? read<float>(*x) : nullptr, single ? nullptr : read<double>(*x)};
}

// Return a pointer to the time of a random stream on the device, or null if the host knows the time.
const int64_t* time_of(const OptionalTensor& at, const Tensor& like, const char* like_name) {
  if (!at) return nullptr;
  check_type(*at, "at", ScalarType::Long, "int64");
  STD_TORCH_CHECK(at->numel() == 1, "at must be one number, got ", shape_of(*at));
  check_device(*at, "at", like, like_name);
  return read<int64_t>(*at);
}

}  // namespace
}  // namespace lro
