// Sums of rows by segment, deterministic, and balanced however the rows are distributed over the segments.
//
// sums[s] = sum of values[r] over the rows r with ids[r] == s, counts[s] their number; rows with an id outside [0,
// segments) are skipped. Sums are in fp64 in a fixed order, rounded once, without atomics: the bits depend only on the
// input.
//
// Plan. sort_rows orders the rows by id, and zeroes the outputs on the way: most segments may be empty. The sorted rows
// are cut into chunks of a fixed number of rows. A team of lanes adds up a chunk, a lane a column, in ascending order;
// a run of one segment that begins and ends in its chunk is done. The sums of a longer run stay in fp64, that at the
// end of a chunk as `tail`, those at the start of one as `head`; a block of the last launch then adds up a run's sums,
// every kSlots-th by one team, and the teams' results in ascending order. Cost: the sort; values read once, in rows;
// sums written once, and once with zeros; 16 bytes of heads and tails for every `chunk` values. At 16,384 rows of 32
// fp32 values and 196,608 segments on an H200: 25 MB of zeros 6 us, sort 15 us, one wave of 512 warps that take 32 rows
// each, 8 loads at a time, 3 us, joining 2 us. One segment with all of 65,536 rows: 1,024 warps of 64 rows, 5 us, then
// one block with 128 sums a lane, 8 loads at a time, 7 us.
#include "device.cuh"
#include "kernels.h"
#include "rows.cuh"
#include "sort.h"

namespace semhitok::cuda {
namespace {

constexpr int kAhead = 8;  // loads under way
constexpr int kLeastChunk = 32;
constexpr int64_t kChunksPerRow = 16;  // a chunk of c rows for up to 16 c^2 of them: as many chunks as fill the device
static_assert(kLeastChunk % kAhead == 0, "a full chunk is whole batches of loads");

struct Scratch {
  double *head, *tail;  // [chunks][depth]: sums of a first run that began earlier, and of a last run that continues
  char* sort;
  int64_t chunk, chunks, bytes;
};

Scratch cut(const SegmentSum& p, void* base) {
  Scratch s;
  s.chunk = kLeastChunk;
  while (s.chunk * s.chunk * kChunksPerRow < p.rows) s.chunk *= 2;
  s.chunks = ceil_div(p.rows, s.chunk);
  Arena arena(base);
  s.head = arena.take<double>(s.chunks * p.depth);
  s.tail = arena.take<double>(s.chunks * p.depth);
  s.sort = arena.take<char>(sort_rows_scratch(p.rows, p.segments));
  s.bytes = arena.used();
  return s;
}

template <typename Value>
using Sum = std::conditional_t<sizeof(Value) == 8, double, float>;

template <typename Value>
__global__ void __launch_bounds__(kThreads) chunk_kernel(SegmentSum p, SortedRows sorted, Scratch s, int lanes) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * lanes + threadIdx.x % lanes;
  if (chunk >= s.chunks || column >= p.depth) return;
  const int64_t begin = chunk * s.chunk, end = min(begin + s.chunk, p.rows);
  const Value* values = static_cast<const Value*>(p.values.data) + column;

