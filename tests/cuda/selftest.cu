// Kernels that test the emulator: each right as it stands, and wrong in a known way for each mistake it can be told to
// make. test_cuda_kernels.py compares the right ones with a plain product and wants the wrong ones caught.
#include "ptx.cuh"

namespace semhitok::cuda {
namespace {

constexpr int kRows = 64, kCodes = 128;  // of a wgmma
constexpr int kChunk = 16;               // bytes of a row of a core matrix
constexpr int kStep = 32;                // bytes of depth a wgmma takes
constexpr int kConsumers = 4 * kWarp;

// ---- wgmma: a producer warp brings tiles of 128 codes into a ring of two, four warps multiply them ----

enum RingMistake {
  kNoWaitForTile = 1,
  kProducerParity,
  kNoWaitForWgmma,
  kNoWgmmaFence,
  kReleaseTooEarly,
  kTooFewBytes,
  kNoSyncAfterInit,
  kNoInitFence,
  kOneWarpReleasesNot,
  kOverwriteBarrier,
  kMisaligned,
  kNoProducerWait,
};

__device__ __forceinline__ void multiply(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add) {
  wgmma_f16(d, a, b, add);
}
__device__ __forceinline__ void multiply(int32_t (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add) {
  wgmma_s8(d, a, b, add);
}

// rows [64][bytes]; codes [tiles][bytes / 16][128][16 bytes]; products [64][tiles * 128].
template <typename T>
__global__ void ring_kernel(const char* rows, const char* codes, T* products, int bytes, int tiles, int mistake) {
  __shared__ uint64_t full[2], empty[2];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t tile_bytes = static_cast<uint32_t>(kCodes * bytes);
  char* ring = dynamic_shared();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], 4);
    }
    if (mistake != kNoInitFence) barrier_init_fence();
  }
  if (mistake != kNoSyncAfterInit) __syncthreads();

  if (warp == 4) {
    if (lane != 0) return;
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile % 2, round = tile / 2;
      const int parity = (round + 1) % 2;
      if (mistake != kNoProducerWait) barrier_wait(&empty[stage], mistake == kProducerParity ? parity ^ 1 : parity);
      barrier_arrive_expect(&full[stage], mistake == kTooFewBytes ? tile_bytes - kChunk : tile_bytes);
      copy_bulk(ring + stage * tile_bytes + (mistake == kMisaligned ? 8 : 0), codes + int64_t(tile) * tile_bytes,
                tile_bytes, &full[stage]);
      if (mistake == kOverwriteBarrier) full[stage] = 0;
    }
    return;
  }

  const int g = lane / 4, t = lane % 4;
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % 2, round = tile / 2;
    if (mistake != kNoWaitForTile) barrier_wait(&full[stage], round % 2);
    T d[64];
    if (mistake != kNoWgmmaFence) wgmma_fence();
    for (int step = 0; step < bytes / kStep; ++step) {
      uint32_t a[4];
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * warp + g + 8 * (i % 2);
        a[i] = *reinterpret_cast<const uint32_t*>(rows + row * bytes + step * kStep + kChunk * (i / 2) + 4 * t);
      }
      const char* b = ring + stage * tile_bytes + step * (kStep / kChunk) * kCodes * kChunk;
      multiply(d, a, matrix_descriptor(b, kCodes * kChunk, 8 * kChunk), step > 0);
    }
    wgmma_commit();
    const bool releases = lane == 0 && !(mistake == kOneWarpReleasesNot && warp == 2);
    if (mistake == kReleaseTooEarly && releases) barrier_arrive(&empty[stage]);
    if (mistake != kNoWaitForWgmma) wgmma_wait<0>();
    for (int i = 0; i < 64; ++i) {
      const int row = 16 * warp + g + 8 * (i % 4 / 2), column = 8 * (i / 4) + 2 * t + i % 2;
      products[int64_t(row) * tiles * kCodes + tile * kCodes + column] = d[i];
    }
    if (mistake == kNoWaitForWgmma) wgmma_wait<0>();
    if (mistake != kReleaseTooEarly && releases) barrier_arrive(&empty[stage]);
  }
}

// ---- mma.sync: four warps of 16 rows each, tiles of 8 codes and 32 bytes of depth brought by cp.async ----

enum PipelineMistake { kNoWait = 1, kWaitForOneLess, kNoSyncBefore, kNoSyncAfter, kNoCommit };

// rows [64][depth], codes [8][depth] -> products [64][8]; a stage holds 16 columns of both, in core matrices.
__global__ void pipeline_kernel(const __half* rows, const __half* codes, float* products, int depth, int mistake) {
  constexpr int kColumns = 16, kHalves = kColumns / 2, kStages = 2;
  constexpr int kStageRows = 64 + 8;
  constexpr int kStageBytes = 2 * kStageRows * kChunk;  // [2 chunks][72 rows][16 bytes]
  char* ring = dynamic_shared();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int steps = depth / kColumns;
  const auto load = [&](int step) {
    for (int i = threadIdx.x; i < 2 * kStageRows; i += 4 * kWarp) {
      const int chunk = i / kStageRows, row = i % kStageRows;
      const __half* from = row < 64 ? rows + row * depth : codes + (row - 64) * depth;
      copy_async_16(ring + step % kStages * kStageBytes + i * kChunk, from + step * kColumns + chunk * kHalves);
    }
  };
  float d[4] = {};
  load(0);
  copy_async_commit();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) load(step + 1);
    if (mistake != kNoCommit) copy_async_commit();
    if (mistake == kWaitForOneLess) {
      copy_async_wait<2>();
    } else if (mistake != kNoWait) {
      copy_async_wait<1>();
    }
    if (mistake != kNoSyncBefore) __syncthreads();
    const char* stage = ring + step % kStages * kStageBytes;
    const int row = lane % 8, matrix = lane / 8;
    uint32_t a[4], b[4];
    load_matrices(a, stage + ((matrix / 2) * kStageRows + 16 * warp + 8 * (matrix % 2) + row) * kChunk);
    load_matrices(b, stage + ((matrix % 2) * kStageRows + 64 + row) * kChunk);
    mma_f16(d, a, b[0], b[1]);
    if (mistake != kNoSyncAfter) __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    products[(16 * warp + lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = d[i];
  }
}

