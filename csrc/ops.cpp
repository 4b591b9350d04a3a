// The ops: schemas, argument checks, and the contract, the same on every backend.
//
// nearest_code(z[..., D], codebook[K, D], metric) -> (scores[...], ids[...] in [0, K))
// nearest_subcode(z[..., D], sub_codebooks[K, m, D], group[...], metric) -> (scores[...], ids[...] in [0, m))
// hier_quantize(z_sem[..., Ds], z_pix[..., Dp], sem_codebook[K, Ds], pix_codebook[K, m, Dp], metrics)
//     -> (q_sem[..., Ds], q_pix[..., Dp], codes[...]): i = nearest_code(z_sem), j = nearest_subcode(z_pix, group = i),
//     codes = i * m + j, q_sem = sem_codebook[i], q_pix = pix_codebook[i, j]
// hier_lookup(codes[...], sem_codebook[K, Ds], pix_codebook[K, m, Dp]) -> (q_sem[..., Ds], q_pix[..., Dp])
// The last three take sub-codebooks of different sizes m_i as one table [T, Dp] with offsets[K + 1]: sub-codebook i is
// its rows offsets[i] .. offsets[i + 1] - 1, and codes = offsets[i] + j. offsets is int64, from 0 to T, and m_i >= 1.
// segment_sum(values[N, D], ids[N], S) -> (sums[S, D], counts[S])
//
// - Score: z.c ("ip") or z.c - |c|^2/2 ("l2": the same winner as the least distance). The lowest index wins among equal
//   scores. A NaN score never wins; a code with NaN or Inf never wins.
// - On the CPU, with inputs of at most float32, nearest_code's ids are those of fp64 arithmetic; its scores, and those
//   of sub-codes before they are compared, are fp64 sums rounded to fp32 once. Both are the same on every instruction
//   set. On CUDA scores are as exact as fp32 sums, some of them fp64 sums, and so are the comparisons: ids are those of
//   fp64 wherever its scores differ by more than fp32 rounding.
// - A token with NaN or Inf, or without any score above -inf: id 0 and score NaN. Ids are always in range.
// - dtypes: float32, float16, bfloat16, float64, each tensor its own. Scores and search in fp32, or in fp64 as soon as
//   one floating-point input is float64. q_sem and q_pix have their codebook's dtype and are exact copies of its rows.
//   sums are float32 (float64 for float64 values), summed in fp64 and rounded once: on the CPU in row order, on CUDA in a
//   fixed order of chunks of the rows sorted by id. Ids, groups, codes and counts are int64.
// - Shapes: any leading dimensions, none included; N = 0 gives empty outputs; K, m, D >= 1. Any strides. One device.
// - Ids out of range cannot raise without a device synchronisation, so they have an outcome: nearest_subcode: id 0,
//   score NaN; hier_lookup: rows of NaN; segment_sum: the row is left out.
// - Offsets that do not ascend from 0 to T raise on the CPU. On CUDA that would take a device synchronisation, too: the
//   ids are meaningless then, but in range, and nothing outside the table is read. A sub-codebook left without a row:
//   id 0, score NaN.
// - Everything else that is wrong raises std::runtime_error (RuntimeError in Python), naming the argument, what was
//   expected and what came.
// - Same input, same bits: on every run, with any number of threads.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "build_config.h"
#include "cpu/backend.h"
#include "problem.h"

#if SEMHITOK_WITH_CUDA
#include <cuda_runtime_api.h>

#include "cuda/kernels.h"
// Lives in the CUDA half of PyTorch: weak, so that this module also loads beside a CPU-only one.
#pragma weak aoti_torch_get_current_cuda_stream
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace semhitok {

namespace cpu {

void parallel_range(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, function, context));
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace cpu

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return torch::headeronly::toString(type);
  }
}

std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

Dtype float_dtype(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Double: return Dtype::kFloat64;
    default:
      check(false, name, ": expected float32, float16, bfloat16 or float64, got ", name_of(t.scalar_type()));
      return Dtype::kFloat32;
  }
}

