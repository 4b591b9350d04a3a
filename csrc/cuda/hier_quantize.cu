// Hierarchical quantisation: the semantic search, then one launch for everything that depends on its winners.
//
// Plan. nearest_code, then on the same stream the pixel stage (nearest_subcode.cu), which reads the ids and writes
// codes and rows. The host does not wait for the device in between. Scratch: 8 bytes a token for the ids, 4 (in fp32)
// for scores that are not used, and that of the larger stage, as the two do not run at the same time. Nothing of size
// tokens x codes.
#include <algorithm>

#include "device.cuh"
#include "kernels.h"

namespace semhitok::cuda {
namespace {

struct Stages {
  NearestCode sem;
  PixelStage pix;
  char* scratch;  // shared by the two
  int64_t bytes;
};

Stages cut(const HierQuantize& p, const Device& device, void* base) {
  Arena arena(base);
  Stages s{p.sem, {p.pix, p.codes, p.lookup}, nullptr, 0};
  s.sem.ids = arena.take<int64_t>(p.sem.tokens);
  s.sem.scores = p.sem.wide ? static_cast<void*>(arena.take<double>(p.sem.tokens)) : arena.take<float>(p.sem.tokens);
  s.pix.search.group = s.sem.ids;
  s.pix.search.scores = nullptr;
  s.pix.search.ids = nullptr;
  s.scratch = arena.take<char>(std::max(nearest_code_scratch(s.sem, device), pixel_stage_scratch(s.pix)));
  s.bytes = arena.used();
  return s;
}

}  // namespace

int64_t hier_quantize_scratch(const HierQuantize& p, const Device& device) { return cut(p, device, nullptr).bytes; }

cudaError_t hier_quantize(const HierQuantize& p, const Device& device, void* scratch, cudaStream_t stream) {
  if (p.sem.tokens == 0) return cudaSuccess;
  const Stages s = cut(p, device, scratch);
  const cudaError_t error = nearest_code(s.sem, device, s.scratch, stream);
  return error == cudaSuccess ? pixel_stage(s.pix, s.scratch, stream) : error;
}

}  // namespace semhitok::cuda
