// Nearest sub-code on the CPU: tokens in parallel, fp32 through the instruction set's kernel
// (nearest_subcode_simd.cpp), fp64 by a plain loop with the same contract. Tokens are independent: no result depends on
// the number of threads.
#include <algorithm>
#include <limits>

#include "backend.h"
#include "convert.h"

namespace semhitok::cpu {
namespace {

void subcode_wide(const NearestSubcode& p, int64_t first, int64_t count, const int64_t* group, double* x,
                  double* scores, int64_t* ids) {
  const int64_t depth = p.sub.depth;
  double* code = x + depth;
  for (int64_t t = 0; t < count; ++t) {
    read(p.z, (first + t) * depth, depth, x);
    double poison = 0.0;
    for (int64_t d = 0; d < depth; ++d) poison += x[d] * 0.0;
    double best = -std::numeric_limits<double>::infinity();
    int64_t id = 0;
    const bool valid = poison == 0.0 && group[t] >= 0 && group[t] < p.sub.groups;
    const RowRange own = valid ? rows_of_group(p.sub, group[t]) : RowRange{0, 0};
    for (int64_t j = 0; j < own.count; ++j) {
      read(p.sub.rows, (own.first + j) * depth, depth, code);
      double dot = 0.0, norm = 0.0, bad = 0.0;
      for (int64_t d = 0; d < depth; ++d) dot += x[d] * code[d], norm += code[d] * code[d], bad += code[d] * 0.0;
      const double score = dot + (p.metric == Metric::kL2 ? -0.5 * norm : 0.0) + bad;
      if (score > best) best = score, id = j;
    }
    const bool found = best > -std::numeric_limits<double>::infinity();
    scores[t] = found ? best : std::numeric_limits<double>::quiet_NaN();
    ids[t] = id;
  }
}

}  // namespace

int64_t subcode_scratch(const NearestSubcode& problem) {
  return problem.wide ? 2 * problem.sub.depth * static_cast<int64_t>(sizeof(double))
                      : subcode_floats(problem.sub.depth) * static_cast<int64_t>(sizeof(float));
}

void subcode_run(const NearestSubcode& problem, int64_t first, int64_t count, const int64_t* group, void* scratch,
                 void* scores, int64_t* ids) {
  if (problem.wide) {
    subcode_wide(problem, first, count, group, static_cast<double*>(scratch), static_cast<double*>(scores), ids);
  } else {
    kernels().subcode(problem, first, count, group, static_cast<float*>(scratch), static_cast<float*>(scores), ids);
  }
}

void nearest_subcode(const NearestSubcode& problem) {
  const int64_t block = ceil_div(kInlineWork, problem.sub.subcodes * problem.sub.depth);
  const int64_t score_size = problem.wide ? 8 : 4;
  parallel_blocks(ceil_div(problem.tokens, block), 1, [&](const auto& next) {
    const auto scratch = allocate<char>(subcode_scratch(problem));
    for (int64_t b = next(); b >= 0; b = next()) {
      const int64_t first = b * block, count = std::min(block, problem.tokens - first);
      subcode_run(problem, first, count, problem.group + first, scratch.get(),
                  static_cast<char*>(problem.scores) + first * score_size, problem.ids + first);
    }
  });
}

}  // namespace semhitok::cpu
