// What a kernel is asked to do, as plain structs that both backends share.
//
// Every tensor is contiguous and row-major by the time it gets here (ops.cpp saw to that), every size is checked, and
// every pointer lives on the device of the backend called. The score of code c for token z is z.c + bias(c), with
// bias(c) = 0 (inner product) or -|c|^2/2 (l2), and bias(c) = NaN when c holds NaN or Inf, so that it never wins.
#pragma once

#include <cstdint>

namespace semhitok {

enum class Dtype : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };
enum class Metric : int32_t { kInnerProduct, kL2 };

struct Rows {
  const void* data;
  Dtype dtype;
};

// z [tokens, depth], codebook [codes, depth] -> scores [tokens], ids [tokens].
// wide: compute in fp64 and write scores as double; otherwise fp32 and float.
struct NearestCode {
  int64_t tokens, codes, depth;
  Metric metric;
  bool wide;
  Rows z, codebook;
  void* scores;
  int64_t* ids;
};

// z [tokens, depth], sub_codebooks [groups, subcodes, depth], group [tokens] -> scores [tokens], ids [tokens].
struct NearestSubcode {
  int64_t tokens, groups, subcodes, depth;
  Metric metric;
  bool wide;
  Rows z, sub_codebooks;
  const int64_t* group;
  void* scores;
  int64_t* ids;
};

// codes [tokens] -> q_sem, q_pix: row codes/subcodes of the semantic codebook and row codes of the flattened pixel one.
struct HierLookup {
  int64_t tokens, groups, subcodes;
  Dtype sem_dtype, pix_dtype;
  int64_t sem_depth, pix_depth;
  const int64_t* codes;
  const void* sem_codebook;
  const void* pix_codebook;
  void* q_sem;
  void* q_pix;
};

// sem and pix hold the two searches (their scores and ids, and pix.group, are unset); lookup the gather of the rows.
// codes is the output that lookup.codes reads.
struct HierQuantize {
  NearestCode sem;
  NearestSubcode pix;
  HierLookup lookup;
  int64_t* codes;
};

// values [rows, depth], ids [rows] -> sums [segments, depth] (float, or double for fp64 values), counts [segments].
struct SegmentSum {
  int64_t rows, depth, segments;
  Rows values;
  const int64_t* ids;
  void* sums;
  int64_t* counts;
};

static constexpr int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

}  // namespace semhitok
