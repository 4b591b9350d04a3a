// Nearest code, plain SIMT: fp32, or fp64 when the problem is wide. Any GPU; the oracle of the faster kernels.
//
// Contract: score(t, k) = bias[k] + sum_d z[t][d] c[k][d], the sum in ascending d with one FMA a step; the lowest k of
// the greatest score wins; NaN never does. A token with NaN or Inf, or without any score above -inf: id 0, score NaN.
//
// Plan. bias[K] first. Then a block of 256 threads holds a tile of tokens and walks over the tiles of its split of the
// codes: kDepth columns of both in shared memory, kPerThread x kPerThread scores a thread in registers, and the running
// best of each of its tokens. Threads meet only at the end, by (score descending, id ascending); few tokens are split
// over the codes so that the device is full, and the splits are merged in ascending order: arrival never decides.
// Cost: tokens * codes * depth FMAs; z read once a split and the codebook once a tile of tokens; no score leaves the
// block.
#include <algorithm>

#include "device.cuh"
#include "search.h"

namespace semhitok::cuda {
namespace {

constexpr int kSide = 16;  // threads along tokens and along codes
constexpr int kThreads = kSide * kSide;
constexpr int kDepth = 16;
constexpr int kQuad = 4;
constexpr int kPad = 4;  // shared rows shift by four banks, and stay aligned to 16 bytes
constexpr int64_t kWantedBlocks = 264;
static_assert(kWarp % kSide == 0, "the threads that share tokens are in one warp");

template <typename T>
struct Shape;
template <>
struct Shape<float> {
  static constexpr int kPerThread = 8;
};
template <>
struct Shape<double> {
  static constexpr int kPerThread = 4;
};
template <typename T>
constexpr int kTile = kSide * Shape<T>::kPerThread;

template <typename T>
struct alignas(16) Quad {
  T value[kQuad];
};

template <typename T>
struct Scratch {
  T* bias;           // [codes]
  T* scores;         // [splits][tokens]
  int32_t* ids;      // [splits][tokens]
  int64_t splits, tiles_per_split, bytes;
};

template <typename T>
Scratch<T> cut(const NearestCode& p, void* base) {
  const int64_t token_tiles = std::max<int64_t>(ceil_div(p.tokens, kTile<T>), 1);
  const int64_t code_tiles = ceil_div(p.codes, kTile<T>);
  Scratch<T> s;
  s.splits = std::clamp<int64_t>(kWantedBlocks / token_tiles, 1, code_tiles);
  s.tiles_per_split = ceil_div(code_tiles, s.splits);
  s.splits = ceil_div(code_tiles, s.tiles_per_split);
  Pieces pieces(base);
  s.bias = pieces.take<T>(p.codes);
  s.scores = pieces.take<T>(s.splits * p.tokens);
  s.ids = pieces.take<int32_t>(s.splits * p.tokens);
  s.bytes = pieces.used();
  return s;
}

// A warp a code: 0 or -|c|^2/2, NaN where the code holds NaN or Inf.
template <typename T>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) bias_kernel(NearestCode p, T* bias) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (k >= p.codes) return;
  double norm = 0.0, poison = 0.0;
  for (int64_t d = threadIdx.x % kWarp; d < p.depth; d += kWarp) {
    const double c = read<double>(p.codebook, k * p.depth + d);
    norm += c * c;
    poison += c * 0.0;
  }
  norm = warp_sum(norm);
  poison = warp_sum(poison);
  if (threadIdx.x % kWarp == 0) bias[k] = static_cast<T>((p.metric == Metric::kL2 ? -0.5 * norm : 0.0) + poison);
}

