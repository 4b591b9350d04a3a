// The CUDA backend: for each op the scratch it needs and a launch on a stream. No kernel waits for the device, and none
// includes a header of PyTorch: ops.cpp brings the pointers, the scratch, the stream and the current device.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace semhitok::cuda {

int64_t nearest_code_scratch(const NearestCode& problem);  // bytes
cudaError_t nearest_code(const NearestCode& problem, void* scratch, cudaStream_t stream);

int64_t nearest_subcode_scratch(const NearestSubcode& problem);
cudaError_t nearest_subcode(const NearestSubcode& problem, void* scratch, cudaStream_t stream);

int64_t hier_quantize_scratch(const HierQuantize& problem);
cudaError_t hier_quantize(const HierQuantize& problem, void* scratch, cudaStream_t stream);

int64_t hier_lookup_scratch(const HierLookup& problem);
cudaError_t hier_lookup(const HierLookup& problem, void* scratch, cudaStream_t stream);

int64_t segment_sum_scratch(const SegmentSum& problem);
cudaError_t segment_sum(const SegmentSum& problem, void* scratch, cudaStream_t stream);

}  // namespace semhitok::cuda
