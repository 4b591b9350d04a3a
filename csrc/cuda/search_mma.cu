// Nearest code on the tensor cores of compute capability 8.0 and later, as exact as fp32: three fp16 products
// (half_codebook.cuh) by mma.sync.
//
// Contract: that of nearest_code; the lowest id among equal fp32 scores.
//
// Plan. A block of eight warps goes over units of work (search.h). A warp holds kRowSets x 16 tokens in registers as A
// operands; all warps multiply them with each packed tile of codes, which cp.async brings while the one before is used.
// One ldmatrix reads hi and lo of 8 codes and 16 depths for 3 * kRowSets MMAs; their scores are compared at once, in
// ascending order of the codes. Four lanes share a row and meet once a unit.
// Cost of 8 codes x 16 tokens: 3 * steps MMAs; 4 scores a thread at an FMA, a compare and two selects. At N = 65,536,
// K = 16,384, D = 32 on an A100: 660 us of MMAs, 330 us of the rest beside them.
#include <type_traits>

#include "half_codebook.cuh"
#include "ptx.cuh"

namespace semhitok::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kSetTokens = 16;  // of one A operand
constexpr int kGroupCodes = 8;  // of one B operand
constexpr int kStages = 2;
constexpr int kMatrixLanes = 8;  // lanes that name the rows of one core matrix

// A operands of two sets fit in registers up to here.
constexpr int kMostStepsOfTwo = 4;
__host__ __device__ constexpr int row_sets(int steps) { return steps <= kMostStepsOfTwo ? 2 : 1; }
constexpr int tile_tokens(int steps) { return kWarps * row_sets(steps) * kSetTokens; }

#ifdef SEMHITOK_AMPERE
template <int kSteps>
__device__ __forceinline__ void bring_tile(char* shared, const char* tile) {
  static_assert(half_tile_bytes(kSteps) % 16 == 0, "copied by 16 bytes");
  for (int i = threadIdx.x * 16; i < half_tile_bytes(kSteps); i += kThreads * 16) copy_async_16(shared + i, tile + i);
}
#endif

template <int kSteps>
__global__ void __launch_bounds__(kThreads)
    search_mma_kernel(NearestCode p, const CodebookStats* stats, const char* codes, HalfResults results,
                      int32_t blocks) {
#ifdef SEMHITOK_AMPERE
  constexpr int kTileBytes = half_tile_bytes(kSteps), kRowSets = row_sets(kSteps);
  constexpr int kTokens = kWarps * kRowSets * kSetTokens;
  const Shares shares = share(p.tokens, kTokens, code_tiles(p), blocks);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int codebook_shift = half_shift(stats->largest);
  char* const stages = dynamic_shared();
  // Of the four core matrices that one ldmatrix reads: depths 0 to 7 and 8 to 15 of hi, then of lo.
  const int matrix = lane / kMatrixLanes;
  const int matrix_place = matrix / 2 * kSteps * kStepBytes + matrix % 2 * kTileColumnBytes + lane % 8 * kColumnBytes;

  for (int unit = blockIdx.x; unit < shares.row_tiles * shares.splits; unit += blocks) {
    const int split = unit % shares.splits;
    const int64_t place = int64_t{unit / shares.splits} * kTokens + warp * kRowSets * kSetTokens + lane / 4;
    HalfRows<kSteps> rows[kRowSets];
    Best best[kRowSets][2];
#pragma unroll
    for (int r = 0; r < kRowSets; ++r) {
      const int64_t first = place + r * kSetTokens, second = first + 8;
      rows[r].load(p, first < p.tokens ? first : -1, second < p.tokens ? second : -1, codebook_shift);
      best[r][0].clear();
      best[r][1].clear();
    }
    const int first = split * shares.tiles_per_split, end = min(first + shares.tiles_per_split, code_tiles(p));
    bring_tile<kSteps>(stages, codes + int64_t{first} * kTileBytes);
    copy_async_commit();
    for (int tile = first; tile < end; ++tile) {
      const char* shared = stages + (tile - first) % kStages * kTileBytes;
      if (tile + 1 < end) {
        bring_tile<kSteps>(stages + (tile + 1 - first) % kStages * kTileBytes, codes + int64_t{tile + 1} * kTileBytes);
      }
      copy_async_commit();  // empty at the end, so that there are always kStages of them
      copy_async_wait<kStages - 1>();
      __syncthreads();
#pragma unroll 2
      for (int group = 0; group < kTileCodes / kGroupCodes; ++group) {
        float scores[kRowSets][4] = {};
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          uint32_t b[4];
          load_matrices(b, shared + group * kCoreMatrixBytes + s * kStepBytes + matrix_place);
#pragma unroll
          for (int r = 0; r < kRowSets; ++r) {
            mma_f16(scores[r], rows[r].lo[s], b[0], b[1]);
            mma_f16(scores[r], rows[r].hi[s], b[2], b[3]);
            mma_f16(scores[r], rows[r].hi[s], b[0], b[1]);
          }
        }
        const int column = group * kGroupCodes + 2 * (lane % 4);
        const float2 bias = *reinterpret_cast<const float2*>(shared + 2 * kSteps * kStepBytes + column * sizeof(float));
        const int id = tile * kTileCodes + column;
#pragma unroll
        for (int r = 0; r < kRowSets; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            Best& row = best[r][i / 2];
            const float score = fmaf(scores[r][i], rows[r].scale[i / 2], i % 2 == 0 ? bias.x : bias.y);
            if (score > row.score) row.score = score, row.id = id + i % 2;
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < kRowSets; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        best[r][half].merge_lanes_of_row();
        if (lane % 4 == 0) {
          const int64_t at = int64_t{split} * shares.row_tiles * kTokens + place + r * kSetTokens + half * 8;
          results.scores[at] = best[r][half].score;
          results.ids[at] = best[r][half].id;
        }
      }
    }
  }
#endif
}

// Two blocks a multiprocessor where shared memory allows it.
int32_t blocks_on(const Device& device) { return 2 * device.multiprocessors; }

}  // namespace

int64_t mma_shared_bytes(const NearestCode& p) { return kStages * half_tile_bytes(half_steps(p.depth)); }

int64_t mma_search_scratch(const NearestCode& p, const Device& device) {
  return cut_half(p, tile_tokens(half_steps(p.depth)), blocks_on(device), nullptr).bytes;
}

cudaError_t mma_search(const NearestCode& p, const Device& device, void* base, cudaStream_t stream) {
  const int32_t blocks = blocks_on(device);
  const int tokens = tile_tokens(half_steps(p.depth));
  const HalfScratch scratch = cut_half(p, tokens, blocks, base);
  cudaError_t error = codebook_stats(p, false, scratch.stats, nullptr, stream);
  if (error == cudaSuccess) error = pack_half_codebook(p, {}, scratch.stats, scratch.codes, stream);
  if (error != cudaSuccess) return error;
  error = with_half_steps(p.depth, [&](auto steps) {
    constexpr int kSteps = decltype(steps)::value;
    return launch(search_mma_kernel<kSteps>, static_cast<unsigned>(blocks), kThreads,
                  kStages * half_tile_bytes(kSteps), stream, p, scratch.stats, scratch.codes, scratch.results, blocks);
  });
  if (error != cudaSuccess) return error;
  return merge_half_results(p, {}, scratch.results, tokens, blocks, stream);
}

}  // namespace semhitok::cuda
