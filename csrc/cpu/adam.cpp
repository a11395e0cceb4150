#include "../kernels.h"
#include "clones.h"

namespace lro {
namespace {

constexpr int64_t kGrain = 32768;

template <class T>
LRO_HD void loop(T* LRO_RESTRICT m, T* LRO_RESTRICT v, T* LRO_RESTRICT r, int64_t n, const AdamNumbers<T> numbers) {
  for (int64_t i = 0; i < n; ++i) adam(m[i], v[i], r[i], numbers);
}

// Attributes do not reach the instances of templates, so there is one function per type.
LRO_CLONES void run(float* m, float* v, float* r, int64_t n, const AdamNumbers<float> numbers) {
  loop(m, v, r, n, numbers);
}
LRO_CLONES void run(double* m, double* v, double* r, int64_t n, const AdamNumbers<double> numbers) {
  loop(m, v, r, n, numbers);
}

}  // namespace

template <class T>
void projected_adam(Queue, T* exp_avg, T* exp_avg_sq, T* r, int64_t n, double beta1, double beta2, double eps,
                    Step step) {
  const double t = step.single ? *step.single : step.wide ? *step.wide : step.known;
  const auto numbers = adam_numbers<T>(beta1, beta2, eps, t);
  parallel(n, kGrain, [&](int64_t begin, int64_t end) {
    run(exp_avg + begin, exp_avg_sq + begin, r + begin, end - begin, numbers);
  });
}

template void projected_adam(Queue, float*, float*, float*, int64_t, double, double, double, Step);
template void projected_adam(Queue, double*, double*, double*, int64_t, double, double, double, Step);

}  // namespace lro
