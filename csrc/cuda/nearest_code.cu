// Nearest code: which of the searches runs.
#include "search.h"

namespace semhitok::cuda {

int64_t nearest_code_scratch(const NearestCode& problem) { return simt_search_scratch(problem); }

cudaError_t nearest_code(const NearestCode& problem, void* scratch, cudaStream_t stream) {
  return simt_search(problem, scratch, stream);
}

}  // namespace semhitok::cuda
