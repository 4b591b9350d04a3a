// Nearest code on Hopper's tensor cores, as exact as fp32: three fp16 products (half_codebook.cuh). Compute capability
// 9.0 only.
//
// Contract: that of nearest_code; the lowest id among equal fp32 scores. It also searches the tokens for which the
// certified search has no proof, whose number is known only on the device.
//
// Plan. A block of three warpgroups stays on its multiprocessor and takes units of work (search.h). A warpgroup holds
// 64 tokens in registers, as A operands, and multiplies them with every tile of codes in turn (tile_ring.cuh): 64
// scores a thread, of two rows, compared in registers. Four lanes share a row and are merged once a unit.
// Cost a tile of 128 codes and 64 tokens: 3 * steps MMAs of 64 cycles; 64 scores a thread at an FMA, a compare and two
// selects, which overlap with the MMAs of the other warpgroups. At N = 65,536, K = 16,384: 217 us (D = 32), 435 us (D =
// 64); the codebook comes from L2 once for every 192 tokens: 0.7 GB and 1.4 GB.
#include "half_codebook.cuh"
#include "tile_ring.cuh"

namespace semhitok::cuda {
namespace {

constexpr int kWarpgroups = 3;  // three leave 168 registers a thread
constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupTokens = 64;
constexpr int kTileTokens = kWarpgroups * kWarpgroupTokens;
constexpr int kBlockThreads = kWarpgroups * kWarpgroupThreads;
constexpr int kRingBytes = 200 * 1024;
constexpr int kMostStages = 8;
static_assert(kTileCodes == 128, "wgmma_f16 is 128 codes wide");

template <int kSteps>
using Ring = TileRing<half_tile_bytes(kSteps), 1, std::min(kMostStages, kRingBytes / half_tile_bytes(kSteps))>;

template <int kSteps>
__global__ void __launch_bounds__(kBlockThreads, 1)
    search_wgmma_kernel(NearestCode p, TokenList tokens, const CodebookStats* stats, const char* codes,
                        HalfResults results, int32_t blocks) {
#ifdef SEMHITOK_HOPPER
  constexpr int kWarpTokens = 16, kScoresPerThread = 64;
  const int64_t count = token_count(p, tokens);
  const Shares shares = share(count, kTileTokens, code_tiles(p), blocks);
  const int units = shares.row_tiles * shares.splits;
  if (units == 0) return;
  __shared__ typename Ring<kSteps>::Barriers barriers;
  Ring<kSteps> ring(barriers, codes, shares, code_tiles(p), blocks, kBlockThreads / kWarp);

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int codebook_shift = half_shift(stats->largest);
  for (int unit = blockIdx.x; unit < units; unit += blocks) {
    const int split = unit % shares.splits;
    const int64_t place = int64_t{unit / shares.splits} * kTileTokens + warp * kWarpTokens + lane / 4;  // and place + 8
    const auto token_at = [&](int64_t at) {
      return at >= count ? int64_t{-1} : tokens.list ? static_cast<int64_t>(tokens.list[at]) : at;
    };
    HalfRows<kSteps> rows;
    rows.load(p, token_at(place), token_at(place + 8), codebook_shift);
    Best best[2];
    best[0].clear();
    best[1].clear();
    const int first = split * shares.tiles_per_split, end = min(first + shares.tiles_per_split, code_tiles(p));
    for (int tile = first; tile < end; ++tile) {
      const char* shared = ring.wait();
      float scores[kScoresPerThread];
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {  // the small terms first
        const uint64_t hi = matrix_descriptor(shared + s * kStepBytes, kTileColumnBytes, kCoreMatrixBytes);
        const uint64_t lo = matrix_descriptor(shared + (kSteps + s) * kStepBytes, kTileColumnBytes, kCoreMatrixBytes);
        wgmma_f16(scores, rows.lo[s], hi, s > 0);
        wgmma_f16(scores, rows.hi[s], lo, true);
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const uint64_t hi = matrix_descriptor(shared + s * kStepBytes, kTileColumnBytes, kCoreMatrixBytes);
        wgmma_f16(scores, rows.hi[s], hi, true);
      }
      wgmma_commit();
      wgmma_wait<0>();
      const float* bias = reinterpret_cast<const float*>(shared + 2 * kSteps * kStepBytes) + 2 * (lane % 4);
      int at[2] = {-1, -1};
#pragma unroll
      for (int j = 0; j < kTileCodes / 8; ++j) {
        const float2 b = *reinterpret_cast<const float2*>(bias + 8 * j);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float score = fmaf(scores[4 * j + i], rows.scale[i / 2], i % 2 == 0 ? b.x : b.y);
          if (score > best[i / 2].score) best[i / 2].score = score, at[i / 2] = 8 * j + i % 2;
        }
      }
      ring.release();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (at[r] >= 0) best[r].id = tile * kTileCodes + at[r] + 2 * (lane % 4);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      best[r].merge_lanes_of_row();
      if (lane % 4 == 0) results.put(best[r], place + 8 * r, split, shares);
    }
  }
#endif
}

}  // namespace

int64_t wgmma_search_scratch(const NearestCode& p, const Device& device) {
  return cut_half(p, kTileTokens, device.multiprocessors, nullptr).bytes;
}

cudaError_t wgmma_search(const NearestCode& p, const Device& device, const SearchOptions&, void* base,
                         cudaStream_t stream) {
  return wgmma_search_tokens(p, device, {}, nullptr, base, stream);
}

cudaError_t wgmma_search_tokens(const NearestCode& p, const Device& device, TokenList tokens,
                                const CodebookStats* stats, void* base, cudaStream_t stream) {
  const int32_t blocks = device.multiprocessors;
  const HalfScratch scratch = cut_half(p, kTileTokens, blocks, base);
  cudaError_t error = cudaSuccess;
  if (stats == nullptr) {
    stats = scratch.stats;
    error = codebook_stats(p, false, scratch.stats, nullptr, stream);
  }
  if (error == cudaSuccess) error = pack_half_codebook(p, tokens, stats, scratch.codes, stream);
  if (error != cudaSuccess) return error;
  error = with_half_steps(p.depth, [&](auto steps) {
    constexpr int kSteps = decltype(steps)::value;
    return launch(search_wgmma_kernel<kSteps>, static_cast<unsigned>(blocks), kBlockThreads, Ring<kSteps>::kSharedBytes,
                  stream, p, tokens, stats, scratch.codes, scratch.results, blocks);
  });
  return error == cudaSuccess ? merge_half_results(p, tokens, scratch.results, kTileTokens, blocks, stream) : error;
}

}  // namespace semhitok::cuda
