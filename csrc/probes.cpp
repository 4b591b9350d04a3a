// Ops for tests and benchmarks: a search of nearest_code chosen by name, and what its first pass sees. z is [N, D], and
// nothing is float64.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "dispatch.h"

namespace semhitok {
namespace {

CodeProblem probe_problem(const Tensor& z, const Tensor& codebook, const std::string& metric) {
  const auto check_narrow = [](const char* name, const Tensor& t) {
    check(t.scalar_type() != ScalarType::Double, name, ": expected float32, float16 or bfloat16, got float64");
  };
  check_narrow("z", z);
  check_narrow("codebook", codebook);
  check(z.dim() == 2, "z: expected 2 dimensions [N, D], got ", z.dim());
  return code_problem(z, codebook, metric);
}

void check_first_pass(const std::string& first_pass, const cpu::Kernels& kernels, int64_t depth) {
  check(first_pass.empty() || first_pass == "int8" || first_pass == "fp32",
        "first_pass: expected \"int8\", \"fp32\" or \"\", got \"", first_pass, "\"");
  check(first_pass != "int8" || (kernels.step > 0 && depth <= cpu::kMaxInt8Depth),
        "first_pass: expected \"fp32\", as there is no int8 pass here, got \"int8\"");
}

// On the CPU: capability names an instruction set, first_pass the first pass; "" for either is the usual one. rescored
// [N] counts the codes whose exact scores were computed. A bound_scale below 1 may give wrong ids, which tests show.
std::tuple<Tensor, Tensor, Tensor> nearest_code_probe(const Tensor& z, const Tensor& codebook,
                                                      const std::string& metric, const std::string& capability,
                                                      const std::string& first_pass, double bound_scale) {
  const cpu::Kernels& kernels = cpu::kernels_named(capability.c_str());
  const CodeProblem c = probe_problem(z, codebook, metric);
  check_first_pass(first_pass, kernels, c.problem.depth);
  const Tensor rescored = new_tensor(z, {c.problem.tokens}, ScalarType::Long);
  cpu::SearchOptions options;
  options.bound_scale = bound_scale, options.fp32_first = first_pass == "fp32", options.rescored = ids_of(rescored);
  cpu::nearest_code(c.problem, kernels, options);
  return {c.scores, c.ids, rescored};
}

// What the first pass sees: B blocks of C codes (panels of 16 for int8, units of 128 for fp32). approximate [N, B] and
// bound [N, B], with |approximate - greatest exact score of the block| <= bound; codes [B, C] the ids of each block,
// without codes that cannot win. A token that goes straight to the exact pass has an infinite bound.
std::tuple<Tensor, Tensor, Tensor> nearest_code_bounds(const Tensor& z, const Tensor& codebook,
                                                       const std::string& metric, const std::string& capability,
                                                       const std::string& first_pass) {
  const cpu::Kernels& kernels = cpu::kernels_named(capability.c_str());
  const CodeProblem c = probe_problem(z, codebook, metric);
  check_first_pass(first_pass, kernels, c.problem.depth);
  const std::vector<int64_t> order = cpu::packed_order(c.problem, kernels);
  const int64_t num_codes = static_cast<int64_t>(order.size()), tokens = c.problem.tokens;
  const bool fp32 = first_pass == "fp32" || kernels.step == 0 || c.problem.depth > cpu::kMaxInt8Depth;
  const int64_t size = fp32 ? cpu::kUnitCodes : cpu::kPanelCodes, blocks = num_codes / size;
  const Tensor codes = new_tensor(z, {blocks, size}, ScalarType::Long);
  std::copy(order.begin(), order.end(), ids_of(codes));
  const Tensor approximate = new_tensor(z, {tokens, blocks}, ScalarType::Double);
  const Tensor bound = new_tensor(z, {tokens, blocks}, ScalarType::Double);
  cpu::SearchOptions options;
  options.fp32_first = fp32, options.panels = num_codes / cpu::kPanelCodes;
  options.approximate = static_cast<double*>(approximate.data_ptr());
  options.bound = static_cast<double*>(bound.data_ptr());
  std::fill_n(options.approximate, tokens * blocks, 0.0);
  std::fill_n(options.bound, tokens * blocks, std::numeric_limits<double>::infinity());
  cpu::nearest_code(c.problem, kernels, options);
  return {approximate, bound, codes};
}

#if SEMHITOK_WITH_CUDA
const cuda::Search& named_search(const std::string& name, const NearestCode& p, const cuda::Device& device) {
  if (name.empty()) return cuda::chosen_search(p, device);
  std::string names;
  for (const cuda::Search& search : cuda::searches()) {
    names += '"' + std::string(search.name) + "\", ";
    if (name != search.name) continue;
    check(search.can_run(p, device), "capability: expected a search that this device and build have for D = ", p.depth,
          ", got \"", name, "\"");
    return search;
  }
  throw std::runtime_error("capability: expected one of " + names + "or \"\", got \"" + name + "\"");
}

// On CUDA: capability names a search of cuda::searches(), or "" for the one that nearest_code chooses. rescored [N]: -1
// for a token without a certificate, 0 from a search that has none.
std::tuple<Tensor, Tensor, Tensor> nearest_code_probe_cuda(const Tensor& z, const Tensor& codebook,
                                                           const std::string& metric, const std::string& capability,
                                                           const std::string& first_pass, double bound_scale) {
  check(first_pass.empty(), "first_pass: expected \"\" on CUDA, got \"", first_pass, "\"");
  const CodeProblem c = probe_problem(z, codebook, metric);
  const Tensor rescored = torch::stable::new_zeros(z, {c.problem.tokens}, ScalarType::Long);
  const cuda::Search* search = nullptr;
  run_cuda(
      z,
      [&](const cuda::Device& device) {
        search = &named_search(capability, c.problem, device);
        return search->scratch(c.problem, device);
      },
      [&](const cuda::Device& device, void* scratch, cudaStream_t stream) {
        return cuda::run(*search, c.problem, device, {bound_scale, ids_of(rescored)}, scratch, stream);
      });
  return {c.scores, c.ids, rescored};
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(semhitok, m) {
  m.def(
      "nearest_code_probe(Tensor z, Tensor codebook, str metric=\"ip\", str capability=\"\", str first_pass=\"\", "
      "float bound_scale=1.0) -> (Tensor scores, Tensor ids, Tensor rescored)");
  m.def(
      "nearest_code_bounds(Tensor z, Tensor codebook, str metric=\"ip\", str capability=\"\", str first_pass=\"\") "
      "-> (Tensor approximate, Tensor bound, Tensor codes)");
}

STABLE_TORCH_LIBRARY_IMPL(semhitok, CPU, m) {
  m.impl("nearest_code_probe", TORCH_BOX(&nearest_code_probe));
  m.impl("nearest_code_bounds", TORCH_BOX(&nearest_code_bounds));
}
#if SEMHITOK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(semhitok, CUDA, m) { m.impl("nearest_code_probe", TORCH_BOX(&nearest_code_probe_cuda)); }
#endif

}  // namespace semhitok
