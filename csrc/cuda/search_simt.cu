// Nearest code, plain SIMT: fp32, or fp64 when the problem is wide. Any GPU, any depth; oracle of the faster kernels.
//
// Contract: score(t, k) = bias[k] + sum_d z[t][d] c[k][d], the sum in ascending d with one FMA a step from zero, then
// the bias; the lowest k of the greatest score wins; NaN never does. A token with NaN or Inf, or without any score
// above -inf: id 0, score NaN.
//
// Plan. A block of 256 threads holds a tile of tokens and goes through the tiles of its split of the codes: kDepth
// columns of both in shared memory, kPerThread x kPerThread scores a thread in registers, and the running best of each
// of its tokens. A thread for every code of the tile adds up its bias from the same shared memory, without a launch or
// scratch of its own. Tokens of one depth tile are read once a block. Threads merge only at the end, by (score
// descending, id ascending). For few tokens the codes are split so that the device is full, and a warp a token merges
// the splits in the same way: the order of arrival never matters.
//
// Cost: tokens * codes * depth FMAs; z read once a split and the codebook once a tile of tokens; no score leaves the
// block. A depth step of a warp is 64 FMAs, 16 cycles of an SM, against 4 reads of 16 bytes a lane from shared memory,
// 6 cycles (codes 2 x 2, tokens 2 x 1), and 4 issue slots: the FMAs are the limit. On an H200 (132 SMs, 1.7 GHz), two
// blocks an SM: 256 tokens, 16,384 codes, depth 32: 256 blocks of one tile, 134 M FMAs = 4.7 us at full rate, 6.5 us
// with the first tile's latency and the bias (32 steps of 2 FMAs), merge 2 us, two launches: 11 us. 65,536 tokens: 1.2
// ms at full rate, 1.4 expected.
#include <algorithm>

#include "device.cuh"
#include "rows.cuh"
#include "search.h"

namespace semhitok::cuda {
namespace {

constexpr int kSide = 16;  // threads along tokens and along codes
constexpr int kDepth = 32;
constexpr int kSteps = 8;  // depth steps unrolled; a depth is rounded up to them, with zeros
constexpr int kQuad = 4;
constexpr int kPad = 4;  // shared rows shift by four banks, and stay aligned to 16 bytes
constexpr int kBlocksPerSM = 2;
constexpr int64_t kWantedBlocks = 132 * kBlocksPerSM;
static_assert(kSide * kSide == kThreads && kWarp % kSide == 0, "the threads that share tokens are in one warp");
static_assert(kDepth % kSteps == 0 && kSteps % kQuad == 0, "a depth tile is whole groups of steps, and whole quads");

template <typename T>
constexpr int kAcross = sizeof(T) == sizeof(float) ? 8 : 4;  // tokens, and codes, of a thread
template <typename T>
constexpr int kTile = kSide * kAcross<T>;

template <typename T>
struct alignas(16) Quad {
  T value[kQuad];
};

template <typename T>
using Tile = T (*)[kTile<T> + kPad];  // [kDepth]

template <typename T>
struct Scratch {
  T* scores;     // [tokens][splits]
  int32_t* ids;  // [tokens][splits]
  int64_t splits, tiles_per_split, bytes;
};

// The number of splits with which the last wave of blocks ends soonest; starting a block costs about a tile.
int64_t splits_for(int64_t token_tiles, int64_t code_tiles) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t splits = 1; splits <= std::min(code_tiles, kWantedBlocks); ++splits) {
    const int64_t cost = ceil_div(token_tiles * splits, kWantedBlocks) * (ceil_div(code_tiles, splits) + 1);
    if (cost < least) best = splits, least = cost;
  }
  return best;
}

template <typename T>
Scratch<T> cut(const NearestCode& p, void* base) {
  const int64_t code_tiles = ceil_div(p.num_codes, kTile<T>);
  Scratch<T> s;
  s.tiles_per_split = ceil_div(code_tiles, splits_for(ceil_div(p.tokens, kTile<T>), code_tiles));
  s.splits = ceil_div(code_tiles, s.tiles_per_split);
  Arena arena(base);
  s.scores = arena.take<T>(s.splits * p.tokens);
  s.ids = arena.take<int32_t>(s.splits * p.tokens);
  s.bytes = arena.used();
  return s;
}

