// Every CUDA kernel once, on the CPU, for ThreadSanitizer; prints their names. LRO_DROPPED=range.h:31 leaves that barrier out.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "emulate.h"
#include "kernels.h"

namespace lro {
bool dropped(const char* file, int line) {
  static const char* const asked = std::getenv("LRO_DROPPED");
  static const std::string place = asked ? asked : "";
  const char* slash = std::strrchr(file, '/');
  return !place.empty() && place == std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
}
void launched(const char* kernel) { std::puts(kernel); }
}  // namespace lro

using namespace lro;

int main() {
  constexpr int64_t rows = 7, k = 341, n = rows * k;  // more blocks than any kernel has thread blocks
  const Queue queue{nullptr};
  std::vector<float> x(n), out(n), m(n), v(n), values(256), numbers(n), lows(n), midpoint(1 << 16);
  std::vector<uint8_t> codes(n), packed(rows * (k + 1) / 2), lower(1 << 16), level(1 << 16);
  std::vector<int32_t> integers(n), positions(n / 3);
  std::vector<bfloat16> halves(n), owed(n);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>((i * 7919) % 1009) / 100;
  for (int64_t i = 0; i < n / 3; ++i) positions[i] = static_cast<int32_t>(3 * i + 1);

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

  // Two tensors, since lists have tables of their own.
  const float number = 3;
  const Step third{0, &number, nullptr};  // on the device: kernels then share powers that they have taken themselves
  const AdamRule rule{0.9, 0.99, 1e-8, third, 0, 0};
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
  fix_signs(queue, x.data(), int64_t{1}, rows, k);
  const Draw numbered{{1, 2, 3, 4}, nullptr, 5};
  for (const Kind kind : {Kind::noise16, Kind::uniform, Kind::normal}) draw(queue, kind, out.data(), n, numbered);
  draw(queue, Kind::bits16, integers.data(), n, numbered);
  round_to_bfloat16(queue, halves.data(), x.data(), n, numbered);

  const Columns columns{rows, k / 2, k, 11};
  add_nearest(queue, halves.data(), x.data(), columns, third);
  add_kahan(queue, halves.data(), owed.data(), x.data(), columns, third);
  add_stochastic(queue, halves.data(), x.data(), columns, third, numbered, k);

  select_top(queue, integers.data(), x.data(), rows, k, k / 3);
  add_at(queue, out.data(), n, positions.data(), x.data(), n / 3, 0);
  gather_at(queue, m.data(), x.data(), n, positions.data(), n / 3, 0);
  std::puts("done");
}
