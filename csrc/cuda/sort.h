// Rows ordered by id: a stable radix sort of (id, row) pairs over no more bits than the ids have.
//
// keys[i] ascend from 0 to `segments`, the last for the rows whose id is outside [0, segments); rows of one key ascend.
// Cost: 16 bytes of scratch a row and what cub asks for; one launch for the pairs and those of cub: one for a few
// thousand rows, otherwise three and one more for every 8 bits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace semhitok::cuda {

struct SortedRows {
  const int32_t *keys, *rows;  // [count]
};

int64_t sort_rows_scratch(int64_t count, int64_t segments);  // bytes; sort_rows returns the error, if there is one

// zeroed: memory that the same launch sets to zero, in whole elements of 4 bytes each; or null.
struct Zeroed {
  void* data;
  int64_t words;
};
cudaError_t sort_rows(const int64_t* ids, int64_t count, int64_t segments, Zeroed first, Zeroed second, void* scratch,
                      SortedRows* sorted, cudaStream_t stream);

}  // namespace semhitok::cuda
