// Finds the packed codebook for a codebook's bytes, or packs it and keeps it.
//
// A codebook is identified by what it holds: a 128-bit digest of all its bytes, taken at every call, besides its shape
// and dtype. So an in-place update, an optimiser step, a loaded state or another storage never gets an outdated
// answer, and a codebook that is computed again to the same values (normalised in every forward pass) is found again.
// The digest reads the codebook once, at memory speed: tens of microseconds at 16,384 x 32.
#include <algorithm>
#include <mutex>
#include <vector>

#include "codebook.h"

namespace semhitok::cpu {
namespace {

constexpr int64_t kDigestBytes = 1 << 16;  // digested by one thread at a time
constexpr size_t kMaxCodebooks = 8;
constexpr int64_t kMaxBytes = 256 << 20;  // of all codebooks together

struct Key {
  uint64_t digest[2];
  int64_t count, depth;
  Dtype dtype;
  const Kernels* kernels;
  bool operator==(const Key& o) const {
    return digest[0] == o.digest[0] && digest[1] == o.digest[1] && count == o.count && depth == o.depth &&
           dtype == o.dtype && kernels == o.kernels;
  }
};

Key key_of(const Rows& codes, int64_t count, int64_t depth, const Kernels& kernels) {
  const int64_t bytes = count * depth * element_size(codes.dtype), blocks = ceil_div(bytes, kDigestBytes);
  std::vector<uint64_t> digests(2 * blocks);
  parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      kernels.digest(static_cast<const char*>(codes.data) + b * kDigestBytes,
                     std::min(kDigestBytes, bytes - b * kDigestBytes), &digests[2 * b]);
    }
  });
  Key key{{}, count, depth, codes.dtype, &kernels};
  kernels.digest(digests.data(), 16 * blocks, key.digest);
  return key;
}

struct Entry {
  Key key;
  const void* data;  // where its codes were: the next version of the same codebook replaces it
  std::shared_ptr<Codebook> codebook;
};

// Most recently used last. No thread waits for the lock: one that does not get it packs for itself, so a process that
// was forked while another thread held the lock still works.
struct Cache {
  std::mutex mutex;
  std::vector<Entry> entries;
};

Cache& cache() {
  static Cache* const instance = new Cache;  // never destroyed: threads may outlive static destruction
  return *instance;
}

}  // namespace

std::shared_ptr<const Codebook> prepare(const Rows& codes, int64_t count, int64_t depth, const Kernels& kernels) {
  const Key key = key_of(codes, count, depth, kernels);
  auto& entries = cache().entries;
  std::shared_ptr<Codebook> former;
  {
    std::unique_lock<std::mutex> lock(cache().mutex, std::try_to_lock);
    if (lock.owns_lock()) {
      const auto found = std::find_if(entries.begin(), entries.end(), [&](const Entry& e) { return e.key == key; });
      if (found != entries.end()) {
        std::rotate(found, found + 1, entries.end());
        return entries.back().codebook;
      }
      // The former version is outdated. Its memory is reused unless a search in another thread still reads it.
      const auto outdated = std::find_if(entries.begin(), entries.end(), [&](const Entry& e) {
        return e.data == codes.data && e.key.count == count && e.key.depth == depth && e.key.kernels == &kernels;
      });
      if (outdated != entries.end()) {
        if (outdated->codebook.use_count() == 1) former = std::move(outdated->codebook);
        entries.erase(outdated);
      }
    }
  }

  auto packed = std::make_shared<Codebook>(codes, count, depth, kernels, std::move(former));
  if (packed->bytes() > kMaxBytes) return packed;
  std::vector<Entry> dropped;  // freed after the lock
  std::unique_lock<std::mutex> lock(cache().mutex, std::try_to_lock);
  if (!lock.owns_lock()) return packed;
  entries.push_back({key, codes.data, packed});
  int64_t total = 0;
  for (const Entry& entry : entries) total += entry.codebook->bytes();
  while (entries.size() > kMaxCodebooks || total > kMaxBytes) {
    total -= entries.front().codebook->bytes();
    dropped.push_back(std::move(entries.front()));
    entries.erase(entries.begin());
  }
  lock.unlock();
  return packed;
}

}  // namespace semhitok::cpu