Metric parse_metric(const char* name, const std::string& metric) {
  check(metric == "ip" || metric == "l2", name, ": expected \"ip\" or \"l2\", got \"", metric, "\"");
  return metric == "ip" ? Metric::kInnerProduct : Metric::kL2;
}

std::string shape_of(const Sizes& sizes) {
  std::ostringstream out;
  out << "[";
  for (size_t d = 0; d < sizes.size(); ++d) out << (d ? ", " : "") << sizes[d];
  out << "]";
  return out.str();
}

Sizes sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

void check_dims(const char* name, const Tensor& t, int64_t dims, const char* layout) {
  check(t.dim() == dims, name, ": expected ", dims, " dimensions ", layout, ", got ", t.dim());
  for (int64_t d = 0; d < dims; ++d) {
    check(t.size(d) >= 1, name, ": expected every dimension of ", layout, " to be at least 1, got ",
          shape_of(sizes_of(t)));
  }
}

// The kernels count codes, rows and segments in 32 bits.
void check_count(const char* name, const char* what, int64_t count) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 1;
  check(count <= kMost, name, ": expected at most ", kMost, " ", what, ", got ", count);
}

// z[..., depth]: returns its leading sizes.
Sizes check_tokens(const char* name, const Tensor& z, const char* codebook_name, const Tensor& codebook) {
  const int64_t depth = codebook.size(codebook.dim() - 1);
  check(z.dim() >= 1, name, ": expected at least 1 dimension [..., D], got a scalar");
  check(z.size(z.dim() - 1) == depth, name, ": expected last dimension ", depth, " (", codebook_name,
        ".shape[-1]), got ", z.size(z.dim() - 1));
  Sizes leading = sizes_of(z);
  leading.pop_back();
  return leading;
}

void check_leading(const char* name, const Sizes& got, const char* other, const Sizes& expected) {
  check(got == expected, name, ": expected leading dimensions ", shape_of(expected), " (those of ", other, "), got ",
        shape_of(got));
}

void check_ids(const char* name, const Tensor& ids) {
  check(ids.scalar_type() == ScalarType::Long, name, ": expected int64, got ", name_of(ids.scalar_type()));
}

void check_device(const char* name, const Tensor& t, const char* other, const Tensor& first) {
  check(device_of(t) == device_of(first), name, ": expected device ", device_of(first), " (that of ", other, "), got ",
        device_of(t));
}

int64_t count_of(const Sizes& leading) {
  int64_t count = 1;
  for (const int64_t size : leading) count *= size;
  return count;
}

Sizes with_last(Sizes leading, int64_t last) {
  leading.push_back(last);
  return leading;
}