template <typename T, typename Value>
__device__ __forceinline__ void load_values(const void* data, int64_t start, int64_t depth, int inside, int deep,
                                            Tile<T> tile) {
  constexpr int kRows = kThreads / kDepth;
  const int d = threadIdx.x % kDepth;
  const Value* from = static_cast<const Value*>(data) + start + d;
#pragma unroll 2
  for (int r = threadIdx.x / kDepth; r < kTile<T>; r += kRows) {
    tile[d][r] = r < inside && d < deep ? convert<T>(from[r * depth]) : T(0);
  }
}

// tile[d][r] = rows[first + r][depth_first + d], zero beyond either end. kVector: fp32 rows of whole pieces of 16
// bytes.
template <typename T, bool kVector>
__device__ __forceinline__ void load_tile(const Rows& rows, int64_t first, int64_t count, int64_t depth,
                                          int64_t depth_first, Tile<T> tile) {
  const int inside = static_cast<int>(min(count - first, int64_t{kTile<T>}));
  const int deep = static_cast<int>(min(depth - depth_first, int64_t{kDepth}));
  if constexpr (kVector) {
    constexpr int kQuads = kDepth / kQuad, kRows = kThreads / kQuads;
    const int d = threadIdx.x % kQuads * kQuad;
    const float* from = static_cast<const float*>(rows.data) + first * depth + depth_first + d;
#pragma unroll
    for (int i = 0; i < kTile<T> / kRows; ++i) {
      const int r = i * kRows + threadIdx.x / kQuads;
      float4 four{};
      if (r < inside && d < deep) four = *reinterpret_cast<const float4*>(from + r * depth);
      tile[d][r] = four.x, tile[d + 1][r] = four.y, tile[d + 2][r] = four.z, tile[d + 3][r] = four.w;
    }
  } else {
    const int64_t start = first * depth + depth_first;
    switch (rows.dtype) {
      case Dtype::kFloat32: return load_values<T, float>(rows.data, start, depth, inside, deep, tile);
      case Dtype::kFloat16: return load_values<T, __half>(rows.data, start, depth, inside, deep, tile);
      case Dtype::kBFloat16: return load_values<T, __nv_bfloat16>(rows.data, start, depth, inside, deep, tile);
      case Dtype::kFloat64: return load_values<T, double>(rows.data, start, depth, inside, deep, tile);
    }
  }
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM) search_kernel(NearestCode p, Scratch<T> scratch) {
  constexpr int kPerThread = kAcross<T>, kQuads = kPerThread / kQuad, kStride = kSide * kQuad;
  static_assert(kPerThread % kQuad == 0, "a thread reads whole quads");
  static_assert(kTile<T> <= kThreads, "a thread a bias");
  static_assert(sizeof(T) * (2 * kDepth * (kTile<T> + kPad) + kTile<T>) <= 48 * 1024, "static shared memory");
  __shared__ __align__(16) T z_tile[kDepth][kTile<T> + kPad];
  __shared__ __align__(16) T c_tile[kDepth][kTile<T> + kPad];
  __shared__ __align__(16) T biases[kTile<T>];
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTile<T>;
  const int64_t first_tile = blockIdx.y * scratch.tiles_per_split;
  const int64_t end_tile = min(first_tile + scratch.tiles_per_split, (p.num_codes + kTile<T> - 1) / kTile<T>);
  const T half = p.metric == Metric::kL2 ? T(-0.5) : T(0);

  T best[kPerThread];
  int32_t best_id[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) best[i] = -infinity(T()), best_id[i] = 0;

  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int64_t first_code = tile * kTile<T>;
    T acc[kPerThread][kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) acc[i][j] = T(0);
    }
    for (int64_t depth = 0; depth < p.depth; depth += kDepth) {
      const int64_t left = p.depth - depth;
      const int steps = left >= kDepth ? kDepth : static_cast<int>((left + kSteps - 1) / kSteps) * kSteps;
      if (p.depth > kDepth || tile == first_tile) {
        load_tile<T, kVector>(p.z, first_token, p.tokens, p.depth, depth, z_tile);
      }
      load_tile<T, kVector>(p.codebook, first_code, p.num_codes, p.depth, depth, c_tile);
      __syncthreads();
      if (threadIdx.x < kTile<T>) {
        T bias = depth > 0 ? biases[threadIdx.x] : first_code + threadIdx.x < p.num_codes ? T(0) : -infinity(T());
#pragma unroll 4
        for (int d = 0; d < steps; ++d) {
          const T c = c_tile[d][threadIdx.x];
          bias += c * (half * c);  // NaN or -Inf if c is NaN or Inf: with either the code cannot win
        }
        biases[threadIdx.x] = bias;
      }
      for (int d_first = 0; d_first < steps; d_first += kSteps) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int d = d_first + step;
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
      }
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {  // ascending codes, strictly greater: the lowest id stays
      const int column = (j / kQuad) * kStride + tx * kQuad + j % kQuad;
      const int32_t k = static_cast<int32_t>(first_code + column);
      const T added = biases[column];  // not written again before the next tile's barrier
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const T score = acc[i][j] + added;
        if (score > best[i]) best[i] = score, best_id[i] = k;
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    best_of_lanes<kSide>(best[i], best_id[i]);
    const int64_t token = first_token + (i / kQuad) * kStride + ty * kQuad + i % kQuad;
    if (tx == 0 && token < p.tokens) {
      scratch.scores[token * scratch.splits + blockIdx.y] = best[i];
      scratch.ids[token * scratch.splits + blockIdx.y] = best_id[i];
    }
  }
}

