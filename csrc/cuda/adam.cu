// Adam's direction on GPUs: moments are read, updated, used and written back in one pass, many tensors per launch.
//
// A model has hundreds of matrices, many too small to fill a GPU. A launch therefore takes a table of up to 256
// tensors. Each tensor is cut into chunks, and thread blocks walk over the chunks of all tensors. The table is passed
// by value in the parameters of the kernel. Nothing is copied to the device, and a captured graph contains the table.
#include <type_traits>

#include "../kernels.h"
#include "launch.h"
#include "range.h"

namespace lro {
namespace {

#ifdef LRO_EMULATED
constexpr int kMostItems = 3;  // tests with few tensors then need several launches
constexpr int64_t kChunk = 64;
#else
constexpr int kMostItems = 256;  // 20 KB of parameters; a kernel may have 32 KB
constexpr int64_t kChunk = 4096;
#endif
// The elements of a block of codes that one thread holds in registers.
constexpr int kPerThread = static_cast<int>(kMostCoded / kThreads);

// The tensors of a launch. Chunks are numbered through all items.
template <class Item, int most>
struct Table {
  static constexpr int kMost = most;
  Item items[most];
  int64_t first[most + 1];  // the number of the first chunk of each item; at the end, the number of chunks
  int count;

  LRO_HD int64_t chunks() const { return first[count]; }

  // Return the item that has this chunk, by binary search.
  LRO_HD int find(int64_t chunk) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first[middle] <= chunk) low = middle;
      else high = middle - 1;
    }
    return low;
  }
};

// Return how many chunks a tensor has. With random numbers, chunks hold whole counters: a tensor may start within a
// counter, whose first numbers are skipped. With codes, a chunk is a block.
template <class T>
LRO_HD int64_t chunks_of(const PlainMoments<T>& item) {
  return (item.n + kChunk - 1) / kChunk;
}
LRO_HD int64_t skipped(const HalfMoments& item) { return ((item.start % 8) + 8) % 8; }
LRO_HD int64_t counters_of(const HalfMoments& item) { return (skipped(item) + item.n + 7) / 8; }
LRO_HD int64_t chunks_of(const HalfMoments& item) { return (counters_of(item) * 8 + kChunk - 1) / kChunk; }
LRO_HD int64_t chunks_of(const CodedMoments& item) { return item.blocks.count(); }

// Return the shared factors to all threads. Powers in double are slow on a GPU, so two threads of each block compute
// one each and share them. Every thread of the block must call this function.
template <class T>
__device__ AdamNumbers<T> numbers_of(const AdamRule& rule) {
  __shared__ double powers[2];
  if (threadIdx.x < 2) {
    const double known = threadIdx.x ? rule.power2 : rule.power1, beta = threadIdx.x ? rule.beta2 : rule.beta1;
    powers[threadIdx.x] = rule.knows_powers() ? known : pow(beta, number_of(rule.step));
  }
  __syncthreads();
  return adam_numbers<T>(rule.beta1, rule.beta2, rule.eps, powers[0], powers[1]);
}

// Update moments that have the dtype of r; neighboring threads take neighboring elements.
template <class T, int most>
__global__ void __launch_bounds__(kThreads) plain_kernel(const __grid_constant__ Table<PlainMoments<T>, most> table,
                                                         AdamRule rule) {
  const AdamNumbers<T> numbers = numbers_of<T>(rule);
  for (int64_t chunk = blockIdx.x; chunk < table.chunks(); chunk += gridDim.x) {
    const int place = table.find(chunk);
    const PlainMoments<T>& item = table.items[place];
    const int64_t begin = (chunk - table.first[place]) * kChunk;
    const int64_t end = begin + kChunk < item.n ? begin + kChunk : item.n;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) adam(item.m[i], item.v[i], item.r[i], numbers);
  }
}

// Update moments in bfloat16. A thread takes one counter per moment, and the eight elements that its numbers round.
template <int most>
__global__ void __launch_bounds__(kThreads) half_kernel(const __grid_constant__ Table<HalfMoments, most> table,
                                                        AdamRule rule, Streams streams) {
  const AdamNumbers<float> numbers = numbers_of<float>(rule);
  const uint32_t now = streams.now();
  for (int64_t chunk = blockIdx.x; chunk < table.chunks(); chunk += gridDim.x) {
    const int place = table.find(chunk);
    const HalfMoments& item = table.items[place];
    const int64_t skip = skipped(item), first = (item.start - skip) / 8;
    const int64_t begin = (chunk - table.first[place]) * (kChunk / 8), total = counters_of(item);
    const int64_t end = begin + kChunk / 8 < total ? begin + kChunk / 8 : total;
    for (int64_t c = begin + threadIdx.x; c < end; c += kThreads) {
      const Words m_words = philox(static_cast<uint64_t>(first + c), streams.of(item, false, now));
      const Words v_words = philox(static_cast<uint64_t>(first + c), streams.of(item, true, now));
      for (int lane = 0; lane < 8; ++lane) {
        const int64_t i = c * 8 - skip + lane;
        if (i < 0 || i >= item.n) continue;
        float m = to_float(item.m[i]), v = to_float(item.v[i]);
        adam(m, v, item.r[i], numbers);
        item.m[i] = round_stochastic(m, bits16(m_words, lane));
        item.v[i] = round_stochastic(v, bits16(v_words, lane));
      }
    }
  }
}

