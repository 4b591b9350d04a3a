// The certified search: an int8 pass and what it proves (int8_codebook.cuh), then the fp16 search for the other tokens.
//
// Plan. Eight launches on one stream, none of which the host waits for: two for the codebook's mean and extremes, one
// that packs codes and tokens, the search, the certification; then three of search_wgmma.cu for the tokens on the list,
// which do nothing if it is empty.
// Scratch: (K + N) * padded depth bytes, 32 + 48 * splits bytes a token, and that of the fp16 search.
#include "half_codebook.cuh"
#include "int8_codebook.cuh"

namespace semhitok::cuda {
namespace {

// At least as many splits as the bits of a key for the place of a tile require.
Shares shares_of(const NearestCode& p, int32_t blocks) {
  Shares shares = share(p.tokens, kInt8TileTokens, code_tiles(p), blocks);
  shares.tiles_per_split = std::min(shares.tiles_per_split, 1 << key_tile_bits(int8_steps(p)));
  shares.splits = (code_tiles(p) + shares.tiles_per_split - 1) / shares.tiles_per_split;
  return shares;
}

CertifiedScratch cut(const NearestCode& p, const Device& device, void* base) {
  CertifiedScratch s;
  Arena arena(base);
  s.blocks = device.multiprocessors;
  s.shares = shares_of(p, s.blocks);
  const int steps = int8_steps(p);
  const int64_t rows = int64_t{s.shares.row_tiles} * kInt8TileTokens;
  s.stats = arena.take<CodebookStats>(1);
  s.partial = arena.take<double>(kStatsPartial);
  s.codes = arena.take<char>(int64_t{code_tiles(p)} * int8_tile_bytes(steps));
  s.tokens = arena.take<char>(rows * steps * kInt8StepDepth);
  s.info = arena.take<TokenInfo>(p.tokens);
  s.keys = arena.take<int32_t>(s.shares.splits * rows * kSliceLanes * kKeys);
  s.list = arena.take<int32_t>(p.tokens);
  s.bytes = arena.used();
  return s;
}

}  // namespace

int64_t certified_search_scratch(const NearestCode& p, const Device& device) {
  return cut(p, device, nullptr).bytes + wgmma_search_scratch(p, device);
}

cudaError_t certified_search(const NearestCode& p, const Device& device, const SearchOptions& options, void* base,
                             cudaStream_t stream) {
  const CertifiedScratch scratch = cut(p, device, base);
  cudaError_t error = codebook_stats(p, true, scratch.stats, scratch.partial, stream);
  if (error == cudaSuccess) error = pack_int8(p, scratch, stream);
  if (error == cudaSuccess) error = search_int8(p, scratch, stream);
  if (error == cudaSuccess) error = certify(p, scratch, options, stream);
  if (error != cudaSuccess) return error;
  const TokenList rest{scratch.list, &scratch.stats->uncertified};
  return wgmma_search_tokens(p, device, rest, scratch.stats, static_cast<char*>(base) + scratch.bytes, stream);
}

}  // namespace semhitok::cuda
