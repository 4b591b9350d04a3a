// The ops of csrc/cuda/kernels.h for ctypes, on the emulator. Scratch is exactly as large as the op asks for, holds NaN
// at first, and is watched on both sides.
#include <cstdlib>
#include <cstring>
#include <string>

#include "emulated_ptx.h"
#include "kernels.h"

namespace {

using namespace semhitok;

constexpr size_t kGuard = 4096;
constexpr int kGuardByte = 0xC5;
constexpr size_t kAlignment = 512;  // as PyTorch allocates
std::string complaint;

class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    const size_t all = (2 * kGuard + bytes_ + kAlignment - 1) / kAlignment * kAlignment;
    memory_ = static_cast<unsigned char*>(std::aligned_alloc(kAlignment, all));
    std::memset(memory_, kGuardByte, 2 * kGuard + bytes_);
    std::memset(memory_ + kGuard, 0xFF, bytes_);
  }
  ~Scratch() { std::free(memory_); }
  void* data() const { return bytes_ == 0 ? nullptr : memory_ + kGuard; }
  bool intact() const {
    for (size_t i = 0; i < kGuard; ++i) {
      if (memory_[i] != kGuardByte || memory_[kGuard + bytes_ + i] != kGuardByte) return false;
    }
    return true;
  }

 private:
  size_t bytes_;
  unsigned char* memory_;
};

cuda::Device device() {
  cuda::Device device{};
  (void)cuda::get_device(0, &device);
  return device;
}

// scratch_bytes(device), then op(device, scratch), like run_cuda of dispatch.h: one query of the device.
template <typename ScratchBytes, typename Op>
int run(const ScratchBytes& scratch_bytes, const Op& op) {
  complaint.clear();
  const cuda::Device on = device();
  const Scratch scratch(scratch_bytes(on));
  const cudaError_t error = op(on, scratch.data());
  if (error != cudaSuccess) {
    complaint = emulator::message();
  } else if (!scratch.intact()) {
    complaint = "written outside of the scratch";
    return cudaErrorIllegalAddress;
  }
  return error;
}