// Return the code of x in a block with this peak; `least` is the lowest permitted code.
__device__ uint8_t code_of(float x, const Peak& peak, const Levels& levels, int32_t least) {
  const float unit = x / peak.divisor;
  const int32_t low = lowest_code(unit, levels), code = low + (unit > midpoint_above(low, levels) ? 1 : 0);
  return static_cast<uint8_t>(code < least ? least : code);
}

// Update moments that are codes. A thread block takes one block of codes at a time and holds it in registers: it
// decodes and steps the block, finds the new peaks together, and encodes.
template <int most>
__global__ void __launch_bounds__(kThreads) coded_kernel(const __grid_constant__ Table<CodedMoments, most> table,
                                                         AdamRule rule, Levels m_levels, Levels v_levels) {
  const AdamNumbers<float> numbers = numbers_of<float>(rule);
  for (int64_t chunk = blockIdx.x; chunk < table.chunks(); chunk += gridDim.x) {
    const int place = table.find(chunk);
    const CodedMoments& item = table.items[place];
    const int64_t block = chunk - table.first[place], begin = item.blocks.begin(block), n = item.blocks.size(block);
    const float m_old = item.m_peak[block], v_old = item.v_peak[block];
    float m[kPerThread], v[kPerThread];
    Extremes m_own, v_own;
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t i = begin + threadIdx.x + k * kThreads;
      if (i >= begin + n) continue;
      m[k] = m_levels.values[item.m[i]] * m_old, v[k] = v_levels.values[item.v[i]] * v_old;
      adam(m[k], v[k], item.r[i], numbers);
      m_own.add(m[k]), v_own.add(v[k]);
    }
    const Range m_range = range_of(m_own), v_range = range_of(v_own);  // all threads have read the old peaks
    const Peak m_peak = peak_of(m_range.top, m_range.bottom, true), v_peak = peak_of(v_range.top, v_range.bottom, true);
    if (threadIdx.x == 0) item.m_peak[block] = m_peak.stored, item.v_peak[block] = v_peak.stored;
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t i = begin + threadIdx.x + k * kThreads;
      if (i >= begin + n) continue;
      item.m[i] = code_of(m[k], m_peak, m_levels, 0);
      // Code 0 of the second moment stands for zero and is never written (kernels.h).
      item.v[i] = code_of(v[k], v_peak, v_levels, 1);
    }
  }
}

// Call `run(table, grid)` for groups of at most `most` items.
template <int most, class Item, class Run>
void each_table(const Item* items, int64_t count, const Run& run) {
  for (int64_t start = 0; start < count; start += most) {
    Table<Item, most> table;
    table.count = static_cast<int>(count - start < most ? count - start : most);
    table.first[0] = 0;
    for (int i = 0; i < table.count; ++i) {
      table.items[i] = items[start + i];
      table.first[i + 1] = table.first[i] + chunks_of(table.items[i]);
    }
    const int64_t blocks = table.chunks() < kMostBlocks ? table.chunks() : kMostBlocks;
    run(table, static_cast<unsigned>(blocks));
  }
}

// Select the size of the table. A single tensor has a table of one item, since the host needs longer for 20 KB of
// parameters.
template <class Item, class Run>
void launch(const Item* items, int64_t count, const Run& run) {
  if (count == 1) each_table<1>(items, count, run);
  else each_table<kMostItems>(items, count, run);
}

}  // namespace

template <class T>
void projected_adam(Queue queue, const PlainMoments<T>* items, int64_t count, AdamRule rule) {
  launch(items, count, [&](const auto& table, unsigned grid) {
    constexpr int most = std::decay_t<decltype(table)>::kMost;
    LRO_LAUNCH((plain_kernel<T, most>), grid, kThreads, queue, table, rule);
  });
}

template void projected_adam(Queue, const PlainMoments<float>*, int64_t, AdamRule);
template void projected_adam(Queue, const PlainMoments<double>*, int64_t, AdamRule);

void projected_adam(Queue queue, const HalfMoments* items, int64_t count, AdamRule rule, Streams streams) {
  launch(items, count, [&](const auto& table, unsigned grid) {
    constexpr int most = std::decay_t<decltype(table)>::kMost;
    LRO_LAUNCH(half_kernel<most>, grid, kThreads, queue, table, rule, streams);
  });
}

void projected_adam(Queue queue, const CodedMoments* items, int64_t count, AdamRule rule, Levels m, Levels v) {
  launch(items, count, [&](const auto& table, unsigned grid) {
    constexpr int most = std::decay_t<decltype(table)>::kMost;
    LRO_LAUNCH(coded_kernel<most>, grid, kThreads, queue, table, rule, m, v);
  });
}

}  // namespace lro
