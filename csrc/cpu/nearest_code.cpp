// Nearest code on the CPU: prepares a codebook once, then searches blocks of tokens in parallel.
//
// fp32 and narrower inputs go to the instruction set's search (nearest_code_simd.cpp) of a packed codebook
// (codebook_cache.cpp), which gives the winner of the fp64 scores. fp64 is a plain loop over a widened copy of the
// codebook with the same contract: bias + sum in ascending depth, lowest id of the greatest score, NaN never wins.
// Tokens are independent: neither the block size nor the number of threads changes a bit of the result.
#include <algorithm>
#include <limits>

#include "codebook.h"
#include "convert.h"

namespace semhitok::cpu {
namespace {

constexpr int64_t kWideBlock = 16;
constexpr int64_t kTileTokens = 8;  // a multiple of every instruction set's tile of tokens

}  // namespace

CodeSearch::CodeSearch(const NearestCode& problem, const Kernels& kernels, const SearchOptions& options)
    : problem_(problem), kernels_(&kernels), options_(options) {
  const int64_t num_codes = problem.num_codes, depth = problem.depth;
  if (!problem.wide) {
    // Blocks shrink when there are few tokens, so that every thread has one.
    const int64_t share = ceil_div(problem.tokens, thread_count());
    block_ = std::clamp<int64_t>(round_up(share, kTileTokens), kTileTokens, kernels.token_block);
    codebook_ = prepare(problem.codebook, num_codes, depth, kernels);
    return;
  }
  block_ = kWideBlock;
  wide_codes_ = allocate<double>(num_codes * depth);
  wide_bias_ = allocate<double>(num_codes);
  parallel_for(0, num_codes, ceil_div(kInlineWork, depth), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      double* code = wide_codes_.get() + k * depth;
      read(problem_.codebook, k * depth, depth, code);
      double norm = 0.0, poison = 0.0;
      for (int64_t d = 0; d < depth; ++d) norm += code[d] * code[d], poison += code[d] * 0.0;
      wide_bias_[k] = poison + (problem_.metric == Metric::kL2 ? -0.5 * norm : 0.0);
    }
  });
}

int64_t CodeSearch::blocks() const { return ceil_div(problem_.tokens, block_); }

int64_t CodeSearch::grain() const {
  const int64_t block_work = std::max<int64_t>(block_ * problem_.num_codes * problem_.depth, 1);
  return ceil_div(kInlineWork, block_work);
}

Buffer<char> CodeSearch::scratch() const {
  const int64_t bytes =
      problem_.wide ? problem_.depth * static_cast<int64_t>(sizeof(double)) : kernels_->search_scratch(problem_.depth);
  auto scratch = allocate<char>(bytes);
  std::fill_n(scratch.get(), std::min(bytes, kAlignment), char{0});  // what a search leaves for the next one
  return scratch;
}

void CodeSearch::run(int64_t first, int64_t count, const RowsAhead& ahead, char* scratch, void* scores,
                     int64_t* ids) const {
  if (!problem_.wide) {
    float* out = static_cast<float*>(scores);
    const auto& parts = codebook_->parts();
    if (!parts.empty()) {
      kernels_->search(parts.data(), static_cast<int64_t>(parts.size()), problem_.z, problem_.metric, first, count,
                       ahead, options_, scratch, out, ids);
    } else {
      std::fill_n(out, count, std::numeric_limits<float>::quiet_NaN());
      std::fill_n(ids, count, 0);
    }
    return;
  }
  const int64_t depth = problem_.depth;
  double* x = reinterpret_cast<double*>(scratch);
  for (int64_t t = 0; t < count; ++t) {
    read(problem_.z, (first + t) * depth, depth, x);
    double poison = 0.0;
    for (int64_t d = 0; d < depth; ++d) poison += x[d] * 0.0;
    double best = -std::numeric_limits<double>::infinity();
    int64_t id = 0;
    for (int64_t k = 0; poison == 0.0 && k < problem_.num_codes; ++k) {
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

void nearest_code(const NearestCode& problem, const Kernels& kernels, const SearchOptions& options) {
  if (problem.tokens == 0) return;
  const CodeSearch search(problem, kernels, options);
  const int64_t score_size = problem.wide ? 8 : 4;
  parallel_blocks(search.blocks(), search.grain(), [&](const auto& next) {
    const auto scratch = search.scratch();
    for (int64_t b = next(); b >= 0; b = next()) {
      const int64_t first = b * search.block(), count = std::min(search.block(), problem.tokens - first);
      search.run(first, count, {}, scratch.get(), static_cast<char*>(problem.scores) + first * score_size,
                 problem.ids + first);
    }
  });
}

std::vector<int64_t> packed_order(const NearestCode& problem, const Kernels& kernels) {
  std::vector<int64_t> order;
  const auto codebook = prepare(problem.codebook, problem.num_codes, problem.depth, kernels);
  for (const PackedCodebook& part : codebook->parts()) order.insert(order.end(), part.ids, part.ids + part.padded);
  return order;
}

}  // namespace semhitok::cpu
