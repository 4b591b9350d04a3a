// PyTorch's thread pool for the CPU backend. The only file here that includes PyTorch's headers.
#include <torch/csrc/stable/ops.h>

#include "backend.h"

namespace semhitok::cpu {

void parallel_range(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, function, context));
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace semhitok::cpu
