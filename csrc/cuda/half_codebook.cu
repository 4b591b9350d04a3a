// The two ends of a search on fp16 products: packing the codebook, and merging what the splits found.
//
// pack: eight lanes a code, a lane a column of eight values. Cost: K * D * 4 bytes read and as many written.
// merge: a thread a token goes over its splits in ascending order, so the lowest id stays among equal scores.
#include "half_codebook.cuh"

namespace semhitok::cuda {
namespace {

constexpr int kThreads = kWarpsPerBlock * kWarp;

__global__ void __launch_bounds__(kThreads) pack_half_kernel(NearestCode p, TokenList tokens, const CodebookStats* stats,
                                                             int steps, char* codes) {
  if (token_count(p, tokens) == 0) return;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kTeamsPerBlock + threadIdx.x / kTeam;  // whole tiles of codes
  char* tile = codes + k / kTileCodes * half_tile_bytes(steps);
  const int row = static_cast<int>(k % kTileCodes);
  const int shift = half_shift(stats->largest), columns = steps * (kStepDepth / kColumnDepth);
  double squared = 0.0;
  float poison = k < p.codes ? 0.0f : nan_of(float());
  for (int column = team_lane(); column < columns; column += kTeam) {
    HalfPair pairs[kColumnDepth / 2];
#pragma unroll
    for (int i = 0; i < kColumnDepth; i += 2) {
      float c[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t d = column * kColumnDepth + i + j;
        c[j] = k < p.codes && d < p.depth ? read<float>(p.codebook, k * p.depth + d) : 0.0f;
        squared += static_cast<double>(c[j]) * c[j];
        poison += c[j] * 0.0f;
      }
      pairs[i / 2] = split_halves(ldexpf(c[0], shift), ldexpf(c[1], shift));
    }
    char* place = tile + column * kTileColumnBytes + row * kColumnBytes;
    *reinterpret_cast<uint4*>(place) = make_uint4(pairs[0].hi, pairs[1].hi, pairs[2].hi, pairs[3].hi);
    *reinterpret_cast<uint4*>(place + columns * kTileColumnBytes) =
        make_uint4(pairs[0].lo, pairs[1].lo, pairs[2].lo, pairs[3].lo);
  }
  squared = team_sum(squared);
  poison = team_sum(poison);
  if (team_lane() == 0) {
    reinterpret_cast<float*>(tile + 2 * columns * kTileColumnBytes)[row] =
        static_cast<float>(bias_of(p.metric, squared)) + poison;
  }
}

__global__ void __launch_bounds__(kThreads) merge_half_kernel(NearestCode p, TokenList tokens, HalfResults results,
                                                              int tile_tokens, int32_t blocks) {
  const int64_t count = token_count(p, tokens);
  const Shares shares = share(count, tile_tokens, code_tiles(p), blocks);
  const int64_t rows = int64_t{shares.row_tiles} * tile_tokens;
  for (int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; place < count;
       place += static_cast<int64_t>(gridDim.x) * kThreads) {
    Best best;
    best.clear();
    for (int64_t s = 0; s < shares.splits; ++s) {
      best.merge(results.scores[s * rows + place], results.ids[s * rows + place]);
    }
    const int64_t token = tokens.list ? tokens.list[place] : place;
    const bool any = best.score > -infinity(float());
    static_cast<float*>(p.scores)[token] = any ? best.score : nan_of(float());
    p.ids[token] = any ? best.id : 0;
  }
}

}  // namespace

HalfScratch cut_half(const NearestCode& p, int tile_tokens, int32_t blocks, void* base) {
  HalfScratch s;
  Pieces pieces(base);
  const int64_t rows = most_shared_rows(p.tokens, tile_tokens, blocks);
  s.stats = pieces.take<CodebookStats>(1);
  s.codes = pieces.take<char>(code_tiles(p) * half_tile_bytes(half_steps(p.depth)));
  s.results.scores = pieces.take<float>(rows);
  s.results.ids = pieces.take<int32_t>(rows);
  s.bytes = pieces.used();
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
  const auto grid = static_cast<unsigned>(std::min<int64_t>(ceil_div(p.tokens, kThreads), blocks));
  return launch(merge_half_kernel, grid, kThreads, 0, stream, p, tokens, results, tile_tokens, blocks);
}

}  // namespace semhitok::cuda
