// Code rows by flat id on the CPU: copies of bytes, whatever the dtype, tokens in parallel.
// An id outside [0, total) gives rows of NaN in the codebook's dtype.
// Cost: every row read once and written once; rows of tokens ahead are prefetched, because their addresses are random.
// If sub-codebooks have their own sizes, a binary search in the offsets finds the semantic code of an id.
#include <algorithm>
#include <cstring>
#include <limits>

#include "backend.h"

namespace semhitok::cpu {
namespace {

constexpr int64_t kInlineBytes = 1 << 16;
constexpr int64_t kPrefetchTokens = 16, kPrefetchBytes = 4096;
constexpr uint16_t kFloat16NaN = 0x7E00, kBFloat16NaN = 0x7FC0;

template <typename T>
void fill(void* row, int64_t depth, T value) {
  for (int64_t d = 0; d < depth; ++d) static_cast<T*>(row)[d] = value;
}

void fill_nan(void* row, int64_t depth, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32: return fill(row, depth, std::numeric_limits<float>::quiet_NaN());
    case Dtype::kFloat64: return fill(row, depth, std::numeric_limits<double>::quiet_NaN());
    case Dtype::kFloat16: return fill(row, depth, kFloat16NaN);
    case Dtype::kBFloat16: return fill(row, depth, kBFloat16NaN);
  }
}

}  // namespace

void lookup_rows(const HierLookup& p, int64_t first, int64_t count, const int64_t* groups) {
  const int64_t sem_bytes = p.sem_depth * element_size(p.sem.dtype);
  const int64_t pix_bytes = p.pix.depth * element_size(p.pix.rows.dtype);
  const int64_t end = first + count;
  const char* sem = static_cast<const char*>(p.sem.data);
  const char* pix = static_cast<const char*>(p.pix.rows.data);
  int64_t waiting[kPrefetchTokens] = {};  // groups of the tokens ahead
  for (int64_t t = first - kPrefetchTokens; t < end; ++t) {
    int64_t& slot = waiting[(t - first + kPrefetchTokens) % kPrefetchTokens];
    const int64_t group = slot, later = t + kPrefetchTokens;
    const int64_t ahead = later < end ? p.codes[later] : -1;
    if (ahead >= 0 && ahead < p.pix.total) {
      slot = groups != nullptr ? groups[later - first] : group_of_row(p.pix, ahead);
      prefetch_row<3>(sem + slot * sem_bytes, std::min(sem_bytes, kPrefetchBytes));
      prefetch_row<3>(pix + ahead * pix_bytes, std::min(pix_bytes, kPrefetchBytes));
    }
    if (t < first) continue;
    char* q_sem = static_cast<char*>(p.q_sem) + t * sem_bytes;
    char* q_pix = static_cast<char*>(p.q_pix) + t * pix_bytes;
    const int64_t code = p.codes[t];
    if (code >= 0 && code < p.pix.total) {
      std::memcpy(q_sem, sem + group * sem_bytes, sem_bytes);
      std::memcpy(q_pix, pix + code * pix_bytes, pix_bytes);
    } else {
      fill_nan(q_sem, p.sem_depth, p.sem.dtype);
      fill_nan(q_pix, p.pix.depth, p.pix.rows.dtype);
    }
  }
}

void hier_lookup(const HierLookup& p) {
  const int64_t bytes = p.sem_depth * element_size(p.sem.dtype) + p.pix.depth * element_size(p.pix.rows.dtype);
  parallel_for(0, p.tokens, ceil_div(kInlineBytes, bytes),
               [&](int64_t begin, int64_t end) { lookup_rows(p, begin, end - begin, nullptr); });
}

}  // namespace semhitok::cpu
