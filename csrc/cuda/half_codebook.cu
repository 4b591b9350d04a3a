// The start and the end of a search on fp16 products: packing the codebook, and merging the results of the splits.
//
// pack: eight lanes a code, a lane a column of eight values. Cost: K * D * 4 bytes read and as many written.
// merge: eight lanes a token, combined by (score descending, id ascending): the order of arrival never matters.
#include "half_codebook.cuh"

namespace semhitok::cuda {
namespace {

constexpr int kMergeBlocks = 8;  // a multiprocessor

__global__ void __launch_bounds__(kThreads)
    pack_half_kernel(NearestCode p, TokenList tokens, const CodebookStats* stats, int steps, char* codes) {
  if (token_count(p, tokens) == 0) return;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kTeamsPerBlock + threadIdx.x / kTeam;  // whole tiles of codes
  char* tile = codes + k / kTileCodes * half_tile_bytes(steps);
  const int row = static_cast<int>(k % kTileCodes);
  const int shift = half_shift(stats->largest), columns = steps * (kStepDepth / kColumnDepth);
  double squared = 0.0;
  float poison = k < p.num_codes ? 0.0f : nan_of(float());
  for (int column = team_lane(); column < columns; column += kTeam) {
    float c[kColumnDepth];
    read_column(p, k, column, c);
#pragma unroll
    for (int i = 0; i < kColumnDepth; ++i) {
      squared += static_cast<double>(c[i]) * c[i];
      poison += c[i] * 0.0f;
    }
    write_column(c, shift, tile + column * kTileColumnBytes + row * kColumnBytes, columns * kTileColumnBytes);
  }
  squared = team_sum(squared);
  poison = team_sum(poison);
  if (team_lane() == 0) {
    reinterpret_cast<float*>(tile + 2 * columns * kTileColumnBytes)[row] =
        static_cast<float>(bias_of(p.metric, squared)) + poison;
  }
}

__global__ void __launch_bounds__(kThreads)
    merge_half_kernel(NearestCode p, TokenList tokens, HalfResults results, int tile_tokens, int32_t blocks) {
  const int64_t count = token_count(p, tokens);
  const Shares shares = share(count, tile_tokens, code_tiles(p), blocks);
  for (int64_t place = static_cast<int64_t>(blockIdx.x) * kTeamsPerBlock + threadIdx.x / kTeam; place < count;
       place += static_cast<int64_t>(gridDim.x) * kTeamsPerBlock) {
    Best best;
    best.clear();
    for (int s = team_lane(); s < shares.splits; s += kTeam) {
      best.merge(results.scores[place * shares.splits + s], results.ids[place * shares.splits + s]);
    }
    best_of_lanes<kTeam>(best.score, best.id, team_mask());
    if (team_lane() != 0) continue;
    const int64_t token = tokens.list ? tokens.list[place] : place;
    const bool any = best.score > -infinity(float());
    static_cast<float*>(p.scores)[token] = any ? best.score : nan_of(float());
    p.ids[token] = any ? best.id : 0;
  }
}

}  // namespace

HalfResults cut_results(const NearestCode& p, int tile_tokens, int32_t blocks, Arena& arena) {
  const int64_t rows = most_shared_rows(p.tokens, tile_tokens, blocks);
  return {arena.take<float>(rows), arena.take<int32_t>(rows)};
}

HalfScratch cut_half(const NearestCode& p, int tile_tokens, int32_t blocks, void* base) {
  HalfScratch s;
  Arena arena(base);
  s.stats = arena.take<CodebookStats>(1);
  s.codes = arena.take<char>(code_tiles(p) * half_tile_bytes(half_steps(p.depth)));
  s.results = cut_results(p, tile_tokens, blocks, arena);
  s.bytes = arena.used();
  return s;
}

cudaError_t pack_half_codebook(const NearestCode& p, TokenList tokens, const CodebookStats* stats, char* codes,
                               cudaStream_t stream) {
  static_assert(kTileCodes % kTeamsPerBlock == 0, "a block stays inside a tile");
  const auto blocks = static_cast<unsigned>(code_tiles(p) * (kTileCodes / kTeamsPerBlock));
  return launch(pack_half_kernel, blocks, kThreads, 0, stream, p, tokens, stats, half_steps(p.depth), codes);
}

cudaError_t merge_half_results(const NearestCode& p, TokenList tokens, HalfResults results, int tile_tokens,
                               int32_t blocks, cudaStream_t stream) {
  const auto grid =
      static_cast<unsigned>(std::min<int64_t>(ceil_div(p.tokens, kTeamsPerBlock), kMergeBlocks * int64_t{blocks}));
  return launch(merge_half_kernel, grid, kThreads, 0, stream, p, tokens, results, tile_tokens, blocks);
}

}  // namespace semhitok::cuda
