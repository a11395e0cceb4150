// Run every CUDA kernel on the CPU, for ThreadSanitizer, and print the names of the kernels.
//
// test_races.py compiles this program with the .cu files and -fsanitize=thread. It expects no data race as written, and
// at least one race when a barrier is left out: LRO_DROPPED=range.h:31 leaves out the barrier in that line. It also
// expects that every kernel in the sources was run. Results are not compared here; test_native.py does that.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "emulate.h"
#include "kernels.h"

namespace lro {
// Whether the environment asks to leave out the barrier in this line.
bool dropped(const char* file, int line) {
  static const char* const requested = std::getenv("LRO_DROPPED");
  static const std::string place = requested ? requested : "";
  const char* slash = std::strrchr(file, '/');
  return !place.empty() && place == std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
}
// Print a kernel, for the check that all of them were run.
void launched(const char* kernel) { std::puts(kernel); }
}  // namespace lro

using namespace lro;

int main() {
  // The sizes are odd, and there are more blocks of numbers than thread blocks, so every kernel has to loop.
  constexpr int64_t rows = 7, k = 341, n = rows * k;
  const Queue queue{nullptr};
  std::vector<float> x(n), out(n), m(n), v(n), values(256), numbers(n), lows(n), midpoint(1 << 16);
  std::vector<uint8_t> codes(n), packed(rows * (k + 1) / 2), lower(1 << 16), level(1 << 16);
  std::vector<int32_t> integers(n), positions(n / 3);
  std::vector<bfloat16> halves(n), owed(n);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>((i * 7919) % 1009) / 100;
  for (int64_t i = 0; i < n / 3; ++i) positions[i] = static_cast<int32_t>(3 * i + 1);

  // Quantizers, with and without noise.
  const Blocks blocks{rows, k, 5};
  const CodeMap map{values.data(), lower.data(), midpoint.data(), 256};
  for (const float* noise : {static_cast<const float*>(nullptr), static_cast<const float*>(v.data())}) {
    quantize_blockwise(queue, codes.data(), numbers.data(), x.data(), map, blocks, true, noise);
    quantize_affine(queue, codes.data(), numbers.data(), lows.data(), x.data(), 4, blocks, noise);
    quantize_sixteenths(queue, codes.data(), numbers.data(), x.data(), blocks, noise);
  }
  dequantize_blockwise(queue, out.data(), codes.data(), numbers.data(), values.data(), blocks);
  dequantize_affine(queue, out.data(), codes.data(), numbers.data(), lows.data(), blocks);
  pack4(queue, packed.data(), codes.data(), rows, k);
  unpack4(queue, codes.data(), packed.data(), rows, k);

  // Lists of two tensors use another table than a single tensor, so both are run. The step count is on the device: the
  // threads of a block then compute its powers and share them, which needs a barrier.
  const float number = 3;
  const Step step3{0, &number, nullptr};
  const AdamRule rule{0.9, 0.99, 1e-8, step3, 0, 0};
  const PlainMoments<float> plain[] = {{m.data(), v.data(), x.data(), n / 2},
                                       {&m[n / 2], &v[n / 2], &x[n / 2], n - n / 2}};
  const HalfMoments half[] = {{halves.data(), &halves[n / 2], x.data(), n / 4, 1, 2, 3},
                              {&halves[n / 4], &halves[n / 2 + n / 4], &x[n / 4], n / 4, 3, 4, 5}};
  const CodedMoments coded[] = {{codes.data(), lower.data(), numbers.data(), lows.data(), x.data(), blocks},
                                {&codes[n / 2], &lower[n / 2], &numbers[n / 2], &lows[n / 2], &x[n / 2], {1, k, 5}}};
  const Levels levels{values.data(), level.data(), 256};
  for (const int64_t count : {1, 2}) {
    projected_adam(queue, plain, count, rule);
    projected_adam(queue, half, count, rule, {1, 2, 3, nullptr});
    projected_adam(queue, coded, count, rule, levels, levels);
  }
  // Signs of a basis, and random numbers that start within a counter.
  fix_signs(queue, x.data(), int64_t{1}, rows, k);
  const Draw numbered{{1, 2, 3, 4}, nullptr, 5};
  for (const Kind kind : {Kind::noise16, Kind::uniform, Kind::normal}) draw(queue, kind, out.data(), n, numbered);
  draw(queue, Kind::bits16, integers.data(), n, numbered);
  round_to_bfloat16(queue, halves.data(), x.data(), n, numbered);

  // Steps of weights, in a block of columns that starts within a counter.
  const Columns columns{rows, k / 2, k, 11};
  add_nearest(queue, halves.data(), x.data(), columns, step3);
  add_kahan(queue, halves.data(), owed.data(), x.data(), columns, step3);
  add_stochastic(queue, halves.data(), x.data(), columns, step3, numbered, k);

  // Selections and single entries.
  select_top(queue, integers.data(), x.data(), rows, k, k / 3);
  add_at(queue, out.data(), n, positions.data(), x.data(), n / 3, 0);
  gather_at(queue, m.data(), x.data(), n, positions.data(), n / 3, 0);
  std::puts("done");
}