  int32_t key = sorted.keys[begin];
  bool began_before = begin > 0 && sorted.keys[begin - 1] == key;
  int64_t run = begin;
  double total = 0.0;
  const auto finish = [&](int64_t next) {  // the run [run, next) of key, which ends there
    if (began_before) {
      s.head[chunk * p.depth + column] = total;
    } else if (key < p.segments) {
      static_cast<Sum<Value>*>(p.sums)[key * p.depth + column] = static_cast<Sum<Value>>(total);
      if (column == 0) p.counts[key] = next - run;
    }
  };
  for (int64_t i = begin; i < end; i += kAhead) {
    int32_t keys[kAhead];
    Value value[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t place = min(i + u, end - 1);
      keys[u] = sorted.keys[place];
      value[u] = values[sorted.rows[place] * p.depth];
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (i + u < end) {
        if (keys[u] != key) {
          finish(i + u);
          key = keys[u], run = i + u, began_before = false, total = 0.0;
        }
        total += convert<double>(value[u]);
      }
    }
  }
  if (!began_before && end < p.rows && sorted.keys[end] == key) {
    s.tail[chunk * p.depth + column] = total;
  } else {
    finish(end);
  }
}

// The first position in [low, high) whose key is not below `key`.
__device__ __forceinline__ int64_t lower_bound(const int32_t* keys, int64_t low, int64_t high, int32_t key) {
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// A block a chunk: the run that begins in it and continues, if there is one.
template <typename Value>
__global__ void __launch_bounds__(kThreads) parts_kernel(SegmentSum p, SortedRows sorted, Scratch s, int lanes) {
  __shared__ double shared[kThreads];
  const int64_t chunk = blockIdx.x, end = (chunk + 1) * s.chunk;  // not the last chunk: no run continues there
  const int32_t key = sorted.keys[end - 1];
  if (key >= p.segments || sorted.keys[end] != key) return;
  const int64_t begin = lower_bound(sorted.keys, chunk * s.chunk, end, key);
  if (begin == chunk * s.chunk && begin > 0 && sorted.keys[begin - 1] == key) return;  // began earlier
  const int64_t stop = lower_bound(sorted.keys, end, p.rows, key + 1);
  const int64_t last = (stop - 1) / s.chunk;  // the chunk that the run ends in

  const int slots = kThreads / lanes, slot = threadIdx.x / lanes;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * lanes + threadIdx.x % lanes;
  double total = 0.0;
  if (column < p.depth) {
    for (int64_t c = chunk + 1 + slot; c <= last; c += kAhead * slots) {
      double part[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int64_t from = c + u * slots;
        part[u] = from <= last ? s.head[from * p.depth + column] : 0.0;
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) total += part[u];
    }
  }
  shared[threadIdx.x] = total;
  __syncthreads();
  if (slot != 0 || column >= p.depth) return;
  total = s.tail[chunk * p.depth + column];
  for (int i = 0; i < slots; ++i) total += shared[i * lanes + threadIdx.x];
  static_cast<Sum<Value>*>(p.sums)[key * p.depth + column] = static_cast<Sum<Value>>(total);
  if (column == 0) p.counts[key] = stop - begin;
}

template <typename Value>
cudaError_t add_up(const SegmentSum& p, const SortedRows& sorted, const Scratch& s, cudaStream_t stream) {
  const int lanes = lanes_for(p.depth);  // that share a chunk, one a column
  const auto tiles = static_cast<unsigned>(ceil_div(p.depth, lanes));
  const dim3 groups(static_cast<unsigned>(ceil_div(s.chunks * lanes, kThreads)), tiles);
  const cudaError_t error = launch(chunk_kernel<Value>, groups, kThreads, 0, stream, p, sorted, s, lanes);
  if (error != cudaSuccess || s.chunks == 1) return error;
  const dim3 chunks(static_cast<unsigned>(s.chunks - 1), tiles);
  return launch(parts_kernel<Value>, chunks, kThreads, 0, stream, p, sorted, s, lanes);
}

}  // namespace

int64_t segment_sum_scratch(const SegmentSum& problem, const Device&) { return cut(problem, nullptr).bytes; }

cudaError_t segment_sum(const SegmentSum& p, const Device&, void* base, cudaStream_t stream) {
  if (p.segments == 0) return cudaSuccess;
  const Scratch s = cut(p, base);
  const bool wide = p.values.dtype == Dtype::kFloat64;
  const Zeroed sums{p.sums, p.segments * p.depth * (wide ? 2 : 1)}, counts{p.counts, p.segments * 2};
  SortedRows sorted;
  const cudaError_t error = sort_rows(p.ids, p.rows, p.segments, sums, counts, s.sort, &sorted, stream);
  if (error != cudaSuccess || p.rows == 0) return error;
  switch (p.values.dtype) {
    case Dtype::kFloat32: return add_up<float>(p, sorted, s, stream);
    case Dtype::kFloat16: return add_up<__half>(p, sorted, s, stream);
    case Dtype::kBFloat16: return add_up<__nv_bfloat16>(p, sorted, s, stream);
    default: return add_up<double>(p, sorted, s, stream);
  }
}

}  // namespace semhitok::cuda
