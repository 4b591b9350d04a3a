// Rows ordered by id, with cub's radix sort: see sort.h.
#include <algorithm>
#include <cub/device/device_radix_sort.cuh>

#include "device.cuh"
#include "sort.h"

namespace semhitok::cuda {
namespace {

constexpr int64_t kMostBlocks = 4096;  // enough to write at full speed; beyond it the threads take several words

struct Scratch {
  int32_t *keys, *sorted_keys, *rows, *sorted_rows;  // [count]
  void* sort;
  size_t sort_bytes;
  int64_t bytes;
};

int key_bits(int64_t segments) {
  int bits = 1;
  while ((segments >> bits) != 0) ++bits;
  return bits;
}

cudaError_t sort(Scratch& s, int64_t count, int64_t segments, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(s.sort, s.sort_bytes, s.keys, s.sorted_keys, s.rows, s.sorted_rows,
                                         static_cast<int>(count), 0, key_bits(segments), stream);
}

cudaError_t cut(int64_t count, int64_t segments, void* base, Scratch* s) {
  Arena arena(base);
  s->keys = arena.take<int32_t>(count);
  s->sorted_keys = arena.take<int32_t>(count);
  s->rows = arena.take<int32_t>(count);
  s->sorted_rows = arena.take<int32_t>(count);
  s->sort = nullptr;  // asks only for the size
  s->sort_bytes = 0;
  const cudaError_t error = count == 0 ? cudaSuccess : sort(*s, count, segments, nullptr);
  s->sort = arena.take<char>(static_cast<int64_t>(s->sort_bytes));
  s->bytes = arena.used();
  return error;
}

__device__ __forceinline__ void set_to_zero(const Zeroed& zeroed, int64_t first, int64_t stride) {
  for (int64_t i = first; i < zeroed.words; i += stride) static_cast<uint32_t*>(zeroed.data)[i] = 0;
}

__global__ void __launch_bounds__(kThreads)
    keys_kernel(const int64_t* ids, int64_t count, int64_t segments, Scratch s, Zeroed first, Zeroed second) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t row = thread; row < count; row += stride) {
    const int64_t id = ids[row];
    s.keys[row] = static_cast<int32_t>(id >= 0 && id < segments ? id : segments);
    s.rows[row] = static_cast<int32_t>(row);
  }
  set_to_zero(first, thread, stride);
  set_to_zero(second, thread, stride);
}

}  // namespace

int64_t sort_rows_scratch(int64_t count, int64_t segments) {
  Scratch scratch;
  (void)cut(count, segments, nullptr, &scratch);
  return scratch.bytes;
}

cudaError_t sort_rows(const int64_t* ids, int64_t count, int64_t segments, Zeroed first, Zeroed second, void* base,
                      SortedRows* sorted, cudaStream_t stream) {
  Scratch s;
  cudaError_t error = cut(count, segments, base, &s);
  *sorted = {s.sorted_keys, s.sorted_rows};
  const int64_t most = std::max({count, first.words, second.words});
  if (error != cudaSuccess || most == 0) return error;
  const auto blocks = static_cast<unsigned>(std::min(ceil_div(most, kThreads), kMostBlocks));
  error = launch(keys_kernel, blocks, kThreads, 0, stream, ids, count, segments, s, first, second);
  return error == cudaSuccess && count > 0 ? sort(s, count, segments, stream) : error;
}

}  // namespace semhitok::cuda
