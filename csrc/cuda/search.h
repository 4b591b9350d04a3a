// The searches behind nearest_code: for each the scratch it needs and its launches on a stream.
#pragma once

#include "kernels.h"

namespace semhitok::cuda {

int64_t simt_search_scratch(const NearestCode& problem);  // bytes
cudaError_t simt_search(const NearestCode& problem, void* scratch, cudaStream_t stream);

}  // namespace semhitok::cuda
