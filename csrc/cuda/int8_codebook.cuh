// The certified search: int8 scores from the tensor cores, and what they prove.
//
// Code c is kept as r^ = s_c q, the rounding of r = c - mean to int8 with one scale for the codebook; token x as
// x^ = s_x q with its own. The integer A = q_x.q_c gives s_x s_c A = x^.r^, and
//   |x.r - x^.r^| <= |x| max|r - r^| + |x - x^| max|r^| = bound(x),
// so that with any exact score L a code can win only if s_x s_c A >= L - x.mean - bound(x).
//
// "l2": x.c - |c|^2/2 = y.r + b + x.mean - |mean|^2/2 with y = x - mean and b = -|r|^2/2, so y replaces x. Columns
// beyond the depth hold b: B = rint((b - mean b) / (tau s_c)) is distributed over `columns` of them. A token has n in
// each, and s_x = tau / n. The products add up to b - mean b, to within half of tau s_c. A token too long for that has
// n = 0, and its bound covers all of b.
//
// The codes of a tile that one lane of wgmma sees for a token are a slice: 32 codes, 8j + 2t and 8j + 2t + 1 of lane t.
// The search keeps the best kKeys slices of each lane by their greatest A. If the last one kept cannot win, no dropped
// slice can, and the token is certain once the other kept codes that can win are scored in fp64.
#pragma once

#include "codebook.cuh"

namespace semhitok::cuda {

constexpr int kInt8StepDepth = 32;  // of one MMA
constexpr int kLargestInt8 = 127;
constexpr int kLeastBiasColumns = 8;
constexpr int kMostInt8Steps = (kMaxTensorDepth + kLeastBiasColumns + kInt8StepDepth - 1) / kInt8StepDepth;
constexpr int kSliceLanes = 4;
constexpr int kSliceCodes = kTileCodes / kSliceLanes;
constexpr int kKeys = 3;
constexpr int kInt8TileTokens = 256;

inline int int8_steps(const NearestCode& p) {
  const int64_t depth = p.depth + (p.metric == Metric::kL2 ? kLeastBiasColumns : 0);
  return static_cast<int>((depth + kInt8StepDepth - 1) / kInt8StepDepth);
}
__host__ __device__ constexpr int int8_tile_bytes(int steps) { return steps * kInt8StepDepth * kTileCodes; }

// A key is A * 2^bits + the tile's place in its split, with all bits that A leaves free.
__host__ __device__ constexpr int key_tile_bits(int steps) { return steps <= 2 ? 11 : steps <= 4 ? 10 : 9; }
constexpr bool key_fits(int steps) {
  const int64_t most = int64_t{steps} * kInt8StepDepth * kLargestInt8 * kLargestInt8;
  return (most + 1) << key_tile_bits(steps) <= int64_t{1} << 31;
}
static_assert(key_fits(2) && key_fits(4) && key_fits(kMostInt8Steps), "a key fits into 32 bits");

enum class TokenState : int32_t { kCertifiable, kNoCertificate, kNotFinite };

struct TokenInfo {
  double offset;         // the part of a score outside A: x.mean ("l2": - |mean|^2/2 + mean b)
  double inverse_scale;  // 1 / (s_x s_c)
  float norm, residual;  // |x| and |x - x^| ("l2": of y)
  float dropped_bias;    // what the bound adds for b if n = 0
  TokenState state;
};

struct CertifiedScratch {
  CodebookStats* stats;
  double* partial;
  char* codes;      // packed tiles
  char* tokens;     // [row tiles * kInt8TileTokens][steps * kInt8StepDepth]
  TokenInfo* info;  // [tokens]
  int32_t* keys;    // [splits][row tiles * kInt8TileTokens][kSliceLanes][kKeys], descending
  int32_t* list;    // [tokens]: those without a certificate, stats->uncertified of them
  Shares shares;
  int32_t blocks;
  int64_t bytes;
};

// From the codebook and the tokens to their int8 rows.
cudaError_t pack_int8(const NearestCode& problem, const CertifiedScratch& scratch, cudaStream_t stream);
// From the int8 rows to the keys.
cudaError_t search_int8(const NearestCode& problem, const CertifiedScratch& scratch, cudaStream_t stream);
// From the keys to scores, ids and the list of tokens without a certificate.
cudaError_t certify(const NearestCode& problem, const CertifiedScratch& scratch, const SearchOptions& options,
                    cudaStream_t stream);

}  // namespace semhitok::cuda
