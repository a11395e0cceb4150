// Blockwise quantization on GPUs (elements.h has the arithmetic of a single code).
//
// A thread block takes whole blocks of numbers, one after another. Its threads first find the extremes together
// (range.h) and then encode the elements of the block. Decoding needs no extremes and no barriers.
#include "../kernels.h"
#include "launch.h"
#include "range.h"

namespace lro {
namespace {

// Return the extremes of n numbers to all threads. Every thread of the block must call this function.
template <class In>
__device__ Range range_of(const In* x, int64_t n) {
  Extremes own;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) own.add(to_float(x[i]));
  return range_of(own);
}

// Encode by a code map; thread 0 writes the peak.
template <class In>
__global__ void __launch_bounds__(kThreads) to_levels(uint8_t* codes, float* absmax, const In* x, CodeMap map,
                                                      Blocks blocks, bool signed_peak, const float* noise) {
  for (int64_t b = blockIdx.x; b < blocks.count(); b += gridDim.x) {
    const int64_t begin = blocks.begin(b), n = blocks.size(b);
    const Range range = range_of(x + begin, n);
    const Peak peak = peak_of(range.top, range.bottom, signed_peak);
    if (threadIdx.x == 0) absmax[b] = peak.stored;
    for (int64_t i = begin + threadIdx.x; i < begin + n; i += kThreads) {
      const float unit = to_float(x[i]) / peak.divisor;
      codes[i] = static_cast<uint8_t>(noise ? dithered_code(unit, map, noise[i]) : nearest_code(unit, map));
    }
  }
}

// Encode on a uniform grid; thread 0 writes its step and its start.
template <class In>
__global__ void __launch_bounds__(kThreads) to_grid(uint8_t* codes, float* scale, float* low, const In* x, int32_t most,
                                                    Blocks blocks, const float* noise) {
  for (int64_t b = blockIdx.x; b < blocks.count(); b += gridDim.x) {
    const int64_t begin = blocks.begin(b), n = blocks.size(b);
    const Range range = range_of(x + begin, n);
    const Grid grid = grid_of(range.top, range.bottom, static_cast<float>(most));
    if (threadIdx.x == 0) scale[b] = grid.step, low[b] = grid.low;
    for (int64_t i = begin + threadIdx.x; i < begin + n; i += kThreads) {
      const float value = to_float(x[i]);
      codes[i] = noise ? grid_code(value, grid, most, noise[i]) : grid_code(value, grid, most);
    }
  }
}

// Encode in sixteenths of the largest element; thread 0 writes that element.
template <class In>
__global__ void __launch_bounds__(kThreads) to_sixteenths(uint8_t* codes, float* largest, const In* x, Blocks blocks,
                                                          const float* noise) {
  for (int64_t b = blockIdx.x; b < blocks.count(); b += gridDim.x) {
    const int64_t begin = blocks.begin(b), n = blocks.size(b);
    const float top = range_of(x + begin, n).top, divisor = top > kTiny ? top : kTiny;
    if (threadIdx.x == 0) largest[b] = top;
    for (int64_t i = begin + threadIdx.x; i < begin + n; i += kThreads)
      codes[i] = sixteenth_code(to_float(x[i]), divisor, noise ? noise[i] : kHalf);
  }
}

// Decode by a code map.
template <class Out>
__global__ void __launch_bounds__(kThreads) from_levels(Out* x, const uint8_t* codes, const float* absmax,
                                                        const float* code_map, Blocks blocks) {
  for (int64_t b = blockIdx.x; b < blocks.count(); b += gridDim.x) {
    const int64_t begin = blocks.begin(b), end = begin + blocks.size(b);
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) assign(x[i], code_map[codes[i]] * absmax[b]);
  }
}

// Decode a uniform grid.
template <class Out>
__global__ void __launch_bounds__(kThreads) from_grid(Out* x, const uint8_t* codes, const float* scale,
                                                      const float* low, Blocks blocks) {
  for (int64_t b = blockIdx.x; b < blocks.count(); b += gridDim.x) {
    const int64_t begin = blocks.begin(b), end = begin + blocks.size(b);
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads)
      assign(x[i], static_cast<float>(codes[i]) * scale[b] + low[b]);
  }
}

