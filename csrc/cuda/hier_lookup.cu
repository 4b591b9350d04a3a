// Code rows by flat id: copies of elements, whatever the dtype. An id outside [0, groups * subcodes) gives rows of NaN
// in the codebook's dtype. A warp a token, lanes along the rows. Cost: the rows read and written once.
#include "device.cuh"
#include "kernels.h"

namespace semhitok::cuda {
namespace {

template <typename Bits>
__device__ __forceinline__ void copy_row(const void* table, int64_t row, bool valid, int64_t depth, Bits nan, void* out,
                                         int64_t token, int lane) {
  const Bits* from = static_cast<const Bits*>(table) + row * depth;
  Bits* to = static_cast<Bits*>(out) + token * depth;
  for (int64_t d = lane; d < depth; d += kWarp) to[d] = valid ? from[d] : nan;
}

__device__ __forceinline__ void copy(Dtype dtype, const void* table, int64_t row, bool valid, int64_t depth, void* out,
                                     int64_t token, int lane) {
  switch (dtype) {
    case Dtype::kFloat32: return copy_row<uint32_t>(table, row, valid, depth, 0x7FC00000u, out, token, lane);
    case Dtype::kFloat16: return copy_row<uint16_t>(table, row, valid, depth, 0x7E00u, out, token, lane);
    case Dtype::kBFloat16: return copy_row<uint16_t>(table, row, valid, depth, 0x7FC0u, out, token, lane);
    case Dtype::kFloat64: return copy_row<uint64_t>(table, row, valid, depth, 0x7FF8000000000000ull, out, token, lane);
  }
}

__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) lookup_kernel(HierLookup p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (token >= p.tokens) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t code = p.codes[token];
  const bool valid = code >= 0 && code < p.groups * p.subcodes;
  copy(p.sem_dtype, p.sem_codebook, valid ? code / p.subcodes : 0, valid, p.sem_depth, p.q_sem, token, lane);
  copy(p.pix_dtype, p.pix_codebook, valid ? code : 0, valid, p.pix_depth, p.q_pix, token, lane);
}

}  // namespace

int64_t hier_lookup_scratch(const HierLookup&) { return 0; }

cudaError_t hier_lookup(const HierLookup& p, void*, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  return launch(lookup_kernel, warp_blocks(p.tokens), kWarpsPerBlock * kWarp, 0, stream, p);
}

}  // namespace semhitok::cuda
