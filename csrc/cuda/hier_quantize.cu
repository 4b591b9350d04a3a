// Hierarchical quantisation: the semantic search, the pixel search in the winners' sub-codebooks, flat codes, rows.
//
// codes = i * subcodes + j, i the nearest semantic code of z_sem, j the nearest sub-code of z_pix in sub-codebook i;
// q_sem and q_pix are copies of the two rows. Four launches in a row on one stream; scratch is 24 bytes a token and
// that of nearest_code, nothing of size tokens x codes.
#include "device.cuh"
#include "kernels.h"

namespace semhitok::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) flatten_kernel(HierQuantize p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token < p.sem.tokens) p.codes[token] = p.sem.ids[token] * p.pix.subcodes + p.pix.ids[token];
}

// The two searches with their outputs in scratch; returns the bytes used before nearest_code's own scratch.
int64_t cut(const HierQuantize& p, void* base, NearestCode* sem, NearestSubcode* pix) {
  Pieces pieces(base);
  *sem = p.sem;
  *pix = p.pix;
  sem->ids = pieces.take<int64_t>(p.sem.tokens);
  pix->ids = pieces.take<int64_t>(p.sem.tokens);
  sem->scores = pix->scores = pieces.take<double>(p.sem.tokens);  // nobody reads them
  pix->group = sem->ids;
  return pieces.used();
}

}  // namespace

int64_t hier_quantize_scratch(const HierQuantize& p) {
  NearestCode sem;
  NearestSubcode pix;
  return cut(p, nullptr, &sem, &pix) + nearest_code_scratch(p.sem);
}

cudaError_t hier_quantize(const HierQuantize& problem, void* scratch, cudaStream_t stream) {
  if (problem.sem.tokens == 0) return cudaSuccess;
  HierQuantize p = problem;
  const int64_t used = cut(problem, scratch, &p.sem, &p.pix);
  cudaError_t error = nearest_code(p.sem, static_cast<char*>(scratch) + used, stream);
  if (error == cudaSuccess) error = nearest_subcode(p.pix, nullptr, stream);
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(ceil_div(p.sem.tokens, kThreads));
  error = launch(flatten_kernel, blocks, kThreads, 0, stream, p);
  return error == cudaSuccess ? hier_lookup(p.lookup, nullptr, stream) : error;
}

}  // namespace semhitok::cuda
