// Code rows by flat id: copies of bytes, whatever the dtype. An id outside [0, total) gives rows of NaN in the
// codebook's dtype.
//
// Plan. A power of two of lanes a token, as many as its longer row has pieces of 16 bytes: at 32 fp32 values 4 tokens a
// warp, each lane one piece of either row. Rows that are not whole pieces are copied value by value.
// If sub-codebooks have their own sizes, a binary search finds the semantic code: log2(groups) dependent reads of
// offsets, the same for all lanes of a token, from L1 or L2.
// Cost: the rows read and written once: at 65,536 tokens and 2 x 32 fp32 values 17 MB each, 8 us on an H200.
#include <algorithm>

#include "device.cuh"
#include "kernels.h"
#include "rows.cuh"

namespace semhitok::cuda {
namespace {

template <typename Bits>
__device__ __forceinline__ void fill_row(void* out, int64_t token, int64_t depth, Bits value, int lane, int lanes) {
  Bits* row = static_cast<Bits*>(out) + token * depth;
  for (int64_t d = lane; d < depth; d += lanes) row[d] = value;
}

__device__ __forceinline__ void fill_nan(Dtype dtype, void* out, int64_t token, int64_t depth, int lane, int lanes) {
  switch (dtype) {
    case Dtype::kFloat32: return fill_row<uint32_t>(out, token, depth, 0x7FC00000u, lane, lanes);
    case Dtype::kFloat16: return fill_row<uint16_t>(out, token, depth, 0x7E00u, lane, lanes);
    case Dtype::kBFloat16: return fill_row<uint16_t>(out, token, depth, 0x7FC0u, lane, lanes);
    case Dtype::kFloat64: return fill_row<uint64_t>(out, token, depth, 0x7FF8000000000000ull, lane, lanes);
  }
}

// group_of_row, without the many instructions of a division in 64 bits if 32 are enough.
__device__ __forceinline__ int64_t group_of(const SubCodebooks& s, int64_t code) {
  if (s.offsets == nullptr && ((code | s.subcodes) >> 32) == 0) {
    return static_cast<uint32_t>(code) / static_cast<uint32_t>(s.subcodes);
  }
  return group_of_row(s, code);
}

__global__ void __launch_bounds__(kThreads) lookup_kernel(HierLookup p, int lanes, CodePieces pieces) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  if (token >= p.tokens) return;
  const int lane = threadIdx.x % lanes;
  const int64_t code = p.codes[token];
  if (code >= 0 && code < p.pix.total) {
    copy_code(p, pieces, group_of(p.pix, code), code, token, lane, lanes);
  } else {
    fill_nan(p.sem.dtype, p.q_sem, token, p.sem_depth, lane, lanes);
    fill_nan(p.pix.rows.dtype, p.q_pix, token, p.pix.depth, lane, lanes);
  }
}

}  // namespace

int64_t hier_lookup_scratch(const HierLookup&, const Device&) { return 0; }

cudaError_t hier_lookup(const HierLookup& p, const Device&, void*, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  const CodePieces pieces = code_pieces(p);
  const int lanes = pieces.sem == 0 ? kWarp : lanes_for(std::max(pieces.sem, pieces.pix));
  const auto blocks = static_cast<unsigned>(ceil_div(p.tokens * lanes, kThreads));
  return launch(lookup_kernel, blocks, kThreads, 0, stream, p, lanes, pieces);
}

}  // namespace semhitok::cuda
