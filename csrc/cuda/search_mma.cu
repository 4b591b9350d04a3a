// Nearest code on the tensor cores of compute capability 8.0 and later, as exact as fp32: three fp16 products
// (half_codebook.cuh) by mma.sync.
//
// Contract: that of nearest_code; the lowest id among equal fp32 scores.
//
// Plan. A block of eight warps takes units of work (search.h). A warp holds one or two x 16 tokens in registers as A
// operands; all warps multiply them with each packed tile of codes, which cp.async loads while the previous one is
// used. One ldmatrix reads hi and lo of 8 codes and 16 depths for 3 or 6 MMAs; their scores are compared at once, in
// ascending order of the codes. Four lanes share a row and are merged once a unit.
// Cost of 8 codes x 16 tokens: 3 * steps MMAs; 4 scores a thread at an FMA, a compare and two selects. At N = 65,536,
// K = 16,384, D = 32 on an A100: 660 us of MMAs, 330 us of everything else at the same time.
#include "mma_tile.cuh"

namespace semhitok::cuda {
namespace {

constexpr int kStages = 2;

#ifdef SEMHITOK_AMPERE
template <int kSteps>
__device__ __forceinline__ void bring_tile(char* shared, const char* tile) {
  constexpr int kCopy = 16;
  static_assert(half_tile_bytes(kSteps) % kCopy == 0, "whole copies");
  for (int i = threadIdx.x * kCopy; i < half_tile_bytes(kSteps); i += kThreads * kCopy) {
    copy_async_16(shared + i, tile + i);
  }
}
#endif

template <int kSteps>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    search_mma_kernel(NearestCode p, const CodebookStats* stats, const char* codes, HalfResults results,
                      int32_t blocks) {
#ifdef SEMHITOK_AMPERE
  constexpr int kTileBytes = half_tile_bytes(kSteps), kTokens = mma_tile_tokens(kSteps);
  const Shares shares = share(p.tokens, kTokens, code_tiles(p), blocks);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int codebook_shift = half_shift(stats->largest);
  char* const stages = dynamic_shared();

  for (int unit = blockIdx.x; unit < shares.row_tiles * shares.splits; unit += blocks) {
    const int split = unit % shares.splits;
    const int64_t place = int64_t{unit / shares.splits} * kTokens + warp * (kTokens / kWarpsPerBlock) + lane / 4;
    const int first = split * shares.tiles_per_split, end = min(first + shares.tiles_per_split, code_tiles(p));
    bring_tile<kSteps>(stages, codes + int64_t{first} * kTileBytes);
    copy_async_commit();
    MmaTokens<kSteps> tokens;
    tokens.load(p, place, codebook_shift);
    for (int tile = first; tile < end; ++tile) {
      const char* shared = stages + (tile - first) % kStages * kTileBytes;
      if (tile + 1 < end) {
        bring_tile<kSteps>(stages + (tile + 1 - first) % kStages * kTileBytes, codes + int64_t{tile + 1} * kTileBytes);
      }
      copy_async_commit();  // empty at the end, so that kStages are always pending
      copy_async_wait<kStages - 1>();
      __syncthreads();
      tokens.search(shared, tile * kTileCodes, 1.0f);
      __syncthreads();
    }
    tokens.store(results, shares, split, place);
  }
#endif
}

}  // namespace

int64_t mma_shared_bytes(const NearestCode& p) { return kStages * half_tile_bytes(half_steps(p.depth)); }

int64_t mma_search_scratch(const NearestCode& p, const Device& device) {
  return cut_half(p, mma_tile_tokens(half_steps(p.depth)), blocks_on(device), nullptr).bytes;
}

cudaError_t mma_search(const NearestCode& p, const Device& device, const SearchOptions&, void* base,
                       cudaStream_t stream) {
  const int32_t blocks = blocks_on(device);
  const int tokens = mma_tile_tokens(half_steps(p.depth));
  const HalfScratch scratch = cut_half(p, tokens, blocks, base);
  cudaError_t error = codebook_stats(p, false, scratch.stats, nullptr, stream);
  if (error == cudaSuccess) error = pack_half_codebook(p, {}, scratch.stats, scratch.codes, stream);
  if (error != cudaSuccess) return error;
  error = with_half_steps(p.depth, [&](auto steps) {
    constexpr int kSteps = decltype(steps)::value;
    return launch(search_mma_kernel<kSteps>, static_cast<unsigned>(blocks), kThreads, kStages * half_tile_bytes(kSteps),
                  stream, p, scratch.stats, scratch.codes, scratch.results, blocks);
  });
  return error == cudaSuccess ? merge_half_results(p, {}, scratch.results, tokens, blocks, stream) : error;
}

}  // namespace semhitok::cuda
