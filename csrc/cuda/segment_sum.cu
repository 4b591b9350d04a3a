// Sums of rows by segment, deterministic.
//
// sums[s] = sum of values[r] over the rows r with ids[r] == s, counts[s] their number; rows with an id outside
// [0, segments) are left out. A stable radix sort orders the rows by id; a warp then adds the rows of its segment in
// ascending row order, in fp64, and rounds once: no atomics, so the bits depend on nothing but the input.
// Cost: the sort of (id, row) pairs, values read once; a segment is read by one warp, so one huge segment is slow.
#include <cub/device/device_radix_sort.cuh>

#include "device.cuh"
#include "kernels.h"

namespace semhitok::cuda {
namespace {

constexpr int kThreads = 256;

struct Scratch {
  int32_t *keys, *sorted_keys, *rows, *sorted_rows;  // [rows]
  void* sort;
  size_t sort_bytes;
  int64_t bytes;
};

int key_bits(int64_t segments) {  // keys run from 0 to segments, the last for the rows left out
  int bits = 1;
  while ((segments >> bits) != 0) ++bits;
  return bits;
}

cudaError_t sort(const SegmentSum& p, Scratch& s, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(s.sort, s.sort_bytes, s.keys, s.sorted_keys, s.rows, s.sorted_rows,
                                         static_cast<int>(p.rows), 0, key_bits(p.segments), stream);
}

cudaError_t cut(const SegmentSum& p, void* base, Scratch* s) {
  Pieces pieces(base);
  s->keys = pieces.take<int32_t>(p.rows);
  s->sorted_keys = pieces.take<int32_t>(p.rows);
  s->rows = pieces.take<int32_t>(p.rows);
  s->sorted_rows = pieces.take<int32_t>(p.rows);
  s->sort = nullptr;  // asks only for the size
  s->sort_bytes = 0;
  const cudaError_t error = p.rows == 0 ? cudaSuccess : sort(p, *s, nullptr);
  s->sort = pieces.take<char>(static_cast<int64_t>(s->sort_bytes));
  s->bytes = pieces.used();
  return error;
}

__global__ void __launch_bounds__(kThreads) keys_kernel(SegmentSum p, Scratch s) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= p.rows) return;
  const int64_t id = p.ids[row];
  s.keys[row] = static_cast<int32_t>(id >= 0 && id < p.segments ? id : p.segments);
  s.rows[row] = static_cast<int32_t>(row);
}

// First position of the sorted keys that is not below key.
__device__ __forceinline__ int64_t lower_bound(const int32_t* keys, int64_t count, int64_t key) {
  int64_t low = 0, high = count;
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

__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) sum_kernel(SegmentSum p, Scratch s) {
  const int64_t segment = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (segment >= p.segments) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = lower_bound(s.sorted_keys, p.rows, segment);
  const int64_t end = lower_bound(s.sorted_keys, p.rows, segment + 1);
  for (int64_t d = lane; d < p.depth; d += kWarp) {
    double total = 0.0;
    for (int64_t i = begin; i < end; ++i) total += read<double>(p.values, s.sorted_rows[i] * p.depth + d);
    if (p.values.dtype == Dtype::kFloat64) {
      static_cast<double*>(p.sums)[segment * p.depth + d] = total;
    } else {
      static_cast<float*>(p.sums)[segment * p.depth + d] = static_cast<float>(total);
    }
  }
  if (lane == 0) p.counts[segment] = end - begin;
}

}  // namespace

int64_t segment_sum_scratch(const SegmentSum& problem) {
  Scratch scratch;
  (void)cut(problem, nullptr, &scratch);  // an error comes again, and is returned, in segment_sum
  return scratch.bytes;
}

cudaError_t segment_sum(const SegmentSum& p, void* base, cudaStream_t stream) {
  if (p.segments == 0) return cudaSuccess;
  Scratch scratch;
  cudaError_t error = cut(p, base, &scratch);
  if (error != cudaSuccess) return error;
  if (p.rows > 0) {
    const auto blocks = static_cast<unsigned>(ceil_div(p.rows, kThreads));
    error = launch(keys_kernel, blocks, kThreads, 0, stream, p, scratch);
    if (error == cudaSuccess) error = sort(p, scratch, stream);
    if (error != cudaSuccess) return error;
  }
  return launch(sum_kernel, warp_blocks(p.segments), kWarpsPerBlock * kWarp, 0, stream, p, scratch);
}

}  // namespace semhitok::cuda
