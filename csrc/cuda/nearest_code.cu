// Nearest code: which of the searches runs.
#include "search.h"

namespace semhitok::cuda {
namespace {

constexpr int kOldestMma = 8;  // compute capability of the first mma.sync used here
constexpr int kHopper = 9;
constexpr int64_t kLittleWork = int64_t{1} << 30;  // multiply-adds that take less long than packing a codebook

bool can_run(Search search, const NearestCode& p, const Device& device) {
  if (search == Search::kSimt) return true;
  if (p.wide || p.depth > kMaxTensorDepth) return false;
  if (search == Search::kFew) return device.major >= kOldestMma;
  if (search == Search::kMma) return device.major >= kOldestMma && device.shared_bytes >= mma_shared_bytes(p);
  return SEMHITOK_HAVE_SM90A && device.major == kHopper && device.minor == 0;  // code for 9.0a runs nowhere else
}

Search choose(const NearestCode& p, const Device& device) {
  const bool little = p.tokens * p.codes * p.depth < kLittleWork;
  for (const Search search : {Search::kCertified, Search::kMma, Search::kFew}) {
    if ((!little || search == Search::kFew) && can_run(search, p, device)) return search;
  }
  return Search::kSimt;
}

}  // namespace

Device current_device() {
  Device device{};
  int index = 0;
  if (cudaGetDevice(&index) != cudaSuccess) return device;  // the launch will say why
  (void)cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index);
  (void)cudaDeviceGetAttribute(&device.minor, cudaDevAttrComputeCapabilityMinor, index);
  (void)cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  (void)cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  return device;
}

Search chosen_search(const NearestCode& problem) { return choose(problem, current_device()); }

bool search_can_run(Search search, const NearestCode& problem) { return can_run(search, problem, current_device()); }

int64_t nearest_code_probe_scratch(const NearestCodeProbe& probe) {
  const Device device = current_device();
  switch (probe.search) {
    case Search::kFew: return few_search_scratch(probe.problem, device);
    case Search::kMma: return mma_search_scratch(probe.problem, device);
    case Search::kWgmma: return wgmma_search_scratch(probe.problem, device);
    case Search::kCertified: return certified_search_scratch(probe.problem, device);
    default: return simt_search_scratch(probe.problem);
  }
}

cudaError_t nearest_code_probe(const NearestCodeProbe& probe, void* scratch, cudaStream_t stream) {
  const NearestCode& p = probe.problem;
  if (p.tokens == 0) return cudaSuccess;
  const Device device = current_device();
  switch (probe.search) {
    case Search::kFew: return few_search(p, device, scratch, stream);
    case Search::kMma: return mma_search(p, device, scratch, stream);
    case Search::kWgmma: return wgmma_search(p, device, {}, nullptr, scratch, stream);
    case Search::kCertified: return certified_search(p, device, probe.bound_scale, probe.rescored, scratch, stream);
    default: return simt_search(p, scratch, stream);
  }
}

int64_t nearest_code_scratch(const NearestCode& problem) {
  return nearest_code_probe_scratch({problem, chosen_search(problem), 1.0, nullptr});
}

cudaError_t nearest_code(const NearestCode& problem, void* scratch, cudaStream_t stream) {
  return nearest_code_probe({problem, chosen_search(problem), 1.0, nullptr}, scratch, stream);
}

}  // namespace semhitok::cuda
