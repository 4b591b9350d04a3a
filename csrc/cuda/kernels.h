// The CUDA backend: for each op the scratch it needs and a launch on a stream. No kernel waits for the device, and none
// includes a header of PyTorch: ops.cpp brings the pointers, the scratch, the stream and the current device.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace semhitok::cuda {

int64_t nearest_code_scratch(const NearestCode& problem);  // bytes
cudaError_t nearest_code(const NearestCode& problem, void* scratch, cudaStream_t stream);

// search.h says what they are.
enum class Search : int32_t { kSimt, kFew, kMma, kWgmma, kCertified };
constexpr const char* kSearchNames[] = {"simt", "few", "mma", "wgmma", "certified"};

Search chosen_search(const NearestCode& problem);  // nearest_code's on the current device
bool search_can_run(Search search, const NearestCode& problem);

// nearest_code by a named search. bound_scale: below 1 the certificate is no longer sound, which is what tests show with
// it. rescored [tokens] or null: how many codes of a token were scored exactly, -1 where it went without a certificate;
// only the certified search writes it.
struct NearestCodeProbe {
  NearestCode problem;
  Search search;
  double bound_scale;
  int64_t* rescored;
};
int64_t nearest_code_probe_scratch(const NearestCodeProbe& probe);
cudaError_t nearest_code_probe(const NearestCodeProbe& probe, void* scratch, cudaStream_t stream);

int64_t nearest_subcode_scratch(const NearestSubcode& problem);
cudaError_t nearest_subcode(const NearestSubcode& problem, void* scratch, cudaStream_t stream);

int64_t hier_quantize_scratch(const HierQuantize& problem);
cudaError_t hier_quantize(const HierQuantize& problem, void* scratch, cudaStream_t stream);

int64_t hier_lookup_scratch(const HierLookup& problem);
cudaError_t hier_lookup(const HierLookup& problem, void* scratch, cudaStream_t stream);

int64_t segment_sum_scratch(const SegmentSum& problem);
cudaError_t segment_sum(const SegmentSum& problem, void* scratch, cudaStream_t stream);

}  // namespace semhitok::cuda
