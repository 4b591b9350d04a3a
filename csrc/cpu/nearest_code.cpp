// Nearest code on the CPU: prepares a codebook once, then searches blocks of tokens in parallel.
//
// fp32 goes to the instruction set's packed search (nearest_code_simd.cpp). fp64 is a plain loop over a widened copy of
// the codebook with the same contract: bias + sum in ascending depth, lowest id of the greatest score, NaN never wins.
// Every token is computed on its own, so neither the block size nor the number of threads changes a bit of the result.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>
#include <vector>

#include "backend.h"
#include "convert.h"

namespace semhitok::cpu {
namespace {

constexpr int64_t kWideBlock = 16;
constexpr int64_t kAlignment = 64;

}  // namespace

void FreeAligned::operator()(void* p) const { std::free(p); }

void* allocate_aligned(int64_t bytes) {
  const int64_t rounded = std::max<int64_t>(ceil_div(bytes, kAlignment), 1) * kAlignment;
  void* p = std::aligned_alloc(kAlignment, static_cast<size_t>(rounded));
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

CodeSearch::CodeSearch(const NearestCode& problem) : problem_(problem), kernels_(&kernels()) {
  const int64_t codes = problem.codes, depth = problem.depth;
  if (problem.wide) {
    block_ = kWideBlock;
    wide_codes_ = allocate<double>(codes * depth);
    wide_bias_ = allocate<double>(codes);
    parallel_for(0, codes, ceil_div(kInlineWork, depth), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        double* code = wide_codes_.get() + k * depth;
        read(problem_.codebook, k * depth, depth, code);
        double norm = 0.0, poison = 0.0;
        for (int64_t d = 0; d < depth; ++d) norm += code[d] * code[d], poison += code[d] * 0.0;
        wide_bias_[k] = poison + (problem_.metric == Metric::kL2 ? -0.5 * norm : 0.0);
      }
    });
    return;
  }

  // Blocks shrink when there are few tokens, so that every thread has one.
  const int64_t share = ceil_div(problem.tokens, thread_count());
  block_ = std::clamp<int64_t>(ceil_div(share, 8) * 8, 8, kernels_->token_block);
  packed_.codes = codes;
  packed_.depth = depth;
  packed_.groups = ceil_div(codes, kernels_->group_codes);
  const int64_t padded = packed_.groups * kernels_->group_codes;
  codes_ = allocate<float>(padded * depth);
  bias_ = allocate<float>(padded);
  packed_.packed = codes_.get();
  packed_.bias = bias_.get();
  std::vector<float> max_abs(packed_.groups), max_bias(packed_.groups);
  const int64_t grain = std::max<int64_t>(kInlineWork / 8 / (kernels_->group_codes * depth), 1);
  parallel_for(0, packed_.groups, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> row(depth);
    for (int64_t g = begin; g < end; ++g) {
      kernels_->pack_group(problem_.codebook, problem_.metric, g, packed_, row.data(), &max_abs[g], &max_bias[g]);
    }
  });
  packed_.max_abs = *std::max_element(max_abs.begin(), max_abs.end());
  packed_.max_bias = *std::max_element(max_bias.begin(), max_bias.end());
}

int64_t CodeSearch::blocks() const { return ceil_div(problem_.tokens, block_); }

int64_t CodeSearch::grain() const {
  const int64_t block_work = std::max<int64_t>(block_ * problem_.codes * problem_.depth, 1);
  return ceil_div(kInlineWork, block_work);
}

int64_t CodeSearch::scratch() const {
  if (problem_.wide) return problem_.depth * static_cast<int64_t>(sizeof(double));
  const int64_t block = kernels_->token_block, depth = problem_.depth;
  return (block * (depth + kernels_->scratch_per_token) + depth) * static_cast<int64_t>(sizeof(float));
}

void CodeSearch::run(int64_t first, int64_t count, void* scratch, void* scores, int64_t* ids) const {
  if (!problem_.wide) {
    kernels_->search(packed_, problem_.z, first, count, static_cast<float*>(scratch), static_cast<float*>(scores), ids);
    return;
  }
  const int64_t depth = problem_.depth;
  double* x = static_cast<double*>(scratch);
  for (int64_t t = 0; t < count; ++t) {
    read(problem_.z, (first + t) * depth, depth, x);
    double poison = 0.0;
    for (int64_t d = 0; d < depth; ++d) poison += x[d] * 0.0;
    double best = -std::numeric_limits<double>::infinity();
    int64_t id = 0;
    for (int64_t k = 0; poison == 0.0 && k < problem_.codes; ++k) {
      const double* code = wide_codes_.get() + k * depth;
      double score = wide_bias_[k];
      for (int64_t d = 0; d < depth; ++d) score += x[d] * code[d];
      if (score > best) best = score, id = k;
    }
    const bool found = best > -std::numeric_limits<double>::infinity();
    static_cast<double*>(scores)[t] = found ? best : std::numeric_limits<double>::quiet_NaN();
    ids[t] = id;
  }
}

void nearest_code(const NearestCode& problem) {
  if (problem.tokens == 0) return;
  const CodeSearch search(problem);
  const int64_t score_size = problem.wide ? 8 : 4;
  parallel_blocks(search.blocks(), search.grain(), [&](const auto& next) {
    const auto scratch = allocate<char>(search.scratch());
    for (int64_t b = next(); b >= 0; b = next()) {
      const int64_t first = b * search.block(), count = std::min(search.block(), problem.tokens - first);
      search.run(first, count, scratch.get(), static_cast<char*>(problem.scores) + first * score_size,
                 problem.ids + first);
    }
  });
}

}  // namespace semhitok::cpu
