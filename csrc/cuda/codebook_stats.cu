// What the packing of a codebook needs first: its mean and its largest entries, over the codes without NaN and Inf.
//
// Plan. Eight lanes a code. sums_kernel leaves kStatsBlocks partial sums in fp64. extremes_kernel adds them in order,
// in every block alike, and takes maxima of non-negative floats as integers: the same bits in any order. Without
// centring only extremes_kernel runs.
// Cost: the codebook read twice (L2: 2 x 2 MiB at K = 16,384, D = 32), two launches of about 2 us.
#include "codebook.cuh"

namespace semhitok::cuda {
namespace {

constexpr int kPerLane = kMaxTensorDepth / kTeam;
static_assert(kThreads >= kStatsSums, "a thread a sum");

// Reads row k; lane l has the values at depth l, l + 8, ... False if the row has NaN or Inf.
__device__ __forceinline__ bool read_row(const NearestCode& p, int64_t k, float (&c)[kPerLane]) {
  float poison = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t d = i * kTeam + team_lane();
    c[i] = d < p.depth ? read<float>(p.codebook, k * p.depth + d) : 0.0f;
    poison += c[i] * 0.0f;
  }
  return team_sum(poison) == 0.0f;
}

__device__ __forceinline__ double squared_norm(const float (&c)[kPerLane]) {
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum += static_cast<double>(c[i]) * c[i];
  return team_sum(sum);
}

__global__ void __launch_bounds__(kThreads) sums_kernel(NearestCode p, double* partial, CodebookStats* stats) {
  __shared__ double sums[kTeamsPerBlock][kStatsSums];
  if (blockIdx.x == 0 && threadIdx.x == 0) *stats = CodebookStats{};
  const int team = threadIdx.x / kTeam, lane = team_lane();
  double sum[kPerLane] = {}, bias = 0.0, count = 0.0;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kTeamsPerBlock + team; k < p.num_codes;
       k += static_cast<int64_t>(gridDim.x) * kTeamsPerBlock) {
    float c[kPerLane];
    if (!read_row(p, k, c)) continue;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sum[i] += c[i];
    bias += bias_of(p.metric, squared_norm(c));
    count += 1.0;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sums[team][i * kTeam + lane] = sum[i];
  if (lane == 0) sums[team][kMaxTensorDepth] = bias, sums[team][kMaxTensorDepth + 1] = count;
  __syncthreads();
  if (threadIdx.x < kStatsSums) {
    double total = 0.0;
    for (int t = 0; t < kTeamsPerBlock; ++t) total += sums[t][threadIdx.x];
    partial[blockIdx.x * kStatsSums + threadIdx.x] = total;
  }
}

__global__ void __launch_bounds__(kThreads)
    extremes_kernel(NearestCode p, bool centre, const double* partial, CodebookStats* stats) {
  __shared__ double mean[kStatsSums];
  if (threadIdx.x < kStatsSums) {
    double total = 0.0;
    for (int b = 0; centre && b < kStatsBlocks; ++b) total += partial[b * kStatsSums + threadIdx.x];
    mean[threadIdx.x] = total;
  }
  __syncthreads();
  const double count = max(mean[kMaxTensorDepth + 1], 1.0);
  if (threadIdx.x <= kMaxTensorDepth) mean[threadIdx.x] /= count;
  __syncthreads();
  double squared_mean = 0.0;
  for (int d = team_lane(); d < kMaxTensorDepth; d += kTeam) squared_mean += mean[d] * mean[d];
  // From the mean of -|c|^2/2 over the codes to that of -|r|^2/2.
  const double mean_bias = mean[kMaxTensorDepth] - bias_of(p.metric, team_sum(squared_mean));
  if (blockIdx.x == 0) {
    if (threadIdx.x < kMaxTensorDepth) stats->mean[threadIdx.x] = mean[threadIdx.x];
    if (threadIdx.x == 0) stats->mean_bias = mean_bias;
  }
  float largest = 0.0f;
  double centred = 0.0, bias = 0.0;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kTeamsPerBlock + threadIdx.x / kTeam; k < p.num_codes;
       k += static_cast<int64_t>(gridDim.x) * kTeamsPerBlock) {
    float c[kPerLane];
    if (!read_row(p, k, c)) continue;
    double squared = 0.0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int d = i * kTeam + team_lane();
      largest = max(largest, fabsf(c[i]));
      if (centre && d < p.depth) {
        const double r = c[i] - mean[d];
        centred = max(centred, fabs(r));
        squared += r * r;
      }
    }
    if (centre) bias = max(bias, fabs(bias_of(p.metric, team_sum(squared)) - mean_bias));
  }
  largest = team_max(largest);
  centred = team_max(centred);
  if (team_lane() == 0) {
    raise(&stats->largest, largest);
    raise(&stats->centred, centred);
    raise(&stats->bias, bias);
  }
}

}  // namespace

cudaError_t codebook_stats(const NearestCode& p, bool centre, CodebookStats* stats, double* partial,
                           cudaStream_t stream) {
  const cudaError_t error = centre ? launch(sums_kernel, kStatsBlocks, kThreads, 0, stream, p, partial, stats)
                                   : cudaMemsetAsync(stats, 0, sizeof(CodebookStats), stream);
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(ceil_div(p.num_codes, kTeamsPerBlock), 4 * kStatsBlocks));
  return launch(extremes_kernel, blocks, kThreads, 0, stream, p, centre, partial, stats);
}

}  // namespace semhitok::cuda
