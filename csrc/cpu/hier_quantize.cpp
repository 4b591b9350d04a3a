// Hierarchical quantisation on the CPU, both stages and the gather fused per block of tokens.
//
// codes = i * subcodes + j, i the nearest semantic code of z_sem, j the nearest sub-code of z_pix in sub-codebook i;
// q_sem and q_pix are copies of the two rows. Nothing of size tokens x codes or tokens x subcodes x depth exists: a
// block's ids stay on the stack, and its rows are copied while its codes are still in the cache.
// Cost: that of nearest_code + nearest_subcode, the packed semantic codebook as scratch.
#include <algorithm>

#include "backend.h"

namespace semhitok::cpu {

void hier_quantize(const HierQuantize& problem) {
  const int64_t tokens = problem.sem.tokens;
  if (tokens == 0) return;
  const CodeSearch search(problem.sem);
  const int64_t block = search.block();
  parallel_blocks(search.blocks(), search.grain(), [&](const auto& next) {
    const auto search_scratch = search.scratch();
    const auto sub_scratch = allocate<char>(subcode_scratch(problem.pix));
    const auto scores = allocate<double>(block);  // float or double; nobody reads them
    const auto groups = allocate<int64_t>(block);
    for (int64_t b = next(); b >= 0; b = next()) {
      const int64_t first = b * block, count = std::min(block, tokens - first);
      int64_t* codes = problem.codes + first;
      search.run(first, count, search_scratch.get(), scores.get(), groups.get());
      subcode_run(problem.pix, first, count, groups.get(), sub_scratch.get(), scores.get(), codes);
      for (int64_t t = 0; t < count; ++t) codes[t] += groups[t] * problem.pix.subcodes;
      lookup_rows(problem.lookup, first, count);
    }
  });
}

}  // namespace semhitok::cpu
