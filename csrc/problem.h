// The problems that the ops solve, as plain structs that both backends share.
//
// Every tensor is contiguous and row-major, every size is checked (checks.h, ops.cpp), and every pointer is on the
// device of the backend that is called. The score of code c for token z is z.c + bias(c), with
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

// z [tokens, depth], codebook [num_codes, depth] -> scores [tokens], ids [tokens].
// wide: compute in fp64 and write scores as double; otherwise fp32 and float.
struct NearestCode {
  int64_t tokens, num_codes, depth;
  Metric metric;
  bool wide;
  Rows z, codebook;
  void* scores;
  int64_t* ids;
};

// Sub-codebooks one after another in rows [total, depth], that of group g where rows_of_group says. If offsets is null,
// all have `subcodes` rows. With offsets [groups + 1], each has its own size, and subcodes is the mean, rounded up.
struct SubCodebooks {
  int64_t groups, subcodes, total, depth;
  const int64_t* offsets;
  Rows rows;
};

// z [tokens, sub.depth], group [tokens] -> scores [tokens], ids [tokens] in the group's sub-codebook.
struct NearestSubcode {
  int64_t tokens;
  SubCodebooks sub;
  Metric metric;
  bool wide;
  Rows z;
  const int64_t* group;
  void* scores;
  int64_t* ids;
};

// codes [tokens], flat ids -> q_sem, q_pix: row group_of_row(code) of sem [groups, sem_depth] and row `code` of pix.
struct HierLookup {
  int64_t tokens, sem_depth;
  Rows sem;
  SubCodebooks pix;
  const int64_t* codes;
  void* q_sem;
  void* q_pix;
};

// sem and pix are the two searches (their scores and ids, and pix.group, are unset), lookup the gather of the rows.
// codes [tokens], the flat ids, is an output, which lookup.codes reads.
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

#ifdef __CUDACC__
#define SEMHITOK_ANYWHERE __host__ __device__ __forceinline__
#else
#define SEMHITOK_ANYWHERE inline
#endif

struct RowRange {
  int64_t first, count;
};

// The rows of a group's sub-codebook, group in [0, groups). Offsets on a GPU are never checked: whatever they hold, all
// rows are inside the table, first too, and count is 0 for a group without rows.
SEMHITOK_ANYWHERE static RowRange rows_of_group(const SubCodebooks& s, int64_t group) {
  if (s.offsets == nullptr) return {group * s.subcodes, s.subcodes};
  const int64_t from = s.offsets[group], to = s.offsets[group + 1];
  const int64_t first = from < 0 ? 0 : from < s.total ? from : s.total - 1, end = to < s.total ? to : s.total;
  return {first, end > first ? end - first : 0};
}

// The group whose sub-codebook holds a row in [0, total). It is in [0, groups) whatever the offsets hold.
SEMHITOK_ANYWHERE static int64_t group_of_row(const SubCodebooks& s, int64_t row) {
  if (s.offsets == nullptr) return row / s.subcodes;
  int64_t low = 0, high = s.groups;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (s.offsets[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

[[maybe_unused]] static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static constexpr int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

}  // namespace semhitok
