// Single entries of a matrix on the CPU: adding to them, reading them, and a product of two matrices at these entries.
//
// Positions ascend without repetition (registration/entries.h checks it), so threads never share an element.
#include "../kernels.h"
#include "clones.h"

namespace lro {
namespace {

constexpr int64_t kGrain = 16384;  // elements, or products of a sampled product, that are worth a thread

// Return the product of two lines of k elements, by kLanes partial sums (elements.h).
template <class T>
LRO_HD T dot(const T* LRO_RESTRICT x, const T* LRO_RESTRICT y, int64_t k) {
  T sums[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= k; j += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += x[j + lane] * y[j + lane];
  for (int lane = 0; j + lane < k; ++lane) sums[lane] += x[j + lane] * y[j + lane];
  return sum_in_halves(sums);
}

// Add to out (count,) the entries at `positions` of left (m, k) times right (n, k) transposed. Positions ascend, so the
// row is counted up instead of being computed by a division per entry.
template <class T, class Index>
LRO_HD void product_loop(T* LRO_RESTRICT out, const T* LRO_RESTRICT left, const T* LRO_RESTRICT right,
                         const Index* positions, int64_t count, int64_t n, int64_t k) {
  int64_t row = positions[0] / n;
  for (int64_t i = 0; i < count; ++i) {
    while (positions[i] >= (row + 1) * n) ++row;
    out[i] += dot(left + row * k, right + (positions[i] - row * n) * k, k);
  }
}

// target_clones has no effect on instances of templates, so there is one plain function per type.
#define LRO_PER_TYPE(T, Index)                                                                                      \
  LRO_CLONES void products(T* out, const T* left, const T* right, const Index* positions, int64_t count, int64_t n, \
                           int64_t k) {                                                                             \
    product_loop(out, left, right, positions, count, n, k);                                                         \
  }
LRO_PER_TYPE(float, int32_t)
LRO_PER_TYPE(float, int64_t)
LRO_PER_TYPE(double, int32_t)
LRO_PER_TYPE(double, int64_t)

}  // namespace

template <class T, class Index>
void add_at(Queue, T* dense, int64_t, const Index* positions, const T* values, int64_t count, int64_t start) {
  parallel(count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) add(dense[positions[i] - start], values[i]);
  });
}

template <class T, class Index>
void gather_at(Queue, T* out, const T* dense, int64_t, const Index* positions, int64_t count, int64_t start) {
  parallel(count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = dense[positions[i] - start];
  });
}

template <class T, class Index>
void add_sampled_product(T* out, const T* left, const T* right, const Index* positions, int64_t count, int64_t n,
                         int64_t k) {
  parallel(count, kGrain / (k + 1) + 1, [&](int64_t begin, int64_t end) {
    products(out + begin, left, right, positions + begin, end - begin, n, k);
  });
}

#define LRO_INSTANCES(T, Index)                                                                  \
  template void add_at(Queue, T*, int64_t, const Index*, const T*, int64_t, int64_t);            \
  template void gather_at(Queue, T*, const T*, int64_t, const Index*, int64_t, int64_t);
LRO_INSTANCES(float, int32_t)
LRO_INSTANCES(float, int64_t)
LRO_INSTANCES(double, int32_t)
LRO_INSTANCES(double, int64_t)
LRO_INSTANCES(bfloat16, int32_t)
LRO_INSTANCES(bfloat16, int64_t)

template void add_sampled_product(float*, const float*, const float*, const int32_t*, int64_t, int64_t, int64_t);
template void add_sampled_product(float*, const float*, const float*, const int64_t*, int64_t, int64_t, int64_t);
template void add_sampled_product(double*, const double*, const double*, const int32_t*, int64_t, int64_t, int64_t);
template void add_sampled_product(double*, const double*, const double*, const int64_t*, int64_t, int64_t, int64_t);

}  // namespace lro
