// The functions that a backend provides: loops over memory, around the arithmetic of elements.h.
//
// cpu/*.cpp and cuda/*.cu each define these functions once, and neither includes torch. registration.cpp checks
// tensors, takes their pointers and calls the functions. Shapes, dtypes and contiguity are therefore certain here, and
// no tensor is empty. All tensors are row-major; `(matrices, m, n)` is a stack of matrices (m, n) without gaps.
#pragma once

#include "elements.h"

namespace lro {

// The CUDA stream that a kernel is launched on. The CPU ignores it.
struct Queue {
  void* stream;
};

// A number such as a step count or a decay factor: `known` by the host, or read through one of the two pointers when
// the kernel runs. Only a number on the device can change between two replays of a captured graph.
struct Step {
  double known;
  const float* single;  // float32 on the device, or null
  const double* wide;   // float64 on the device, or null
};

// Return the number; on a GPU this must run on the device.
LRO_HD double number_of(const Step& step) { return step.single ? *step.single : step.wide ? *step.wide : step.known; }

// A stream of random numbers, and the number in it of the output's element 0. A shard sets `start` to the global index
// of its first element and draws the numbers that one process would have drawn for it.
struct Draw {
  Stream stream;
  const int64_t* time;  // on the device, or null if the host knows the time
  int64_t start;
};

// A tensor (rows, k) cut into blocks of `block` elements. A block never crosses the end of a row, so the last block of
// a row may be short. Blocks are numbered row by row.
struct Blocks {
  int64_t rows, k, block;

  // Return the number of blocks of a row, and of all rows.
  LRO_HD int64_t per_row() const { return (k + block - 1) / block; }
  LRO_HD int64_t count() const { return rows * per_row(); }
  // Return the first element of block i, as an index into the whole tensor.
  LRO_HD int64_t begin(int64_t i) const { return i / per_row() * k + i % per_row() * block; }
  // Return the number of elements of block i.
  LRO_HD int64_t size(int64_t i) const {
    const int64_t left = k - i % per_row() * block;
    return left < block ? left : block;
  }
};

// The options of Adam and the current step count. The host computes the powers beta^t if it knows t: on a GPU,
// pow() may differ from the host's in the last bit of a double.
struct AdamRule {
  double beta1, beta2, eps;
  Step step;
  double power1, power2;

  LRO_HD bool knows_powers() const { return !step.single && !step.wide; }
};

// One of several tensors that one call updates: moments m and v, and coordinates r, which the direction overwrites. All
// three have n elements. A list of small matrices then costs one launch.
template <class T>
struct PlainMoments {
  T *m, *v, *r;
  int64_t n;
};

// A tensor whose moments are bfloat16 and are rounded stochastically. m and v have one stream each, with the same key.
// Element 0 gets number `start` of both streams.
struct HalfMoments {
  bfloat16 *m, *v;
  float* r;
  int64_t n;
  uint32_t key0, key1;
  int64_t start;
};

// The two streams of a call: their purposes and their common time, which may be on the device.
struct Streams {
  uint32_t m, v, time;
  const int64_t* at;  // the time on the device, or null

