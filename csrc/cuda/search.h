// The searches behind nearest_code (their table is in nearest_code.cu): the scratch and the launches of each.
//
//   simt       fp32 (fp64 when wide) multiply-adds: any GPU, any shape.
//   few        mma.sync on three-term fp16 products, as exact as fp32, in two launches: compute capability 8.0 and
//              later.
//   mma        the same from a codebook packed beforehand.
//   wgmma      the same products on Hopper's own tensor-core instructions: 9.0.
//   certified  one int8 wgmma pass that proves for nearly every token which few codes can win; those are scored in
//              fp64, and the tokens without a proof go to wgmma: 9.0.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace semhitok::cuda {

struct CodebookStats;

// Some of a problem's tokens: `count` of them, in list. Both are on the device: the host does not know how many.
struct TokenList {
  const int32_t* list = nullptr;  // null: all tokens
  const int32_t* count = nullptr;
};

SearchScratch simt_search_scratch, few_search_scratch, mma_search_scratch, wgmma_search_scratch,
    certified_search_scratch;
SearchRun simt_search, few_search, mma_search, wgmma_search, certified_search;

int64_t mma_shared_bytes(const NearestCode& problem);
// wgmma_search for some of the tokens. stats: the codebook's if they are already known, or null.
cudaError_t wgmma_search_tokens(const NearestCode& problem, const Device& device, TokenList tokens,
                                const CodebookStats* stats, void* scratch, cudaStream_t stream);

// ---- what the tensor-core searches share ----

constexpr int kTileCodes = 128;       // codes of a tile: the width of a wgmma
constexpr int kMaxTensorDepth = 128;  // so that a token fits in registers

__host__ __device__ inline int32_t code_tiles(const NearestCode& p) {
  return static_cast<int32_t>((p.num_codes + kTileCodes - 1) / kTileCodes);
}

// A grid of blocks shares row_tiles * splits units of work: unit u is row tile u / splits with range u % splits of
// tiles_per_split tiles of codes.
struct Shares {
  int32_t row_tiles, splits, tiles_per_split;
};

constexpr int kMostSplitsOfMany = 4;

// Splits the codes so that the blocks finish as early as possible; few splits if there are many rows.
__host__ __device__ inline Shares share(int64_t tokens, int tile_tokens, int32_t tiles, int32_t blocks) {
  Shares best{static_cast<int32_t>((tokens + tile_tokens - 1) / tile_tokens), 1, tiles};
  if (best.row_tiles == 0) return best;
  const int32_t few = blocks / best.row_tiles < tiles ? blocks / best.row_tiles : tiles;
  const int32_t most = few > kMostSplitsOfMany ? few : kMostSplitsOfMany;
  int64_t least = 0;
  for (int32_t splits = few > 1 ? few : 1; splits <= most && splits <= tiles; ++splits) {
    const int32_t per_split = (tiles + splits - 1) / splits;
    const int64_t rounds = (int64_t{best.row_tiles} * splits + blocks - 1) / blocks;
    const int64_t length = rounds * (per_split + 1);  // + 1: the cost of a unit before its first tile
    if (least == 0 || length < least) {
      least = length;
      best.splits = (tiles + per_split - 1) / per_split;
      best.tiles_per_split = per_split;
    }
  }
  return best;
}

// The most rows, each counted once a split, that share() gives for at most `tokens` tokens.
inline int64_t most_shared_rows(int64_t tokens, int tile_tokens, int64_t blocks) {
  return std::max(blocks, kMostSplitsOfMany * ((tokens + tile_tokens - 1) / tile_tokens)) * tile_tokens;
}

}  // namespace semhitok::cuda
