// Nearest sub-code: each token searches the one sub-codebook its group names.
//
// Contract: score(t, j) = z[t].c[j] + bias, c = sub_codebooks[group[t]]; the lowest j of the greatest score wins. id 0
// and score NaN for a group out of range, a token with NaN or Inf, or no score above -inf.
//
// Plan. A warp a token, lanes along the depth; z.c, |c|^2 and the test for NaN and Inf are summed across the warp by a
// fixed butterfly, so every lane has the same score and nothing needs merging.
// Cost: tokens * subcodes * depth values read in rows, three warp sums a sub-code.
#include "device.cuh"
#include "kernels.h"

namespace semhitok::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) subcode_kernel(NearestSubcode p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (token >= p.tokens) return;
  const int lane = threadIdx.x % kWarp;
  T poison = 0;
  for (int64_t d = lane; d < p.depth; d += kWarp) poison += read<T>(p.z, token * p.depth + d) * T(0);
  const int64_t group = p.group[token];
  const bool usable = __all_sync(kAllLanes, poison == T(0)) && group >= 0 && group < p.groups;

  T best = -infinity(T());
  int64_t id = 0;
  for (int64_t j = 0; usable && j < p.subcodes; ++j) {
    const int64_t row = (group * p.subcodes + j) * p.depth;
    T dot = 0, norm = 0, bad = 0;
    for (int64_t d = lane; d < p.depth; d += kWarp) {
      const T c = read<T>(p.sub_codebooks, row + d);
      dot += read<T>(p.z, token * p.depth + d) * c;
      norm += c * c;
      bad += c * T(0);
    }
    const T bias = p.metric == Metric::kL2 ? T(-0.5) * warp_sum(norm) : T(0);
    const T score = warp_sum(dot) + bias + warp_sum(bad);
    if (score > best) best = score, id = j;
  }
  if (lane == 0) {
    static_cast<T*>(p.scores)[token] = best > -infinity(T()) ? best : nan_of(T());
    p.ids[token] = id;
  }
}

}  // namespace

int64_t nearest_subcode_scratch(const NearestSubcode&) { return 0; }

cudaError_t nearest_subcode(const NearestSubcode& p, void*, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  const auto kernel = p.wide ? subcode_kernel<double> : subcode_kernel<float>;
  return launch(kernel, warp_blocks(p.tokens), kWarpsPerBlock * kWarp, 0, stream, p);
}

}  // namespace semhitok::cuda