// A warp a token: whether it is finite, and which split has its winner.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge_kernel(NearestCode p, Scratch<T> scratch) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (token >= p.tokens) return;
  const int lane = threadIdx.x % kWarp;
  T poison = 0;
  for (int64_t d = lane; d < p.depth; d += kWarp) poison += read<T>(p.z, token * p.depth + d) * T(0);
  T best = -infinity(T());
  int32_t id = 0;
  for (int64_t s = lane; s < scratch.splits; s += kWarp) {  // ids ascend with the splits
    const T score = scratch.scores[token * scratch.splits + s];
    const int32_t split_id = scratch.ids[token * scratch.splits + s];
    if (score > best) best = score, id = split_id;
  }
  best_of_lanes<kWarp>(best, id);
  const bool won = __all_sync(kAllLanes, poison == T(0)) && best > -infinity(T());
  if (lane != 0) return;
  static_cast<T*>(p.scores)[token] = won ? best : nan_of(T());
  p.ids[token] = won ? id : 0;
}

bool whole_pieces(const Rows& rows, int64_t depth) { return rows.dtype == Dtype::kFloat32 && in_pieces(rows, depth); }

template <typename T>
cudaError_t run(const NearestCode& p, void* base, cudaStream_t stream) {
  const Scratch<T> scratch = cut<T>(p, base);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.tokens, kTile<T>)), static_cast<unsigned>(scratch.splits));
  auto kernel = search_kernel<T, false>;
  if constexpr (std::is_same_v<T, float>) {
    if (whole_pieces(p.z, p.depth) && whole_pieces(p.codebook, p.depth)) kernel = search_kernel<T, true>;
  }
  const cudaError_t error = launch(kernel, grid, kThreads, 0, stream, p, scratch);
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(ceil_div(p.tokens, kWarpsPerBlock));
  return launch(merge_kernel<T>, blocks, kThreads, 0, stream, p, scratch);
}

}  // namespace

int64_t simt_search_scratch(const NearestCode& problem, const Device&) {
  return problem.wide ? cut<double>(problem, nullptr).bytes : cut<float>(problem, nullptr).bytes;
}

cudaError_t simt_search(const NearestCode& problem, const Device&, const SearchOptions&, void* scratch,
                        cudaStream_t stream) {
  return problem.wide ? run<double>(problem, scratch, stream) : run<float>(problem, scratch, stream);
}

}  // namespace semhitok::cuda
