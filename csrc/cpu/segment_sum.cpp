// Sums of rows by segment on the CPU.
//
// sums[s] = sum of values[r] over the rows r with ids[r] == s, counts[s] their number; rows with an id outside
// [0, segments) are left out. A stable counting sort orders the rows, then every segment is summed in ascending row
// order by one thread, in fp64, and rounded once: the bits depend on nothing but the input.
// Cost: values read once, (rows + segments) * 8 bytes of scratch.
#include <algorithm>

#include "backend.h"
#include "convert.h"

namespace semhitok::cpu {
namespace {

template <typename T>
void write_sum(const double* total, int64_t depth, T* out) {
  for (int64_t d = 0; d < depth; ++d) out[d] = static_cast<T>(total[d]);
}

}  // namespace

void segment_sum(const SegmentSum& p) {
  const auto valid = [&](int64_t id) { return id >= 0 && id < p.segments; };
  const auto ends = allocate<int64_t>(p.segments + 1);
  const auto order = allocate<int64_t>(p.rows);
  std::fill_n(p.counts, p.segments, 0);
  for (int64_t r = 0; r < p.rows; ++r) {
    if (valid(p.ids[r])) ++p.counts[p.ids[r]];
  }
  int64_t position = 0;
  for (int64_t s = 0; s < p.segments; ++s) {
    ends[s] = position;  // the segment's start, which the loop below advances to its end
    position += p.counts[s];
  }
  for (int64_t r = 0; r < p.rows; ++r) {
    if (valid(p.ids[r])) order[ends[p.ids[r]]++] = r;
  }

  const int64_t work = std::max<int64_t>(p.depth * (1 + p.rows / std::max<int64_t>(p.segments, 1)), 1);
  parallel_for(0, p.segments, ceil_div(kInlineWork, 8 * work), [&](int64_t begin, int64_t end) {
    const auto total = allocate<double>(p.depth);
    const auto row = allocate<double>(p.depth);
    for (int64_t s = begin; s < end; ++s) {
      std::fill_n(total.get(), p.depth, 0.0);
      for (int64_t i = ends[s] - p.counts[s]; i < ends[s]; ++i) {
        read(p.values, order[i] * p.depth, p.depth, row.get());
        for (int64_t d = 0; d < p.depth; ++d) total[d] += row[d];
      }
      if (p.values.dtype == Dtype::kFloat64) {
        write_sum(total.get(), p.depth, static_cast<double*>(p.sums) + s * p.depth);
      } else {
        write_sum(total.get(), p.depth, static_cast<float*>(p.sums) + s * p.depth);
      }
    }
  });
}

}  // namespace semhitok::cpu
