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
// - A token with NaN or Inf, or without a score above -inf: id 0 and score NaN. Ids are always in range.
// - dtypes: float32, float16, bfloat16, float64, independently for each tensor. Scores and search are in fp32, or in
//   fp64 if any floating-point input is float64. q_sem and q_pix have their codebook's dtype and are exact copies of
//   its rows. sums are float32 (float64 for float64 values), summed in fp64 and rounded once: on the CPU in row order,
//   on CUDA in a fixed order of chunks of the rows sorted by id. Ids, groups, codes and counts are int64.
// - Shapes: any leading dimensions, or none; N = 0 gives empty outputs; K, m, D >= 1. Any strides. One device.
// - Ids out of range cannot raise without a device synchronisation, so their result is defined: nearest_subcode gives
//   id 0 and score NaN, hier_lookup rows of NaN, and segment_sum skips the row.
// - Offsets that do not ascend from 0 to T raise on the CPU. On CUDA this, too, would need a device synchronisation:
//   the ids are then meaningless, but in range, and nothing outside the table is read. A sub-codebook without a row
//   gives id 0 and score NaN.
// - Everything else that is wrong raises std::runtime_error (RuntimeError in Python) that names the argument, what was
//   expected and what was given.
// - Same input, same bits: on every run, with any number of threads.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "dispatch.h"

namespace semhitok {
namespace {

std::tuple<Tensor, Tensor> nearest_code(const Tensor& z, const Tensor& codebook, const std::string& metric) {
  const CodeProblem c = code_problem(z, codebook, metric);
  SEMHITOK_RUN(nearest_code, c.problem, z);
  return {c.scores, c.ids};
}

// Checks the sub-codebooks [K, m, D], or [T, D] with offsets, and sets the problem's groups, subcodes, total and
// offsets. num_codes: the number of semantic codes, or 0 if the sub-codebooks determine it. Returns the tensor behind
// offsets.
template <typename Problem>
std::optional<Tensor> check_sub_codebooks(const char* name, const char* depth, const Tensor& table,
                                          const std::optional<Tensor>& offsets, int64_t num_codes, const Tensor& first,
                                          const char* first_name, Problem* p) {
  const std::string fixed = std::string("[K, m, ") + depth + "]", own = std::string("[T, ") + depth + "]";
  if (!offsets.has_value()) {
    check_dims(name, table, 3, fixed.c_str());
    p->groups = table.size(0), p->subcodes = table.size(1), p->total = p->groups * p->subcodes;
    check(num_codes == 0 || p->groups == num_codes, name, ": expected first dimension ", num_codes,
          " (sem_codebook.shape[0]), got ", p->groups);
    check_count(name, "codes", p->groups);
    return std::nullopt;
  }
  const Tensor& bounds = *offsets;
  check_dims(name, table, 2, (own + " (with offsets)").c_str());
  check_ids("offsets", bounds);
  const Sizes sizes = sizes_of(bounds);
  if (num_codes != 0) {
    check(sizes == Sizes{num_codes + 1}, "offsets: expected shape [", num_codes + 1,
          "] (sem_codebook.shape[0] + 1), got ", shape_of(sizes));
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
  const Tensor z_rows = torch::stable::contiguous(z), table = torch::stable::contiguous(sub_codebooks);
  const Tensor group_rows = torch::stable::contiguous(group);
  Tensor scores = new_tensor(z, leading, p.wide ? ScalarType::Double : ScalarType::Float);
  Tensor ids = new_tensor(z, leading, ScalarType::Long);
  p.z.data = z_rows.data_ptr(), p.sub_codebooks.data = table.data_ptr(), p.group = ids_of(group_rows);
  p.scores = scores.data_ptr(), p.ids = ids_out(ids);
  SEMHITOK_RUN(nearest_subcode, p, z);
  return {scores, ids};
}

// The checks and sizes that hier_quantize and hier_lookup share. first: all tensors must be on its device.
std::pair<HierLookup, std::optional<Tensor>> lookup_problem(const Tensor& sem_codebook, const Tensor& pix_codebook,
                                                            const std::optional<Tensor>& offsets, const Tensor& first,
                                                            const char* first_name) {
  HierLookup p{};
  p.sem_dtype = float_dtype("sem_codebook", sem_codebook);
  p.pix_dtype = float_dtype("pix_codebook", pix_codebook);
  check_dims("sem_codebook", sem_codebook, 2, "[K, Ds]");
  check_count("sem_codebook", "codes", sem_codebook.size(0));
  const int64_t num_codes = sem_codebook.size(0);
  auto bounds = check_sub_codebooks("pix_codebook", "Dp", pix_codebook, offsets, num_codes, first, first_name, &p);
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
  p.sem.num_codes = p.pix.groups = p.lookup.groups;
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
  m.def("segment_sum(Tensor values, Tensor ids, int num_segments) -> (Tensor sums, Tensor counts)");
}

// One implementation of an op for both keys: it picks the backend by where its tensors are.
#define SEMHITOK_IMPLEMENT(m)                             \
  m.impl("nearest_code", TORCH_BOX(&nearest_code));       \
  m.impl("nearest_subcode", TORCH_BOX(&nearest_subcode)); \
  m.impl("hier_quantize", TORCH_BOX(&hier_quantize));     \
  m.impl("hier_lookup", TORCH_BOX(&hier_lookup));         \
  m.impl("segment_sum", TORCH_BOX(&segment_sum))

STABLE_TORCH_LIBRARY_IMPL(semhitok, CPU, m) { SEMHITOK_IMPLEMENT(m); }
STABLE_TORCH_LIBRARY_IMPL(semhitok, CUDA, m) { SEMHITOK_IMPLEMENT(m); }

}  // namespace semhitok