// ---- barriers and collectives of plain CUDA ----

enum PlainMistake { kNoBlockSync = 1, kNoWarpSync, kLaneLeaves, kDifferentCollectives, kHalfTheBarrier, kTrap };

// sums[block] = sum of values [blocks][threads], through static shared memory.
__global__ void sum_kernel(const int* values, long long* sums, int mistake) {
  __shared__ int parts[kWarp];
  __shared__ int whole[1024];
  const int threads = static_cast<int>(blockDim.x), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  whole[threadIdx.x] = values[blockIdx.x * threads + threadIdx.x];
  if (mistake != kNoWarpSync) __syncwarp();
  const int neighbour = whole[threadIdx.x ^ 1];  // of the same warp
  if (mistake == kLaneLeaves && threadIdx.x == 5) return;
  if (mistake == kTrap && threadIdx.x == 5) __trap();
  int sum = 0;
  if (mistake == kDifferentCollectives && lane == 3) {
    sum = __reduce_add_sync(kAllLanes, neighbour);
  } else {
    sum = neighbour;
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  }
  if (lane == 0) parts[warp] = sum;
  if (mistake == kHalfTheBarrier && warp == 0) {
    __shfl_sync(lane < 16 ? 0xffffu : kAllLanes, 0, 0);
  }
  if (mistake != kNoBlockSync) __syncthreads();
  if (warp != 0) return;
  const long long total = __reduce_add_sync(kAllLanes, lane < threads / kWarp ? parts[lane] : 0);
  if (lane == 0) sums[blockIdx.x] = total;
}

// Every collective once; out [kResults][32].
__global__ void collectives_kernel(const int* values, int* out) {
  const int lane = threadIdx.x, value = values[lane];
  int* o = out + lane;
  const auto put = [&](int result) { *o = result, o += kWarp; };
  put(__shfl_sync(kAllLanes, value, 5));
  put(__shfl_sync(kAllLanes, value, 9, 8));
  put(__shfl_up_sync(kAllLanes, value, 3));
  put(__shfl_up_sync(kAllLanes, value, 2, 4));
  put(__shfl_down_sync(kAllLanes, value, 30));
  put(__shfl_down_sync(kAllLanes, value, 1, 16));
  put(__shfl_xor_sync(kAllLanes, value, 21));
  put(__shfl_xor_sync(kAllLanes, value, 12, 8));
  put(static_cast<int>(__ballot_sync(kAllLanes, value > 0)));
  put(__all_sync(kAllLanes, value > 0));
  put(__any_sync(kAllLanes, value > 0));
  put(__reduce_max_sync(kAllLanes, value));
  put(__reduce_min_sync(kAllLanes, value));
  put(__reduce_add_sync(kAllLanes, value));
  put(static_cast<int>(__reduce_max_sync(kAllLanes, static_cast<unsigned>(value))));
  put(lane % 3 == 0 ? __reduce_max_sync(0x49249249u, value) : -1);  // lanes in two halves
  put(static_cast<int>(__match_any_sync(kAllLanes, value % 2)));
}

}  // namespace
}  // namespace semhitok::cuda

#define EXPORTED extern "C" __attribute__((visibility("default")))

using namespace semhitok::cuda;

EXPORTED int selftest_ring(int integer, const char* rows, const char* codes, void* products, int bytes, int tiles,
                           int mistake) {
  const int64_t shared = 2ll * kCodes * bytes;
  if (integer != 0) {
    return launch(ring_kernel<int32_t>, 1, kConsumers + kWarp, shared, nullptr, rows, codes,
                  static_cast<int32_t*>(products), bytes, tiles, mistake);
  }
  return launch(ring_kernel<float>, 1, kConsumers + kWarp, shared, nullptr, rows, codes, static_cast<float*>(products),
                bytes, tiles, mistake);
}
EXPORTED int selftest_pipeline(const void* rows, const void* codes, float* products, int depth, int mistake) {
  return launch(pipeline_kernel, 1, 4 * kWarp, 2 * 2 * 72 * 16, nullptr, static_cast<const __half*>(rows),
                static_cast<const __half*>(codes), products, depth, mistake);
}
EXPORTED int selftest_sum(const int* values, long long* sums, int blocks, int threads, int mistake) {
  return launch(sum_kernel, static_cast<unsigned>(blocks), threads, 0, nullptr, values, sums, mistake);
}
EXPORTED int selftest_collectives(const int* values, int* out) {
  return launch(collectives_kernel, 1, kWarp, 0, nullptr, values, out);
}
EXPORTED const char* launch_message() { return emulator::message(); }