// tile[d][r] = rows[first + r][depth_first + d], zero beyond either end.
template <typename T>
__device__ __forceinline__ void load_tile(const Rows& rows, int64_t first, int64_t count, int64_t depth,
                                          int64_t depth_first, T (*tile)[kTile<T> + kPad]) {
  for (int i = threadIdx.x; i < kTile<T> * kDepth; i += kThreads) {
    const int r = i / kDepth, d = i % kDepth;
    const bool inside = first + r < count && depth_first + d < depth;
    tile[d][r] = inside ? read<T>(rows, (first + r) * depth + depth_first + d) : T(0);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) search_kernel(NearestCode p, Scratch<T> scratch) {
  constexpr int kPerThread = Shape<T>::kPerThread, kQuads = kPerThread / kQuad, kStride = kSide * kQuad;
  static_assert(kPerThread % kQuad == 0, "a thread reads whole quads");
  __shared__ __align__(16) T z_tile[kDepth][kTile<T> + kPad];
  __shared__ __align__(16) T c_tile[kDepth][kTile<T> + kPad];
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTile<T>;
  const int64_t first_tile = blockIdx.y * scratch.tiles_per_split;
  const int64_t end_tile = min(first_tile + scratch.tiles_per_split, (p.codes + kTile<T> - 1) / kTile<T>);

  T best[kPerThread];
  int32_t best_id[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) best[i] = -infinity(T()), best_id[i] = 0;

  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int64_t first_code = tile * kTile<T>;
    T acc[kPerThread][kPerThread];
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t k = first_code + (j / kQuad) * kStride + tx * kQuad + j % kQuad;
      const T bias = k < p.codes ? scratch.bias[k] : -infinity(T());
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) acc[i][j] = bias;
    }
    for (int64_t depth = 0; depth < p.depth; depth += kDepth) {
      load_tile<T>(p.z, first_token, p.tokens, p.depth, depth, z_tile);
      load_tile<T>(p.codebook, first_code, p.codes, p.depth, depth, c_tile);
      __syncthreads();
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        Quad<T> z[kQuads], c[kQuads];
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          z[q] = *reinterpret_cast<const Quad<T>*>(&z_tile[d][q * kStride + ty * kQuad]);
          c[q] = *reinterpret_cast<const Quad<T>*>(&c_tile[d][q * kStride + tx * kQuad]);
        }
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
          for (int j = 0; j < kPerThread; ++j) {
            acc[i][j] += z[i / kQuad].value[i % kQuad] * c[j / kQuad].value[j % kQuad];
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {  // ascending codes, strictly greater: the lowest id stays
      const int32_t k = static_cast<int32_t>(first_code + (j / kQuad) * kStride + tx * kQuad + j % kQuad);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (acc[i][j] > best[i]) best[i] = acc[i][j], best_id[i] = k;
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
    for (int offset = kSide / 2; offset > 0; offset /= 2) {
      const T score = __shfl_xor_sync(kAllLanes, best[i], offset);
      const int32_t id = __shfl_xor_sync(kAllLanes, best_id[i], offset);
      if (score > best[i] || (score == best[i] && id < best_id[i])) best[i] = score, best_id[i] = id;
    }
    const int64_t token = first_token + (i / kQuad) * kStride + ty * kQuad + i % kQuad;
    if (tx == 0 && token < p.tokens) {
      scratch.scores[blockIdx.y * p.tokens + token] = best[i];
      scratch.ids[blockIdx.y * p.tokens + token] = best_id[i];
    }
  }
}

// A warp a token: is it finite, and which split has its winner.
template <typename T>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) merge_kernel(NearestCode p, Scratch<T> scratch) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (token >= p.tokens) return;
  const int lane = threadIdx.x % kWarp;
  T poison = 0;
  for (int64_t d = lane; d < p.depth; d += kWarp) poison += read<T>(p.z, token * p.depth + d) * T(0);
  const bool finite = __all_sync(kAllLanes, poison == T(0));
  if (lane != 0) return;
  T best = -infinity(T());
  int32_t id = 0;
  for (int64_t s = 0; finite && s < scratch.splits; ++s) {
    const T score = scratch.scores[s * p.tokens + token];
    if (score > best) best = score, id = scratch.ids[s * p.tokens + token];
  }
  static_cast<T*>(p.scores)[token] = best > -infinity(T()) ? best : nan_of(T());
  p.ids[token] = id;
}

template <typename T>
cudaError_t run(const NearestCode& p, void* base, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  const Scratch<T> scratch = cut<T>(p, base);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.tokens, kTile<T>)), static_cast<unsigned>(scratch.splits));
  const int threads = kWarpsPerBlock * kWarp;
  cudaError_t error = launch(bias_kernel<T>, warp_blocks(p.codes), threads, 0, stream, p, scratch.bias);
  if (error == cudaSuccess) error = launch(search_kernel<T>, grid, kThreads, 0, stream, p, scratch);
  if (error == cudaSuccess) error = launch(merge_kernel<T>, warp_blocks(p.tokens), threads, 0, stream, p, scratch);
  return error;
}

}  // namespace

int64_t simt_search_scratch(const NearestCode& problem) {
  return problem.wide ? cut<double>(problem, nullptr).bytes : cut<float>(problem, nullptr).bytes;
}

cudaError_t simt_search(const NearestCode& problem, void* scratch, cudaStream_t stream) {
  return problem.wide ? run<double>(problem, scratch, stream) : run<float>(problem, scratch, stream);
}

}  // namespace semhitok::cuda
