// What follows the semantic search: the best sub-code of each token's sub-codebook, and the outputs for it.
#pragma once

#include "kernels.h"

namespace semhitok::cuda {

struct PixelStage {
  NearestSubcode search;  // scores and ids are written where they are not null
  int64_t* codes;         // null: the search alone; otherwise the group's first row + id, with the rows of lookup
  HierLookup lookup;
};

int64_t pixel_stage_scratch(const PixelStage& stage);  // bytes
cudaError_t pixel_stage(const PixelStage& stage, void* scratch, cudaStream_t stream);

}  // namespace semhitok::cuda