  // Return the stream of a tensor's first or second moment.
  LRO_HD Stream of(const HalfMoments& item, bool second, uint32_t now) const {
    return {item.key0, item.key1, second ? v : m, now};
  }
  LRO_HD uint32_t now() const { return at ? static_cast<uint32_t>(*at) : time; }
};

// A tensor whose moments are 8-bit codes of two maps, and per block the element of largest magnitude with its sign.
// Code 0 of v, which stands for zero, is never written: the direction would be divided by eps alone and explode.
struct CodedMoments {
  uint8_t *m, *v;
  float *m_peak, *v_peak, *r;
  Blocks blocks;
};
constexpr int64_t kMostCoded = 256;  // the largest block: a CPU opens it in its nearest cache, a GPU in registers

// Update the moments of `count` tensors and replace each r by Adam's direction, in one pass over memory.
template <class T>
void projected_adam(Queue queue, const PlainMoments<T>* items, int64_t count, AdamRule rule);
void projected_adam(Queue queue, const HalfMoments* items, int64_t count, AdamRule rule, Streams streams);
void projected_adam(Queue queue, const CodedMoments* items, int64_t count, AdamRule rule, Levels m, Levels v);

// The shape of a matrix Y (rows, columns) with many rows, and its strides in memory. The transpose of a row-major
// matrix has exchanged strides, so that both are read in place.
struct Thin {
  int64_t rows, columns, row_stride, column_stride;
};

// Write Y^T Y of each matrix to out (matrices, columns, columns) in double. Every sum runs in the order of the rows.
// Only the CPU has this function; libraries for GPUs have faster ones.
void gram(Queue queue, double* out, const float* y, int64_t matrices, Thin shape);

// Negate the columns of a basis (matrices, rows, columns) whose entry of largest magnitude is negative, in place. Of
// entries that are equal up to rounding errors, the first decides.
template <class T>
void fix_signs(Queue queue, T* basis, int64_t matrices, int64_t rows, int64_t columns);

// The kinds of random numbers, each a function of the words of a counter: integers below 2^16, midpoints of 2^16 cells
// of (0, 1), midpoints of 2^23 cells, and standard normal numbers.
enum class Kind { bits16, noise16, uniform, normal };
LRO_HD int lanes(Kind kind) { return kind == Kind::uniform || kind == Kind::normal ? 4 : 8; }  // per counter

// Fill out (n,) with numbers `draw.start` and up of a stream: int32 for bits16, else float32.
void draw(Queue queue, Kind kind, void* out, int64_t n, Draw draw);

// Round x (n,) to bfloat16 stochastically, element i by number `draw.start + i` of a stream.
void round_to_bfloat16(Queue queue, bfloat16* out, const float* x, int64_t n, Draw draw);

// Columns `first` to `first + run` of a weight w (rows, width), and an update x (rows, run) for them. Updates are
// computed for some columns at a time, so that no float32 copy of a whole bfloat16 weight is needed.
struct Columns {
  int64_t rows, run, width, first;

