// A packed tile of codes against a warp's tokens, by mma.sync: what its two searches share.
#pragma once

#include "half_codebook.cuh"
#include "ptx.cuh"

namespace semhitok::cuda {

constexpr int kBlocksPerMultiprocessor = 2;  // where registers and shared memory allow it
constexpr int kSetTokens = 16;               // of one A operand

inline int32_t blocks_on(const Device& device) { return kBlocksPerMultiprocessor * device.multiprocessors; }

// Up to so many steps the A operands of two sets fit in registers.
constexpr int kMostStepsOfTwo = 4;
__host__ __device__ constexpr int row_sets(int steps) { return steps <= kMostStepsOfTwo ? 2 : 1; }
__host__ __device__ constexpr int mma_tile_tokens(int steps) { return kWarpsPerBlock * row_sets(steps) * kSetTokens; }

#ifdef SEMHITOK_AMPERE

// The tokens of a warp: rows place + 16 r and those + 8, and the best code of each so far.
template <int kSteps>
struct MmaTokens {
  static constexpr int kSets = row_sets(kSteps);
  HalfRows<kSteps> rows[kSets];
  Best best[kSets][2];

  __device__ __forceinline__ void load(const NearestCode& p, int64_t place, int codebook_shift) {
#pragma unroll
    for (int r = 0; r < kSets; ++r) {
      const int64_t first = place + r * kSetTokens, second = first + 8;
      rows[r].load(p, first < p.tokens ? first : -1, second < p.tokens ? second : -1, codebook_shift);
      best[r][0].clear();
      best[r][1].clear();
    }
  }

  // tile: in shared memory. first_id: of its first code. factor: scales all scores, on top of each row's scale.
  __device__ __forceinline__ void search(const char* tile, int first_id, float factor) {
    constexpr int kOperandCodes = 8;  // of one B operand
    constexpr int kMatrixLanes = 8;   // lanes that name the rows of one core matrix
    const int lane = threadIdx.x % kWarp;
    // One ldmatrix reads four core matrices: depths 0 to 7 and 8 to 15 of hi, then of lo.
    const int matrix = lane / kMatrixLanes;
    const char* rows_of_lane =
        tile + matrix / 2 * kSteps * kStepBytes + matrix % 2 * kTileColumnBytes + lane % kMatrixLanes * kColumnBytes;
    const float* biases = reinterpret_cast<const float*>(tile + 2 * kSteps * kStepBytes);
    float scale[kSets][2];
#pragma unroll
    for (int r = 0; r < kSets; ++r) {
      scale[r][0] = rows[r].scale[0] * factor;
      scale[r][1] = rows[r].scale[1] * factor;
    }
#pragma unroll 2
    for (int operand = 0; operand < kTileCodes / kOperandCodes; ++operand) {
      float scores[kSets][4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t b[4];
        load_matrices(b, rows_of_lane + operand * kCoreMatrixBytes + s * kStepBytes);
#pragma unroll
        for (int r = 0; r < kSets; ++r) {
          mma_f16(scores[r], rows[r].lo[s], b[0], b[1]);
          mma_f16(scores[r], rows[r].hi[s], b[2], b[3]);
          mma_f16(scores[r], rows[r].hi[s], b[0], b[1]);
        }
      }
      const int column = operand * kOperandCodes + 2 * (lane % 4);
      const float2 bias = *reinterpret_cast<const float2*>(biases + column);
#pragma unroll
      for (int r = 0; r < kSets; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Best& row = best[r][i / 2];
          const float score = fmaf(scores[r][i], scale[r][i / 2], i % 2 == 0 ? bias.x : bias.y);
          if (score > row.score) row.score = score, row.id = first_id + column + i % 2;
        }
      }
    }
  }

  __device__ __forceinline__ void store(const HalfResults& results, const Shares& shares, int split, int64_t place) {
#pragma unroll
    for (int r = 0; r < kSets; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        best[r][half].merge_lanes_of_row();
        if (threadIdx.x % 4 == 0) results.put(best[r][half], place + r * kSetTokens + half * 8, split, shares);
      }
    }
  }
};

#endif

}  // namespace semhitok::cuda
