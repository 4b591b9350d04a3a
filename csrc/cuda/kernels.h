// The CUDA backend: for each op the scratch it needs and its launches on a stream. No kernel waits for the device, and
// none includes a header of PyTorch: dispatch.h provides the pointers, the scratch, the stream and the device.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "../problem.h"

namespace semhitok::cuda {

// What the choice of kernels and their grids depend on. An op asks for it once and hands it down.
struct Device {
  int major, minor, multiprocessors;
  int shared_bytes;  // the most a block may ask for
};
cudaError_t get_device(int index, Device* device);

int64_t nearest_code_scratch(const NearestCode& problem, const Device& device);  // bytes
cudaError_t nearest_code(const NearestCode& problem, const Device& device, void* scratch, cudaStream_t stream);

int64_t nearest_subcode_scratch(const NearestSubcode& problem, const Device& device);
cudaError_t nearest_subcode(const NearestSubcode& problem, const Device& device, void* scratch, cudaStream_t stream);

int64_t hier_quantize_scratch(const HierQuantize& problem, const Device& device);
cudaError_t hier_quantize(const HierQuantize& problem, const Device& device, void* scratch, cudaStream_t stream);

int64_t hier_lookup_scratch(const HierLookup& problem, const Device& device);
cudaError_t hier_lookup(const HierLookup& problem, const Device& device, void* scratch, cudaStream_t stream);

int64_t segment_sum_scratch(const SegmentSum& problem, const Device& device);
cudaError_t segment_sum(const SegmentSum& problem, const Device& device, void* scratch, cudaStream_t stream);

// ---- the pixel stage: the best sub-code of each token's sub-codebook, and what hier_quantize writes for it ----

struct PixelStage {
  NearestSubcode search;  // scores and ids are written where they are not null
  int64_t* codes;         // null: the search alone; otherwise the group's first row + id, with the rows of lookup
  HierLookup lookup;
};
int64_t pixel_stage_scratch(const PixelStage& stage);  // bytes
cudaError_t pixel_stage(const PixelStage& stage, void* scratch, cudaStream_t stream);

// ---- the searches behind nearest_code ----

// What only tests and benchmarks set. bound_scale: below 1 the certificate is no longer sound, which tests show with
// it. rescored [tokens] or null: how many codes of a token were scored exactly, -1 for a token without a certificate;
// only the certified search writes it.
struct SearchOptions {
  double bound_scale = 1.0;
  int64_t* rescored = nullptr;
};

using SearchScratch = int64_t(const NearestCode& problem, const Device& device);  // bytes
using SearchRun = cudaError_t(const NearestCode& problem, const Device& device, const SearchOptions& options,
                              void* scratch, cudaStream_t stream);

struct Search {
  const char* name;
  bool packs;  // the codebook first: not worth it for little work
  bool (*can_run)(const NearestCode& problem, const Device& device);
  SearchScratch* scratch;
  SearchRun* run;
};

const std::vector<Search>& searches();  // simplest first; search.h says what they are
const Search& chosen_search(const NearestCode& problem, const Device& device);
// search.run, where there is a token.
cudaError_t run(const Search& search, const NearestCode& problem, const Device& device, const SearchOptions& options,
                void* scratch, cudaStream_t stream);

}  // namespace semhitok::cuda
