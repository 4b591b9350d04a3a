// fp32 products from fp16 tensor cores: x = (hi + lo) 2^-e with hi, lo in fp16, and x.c = hi.hi + hi.lo + lo.hi.
//
// e brings the largest entry (of the codebook, of a token) to [2^13, 2^14). Then hi and lo together hold 22 bits or
// more of it, lo.lo is below fp32's rounding, and what is too small for fp16 is below 2^-37 of the largest. The scores
// are as exact as fp32's, with an error of about 3e-7 |x||c|.
//
// A packed tile: columns of hi, columns of lo, and bias[kTileCodes] in fp32, NaN for a code that must not win.
#pragma once

#include <type_traits>

#include "codebook.cuh"

namespace semhitok::cuda {

constexpr int kStepDepth = 16;  // of one MMA
constexpr int kColumnDepth = kColumnBytes / 2;
constexpr int kStepBytes = kStepDepth / kColumnDepth * kTileColumnBytes;  // of hi or of lo
constexpr int kTargetExponent = 13;

__host__ __device__ constexpr int half_tile_bytes(int steps) {
  return 2 * steps * kStepBytes + kTileCodes * static_cast<int>(sizeof(float));
}

// Steps of MMA, rounded up to a number for which there is a kernel.
inline int half_steps(int64_t depth) {
  const int steps = static_cast<int>((depth + kStepDepth - 1) / kStepDepth);
  return steps <= 4 ? steps : 8;
}

// Calls function(std::integral_constant<int, steps>) with the steps of a problem.
template <typename F>
auto with_half_steps(int64_t depth, F&& function) {
  switch (half_steps(depth)) {
    case 1: return function(std::integral_constant<int, 1>{});
    case 2: return function(std::integral_constant<int, 2>{});
    case 3: return function(std::integral_constant<int, 3>{});
    case 4: return function(std::integral_constant<int, 4>{});
    default: return function(std::integral_constant<int, 8>{});
  }
}

// The power of two that brings `largest` (finite, not negative) to the target: x * 2^shift.
__device__ __forceinline__ int half_shift(float largest) {
  const int exponent = max(__float_as_int(largest) >> 23, 1) - 127;
  return kTargetExponent - exponent;
}

struct HalfPair {
  uint32_t hi, lo;  // two fp16 each, the first in the low half
};

__device__ __forceinline__ HalfPair split_halves(float a, float b) {
  const __half a_hi = __float2half_rn(a), b_hi = __float2half_rn(b);
  const __half a_lo = __float2half_rn(a - __half2float(a_hi)), b_lo = __float2half_rn(b - __half2float(b_hi));
  const auto pack = [](__half x, __half y) {
    return static_cast<uint32_t>(__half_as_ushort(x)) | static_cast<uint32_t>(__half_as_ushort(y)) << 16;
  };
  return {pack(a_hi, b_hi), pack(a_lo, b_lo)};
}

// Column `column` of code k: eight values, zero beyond either end.
__device__ __forceinline__ void read_column(const NearestCode& p, int64_t k, int column, float (&c)[kColumnDepth]) {
#pragma unroll
  for (int i = 0; i < kColumnDepth; ++i) {
    const int64_t d = column * kColumnDepth + i;
    c[i] = k < p.num_codes && d < p.depth ? read<float>(p.codebook, k * p.depth + d) : 0.0f;
  }
}

// Writes such a column to a packed tile, its lo `to_lo` bytes after its hi.
__device__ __forceinline__ void write_column(const float (&c)[kColumnDepth], int shift, char* hi, int to_lo) {
  HalfPair pairs[kColumnDepth / 2];
#pragma unroll
  for (int i = 0; i < kColumnDepth; i += 2) pairs[i / 2] = split_halves(ldexpf(c[i], shift), ldexpf(c[i + 1], shift));
  *reinterpret_cast<uint4*>(hi) = make_uint4(pairs[0].hi, pairs[1].hi, pairs[2].hi, pairs[3].hi);
  *reinterpret_cast<uint4*>(hi + to_lo) = make_uint4(pairs[0].lo, pairs[1].lo, pairs[2].lo, pairs[3].lo);
}

// The A operands of 16 tokens for a warp, rows g = lane / 4 and g + 8, and the scale from sums to scores.
template <int kSteps>
struct HalfRows {
  uint32_t hi[kSteps][4], lo[kSteps][4];
  float scale[2];