// Pack codes (rows, k) into bytes (rows, width), one byte per thread. The last byte of an odd row has 0 in its upper
// half.
__global__ void __launch_bounds__(kThreads) pack_kernel(uint8_t* bytes, const uint8_t* codes, int64_t rows, int64_t k) {
  const int64_t width = (k + 1) / 2, stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * width; i += stride) {
    const int64_t place = i % width * 2, from = i / width * k + place;
    bytes[i] = packed(codes[from], place + 1 < k ? codes[from + 1] : 0);
  }
}

// Unpack bytes (rows, width) into codes (rows, k), one byte per thread.
__global__ void __launch_bounds__(kThreads) unpack_kernel(uint8_t* codes, const uint8_t* bytes, int64_t rows,
                                                          int64_t k) {
  const int64_t width = (k + 1) / 2, stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * width; i += stride) {
    const int64_t place = i % width * 2, to = i / width * k + place;
    codes[to] = bytes[i] & 15;
    if (place + 1 < k) codes[to + 1] = bytes[i] >> 4;
  }
}

// Return one thread block per block of numbers, with a higher limit: such a block is little work.
unsigned grid_of(const Blocks& blocks) {
  constexpr int64_t most = kMostBlocks * 16;
  return static_cast<unsigned>(blocks.count() < most ? blocks.count() : most);
}

}  // namespace

template <class In>
void quantize_blockwise(Queue queue, uint8_t* codes, float* absmax, const In* x, CodeMap map, Blocks blocks,
                        bool signed_peak, const float* noise) {
  LRO_LAUNCH(to_levels<In>, grid_of(blocks), kThreads, queue, codes, absmax, x, map, blocks, signed_peak, noise);
}

template <class In>
void quantize_affine(Queue queue, uint8_t* codes, float* scale, float* low, const In* x, int bits, Blocks blocks,
                     const float* noise) {
  const int32_t most = (1 << bits) - 1;
  LRO_LAUNCH(to_grid<In>, grid_of(blocks), kThreads, queue, codes, scale, low, x, most, blocks, noise);
}

template <class In>
void quantize_sixteenths(Queue queue, uint8_t* codes, float* largest, const In* x, Blocks blocks, const float* noise) {
  LRO_LAUNCH(to_sixteenths<In>, grid_of(blocks), kThreads, queue, codes, largest, x, blocks, noise);
}

template <class Out>
void dequantize_blockwise(Queue queue, Out* x, const uint8_t* codes, const float* absmax, const float* code_map,
                          Blocks blocks) {
  LRO_LAUNCH(from_levels<Out>, grid_of(blocks), kThreads, queue, x, codes, absmax, code_map, blocks);
}

template <class Out>
void dequantize_affine(Queue queue, Out* x, const uint8_t* codes, const float* scale, const float* low, Blocks blocks) {
  LRO_LAUNCH(from_grid<Out>, grid_of(blocks), kThreads, queue, x, codes, scale, low, blocks);
}

void pack4(Queue queue, uint8_t* packed, const uint8_t* codes, int64_t rows, int64_t k) {
  LRO_LAUNCH(pack_kernel, grid_for(rows * ((k + 1) / 2)), kThreads, queue, packed, codes, rows, k);
}

void unpack4(Queue queue, uint8_t* codes, const uint8_t* packed, int64_t rows, int64_t k) {
  LRO_LAUNCH(unpack_kernel, grid_for(rows * ((k + 1) / 2)), kThreads, queue, codes, packed, rows, k);
}

#define LRO_INSTANCES(T)                                                                                              \
  template void quantize_blockwise(Queue, uint8_t*, float*, const T*, CodeMap, Blocks, bool, const float*);           \
  template void quantize_affine(Queue, uint8_t*, float*, float*, const T*, int, Blocks, const float*);                \
  template void quantize_sixteenths(Queue, uint8_t*, float*, const T*, Blocks, const float*);                         \
  template void dequantize_blockwise(Queue, T*, const uint8_t*, const float*, const float*, Blocks);                  \
  template void dequantize_affine(Queue, T*, const uint8_t*, const float*, const float*, Blocks);
LRO_INSTANCES(float)
LRO_INSTANCES(bfloat16)

}  // namespace lro
