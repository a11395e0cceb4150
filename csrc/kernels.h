// What a backend provides: loops over memory. Pointers are checked by registration.cpp; empty tensors never get here.
// cpu/*.cpp and cuda/*.cu define each of these once, and neither includes torch.
#pragma once

#include "elements.h"

namespace lro {

// `stream` is the CUDA stream; the CPU ignores it.
struct Queue {
  void* stream;
};

// A number that is known, or that the device reads when the kernel runs (a captured graph then sees new values).
struct Step {
  double known;
  const float* single;
  const double* wide;
};

LRO_HD double number_of(const Step& step) { return step.single ? *step.single : step.wide ? *step.wide : step.known; }

// A stream of random numbers whose time may be on the device; element 0 of the output is number `start` of the stream.
struct Draw {
  Stream stream;
  const int64_t* time;
  int64_t start;
};

// `rows` lines of `k` elements, cut into blocks; the last one of a line may be short.
struct Blocks {
  int64_t rows, k, block;

  LRO_HD int64_t per_row() const { return (k + block - 1) / block; }
  LRO_HD int64_t count() const { return rows * per_row(); }
  LRO_HD int64_t begin(int64_t i) const { return i / per_row() * k + i % per_row() * block; }
  LRO_HD int64_t size(int64_t i) const {
    const int64_t left = k - i % per_row() * block;
    return left < block ? left : block;
  }
};

// The powers beta^t are the host's where it knows t: those of a GPU's library may differ in the last bit of a double.
struct AdamRule {
  double beta1, beta2, eps;
  Step step;
  double power1, power2;

  LRO_HD bool knows_powers() const { return !step.single && !step.wide; }
};

// One of several tensors that are updated together: moments m and v, and R, over which the direction is written.
template <class T>
struct PlainMoments {
  T *m, *v, *r;
  int64_t n;
};

// Rounded stochastically; element 0 is number `start` of the two streams with this key.
struct HalfMoments {
  bfloat16 *m, *v;
  float* r;
  int64_t n;
  uint32_t key0, key1;
  int64_t start;
};

struct Streams {
  uint32_t m, v, time;  // purposes
  const int64_t* at;

  LRO_HD Stream of(const HalfMoments& item, bool second, uint32_t now) const {
    return {item.key0, item.key1, second ? v : m, now};
  }
  LRO_HD uint32_t now() const { return at ? static_cast<uint32_t>(*at) : time; }
};

// Codes, and the largest element of each block with its sign. Code 0 of v is not used: no direction is divided by eps alone.
struct CodedMoments {
  uint8_t *m, *v;
  float *m_peak, *v_peak, *r;
  Blocks blocks;
};
constexpr int64_t kMostCoded = 256;  // elements of a block

template <class T>
void projected_adam(Queue queue, const PlainMoments<T>* items, int64_t count, AdamRule rule);
void projected_adam(Queue queue, const HalfMoments* items, int64_t count, AdamRule rule, Streams streams);
void projected_adam(Queue queue, const CodedMoments* items, int64_t count, AdamRule rule, Levels m, Levels v);

// A matrix that may be the transpose of what is in memory.
struct Thin {
  int64_t rows, columns, row_stride, column_stride;
};

// Y^T Y of each of `matrices`, in double, every sum in the order of rows. The CPU's alone: GPUs have tensor cores for it.
void gram(Queue queue, double* out, const float* y, int64_t matrices, Thin shape);

// The largest entry of each column becomes positive, in matrices (rows, columns).
template <class T>
void fix_signs(Queue queue, T* basis, int64_t matrices, int64_t rows, int64_t columns);

enum class Kind { bits16, noise16, uniform, normal };
LRO_HD int lanes(Kind kind) { return kind == Kind::uniform || kind == Kind::normal ? 4 : 8; }  // numbers per counter

void draw(Queue queue, Kind kind, void* out, int64_t n, Draw draw);  // int32 for bits16, else float
void round_to_bfloat16(Queue queue, bfloat16* out, const float* x, int64_t n, Draw draw);

// Columns `first` to `first + run` of a matrix w (rows, width), and a matrix x (rows, run) that is added to them.
struct Columns {
  int64_t rows, run, width, first;