  LRO_HD int64_t place(int64_t row, int64_t column) const { return row * width + first + column; }  // index in w
};

// W <- round(keep W + x) by one of three roundings. `owed` (rows, width) holds the rounding errors of the compensated
// sum. For stochastic rounding, column 0 of x in row i gets number `draw.start + i pitch` of the stream.
void add_nearest(Queue queue, bfloat16* w, const float* x, Columns columns, Step keep);
void add_kahan(Queue queue, bfloat16* w, bfloat16* owed, const float* x, Columns columns, Step keep);
void add_stochastic(Queue queue, bfloat16* w, const float* x, Columns columns, Step keep, Draw draw, int64_t pitch);

// Write codes (rows, k) and per block of x the numbers that decode them, (rows, ceil(k / block)). noise (rows, k) is
// uniform in (0, 1) and dithers; without it (null), codes are rounded to nearest.
template <class In>
void quantize_blockwise(Queue queue, uint8_t* codes, float* absmax, const In* x, CodeMap map, Blocks blocks,
                        bool signed_peak, const float* noise);
template <class In>
void quantize_affine(Queue queue, uint8_t* codes, float* scale, float* low, const In* x, int bits, Blocks blocks,
                     const float* noise);
template <class In>
void quantize_sixteenths(Queue queue, uint8_t* codes, float* largest, const In* x, Blocks blocks, const float* noise);
// Decode: x = code_map[code] absmax, and x = code scale + low.
template <class Out>
void dequantize_blockwise(Queue queue, Out* x, const uint8_t* codes, const float* absmax, const float* code_map,
                          Blocks blocks);
template <class Out>
void dequantize_affine(Queue queue, Out* x, const uint8_t* codes, const float* scale, const float* low, Blocks blocks);

// Pack 4-bit codes (rows, k) into bytes (rows, ceil(k / 2)), and unpack them. Rows start at whole bytes, so an odd row
// leaves the upper half of its last byte 0.
void pack4(Queue queue, uint8_t* packed, const uint8_t* codes, int64_t rows, int64_t k);
void unpack4(Queue queue, uint8_t* codes, const uint8_t* packed, int64_t rows, int64_t k);

// Write to index (rows, r) the positions of the r largest of each row of scores (rows, n), in ascending order. Of equal
// numbers the first are taken, so that the selection is unique.
template <class T>
void select_top(Queue queue, int32_t* index, const T* scores, int64_t rows, int64_t n, int64_t r);

// Add to, or read, single elements of a flat tensor. The local part `dense` (n,) starts at global index `start`, and
// positions (count,) are global. They ascend and none occurs twice, so that no two threads share an element.
template <class T, class Index>
void add_at(Queue queue, T* dense, int64_t n, const Index* positions, const T* values, int64_t count, int64_t start);
template <class T, class Index>
void gather_at(Queue queue, T* out, const T* dense, int64_t n, const Index* positions, int64_t count, int64_t start);

#ifndef LRO_CUDA
// -- Functions of the CPU only ----------------------------------------------------------------------------------------
//
// On a GPU a few launches of plain torch, or a matrix product by a library, cost less than a kernel of our own.

// Add to out (count,) the elements number `positions` of the (m, n) product of left (m, k) and right (n, k) transposed.
template <class T, class Index>
void add_sampled_product(T* out, const T* left, const T* right, const Index* positions, int64_t count, int64_t n,
                         int64_t k);

// Scaled matrices y that are never stored: y = x by_row by_column, with the product of both factors limited by `most`.
// x is (matrices, rows, columns), by_row (matrices, rows) and by_column (matrices, columns).
template <class T>
struct Factored {
  int64_t matrices, rows, columns;
  const T *x, *by_row, *by_column;
  double most;
};

// The numbers of a step with momentum, m <- beta m + gain y and w <- keep w - length m. Without momentum it is
// w <- keep w - length gain y.
struct Move {
  double beta, gain, length, keep;
};

// Write y to out.
template <class T>
void scale_factored(T* out, const Factored<T>& y);
// Write the sum of squares of each matrix of y to sums (matrices,).
template <class T>
void factored_energy(double* sums, const Factored<T>& y);
// Step the weight w, and the momentum m unless it is null.
template <class T>
void step_factored(T* w, T* m, const Factored<T>& y, Move move);

// Update (rows, n) moments by Adam where each row has its own step count, ages (rows,). A slot that was reset is
// younger than its neighbors, and the common bias correction would make its first updates too large.
template <class T>
void projected_adam_rows(PlainMoments<T> item, const T* ages, int64_t rows, AdamRule rule);

// Replace row i of x, `width` bytes, by the former row source[i], or by zeros if source[i] is -1. The other sources
// ascend, which makes a move in place possible.
void move_rows(char* x, const int64_t* source, int64_t rows, int64_t width);

// A cosine transform of n columns of length m. The matrix is (m, n), or (n, m) if `across`, whose rows then are the
// columns. `back` selects DCT-III, the inverse and transpose of the orthonormal DCT-II. m is even, and its only prime
// factors are 2, 3, 5 and 7.
struct Cosines {
  int64_t m, n;
  bool back, across;
};

// Write to sums (m,), in double, each coefficient's sum over all columns of squares or of absolute values.
template <class T>
void cosine_scores(double* sums, const T* x, Cosines shape, bool squares);
// A selection of `count` coefficients: d (count, n) has row i for coefficient index[i]. Rows of d are `pitch` elements
// apart, since d may be a block of columns of a wider matrix.
struct Chosen {
  const int32_t* index;
  int64_t count, pitch;
};
// Write the selected coefficients of each column of x to d.
template <class T>
void cosine_rows(T* d, const T* x, Chosen chosen, Cosines shape);
// W <- beta W + alpha C, where the columns of C have the selected coefficients d and zeros elsewhere.
template <class T>
void add_cosines(T* w, const T* d, Chosen chosen, T alpha, T beta, Cosines shape);

// Call `work(begin, end)` on pieces of [0, n) in libtorch's own threads, each piece at least `grain` long. It is
// defined in registration/checks.h. A pool of our own would compete with libtorch's threads for the same cores.
void parallel(int64_t n, int64_t grain, void (*work)(int64_t, int64_t, const void*), const void* context);

// Write the sums of squares of each row and of each column of x (matrices, m, n) to rows (matrices, m) and columns
// (matrices, n), in double.
template <class T>
void squares(Queue queue, double* rows, double* columns, const T* x, int64_t matrices, int64_t m, int64_t n);
// W <- keep W - x factor for w and x (matrices, m, n). There is one factor per row, per column, or per matrix. If keep
// is 0, w is not read and may be uninitialized.
template <class T>
void take_scaled(Queue queue, T* w, const T* x, const T* factors, int64_t matrices, int64_t m, int64_t n, bool per_row,
                 bool per_column, T keep);

// This overload takes a lambda. The function above takes a pointer, so that only one file includes torch's headers.
template <class Work>
void parallel(int64_t n, int64_t grain, const Work& work) {
  parallel(
      n, grain,
      [](int64_t begin, int64_t end, const void* context) { (*static_cast<const Work*>(context))(begin, end); },
      &work);
}
#endif

}  // namespace lro