Tensor new_tensor(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

const int64_t* ids_of(const Tensor& t) { return static_cast<const int64_t*>(t.data_ptr()); }
int64_t* ids_out(const Tensor& t) { return static_cast<int64_t*>(t.data_ptr()); }

// Runs a problem on the backend of `like`: directly on the CPU; on CUDA with scratch from PyTorch's allocator, on
// its current stream and device.
#if SEMHITOK_WITH_CUDA
class CudaDevice {
 public:
  explicit CudaDevice(int index) : guard_(index) {
    // The CUDA runtime linked here keeps its own current device: PyTorch's guard alone does not set it.
    throw_on(cudaGetDevice(&previous_));
    throw_on(cudaSetDevice(index));
  }
  ~CudaDevice() { (void)cudaSetDevice(previous_); }
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  static void throw_on(cudaError_t error) {
    check(error == cudaSuccess, "CUDA: ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int previous_ = 0;
};

template <typename Problem>
void run_cuda(const Problem& problem, const Tensor& like, int64_t (*scratch_bytes)(const Problem&),
              cudaError_t (*op)(const Problem&, void*, cudaStream_t)) {
  const int index = like.get_device_index();
  const CudaDevice device(index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  const Tensor scratch = new_tensor(like, {scratch_bytes(problem)}, ScalarType::Byte);
  CudaDevice::throw_on(op(problem, scratch.data_ptr(), static_cast<cudaStream_t>(stream)));
}

#define SEMHITOK_RUN(op, problem, like)                        \
  do {                                                         \
    if ((like).is_cpu()) {                                     \
      cpu::op(problem);                                        \
    } else {                                                   \
      run_cuda(problem, like, &cuda::op##_scratch, &cuda::op); \
    }                                                          \
  } while (0)
#else
#define SEMHITOK_RUN(op, problem, like)                                                                             \
  do {                                                                                                              \
    check((like).is_cpu(), #op ": expected tensors on cpu, got ", device_of(like),                                  \
          ": this build of semhitok has no CUDA kernels; install the CUDA toolkit (nvcc on PATH) and rebuild with " \
          "SEMHITOK_CUDA=1 pip install -e .");                                                                      \
    cpu::op(problem);                                                                                               \
  } while (0)
#endif

std::tuple<Tensor, Tensor> nearest_code(const Tensor& z, const Tensor& codebook, const std::string& metric) {
  NearestCode p{};
  p.metric = parse_metric("metric", metric);
  p.z.dtype = float_dtype("z", z);
  p.codebook.dtype = float_dtype("codebook", codebook);
  check_dims("codebook", codebook, 2, "[K, D]");
  check_count("codebook", "codes", codebook.size(0));
  const Sizes leading = check_tokens("z", z, "codebook", codebook);
  check_device("codebook", codebook, "z", z);

  p.wide = p.z.dtype == Dtype::kFloat64 || p.codebook.dtype == Dtype::kFloat64;
  p.tokens = count_of(leading), p.codes = codebook.size(0), p.depth = codebook.size(1);
  const Tensor z_rows = torch::stable::contiguous(z), codes = torch::stable::contiguous(codebook);
  Tensor scores = new_tensor(z, leading, p.wide ? ScalarType::Double : ScalarType::Float);
  Tensor ids = new_tensor(z, leading, ScalarType::Long);
  p.z.data = z_rows.data_ptr(), p.codebook.data = codes.data_ptr();
  p.scores = scores.data_ptr(), p.ids = ids_out(ids);
  SEMHITOK_RUN(nearest_code, p, z);
  return {scores, ids};
}

// nearest_code for tests and benchmarks, z [N, D], nothing in float64: by a named search.
NearestCode probe_problem(const Tensor& z, const Tensor& codebook, const std::string& metric) {
  NearestCode p{};
  p.metric = parse_metric("metric", metric);
  p.z.dtype = float_dtype("z", z);
  p.codebook.dtype = float_dtype("codebook", codebook);
  check(p.z.dtype != Dtype::kFloat64, "z: expected float32, float16 or bfloat16, got float64");
  check(p.codebook.dtype != Dtype::kFloat64, "codebook: expected float32, float16 or bfloat16, got float64");
  check_dims("codebook", codebook, 2, "[K, D]");
  check(z.dim() == 2, "z: expected 2 dimensions [N, D], got ", z.dim());
  check_count("codebook", "codes", codebook.size(0));
  check_tokens("z", z, "codebook", codebook);
  check_device("codebook", codebook, "z", z);
  p.tokens = z.size(0), p.codes = codebook.size(0), p.depth = codebook.size(1);
  return p;
}

// On the CPU: a named instruction set, with a named first pass.
NearestCode cpu_probe_problem(const Tensor& z, const Tensor& codebook, const std::string& metric,
                              const cpu::Kernels& kernels, const std::string& first_pass) {
  const NearestCode p = probe_problem(z, codebook, metric);
  check(first_pass.empty() || first_pass == "int8" || first_pass == "fp32",
        "first_pass: expected \"int8\", \"fp32\" or \"\", got \"", first_pass, "\"");
  check(first_pass != "int8" || (kernels.step > 0 && codebook.size(1) <= cpu::kMaxInt8Depth),
        "first_pass: expected \"fp32\", as there is no int8 pass here, got \"int8\"");
  return p;
}

// rescored [N] counts the codes whose exact scores were computed. A bound_scale below 1 may give wrong ids: that is
// what tests show with it.
std::tuple<Tensor, Tensor, Tensor> nearest_code_probe(const Tensor& z, const Tensor& codebook,
                                                      const std::string& metric, const std::string& capability,
                                                      const std::string& first_pass, double bound_scale) {
  const cpu::Kernels& kernels = cpu::kernels_named(capability.c_str());
  NearestCode p = cpu_probe_problem(z, codebook, metric, kernels, first_pass);
  const Tensor z_rows = torch::stable::contiguous(z), codes = torch::stable::contiguous(codebook);
  Tensor scores = new_tensor(z, {p.tokens}, ScalarType::Float), ids = new_tensor(z, {p.tokens}, ScalarType::Long);
  Tensor rescored = new_tensor(z, {p.tokens}, ScalarType::Long);
  p.z.data = z_rows.data_ptr(), p.codebook.data = codes.data_ptr();
  p.scores = scores.data_ptr(), p.ids = ids_out(ids);
  cpu::nearest_code_probe(p, kernels, {bound_scale, first_pass == "fp32", ids_out(rescored), 0, nullptr, nullptr});
  return {scores, ids, rescored};
}

// What the first pass sees: groups of C codes (16 for int8, 128 for fp32), approximate [N, G] and bound [N, G], with
// |approximate - greatest exact score of the group| <= bound; codes [G, C] the ids of each group. Codes that cannot win
// are in none; a token that goes to the exact pass at once has an infinite bound.
std::tuple<Tensor, Tensor, Tensor> nearest_code_bounds(const Tensor& z, const Tensor& codebook,
                                                       const std::string& metric, const std::string& capability,
                                                       const std::string& first_pass) {
  const cpu::Kernels& kernels = cpu::kernels_named(capability.c_str());
  NearestCode p = cpu_probe_problem(z, codebook, metric, kernels, first_pass);
  const Tensor z_rows = torch::stable::contiguous(z), code_rows = torch::stable::contiguous(codebook);
  p.z.data = z_rows.data_ptr(), p.codebook.data = code_rows.data_ptr();
  const std::vector<int64_t> order = cpu::packed_order(p, kernels);
  const bool fp32 = first_pass == "fp32" || kernels.step == 0 || p.depth > cpu::kMaxInt8Depth;
  const int64_t size = fp32 ? cpu::kUnitCodes : cpu::kGroupCodes, groups = static_cast<int64_t>(order.size()) / size;
  Tensor codes = new_tensor(z, {groups, size}, ScalarType::Long);
  std::copy(order.begin(), order.end(), ids_out(codes));
  Tensor approximate = new_tensor(z, {p.tokens, groups}, ScalarType::Double);
  Tensor bound = new_tensor(z, {p.tokens, groups}, ScalarType::Double);
  Tensor scores = new_tensor(z, {p.tokens}, ScalarType::Float), ids = new_tensor(z, {p.tokens}, ScalarType::Long);
  p.scores = scores.data_ptr(), p.ids = ids_out(ids);
  double* seen = static_cast<double*>(approximate.data_ptr());
  double* within = static_cast<double*>(bound.data_ptr());
  std::fill_n(seen, p.tokens * groups, 0.0);
  std::fill_n(within, p.tokens * groups, std::numeric_limits<double>::infinity());
  const int64_t all_groups = static_cast<int64_t>(order.size()) / cpu::kGroupCodes;
  cpu::nearest_code_probe(p, kernels, {1.0, fp32, nullptr, all_groups, seen, within});
  return {approximate, bound, codes};
}

#if SEMHITOK_WITH_CUDA
// The same on CUDA: capability names the search ("simt", "few", "mma", "wgmma", "certified", or "" for the one
// that nearest_code would choose). rescored [N]: -1 for a token without a certificate, 0 where the search has none.
std::tuple<Tensor, Tensor, Tensor> nearest_code_probe_cuda(const Tensor& z, const Tensor& codebook,
                                                           const std::string& metric, const std::string& capability,
                                                           const std::string& first_pass, double bound_scale) {
  cuda::NearestCodeProbe probe{probe_problem(z, codebook, metric), cuda::Search::kSimt, bound_scale, nullptr};
  NearestCode& p = probe.problem;
  check(first_pass.empty(), "first_pass: expected \"\" on CUDA, got \"", first_pass, "\"");
  {
    const CudaDevice device(z.get_device_index());
    const auto names = std::begin(cuda::kSearchNames), end = std::end(cuda::kSearchNames);
    const auto name = std::find(names, end, capability);
    check(capability.empty() || name != end,
          "capability: expected \"simt\", \"few\", \"mma\", \"wgmma\", \"certified\" or \"\", got \"", capability,
          "\"");
    probe.search = capability.empty() ? cuda::chosen_search(p) : static_cast<cuda::Search>(name - names);
    check(cuda::search_can_run(probe.search, p),
          "capability: expected a search that this device and build have for D = ", p.depth, ", got \"", capability,
          "\"");
  }
  const Tensor z_rows = torch::stable::contiguous(z), codes = torch::stable::contiguous(codebook);
  Tensor scores = new_tensor(z, {p.tokens}, ScalarType::Float), ids = new_tensor(z, {p.tokens}, ScalarType::Long);
  Tensor rescored = torch::stable::new_zeros(z, {p.tokens}, ScalarType::Long);
  p.z.data = z_rows.data_ptr(), p.codebook.data = codes.data_ptr();
  p.scores = scores.data_ptr(), p.ids = ids_out(ids), probe.rescored = ids_out(rescored);
  run_cuda(probe, z, &cuda::nearest_code_probe_scratch, &cuda::nearest_code_probe);
  return {scores, ids, rescored};
}
#endif

// The sub-codebooks [K, m, D], or [T, D] with offsets: into a problem's groups, subcodes, total and offsets. codes: how
// many semantic codes there are, or 0 where that is for the sub-codebooks to say. What is returned holds the offsets.
template <typename Problem>
std::optional<Tensor> check_sub_codebooks(const char* name, const char* depth, const Tensor& table,
                                          const std::optional<Tensor>& offsets, int64_t codes, const Tensor& first,
                                          const char* first_name, Problem* p) {
  const std::string fixed = std::string("[K, m, ") + depth + "]", own = std::string("[T, ") + depth + "]";
  if (!offsets.has_value()) {
    check_dims(name, table, 3, fixed.c_str());
    p->groups = table.size(0), p->subcodes = table.size(1), p->total = p->groups * p->subcodes;
    check(codes == 0 || p->groups == codes, name, ": expected first dimension ", codes,
          " (sem_codebook.shape[0]), got ", p->groups);
    check_count(name, "codes", p->groups);
    return std::nullopt;
  }
  const Tensor& bounds = *offsets;
  check_dims(name, table, 2, (own + " (with offsets)").c_str());
  check_ids("offsets", bounds);
  const Sizes sizes = sizes_of(bounds);
  if (codes != 0) {
    check(sizes == Sizes{codes + 1}, "offsets: expected shape [", codes + 1, "] (sem_codebook.shape[0] + 1), got ",
          shape_of(sizes));
  } else {
    check(sizes.size() == 1 && sizes[0] >= 2, "offsets: expected shape [K + 1] with K of at least 1, got ",
          shape_of(sizes));
  }
  p->groups = sizes[0] - 1, p->total = table.size(0);
  check_count(name, "codes", p->total);
  check(p->total >= p->groups, name, ": expected at least ", p->groups,
        " rows (offsets.shape[0] - 1, one a sub-codebook), got ", p->total);
  check_device("offsets", bounds, first_name, first);
  p->subcodes = (p->total + p->groups - 1) / p->groups;
  const Tensor rows = torch::stable::contiguous(bounds);
  p->offsets = ids_of(rows);
  if (rows.is_cpu()) {
    const int64_t* at = p->offsets;
    check(at[0] == 0, "offsets: expected to begin with 0, got ", at[0]);
    check(at[p->groups] == p->total, "offsets: expected to end with ", p->total, " (", name, ".shape[0]), got ",
          at[p->groups]);
    bool ascending = true;
    for (int64_t g = 0; g < p->groups; ++g) ascending &= at[g] < at[g + 1];
    for (int64_t g = 0; !ascending; ++g) {
      check(at[g] < at[g + 1], "offsets: expected each greater than the one before, got ", at[g], " and ", at[g + 1],
            " at ", g, " and ", g + 1);
    }
  }
  return rows;
}

std::tuple<Tensor, Tensor> nearest_subcode(const Tensor& z, const Tensor& sub_codebooks, const Tensor& group,
                                           const std::string& metric, const std::optional<Tensor>& offsets) {
  NearestSubcode p{};
  p.metric = parse_metric("metric", metric);
  p.z.dtype = float_dtype("z", z);
  p.sub_codebooks.dtype = float_dtype("sub_codebooks", sub_codebooks);
  check_ids("group", group);
  const auto bounds = check_sub_codebooks("sub_codebooks", "D", sub_codebooks, offsets, 0, z, "z", &p);
  const Sizes leading = check_tokens("z", z, "sub_codebooks", sub_codebooks);
  check_leading("group", sizes_of(group), "z", leading);
  check_device("sub_codebooks", sub_codebooks, "z", z);
  check_device("group", group, "z", z);

  p.wide = p.z.dtype == Dtype::kFloat64 || p.sub_codebooks.dtype == Dtype::kFloat64;
  p.tokens = count_of(leading);
  p.depth = sub_codebooks.size(sub_codebooks.dim() - 1);
  const Tensor z_rows = torch::stable::contiguous(z), codes = torch::stable::contiguous(sub_codebooks);
  const Tensor group_rows = torch::stable::contiguous(group);
  Tensor scores = new_tensor(z, leading, p.wide ? ScalarType::Double : ScalarType::Float);
  Tensor ids = new_tensor(z, leading, ScalarType::Long);
  p.z.data = z_rows.data_ptr(), p.sub_codebooks.data = codes.data_ptr(), p.group = ids_of(group_rows);
  p.scores = scores.data_ptr(), p.ids = ids_out(ids);
  SEMHITOK_RUN(nearest_subcode, p, z);
  return {scores, ids};
}

// The checks and sizes hier_quantize and hier_lookup share; first: the tensor whose device counts.
std::pair<HierLookup, std::optional<Tensor>> lookup_problem(const Tensor& sem_codebook, const Tensor& pix_codebook,
                                                            const std::optional<Tensor>& offsets, const Tensor& first,
                                                            const char* first_name) {
  HierLookup p{};
  p.sem_dtype = float_dtype("sem_codebook", sem_codebook);
  p.pix_dtype = float_dtype("pix_codebook", pix_codebook);
  check_dims("sem_codebook", sem_codebook, 2, "[K, Ds]");
  check_count("sem_codebook", "codes", sem_codebook.size(0));
  const int64_t codes = sem_codebook.size(0);
  auto bounds = check_sub_codebooks("pix_codebook", "Dp", pix_codebook, offsets, codes, first, first_name, &p);
  p.sem_depth = sem_codebook.size(1), p.pix_depth = pix_codebook.size(pix_codebook.dim() - 1);
  return {p, std::move(bounds)};
}

std::tuple<Tensor, Tensor, Tensor> hier_quantize(const Tensor& z_sem, const Tensor& z_pix, const Tensor& sem_codebook,
                                                 const Tensor& pix_codebook, const std::string& sem_metric,
                                                 const std::string& pix_metric, const std::optional<Tensor>& offsets) {
  HierQuantize p{};
  p.sem.metric = parse_metric("sem_metric", sem_metric);
  p.pix.metric = parse_metric("pix_metric", pix_metric);
  p.sem.z.dtype = float_dtype("z_sem", z_sem);
  p.pix.z.dtype = float_dtype("z_pix", z_pix);
  const auto [lookup, bounds] = lookup_problem(sem_codebook, pix_codebook, offsets, z_sem, "z_sem");
  p.lookup = lookup;
  const Sizes leading = check_tokens("z_sem", z_sem, "sem_codebook", sem_codebook);
  check_leading("z_pix", check_tokens("z_pix", z_pix, "pix_codebook", pix_codebook), "z_sem", leading);
  check_device("z_pix", z_pix, "z_sem", z_sem);
  check_device("sem_codebook", sem_codebook, "z_sem", z_sem);
  check_device("pix_codebook", pix_codebook, "z_sem", z_sem);

  const int64_t tokens = count_of(leading);
  p.sem.codebook.dtype = p.lookup.sem_dtype, p.pix.sub_codebooks.dtype = p.lookup.pix_dtype;
  p.sem.wide = p.sem.z.dtype == Dtype::kFloat64 || p.pix.z.dtype == Dtype::kFloat64 ||
               p.lookup.sem_dtype == Dtype::kFloat64 || p.lookup.pix_dtype == Dtype::kFloat64;
  p.pix.wide = p.sem.wide;
  p.sem.tokens = p.pix.tokens = p.lookup.tokens = tokens;
  p.sem.codes = p.pix.groups = p.lookup.groups;
  p.sem.depth = p.lookup.sem_depth, p.pix.depth = p.lookup.pix_depth, p.pix.subcodes = p.lookup.subcodes;
  p.pix.total = p.lookup.total, p.pix.offsets = p.lookup.offsets;

  const Tensor sem_rows = torch::stable::contiguous(z_sem), pix_rows = torch::stable::contiguous(z_pix);
  const Tensor sem_codes = torch::stable::contiguous(sem_codebook), pix_codes = torch::stable::contiguous(pix_codebook);
  Tensor q_sem = new_tensor(z_sem, with_last(leading, p.lookup.sem_depth), sem_codebook.scalar_type());
  Tensor q_pix = new_tensor(z_sem, with_last(leading, p.lookup.pix_depth), pix_codebook.scalar_type());
  Tensor codes = new_tensor(z_sem, leading, ScalarType::Long);
  p.sem.z.data = sem_rows.data_ptr(), p.pix.z.data = pix_rows.data_ptr();
  p.sem.codebook.data = p.lookup.sem_codebook = sem_codes.data_ptr();
  p.pix.sub_codebooks.data = p.lookup.pix_codebook = pix_codes.data_ptr();
  p.lookup.q_sem = q_sem.data_ptr(), p.lookup.q_pix = q_pix.data_ptr();
  p.codes = ids_out(codes), p.lookup.codes = p.codes;
  SEMHITOK_RUN(hier_quantize, p, z_sem);
  return {q_sem, q_pix, codes};
}

std::tuple<Tensor, Tensor> hier_lookup(const Tensor& codes, const Tensor& sem_codebook, const Tensor& pix_codebook,
                                       const std::optional<Tensor>& offsets) {
  check_ids("codes", codes);
  auto [p, bounds] = lookup_problem(sem_codebook, pix_codebook, offsets, codes, "codes");
  check_device("sem_codebook", sem_codebook, "codes", codes);
  check_device("pix_codebook", pix_codebook, "codes", codes);

  const Sizes leading = sizes_of(codes);
  p.tokens = count_of(leading);
  const Tensor ids = torch::stable::contiguous(codes);
  const Tensor sem_codes = torch::stable::contiguous(sem_codebook), pix_codes = torch::stable::contiguous(pix_codebook);
  Tensor q_sem = new_tensor(sem_codebook, with_last(leading, p.sem_depth), sem_codebook.scalar_type());
  Tensor q_pix = new_tensor(pix_codebook, with_last(leading, p.pix_depth), pix_codebook.scalar_type());
  p.codes = ids_of(ids), p.sem_codebook = sem_codes.data_ptr(), p.pix_codebook = pix_codes.data_ptr();
  p.q_sem = q_sem.data_ptr(), p.q_pix = q_pix.data_ptr();
  SEMHITOK_RUN(hier_lookup, p, codes);
  return {q_sem, q_pix};
}

std::tuple<Tensor, Tensor> segment_sum(const Tensor& values, const Tensor& ids, int64_t num_segments) {
  SegmentSum p{};
  p.values.dtype = float_dtype("values", values);
  check_ids("ids", ids);
  check(values.dim() == 2, "values: expected 2 dimensions [N, D], got ", values.dim());
  check(values.size(1) >= 1, "values: expected last dimension of at least 1, got 0");
  check(ids.dim() == 1 && ids.size(0) == values.size(0), "ids: expected shape [", values.size(0),
        "] (values.shape[0]), got ", shape_of(sizes_of(ids)));
  check(num_segments >= 0, "num_segments: expected at least 0, got ", num_segments);
  check_count("values", "rows", values.size(0));
  check_count("num_segments", "segments", num_segments);
  check_device("ids", ids, "values", values);

  p.rows = values.size(0), p.depth = values.size(1), p.segments = num_segments;
  const Tensor rows = torch::stable::contiguous(values), row_ids = torch::stable::contiguous(ids);
  const bool wide = p.values.dtype == Dtype::kFloat64;
  Tensor sums = new_tensor(values, {num_segments, p.depth}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor counts = new_tensor(values, {num_segments}, ScalarType::Long);
  p.values.data = rows.data_ptr(), p.ids = ids_of(row_ids), p.sums = sums.data_ptr(), p.counts = ids_out(counts);
  SEMHITOK_RUN(segment_sum, p, values);
  return {sums, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY(semhitok, m) {
  m.def("nearest_code(Tensor z, Tensor codebook, str metric=\"ip\") -> (Tensor scores, Tensor ids)");
  m.def(
      "nearest_subcode(Tensor z, Tensor sub_codebooks, Tensor group, str metric=\"l2\", Tensor? offsets=None) -> "
      "(Tensor scores, Tensor ids)");
  m.def(
      "hier_quantize(Tensor z_sem, Tensor z_pix, Tensor sem_codebook, Tensor pix_codebook, str sem_metric=\"ip\", "
      "str pix_metric=\"l2\", Tensor? offsets=None) -> (Tensor q_sem, Tensor q_pix, Tensor codes)");
  m.def(
      "hier_lookup(Tensor codes, Tensor sem_codebook, Tensor pix_codebook, Tensor? offsets=None) -> "
      "(Tensor q_sem, Tensor q_pix)");
  m.def(
      "nearest_code_probe(Tensor z, Tensor codebook, str metric=\"ip\", str capability=\"\", str first_pass=\"\", "
      "float bound_scale=1.0) -> (Tensor scores, Tensor ids, Tensor rescored)");
  m.def(
      "nearest_code_bounds(Tensor z, Tensor codebook, str metric=\"ip\", str capability=\"\", str first_pass=\"\") "
      "-> (Tensor approximate, Tensor bound, Tensor codes)");
  m.def("segment_sum(Tensor values, Tensor ids, int num_segments) -> (Tensor sums, Tensor counts)");
}

// One implementation a op: it picks the backend by where its tensors are.
#define SEMHITOK_IMPLEMENT(m)                             \
  m.impl("nearest_code", TORCH_BOX(&nearest_code));       \
  m.impl("nearest_subcode", TORCH_BOX(&nearest_subcode)); \
  m.impl("hier_quantize", TORCH_BOX(&hier_quantize));     \
  m.impl("hier_lookup", TORCH_BOX(&hier_lookup));         \
  m.impl("segment_sum", TORCH_BOX(&segment_sum))

STABLE_TORCH_LIBRARY_IMPL(semhitok, CPU, m) {
  SEMHITOK_IMPLEMENT(m);
  m.impl("nearest_code_probe", TORCH_BOX(&nearest_code_probe));
  m.impl("nearest_code_bounds", TORCH_BOX(&nearest_code_bounds));
}
STABLE_TORCH_LIBRARY_IMPL(semhitok, CUDA, m) {
  SEMHITOK_IMPLEMENT(m);
#if SEMHITOK_WITH_CUDA
  m.impl("nearest_code_probe", TORCH_BOX(&nearest_code_probe_cuda));
#endif
}

}  // namespace semhitok
