// The ops: schemas, argument checks, and the contract, the same on every backend.
//
// nearest_code(z[..., D], codebook[K, D], metric) -> (scores[...], ids[...] in [0, K))
// nearest_subcode(z[..., D], sub_codebooks[K, m, D], group[...], metric) -> (scores[...], ids[...] in [0, m))
// hier_quantize(z_sem[..., Ds], z_pix[..., Dp], sem_codebook[K, Ds], pix_codebook[K, m, Dp], metrics)
//     -> (q_sem[..., Ds], q_pix[..., Dp], codes[...]): i = nearest_code(z_sem), j = nearest_subcode(z_pix, group = i),
//     codes = i * m + j, q_sem = sem_codebook[i], q_pix = pix_codebook[i, j]
// hier_lookup(codes[...], sem_codebook[K, Ds], pix_codebook[K, m, Dp]) -> (q_sem[..., Ds], q_pix[..., Dp])
// The three ops with sub-codebooks also take ones of different sizes m_i, as one table [T, Dp] with offsets[K + 1]:
// sub-codebook i is its rows offsets[i] .. offsets[i + 1] - 1, and codes = offsets[i] + j. offsets is int64, from 0 to
// T, and m_i >= 1.
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

// Checks the sub-codebooks [K, m, D], or [T, D] with offsets, and sets all of s but the data of its rows.
// num_codes: the number of semantic codes, or 0 if the sub-codebooks determine it. Returns the tensor behind offsets.
std::optional<Tensor> check_sub_codebooks(const char* name, const char* depth, const Tensor& table,
                                          const std::optional<Tensor>& offsets, int64_t num_codes, const Tensor& first,
                                          const char* first_name, SubCodebooks* s) {
  const std::string fixed = std::string("[K, m, ") + depth + "]", own = std::string("[T, ") + depth + "]";
  if (!offsets.has_value()) {
    check_dims(name, table, 3, fixed.c_str());
    s->groups = table.size(0), s->subcodes = table.size(1), s->depth = table.size(2);
    s->total = s->groups * s->subcodes;
    check(num_codes == 0 || s->groups == num_codes, name, ": expected first dimension ", num_codes,
          " (sem_codebook.shape[0]), got ", s->groups);
    check_count(name, "codes", s->groups);
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
  s->groups = sizes[0] - 1, s->total = table.size(0), s->depth = table.size(1);
  check_count(name, "codes", s->total);
  check(s->total >= s->groups, name, ": expected at least ", s->groups,
        " rows (offsets.shape[0] - 1, one a sub-codebook), got ", s->total);
  check_device("offsets", bounds, first_name, first);
  s->subcodes = (s->total + s->groups - 1) / s->groups;
  const Tensor rows = torch::stable::contiguous(bounds);
  s->offsets = ids_of(rows);
  if (rows.is_cpu()) {
    const int64_t* at = s->offsets;
    check(at[0] == 0, "offsets: expected to begin with 0, got ", at[0]);
    check(at[s->groups] == s->total, "offsets: expected to end with ", s->total, " (", name, ".shape[0]), got ",
          at[s->groups]);
    bool ascending = true;
    for (int64_t g = 0; g < s->groups; ++g) ascending &= at[g] < at[g + 1];
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
  p.sub.rows.dtype = float_dtype("sub_codebooks", sub_codebooks);
  check_ids("group", group);
  const auto bounds = check_sub_codebooks("sub_codebooks", "D", sub_codebooks, offsets, 0, z, "z", &p.sub);
  const Sizes leading = check_tokens("z", z, "sub_codebooks", sub_codebooks);
  check_leading("group", sizes_of(group), "z", leading);
  check_device("sub_codebooks", sub_codebooks, "z", z);
  check_device("group", group, "z", z);

  p.wide = is_wide({p.z, p.sub.rows});
  p.tokens = count_of(leading);
  const Tensor z_rows = torch::stable::contiguous(z), table = torch::stable::contiguous(sub_codebooks);
  const Tensor group_rows = torch::stable::contiguous(group);
  Tensor scores = new_floats(z, leading, p.wide);
  Tensor ids = new_tensor(z, leading, ScalarType::Long);
  p.z.data = z_rows.data_ptr(), p.sub.rows.data = table.data_ptr(), p.group = ids_of(group_rows);
  p.scores = scores.data_ptr(), p.ids = ids_of(ids);
  SEMHITOK_RUN(nearest_subcode, p, z);
  return {scores, ids};
}

// The checks and sizes that hier_quantize and hier_lookup share, and the tensor behind offsets. first: all tensors must
// be on its device.
std::pair<HierLookup, std::optional<Tensor>> lookup_problem(const Tensor& sem_codebook, const Tensor& pix_codebook,
                                                            const std::optional<Tensor>& offsets, const Tensor& first,
                                                            const char* first_name) {
  HierLookup p{};
  p.sem.dtype = float_dtype("sem_codebook", sem_codebook);
  p.pix.rows.dtype = float_dtype("pix_codebook", pix_codebook);
  check_dims("sem_codebook", sem_codebook, 2, "[K, Ds]");
  check_count("sem_codebook", "codes", sem_codebook.size(0));
  p.sem_depth = sem_codebook.size(1);
  auto bounds =
      check_sub_codebooks("pix_codebook", "Dp", pix_codebook, offsets, sem_codebook.size(0), first, first_name, &p.pix);
  return {p, std::move(bounds)};
}

// The tensors behind a problem of lookup_problem.
struct LookupTensors {
  Tensor sem_codes, pix_codes, q_sem, q_pix;
};

LookupTensors lookup_tensors(const Tensor& sem_codebook, const Tensor& pix_codebook, const Tensor& first,
                             const char* first_name, const Sizes& leading, HierLookup* p) {
  check_device("sem_codebook", sem_codebook, first_name, first);
  check_device("pix_codebook", pix_codebook, first_name, first);
  LookupTensors t{torch::stable::contiguous(sem_codebook), torch::stable::contiguous(pix_codebook),
                  new_tensor(first, with_last(leading, p->sem_depth), sem_codebook.scalar_type()),
                  new_tensor(first, with_last(leading, p->pix.depth), pix_codebook.scalar_type())};
  p->tokens = count_of(leading);
  p->sem.data = t.sem_codes.data_ptr(), p->pix.rows.data = t.pix_codes.data_ptr();
  p->q_sem = t.q_sem.data_ptr(), p->q_pix = t.q_pix.data_ptr();
  return t;
}

std::tuple<Tensor, Tensor, Tensor> hier_quantize(const Tensor& z_sem, const Tensor& z_pix, const Tensor& sem_codebook,
                                                 const Tensor& pix_codebook, const std::string& sem_metric,
                                                 const std::string& pix_metric, const std::optional<Tensor>& offsets) {
  HierQuantize p{};
  p.sem.metric = parse_metric("sem_metric", sem_metric);
  p.pix.metric = parse_metric("pix_metric", pix_metric);
  p.sem.z.dtype = float_dtype("z_sem", z_sem);
  p.pix.z.dtype = float_dtype("z_pix", z_pix);
  std::optional<Tensor> bounds;
  std::tie(p.lookup, bounds) = lookup_problem(sem_codebook, pix_codebook, offsets, z_sem, "z_sem");
  const Sizes leading = check_tokens("z_sem", z_sem, "sem_codebook", sem_codebook);
  check_leading("z_pix", check_tokens("z_pix", z_pix, "pix_codebook", pix_codebook), "z_sem", leading);
  check_device("z_pix", z_pix, "z_sem", z_sem);
  const LookupTensors tensors = lookup_tensors(sem_codebook, pix_codebook, z_sem, "z_sem", leading, &p.lookup);

  p.sem.codebook = p.lookup.sem, p.pix.sub = p.lookup.pix;
  p.sem.wide = p.pix.wide = is_wide({p.sem.z, p.pix.z, p.lookup.sem, p.lookup.pix.rows});
  p.sem.tokens = p.pix.tokens = p.lookup.tokens;
  p.sem.num_codes = p.lookup.pix.groups, p.sem.depth = p.lookup.sem_depth;
  const Tensor sem_rows = torch::stable::contiguous(z_sem), pix_rows = torch::stable::contiguous(z_pix);
  Tensor codes = new_tensor(z_sem, leading, ScalarType::Long);
  p.sem.z.data = sem_rows.data_ptr(), p.pix.z.data = pix_rows.data_ptr();
  p.lookup.codes = p.codes = ids_of(codes);
  SEMHITOK_RUN(hier_quantize, p, z_sem);
  return {tensors.q_sem, tensors.q_pix, codes};
}

std::tuple<Tensor, Tensor> hier_lookup(const Tensor& codes, const Tensor& sem_codebook, const Tensor& pix_codebook,
                                       const std::optional<Tensor>& offsets) {
  check_ids("codes", codes);
  auto [p, bounds] = lookup_problem(sem_codebook, pix_codebook, offsets, codes, "codes");
  const LookupTensors tensors = lookup_tensors(sem_codebook, pix_codebook, codes, "codes", sizes_of(codes), &p);
  const Tensor ids = torch::stable::contiguous(codes);
  p.codes = ids_of(ids);
  SEMHITOK_RUN(hier_lookup, p, codes);
  return {tensors.q_sem, tensors.q_pix};
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
  Tensor sums = new_floats(values, {num_segments, p.depth}, is_wide({p.values}));
  Tensor counts = new_tensor(values, {num_segments}, ScalarType::Long);
  p.values.data = rows.data_ptr(), p.ids = ids_of(row_ids), p.sums = sums.data_ptr(), p.counts = ids_of(counts);
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