#define RUN(op, problem)                                                       \
  run([&](const cuda::Device& on) { return cuda::op##_scratch(problem, on); }, \
      [&](const cuda::Device& on, void* scratch) { return cuda::op(problem, on, scratch, nullptr); })

Rows rows(const void* data, int dtype) { return {data, static_cast<Dtype>(dtype)}; }

// The sizes of sub-codebooks, as ops.cpp sets them: with offsets [groups + 1] total rows, else groups * subcodes.
SubCodebooks sub_codebooks(const void* data, int dtype, int64_t groups, int64_t subcodes, int64_t total, int64_t depth,
                           const int64_t* offsets) {
  if (offsets == nullptr) {
    total = groups * subcodes;
  } else {
    subcodes = (total + groups - 1) / groups;
  }
  return {groups, subcodes, total, depth, offsets, rows(data, dtype)};
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void set_seed(uint64_t seed) { emulator::set_seed(seed); }
EXPORTED void set_device(int major, int minor, int multiprocessors) {
  emulator::set_device(major, minor, multiprocessors);
}
EXPORTED void set_sum(int sum) { emulator::set_sum(static_cast<emulator::Sum>(sum)); }
EXPORTED const char* message() { return complaint.c_str(); }
EXPORTED uint64_t launches() { return emulator::launches(); }
EXPORTED uint64_t device_queries() { return emulator::device_queries(); }

static NearestCode code_problem(int64_t tokens, int64_t num_codes, int64_t depth, int metric, int wide, const void* z,
                                int z_dtype, const void* codebook, int codebook_dtype, void* scores, int64_t* ids) {
  NearestCode problem{};
  problem.tokens = tokens, problem.num_codes = num_codes, problem.depth = depth;
  problem.metric = static_cast<Metric>(metric), problem.wide = wide != 0;
  problem.z = rows(z, z_dtype), problem.codebook = rows(codebook, codebook_dtype);
  problem.scores = scores, problem.ids = ids;
  return problem;
}

EXPORTED int nearest_code(int64_t tokens, int64_t num_codes, int64_t depth, int metric, int wide, const void* z,
                          int z_dtype, const void* codebook, int codebook_dtype, void* scores, int64_t* ids) {
  const NearestCode problem =
      code_problem(tokens, num_codes, depth, metric, wide, z, z_dtype, codebook, codebook_dtype, scores, ids);
  return RUN(nearest_code, problem);
}

// The name of search number `index`; null after the last.
EXPORTED const char* search_name(int64_t index) {
  const auto& all = cuda::searches();
  return index < static_cast<int64_t>(all.size()) ? all[index].name : nullptr;
}

// By search number `index`; an error if it cannot run.
EXPORTED int nearest_code_probe(int64_t tokens, int64_t num_codes, int64_t depth, int metric, const void* z,
                                int z_dtype, const void* codebook, int codebook_dtype, int64_t index,
                                const double* bound_scale, void* scores, int64_t* ids, int64_t* rescored) {
  const NearestCode problem =
      code_problem(tokens, num_codes, depth, metric, 0, z, z_dtype, codebook, codebook_dtype, scores, ids);
  const cuda::Search& search = cuda::searches()[index];
  if (!search.can_run(problem, device())) {
    complaint = "this search cannot run here";
    return cudaErrorNotSupported;
  }
  return run([&](const cuda::Device& on) { return search.scratch(problem, on); },
             [&](const cuda::Device& on, void* scratch) {
               return cuda::run(search, problem, on, {*bound_scale, rescored}, scratch, nullptr);
             });
}

EXPORTED const char* chosen_search(int64_t tokens, int64_t num_codes, int64_t depth, int64_t wide) {
  NearestCode problem{};
  problem.tokens = tokens, problem.num_codes = num_codes, problem.depth = depth, problem.wide = wide != 0;
  return cuda::chosen_search(problem, device()).name;
}

// Bytes beyond inputs and outputs, fp32.
EXPORTED int64_t hier_quantize_scratch(int64_t tokens, int64_t groups, int64_t subcodes, int64_t sem_depth,
                                       int64_t pix_depth) {
  HierQuantize problem{};
  problem.sem.tokens = problem.pix.tokens = problem.lookup.tokens = tokens;
  problem.sem.num_codes = groups;
  problem.sem.depth = problem.lookup.sem_depth = sem_depth;
  problem.pix.sub = problem.lookup.pix = sub_codebooks(nullptr, 0, groups, subcodes, 0, pix_depth, nullptr);
  return cuda::hier_quantize_scratch(problem, device());
}

EXPORTED int nearest_subcode(int64_t tokens, int64_t groups, int64_t subcodes, int64_t depth, int metric, int wide,
                             const void* z, int z_dtype, const void* sub, int sub_dtype, const int64_t* group,
                             void* scores, int64_t* ids, int64_t total, const int64_t* offsets) {
  NearestSubcode problem{};
  problem.sub = sub_codebooks(sub, sub_dtype, groups, subcodes, total, depth, offsets);
  problem.tokens = tokens, problem.metric = static_cast<Metric>(metric), problem.wide = wide != 0;
  problem.z = rows(z, z_dtype);
  problem.group = group, problem.scores = scores, problem.ids = ids;
  return RUN(nearest_subcode, problem);
}

static HierLookup lookup_problem(int64_t tokens, int64_t groups, int64_t subcodes, const void* sem, int sem_dtype,
                                 int64_t sem_depth, const void* pix, int pix_dtype, int64_t pix_depth,
                                 const int64_t* codes, void* q_sem, void* q_pix, int64_t total,
                                 const int64_t* offsets) {
  HierLookup problem{};
  problem.tokens = tokens, problem.codes = codes;
  problem.sem = rows(sem, sem_dtype), problem.sem_depth = sem_depth;
  problem.pix = sub_codebooks(pix, pix_dtype, groups, subcodes, total, pix_depth, offsets);
  problem.q_sem = q_sem, problem.q_pix = q_pix;
  return problem;
}

EXPORTED int hier_lookup(int64_t tokens, int64_t groups, int64_t subcodes, const void* sem, int sem_dtype,
                         int64_t sem_depth, const void* pix, int pix_dtype, int64_t pix_depth, const int64_t* codes,
                         void* q_sem, void* q_pix, int64_t total, const int64_t* offsets) {
  const HierLookup problem = lookup_problem(tokens, groups, subcodes, sem, sem_dtype, sem_depth, pix, pix_dtype,
                                            pix_depth, codes, q_sem, q_pix, total, offsets);
  return RUN(hier_lookup, problem);
}

EXPORTED int hier_quantize(int64_t tokens, int64_t groups, int64_t subcodes, int sem_metric, int pix_metric, int wide,
                           const void* z_sem, int z_sem_dtype, const void* z_pix, int z_pix_dtype, const void* sem,
                           int sem_dtype, int64_t sem_depth, const void* pix, int pix_dtype, int64_t pix_depth,
                           int64_t* codes, void* q_sem, void* q_pix, int64_t total, const int64_t* offsets) {
  HierQuantize problem{};
  problem.sem =
      code_problem(tokens, groups, sem_depth, sem_metric, wide, z_sem, z_sem_dtype, sem, sem_dtype, nullptr, nullptr);
  problem.lookup = lookup_problem(tokens, groups, subcodes, sem, sem_dtype, sem_depth, pix, pix_dtype, pix_depth, codes,
                                  q_sem, q_pix, total, offsets);
  problem.pix.tokens = tokens, problem.pix.sub = problem.lookup.pix;
  problem.pix.metric = static_cast<Metric>(pix_metric), problem.pix.wide = wide != 0;
  problem.pix.z = rows(z_pix, z_pix_dtype);
  problem.codes = codes;
  return RUN(hier_quantize, problem);
}

EXPORTED int segment_sum(int64_t count, int64_t depth, int64_t segments, const void* values, int values_dtype,
                         const int64_t* ids, void* sums, int64_t* counts) {
  const SegmentSum problem{count, depth, segments, rows(values, values_dtype), ids, sums, counts};
  return RUN(segment_sum, problem);
}