  // first, second: the tokens of the two rows, or -1. A token with NaN or Inf becomes all NaN, so no score wins.
  __device__ __forceinline__ void load(const NearestCode& p, int64_t first, int64_t second, int codebook_shift) {
    constexpr int kLanesPerRow = 4;
    const int64_t tokens[2] = {first, second};
    const int column = 2 * (threadIdx.x % kLanesPerRow);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x[kSteps][4];
      float largest = 0.0f, poison = 0.0f;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t d = s * kStepDepth + i / 2 * kColumnDepth + column + i % 2;
          x[s][i] = tokens[r] >= 0 && d < p.depth ? read<float>(p.z, tokens[r] * p.depth + d) : 0.0f;
          largest = max(largest, fabsf(x[s][i]));
          poison += x[s][i] * 0.0f;
        }
      }
#pragma unroll
      for (int offset = kLanesPerRow / 2; offset > 0; offset /= 2) {
        largest = max(largest, __shfl_xor_sync(kAllLanes, largest, offset));
        poison += __shfl_xor_sync(kAllLanes, poison, offset);
      }
      const int shift = half_shift(largest);
      scale[r] = ldexpf(1.0f, -shift - codebook_shift);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const HalfPair pair =
              split_halves(ldexpf(x[s][2 * half], shift) + poison, ldexpf(x[s][2 * half + 1], shift) + poison);
          hi[s][2 * half + r] = pair.hi;
          lo[s][2 * half + r] = pair.lo;
        }
      }
    }
  }
};

// The best code of one row so far. A lane sees the codes in ascending order, so the lowest id stays.
struct Best {
  float score;
  int32_t id;

  __device__ __forceinline__ void clear() { score = -infinity(float()), id = 0; }
  __device__ __forceinline__ void merge(float other, int32_t other_id) {
    if (other > score || (other == score && other_id < id)) score = other, id = other_id;
  }
  __device__ __forceinline__ void merge_lanes_of_row() { best_of_lanes<4>(score, id); }
};

// The results of a search, split by split: [row_tiles * tile_tokens][splits].
struct HalfResults {
  float* scores;
  int32_t* ids;

  __device__ __forceinline__ void put(const Best& best, int64_t place, int split, const Shares& shares) const {
    scores[place * shares.splits + split] = best.score;
    ids[place * shares.splits + split] = best.id;
  }
};
HalfResults cut_results(const NearestCode& problem, int tile_tokens, int32_t blocks, Arena& arena);

struct HalfScratch {
  CodebookStats* stats;
  char* codes;
  HalfResults results;
  int64_t bytes;
};
HalfScratch cut_half(const NearestCode& problem, int tile_tokens, int32_t blocks, void* base);

// How many tokens there are, known on the device alone.
__device__ __forceinline__ int64_t token_count(const NearestCode& p, const TokenList& tokens) {
  return tokens.list ? *tokens.count : p.tokens;
}

// Packs the codebook; does nothing if the list is empty.
cudaError_t pack_half_codebook(const NearestCode& problem, TokenList tokens, const CodebookStats* stats, char* codes,
                               cudaStream_t stream);
// From the results of all splits to the problem's scores and ids.
cudaError_t merge_half_results(const NearestCode& problem, TokenList tokens, HalfResults results, int tile_tokens,
                               int32_t blocks, cudaStream_t stream);

}  // namespace semhitok::cuda
