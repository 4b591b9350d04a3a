// A codebook as the tensor cores read it, and its statistics.
//
// Packed codebook: tiles of kTileCodes codes. A tile is stored column by column, a column being 16 bytes of each of its
// codes, so that 8 codes of a column are one core matrix (ptx.cuh) and a tile is one contiguous copy.
#pragma once

#include "device.cuh"
#include "search.h"

namespace semhitok::cuda {

constexpr int kColumnBytes = 16;
constexpr int kTileColumnBytes = kTileCodes * kColumnBytes;  // from one column of a tile to the next
constexpr int kCoreMatrixBytes = 8 * kColumnBytes;           // from 8 codes of a column to the next 8

// Over the codes without NaN and Inf. The floats are not negative, so their bits compare as integers. All start at 0.
struct CodebookStats {
  float largest;         // max |c_d|
  float centred;         // max |c_d - mean_d|
  float bias;            // max |b - mean b| of b = -|c - mean|^2/2 ("l2"; else 0)
  float residual, norm;  // of the int8 codes: max |r - r^| and max |r^| over codes r = c - mean
  float bias_residual;   // of the bias columns: max |error|
  int32_t uncertified;   // tokens without a certificate, the length of their list
  double mean_bias;      // mean b
  double mean[kMaxTensorDepth];
};

constexpr int kStatsBlocks = 64;
constexpr int kStatsSums = kMaxTensorDepth + 2;  // along the depth, of the bias, and the number of codes
constexpr int64_t kStatsPartial = int64_t{kStatsBlocks} * kStatsSums;

// Eight lanes work on one row; the four teams of a warp may diverge.
constexpr int kTeam = 8;
constexpr int kTeamsPerBlock = kWarpsPerBlock * kWarp / kTeam;

__device__ __forceinline__ int team_lane() { return threadIdx.x % kTeam; }
__device__ __forceinline__ unsigned team_mask() { return 0xFFu << (threadIdx.x % kWarp / kTeam * kTeam); }

template <typename T>
__device__ __forceinline__ T team_sum(T value) {
  for (int offset = kTeam / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(team_mask(), value, offset, kTeam);
  return value;
}
template <typename T>
__device__ __forceinline__ T team_max(T value) {
  for (int offset = kTeam / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(team_mask(), value, offset, kTeam));
  }
  return value;
}

__device__ __forceinline__ void raise(float* most, double value) {  // *most = max(*most, value), never below value
  atomicMax(reinterpret_cast<int*>(most), __float_as_int(static_cast<float>(value) * 1.000001f));
}

__device__ __forceinline__ double bias_of(Metric metric, double squared_norm) {
  return metric == Metric::kL2 ? -0.5 * squared_norm : 0.0;
}

// Zeroes stats and finds largest; with centre, also mean, centred, mean_bias and bias.
// partial [kStatsPartial]: scratch.
cudaError_t codebook_stats(const NearestCode& problem, bool centre, CodebookStats* stats, double* partial,
                           cudaStream_t stream);

}  // namespace semhitok::cuda
