// Hierarchical quantisation on the CPU: both stages and the gather, fused for each block of tokens.
//
// Plan. Nothing of size tokens x codes or tokens x subcodes x depth exists. The sub-codebooks are a table of megabytes,
// read at random. So a block's second stage runs after the semantic search of the next block, which prefetches the
// first block's sub-codebooks while it computes. The rows are gathered while they are still in the cache.
// Cost: that of nearest_code + nearest_subcode. Scratch: scores and ids of a block, for each thread. The packed
// semantic codebook is kept for the next call (codebook_cache.cpp).
#include <algorithm>
#include <utility>

#include "backend.h"

namespace semhitok::cpu {
namespace {

constexpr int64_t kMostAhead = 4096;  // bytes of a row that are worth prefetching

}  // namespace

void hier_quantize(const HierQuantize& problem) {
  const int64_t tokens = problem.sem.tokens;
  if (tokens == 0) return;
  const CodeSearch search(problem.sem);
  const int64_t block = search.block();
  const SubCodebooks& sub = problem.pix.sub;
  const int64_t row_bytes = sub.subcodes * sub.depth * element_size(sub.rows.dtype);
  const char* table = static_cast<const char*>(sub.rows.data);
  const auto tokens_of = [&](int64_t b) { return std::min(block, tokens - b * block); };
  parallel_blocks(search.blocks(), search.grain(), [&](const auto& next) {
    const auto search_scratch = search.scratch();
    const auto sub_scratch = allocate<char>(subcode_scratch(problem.pix));
    const auto scores = allocate<double>(block);  // float or double; not used
    auto groups = allocate<int64_t>(block), searched = allocate<int64_t>(block);
    int64_t waiting = -1;  // the block whose groups are known
    for (int64_t b = next(); b >= 0 || waiting >= 0; waiting = b, b = b >= 0 ? next() : -1) {
      if (b >= 0) {
        const bool worth = waiting >= 0 && row_bytes <= kMostAhead && sub.offsets == nullptr;
        const RowsAhead ahead{table, row_bytes, groups.get(), worth ? tokens_of(waiting) : 0};
        search.run(b * block, tokens_of(b), ahead, search_scratch.get(), scores.get(), searched.get());
      }
      if (waiting >= 0) {
        const int64_t first = waiting * block, count = tokens_of(waiting);
        int64_t* codes = problem.codes + first;
        subcode_run(problem.pix, first, count, groups.get(), sub_scratch.get(), scores.get(), codes);
        for (int64_t t = 0; t < count; ++t) codes[t] += rows_of_group(sub, groups[t]).first;
        lookup_rows(problem.lookup, first, count, groups.get());
      }
      std::swap(groups, searched);
    }
  });
}

}  // namespace semhitok::cpu