  LRO_HD int64_t place(int64_t row, int64_t column) const { return row * width + first + column; }  // in w
};

// W <- round(keep W + x). Noise: row i begins with number `draw.start + i pitch` of its stream.
void add_nearest(Queue queue, bfloat16* w, const float* x, Columns columns, Step keep);
void add_kahan(Queue queue, bfloat16* w, bfloat16* owed, const float* x, Columns columns, Step keep);
void add_stochastic(Queue queue, bfloat16* w, const float* x, Columns columns, Step keep, Draw draw, int64_t pitch);

template <class In>
void quantize_blockwise(Queue queue, uint8_t* codes, float* absmax, const In* x, CodeMap map, Blocks blocks,
                        bool signed_peak, const float* noise);
template <class In>
void quantize_affine(Queue queue, uint8_t* codes, float* scale, float* low, const In* x, int bits, Blocks blocks,
                     const float* noise);
template <class In>
void quantize_sixteenths(Queue queue, uint8_t* codes, float* largest, const In* x, Blocks blocks, const float* noise);
template <class Out>
void dequantize_blockwise(Queue queue, Out* x, const uint8_t* codes, const float* absmax, const float* code_map,
                          Blocks blocks);
template <class Out>
void dequantize_affine(Queue queue, Out* x, const uint8_t* codes, const float* scale, const float* low, Blocks blocks);

// `rows` lines of k codes, each line ceil(k / 2) bytes.
void pack4(Queue queue, uint8_t* packed, const uint8_t* codes, int64_t rows, int64_t k);
void unpack4(Queue queue, uint8_t* codes, const uint8_t* packed, int64_t rows, int64_t k);

// Of each of `rows` lines of n numbers the positions of the r largest, ascending; of equal ones the first.
template <class T>
void select_top(Queue queue, int32_t* index, const T* scores, int64_t rows, int64_t n, int64_t r);

// Elements number `positions` of a flat tensor of which `dense` begins with number `start` and has n. Positions ascend and
// none is there twice, so that threads share no element.
template <class T, class Index>
void add_at(Queue queue, T* dense, int64_t n, const Index* positions, const T* values, int64_t count, int64_t start);
template <class T, class Index>
void gather_at(Queue queue, T* out, const T* dense, int64_t n, const Index* positions, int64_t count, int64_t start);

#ifndef LRO_CUDA
// Adds to out elements number `positions` of left (m, k) times right (n, k) transposed. GPUs take all of it for less.
template <class T, class Index>
void add_sampled_product(T* out, const T* left, const T* right, const Index* positions, int64_t count, int64_t n,
                         int64_t k);

// Matrices (rows, columns) whose elements are scaled by a factor per row and one per column, or by `most` if that is less.
template <class T>
struct Factored {
  int64_t matrices, rows, columns;
  const T *x, *by_row, *by_column;
  double most;
};

// The same for averages and weights: m <- beta m + gain y and w <- keep w - length m, or w <- keep w - length gain y.
struct Move {
  double beta, gain, length, keep;
};

template <class T>
void scale_factored(T* out, const Factored<T>& y);
template <class T>
void factored_energy(double* sums, const Factored<T>& y);  // of squares, one per matrix
template <class T>
void step_factored(T* w, T* m, const Factored<T>& y, Move move);  // m: or none

// The same for rows of n numbers whose moments have seen a number of steps each. Elsewhere plain torch's launches do.
template <class T>
void projected_adam_rows(PlainMoments<T> item, const T* ages, int64_t rows, AdamRule rule);

// Row i of x, `width` bytes, becomes what row `source[i]` was, or zeros for -1; other sources ascend, so rows can move in place.
void move_rows(char* x, const int64_t* source, int64_t rows, int64_t width);

// Cosine transforms of the columns of a matrix (m, n), or of the lines of (n, m) if `across`: DCT-II, or its inverse, which is
// its transpose, if `back`. m is even and has no prime factors but 2, 3, 5 and 7.
struct Cosines {
  int64_t m, n;
  bool back, across;
};

// Sums over columns of the squares of coefficients, or of their absolute values, in double.
template <class T>
void cosine_scores(double* sums, const T* x, Cosines shape, bool squares);
// Some coefficients of each column: `count` rows of the transform, which lie `pitch` numbers apart.
struct Chosen {
  const int32_t* index;
  int64_t count, pitch;
};
template <class T>
void cosine_rows(T* d, const T* x, Chosen chosen, Cosines shape);
// W <- beta W + alpha times the columns that have these coefficients d, and no others.
template <class T>
void add_cosines(T* w, const T* d, Chosen chosen, T alpha, T beta, Cosines shape);

// libtorch's own threads, from registration.cpp: `work(begin, end)` on pieces of [0, n), each at least `grain` long.
void parallel(int64_t n, int64_t grain, void (*work)(int64_t, int64_t, const void*), const void* context);

// Sums of squares over the rows and over the columns of matrices (m, n), in double.
template <class T>
void squares(Queue queue, double* rows, double* columns, const T* x, int64_t matrices, int64_t m, int64_t n);
// W <- keep W - x factor: of its row, of its column, or one for a matrix. Where keep is 0, w is not read.
template <class T>
void take_scaled(Queue queue, T* w, const T* x, const T* factors, int64_t matrices, int64_t m, int64_t n, bool per_row,
                 bool per_column, T keep);

template <class Work>
void parallel(int64_t n, int64_t grain, const Work& work) {
  parallel(
      n, grain, [](int64_t begin, int64_t end, const void* context) { (*static_cast<const Work*>(context))(begin, end); },
      &work);
}
#endif

}  // namespace lro
