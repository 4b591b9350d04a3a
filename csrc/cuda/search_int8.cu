// The first pass of the certified search (int8_codebook.cuh) on Hopper's tensor cores: which slices may hold a winner.
// Compute capability 9.0 only.
//
// Contract: keys of every lane of every token and split, the kKeys slices of greatest A, descending.
//
// Plan. A block of four warpgroups stays on its multiprocessor and takes units of work. A warpgroup holds 64 tokens in
// registers, as A operands, and multiplies them with every tile of codes in turn (tile_ring.cuh). A thread has 32
// integer scores of each of two rows: 16 three-way maxima give the slice's greatest, a shift and an add turn it into a
// key, five maxima and minima insert the key. The other warpgroups' MMAs run meanwhile.
// Cost of a tile of 128 codes and 256 tokens on one multiprocessor: 256 cycles of tensor cores a step of 32 depths, and
// 4 x 2 x 22 instructions a scheduler at 2 cycles = 352 cycles. At N = 65,536, K = 16,384: about 51 us (D <= 32: the
// maxima), 75 us (D = 64: the tensor cores). The codebook comes from L2 once for every 256 tokens: 134 MB at D = 32.
#include <climits>

#include "int8_codebook.cuh"
#include "tile_ring.cuh"

namespace semhitok::cuda {
namespace {

constexpr int kWarpgroups = 4;  // four leave 128 registers a thread
constexpr int kWarpgroupThreads = 128;
constexpr int kBlockThreads = kWarpgroups * kWarpgroupThreads;
constexpr int kWarpTokens = 16;
constexpr int kStageBytes = 16 * 1024;
constexpr int kStages = 8;
static_assert(kInt8TileTokens == kBlockThreads / kWarp * kWarpTokens, "a warp has its tokens");
static_assert(kTileCodes == 128, "wgmma_s8 is 128 codes wide");

constexpr int stage_tiles(int steps) { return std::max(1, kStageBytes / int8_tile_bytes(steps)); }

template <int kSteps>
using Ring = TileRing<int8_tile_bytes(kSteps), stage_tiles(kSteps), kStages>;

#ifdef SEMHITOK_HOPPER
constexpr int kScoresPerThread = 64;

// Puts key into keys, descending.
__device__ __forceinline__ void insert(int32_t (&keys)[kKeys], int32_t key) {
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int32_t less = min(keys[i], key);
    keys[i] = max(keys[i], key);
    key = less;
  }
}
#endif

template <int kSteps>
__global__ void __launch_bounds__(kBlockThreads, 1) search_int8_kernel(NearestCode p, CertifiedScratch scratch) {
#ifdef SEMHITOK_HOPPER
  constexpr int kDepth = kSteps * kInt8StepDepth, kTileBytes = int8_tile_bytes(kSteps);
  constexpr int kStageTiles = Ring<kSteps>::kTilesPerStage, kStepBytes = 2 * kTileColumnBytes;
  static_assert(kSteps * kStepBytes == kTileBytes, "two columns a step");
  __shared__ typename Ring<kSteps>::Barriers barriers;
  const Shares shares = scratch.shares;
  Ring<kSteps> ring(barriers, scratch.codes, shares, code_tiles(p), scratch.blocks, kBlockThreads / kWarp);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  for (int unit = blockIdx.x; unit < shares.row_tiles * shares.splits; unit += scratch.blocks) {
    const int split = unit % shares.splits;
    const int64_t place = int64_t{unit / shares.splits} * kInt8TileTokens + warp * kWarpTokens + lane / 4;
    uint32_t x[kSteps][4];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = place + i % 2 * 8;
        x[s][i] = *reinterpret_cast<const uint32_t*>(scratch.tokens + row * kDepth + s * kInt8StepDepth +
                                                     i / 2 * kColumnBytes + lane % 4 * 4);
      }
    }
    int32_t keys[2][kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) keys[0][i] = keys[1][i] = INT_MIN;

    const int first = split * shares.tiles_per_split, end = min(first + shares.tiles_per_split, code_tiles(p));
    for (int stage = first; stage < end; stage += kStageTiles) {
      const char* shared = ring.wait();
#pragma unroll
      for (int t = 0; t < kStageTiles; ++t) {
        if (stage + t >= end) break;
        int32_t scores[kScoresPerThread];
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          wgmma_s8(scores, x[s],
                   matrix_descriptor(shared + t * kTileBytes + s * kStepBytes, kTileColumnBytes, kCoreMatrixBytes),
                   s > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          int32_t most = max(scores[2 * r], scores[2 * r + 1]);
#pragma unroll
          for (int j = 4; j < kScoresPerThread; j += 4) {
            most = __vimax3_s32(most, scores[j + 2 * r], scores[j + 2 * r + 1]);
          }
          insert(keys[r], (most << key_tile_bits(kSteps)) + (stage + t - first));
        }
      }
      ring.release();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = int64_t{split} * shares.row_tiles * kInt8TileTokens + place + 8 * r;
#pragma unroll
      for (int i = 0; i < kKeys; ++i) scratch.keys[(row * kSliceLanes + lane % 4) * kKeys + i] = keys[r][i];
    }
  }
#endif
}

template <int kSteps>
cudaError_t run(const NearestCode& p, const CertifiedScratch& scratch, cudaStream_t stream) {
  return launch(search_int8_kernel<kSteps>, static_cast<unsigned>(scratch.blocks), kBlockThreads,
                Ring<kSteps>::kSharedBytes, stream, p, scratch);
}

}  // namespace

cudaError_t search_int8(const NearestCode& p, const CertifiedScratch& scratch, cudaStream_t stream) {
  static_assert(kMostInt8Steps == 5, "a case each");
  switch (int8_steps(p)) {
    case 1: return run<1>(p, scratch, stream);
    case 2: return run<2>(p, scratch, stream);
    case 3: return run<3>(p, scratch, stream);
    case 4: return run<4>(p, scratch, stream);
    default: return run<5>(p, scratch, stream);
  }
}

}  // namespace semhitok::cuda
