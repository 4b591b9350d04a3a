// What follows the semantic search: the best sub-code of each token's sub-codebook, and what is written for it.
#pragma once

#include "kernels.h"

namespace semhitok::cuda {

struct PixelStage {
  NearestSubcode search;  // scores and ids are written where they are not null
  int64_t* codes;         // null: the search alone; else the group's first row + id, and the rows of lookup
  HierLookup lookup;
};

int64_t pixel_stage_scratch(const PixelStage& stage);  // bytes
cudaError_t pixel_stage(const PixelStage& stage, void* scratch, cudaStream_t stream);

}  // namespace semhitok::cuda
