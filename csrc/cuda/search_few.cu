// Nearest code for few tokens on the tensor cores of compute capability 8.0 and later: the arithmetic of search_mma.cu
// in two launches, as each block computes the fp16 halves of its codes itself.
//
// Contract: that of nearest_code; the lowest id among equal fp32 scores.
//
// Plan. As search_mma.cu, but a block reads its tile of codes as it is, finds its largest entry, and leaves the packed
// tile in shared memory, scaled by its own power of two; scores of different tiles are compared unscaled.
// For few tokens the codes are split, down to one tile a block; then a merge.
// Cost: the codes are split once for every 256 tokens, about an eighth of the work, but there are three launches fewer.
// 256 tokens, 16,384 codes, depth 32 on an H200, 128 blocks of one tile: reading 1.5 us, splitting .5 us, 192 MMAs a
// warp 1.5 us, merge 2 us: 6 us.
#include "mma_tile.cuh"

namespace semhitok::cuda {
namespace {

template <int kSteps>
__global__ void __launch_bounds__(kThreads, kSteps <= 2 ? kBlocksPerMultiprocessor : 1)
    search_few_kernel(NearestCode p, HalfResults results, int32_t blocks) {
#ifdef SEMHITOK_AMPERE
  constexpr int kTokens = mma_tile_tokens(kSteps), kColumns = kSteps * (kStepDepth / kColumnDepth);
  constexpr int kPieces = kColumns * kTileCodes / kThreads;  // of 8 values, a thread
  static_assert(kPieces * kThreads == kColumns * kTileCodes, "every thread has as many pieces");
  static_assert(kThreads >= kTileCodes, "a thread a bias");
  __shared__ double squares[kColumns][kTileCodes];
  __shared__ float largest[kWarpsPerBlock];
  const Shares shares = share(p.tokens, kTokens, code_tiles(p), blocks);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  char* const packed = dynamic_shared();

  for (int unit = blockIdx.x; unit < shares.row_tiles * shares.splits; unit += blocks) {
    const int split = unit % shares.splits;
    const int64_t place = int64_t{unit / shares.splits} * kTokens + warp * (kTokens / kWarpsPerBlock) + lane / 4;
    const int first = split * shares.tiles_per_split, end = min(first + shares.tiles_per_split, code_tiles(p));
    MmaTokens<kSteps> tokens;
    tokens.load(p, place, 0);
    for (int tile = first; tile < end; ++tile) {
      const int64_t first_code = int64_t{tile} * kTileCodes;
      float most = 0.0f;
#pragma unroll 2
      for (int i = 0; i < kPieces; ++i) {
        const int piece = i * kThreads + threadIdx.x, row = piece / kColumns, column = piece % kColumns;
        float c[kColumnDepth];
        read_column(p, first_code + row, column, c);
        double squared = first_code + row < p.num_codes ? 0.0 : nan_of(double());
#pragma unroll
        for (int j = 0; j < kColumnDepth; ++j) {
          squared += static_cast<double>(c[j]) * c[j];
          most = max(most, fabsf(c[j]) < infinity(float()) ? fabsf(c[j]) : 0.0f);
        }
        squares[column][row] = squared;  // finite in fp64 unless a value is not
      }
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, offset));
      if (lane == 0) largest[warp] = most;
      __syncthreads();  // and all threads are done with the previous tile
#pragma unroll
      for (int w = 0; w < kWarpsPerBlock; ++w) most = max(most, largest[w]);
      const int shift = half_shift(most);
#pragma unroll 2
      for (int i = 0; i < kPieces; ++i) {  // read again, now from L1: registers are scarce
        const int piece = i * kThreads + threadIdx.x, row = piece / kColumns, column = piece % kColumns;
        float c[kColumnDepth];
        read_column(p, first_code + row, column, c);
        write_column(c, shift, packed + column * kTileColumnBytes + row * kColumnBytes, kSteps * kStepBytes);
      }
      if (threadIdx.x < kTileCodes) {
        double squared = 0.0;
#pragma unroll
        for (int column = 0; column < kColumns; ++column) squared += squares[column][threadIdx.x];
        const bool usable = squared < infinity(double());  // not NaN either
        reinterpret_cast<float*>(packed + 2 * kSteps * kStepBytes)[threadIdx.x] =
            usable ? static_cast<float>(bias_of(p.metric, squared)) : nan_of(float());
      }
      __syncthreads();
      tokens.search(packed, tile * kTileCodes, ldexpf(1.0f, -shift));
    }
    tokens.store(results, shares, split, place);
  }
#endif
}

}  // namespace

int64_t few_search_scratch(const NearestCode& p, const Device& device) {
  Arena arena(nullptr);
  (void)cut_results(p, mma_tile_tokens(half_steps(p.depth)), blocks_on(device), arena);
  return arena.used();
}

cudaError_t few_search(const NearestCode& p, const Device& device, const SearchOptions&, void* base,
                       cudaStream_t stream) {
  const int32_t blocks = blocks_on(device);
  const int tokens = mma_tile_tokens(half_steps(p.depth));
  Arena arena(base);
  const HalfResults results = cut_results(p, tokens, blocks, arena);
  const cudaError_t error = with_half_steps(p.depth, [&](auto steps) {
    constexpr int kSteps = decltype(steps)::value;
    const Shares shares = share(p.tokens, tokens, code_tiles(p), blocks);
    const int32_t grid = std::min(blocks, shares.row_tiles * shares.splits);
    return launch(search_few_kernel<kSteps>, static_cast<unsigned>(grid), kThreads, half_tile_bytes(kSteps), stream, p,
                  results, blocks);
  });
  return error == cudaSuccess ? merge_half_results(p, {}, results, tokens, blocks, stream) : error;
}

}  // namespace semhitok::cuda
