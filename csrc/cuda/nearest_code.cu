// Nearest code: the table of searches, and which of them runs.
#include "search.h"

namespace semhitok::cuda {
namespace {

constexpr int kOldestMma = 8;  // compute capability of the first mma.sync used here
constexpr int kHopper = 9;
constexpr int64_t kLittleWork = int64_t{1} << 30;  // multiply-adds that take less time than packing a codebook

bool runs_anywhere(const NearestCode&, const Device&) { return true; }

bool has_mma(const NearestCode& p, const Device& device) {
  return !p.wide && p.depth <= kMaxTensorDepth && device.major >= kOldestMma;
}

bool has_mma_stages(const NearestCode& p, const Device& device) {
  return has_mma(p, device) && device.shared_bytes >= mma_shared_bytes(p);
}

bool has_wgmma(const NearestCode& p, const Device& device) {
  const bool hopper = device.major == kHopper && device.minor == 0;  // code for 9.0a runs nowhere else
  return SEMHITOK_HAVE_SM90A && hopper && has_mma(p, device);
}

}  // namespace

const std::vector<Search>& searches() {
  static const std::vector<Search> table = {
      {"simt", false, runs_anywhere, simt_search_scratch, simt_search},
      {"few", false, has_mma, few_search_scratch, few_search},
      {"mma", true, has_mma_stages, mma_search_scratch, mma_search},
      {"wgmma", true, has_wgmma, wgmma_search_scratch, wgmma_search},
      {"certified", true, has_wgmma, certified_search_scratch, certified_search},
  };
  return table;
}

const Search& chosen_search(const NearestCode& p, const Device& device) {
  const bool little = p.tokens * p.num_codes * p.depth < kLittleWork;
  const auto fits = [&](const Search& search) { return !(little && search.packs) && search.can_run(p, device); };
  return *std::find_if(searches().rbegin(), searches().rend(), fits);  // the first in the table fits always
}

cudaError_t run(const Search& search, const NearestCode& p, const Device& device, const SearchOptions& options,
                void* scratch, cudaStream_t stream) {
  return p.tokens == 0 ? cudaSuccess : search.run(p, device, options, scratch, stream);
}

int64_t nearest_code_scratch(const NearestCode& p, const Device& device) {
  return chosen_search(p, device).scratch(p, device);
}

cudaError_t nearest_code(const NearestCode& p, const Device& device, void* scratch, cudaStream_t stream) {
  return run(chosen_search(p, device), p, device, {}, scratch, stream);
}

cudaError_t get_device(int index, Device* device) {
  const auto get = [&](int* value, cudaDeviceAttr name) { return cudaDeviceGetAttribute(value, name, index); };
  cudaError_t error = get(&device->major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess) error = get(&device->minor, cudaDevAttrComputeCapabilityMinor);
  if (error == cudaSuccess) error = get(&device->multiprocessors, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) error = get(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return error;
}

}  // namespace semhitok::cuda
