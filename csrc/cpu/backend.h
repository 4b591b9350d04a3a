// The CPU backend: its ops, the choice of the instruction set, and what the drivers (nearest_code.cpp,
// nearest_subcode.cpp, hier_quantize.cpp, hier_lookup.cpp, segment_sum.cpp) share: memory, searches of blocks of
// tokens, threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../problem.h"
#include "kernels.h"

namespace semhitok::cpu {

// The instruction sets in this build, and whether this machine supports them. The best one is used, or the one that
// SEMHITOK_CPU_CAPABILITY names.
struct Capability {
  const char* name;
  bool supported;
  const Kernels* kernels;
};
constexpr int kMaxCapabilities = 5;
int capabilities(Capability out[kMaxCapabilities]);  // best first; returns how many
const Kernels& kernels();                            // throws std::runtime_error on a bad SEMHITOK_CPU_CAPABILITY
const Kernels& kernels_named(const char* name);      // throws std::runtime_error if this machine has none

constexpr int64_t kAlignment = 64;  // bytes

struct FreeAligned {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], FreeAligned>;

template <typename T>
Buffer<T> allocate(int64_t count) {
  const int64_t bytes = std::max<int64_t>(count * static_cast<int64_t>(sizeof(T)), 1);
  void* p = std::aligned_alloc(kAlignment, static_cast<size_t>(round_up(bytes, kAlignment)));
  if (p == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(p));
}

class Codebook;

// Nearest-code search of one codebook, prepared once and run on blocks of tokens from any thread.
class CodeSearch {
 public:
  explicit CodeSearch(const NearestCode& problem, const Kernels& kernels = cpu::kernels(),
                      const SearchOptions& options = {});
  int64_t block() const { return block_; }  // the most tokens a call of run takes
  int64_t blocks() const;                   // blocks of the whole problem
  int64_t grain() const;                    // blocks that are worth a thread
  Buffer<char> scratch() const;             // for the calls of run by one thread
  // scores (float, or double when wide) and ids point at the block's first token.
  void run(int64_t first, int64_t count, const RowsAhead& ahead, char* scratch, void* scores, int64_t* ids) const;

 private:
  NearestCode problem_;
  const Kernels* kernels_;
  SearchOptions options_;
  int64_t block_;
  std::shared_ptr<const Codebook> codebook_;
  Buffer<double> wide_codes_, wide_bias_;
};

int64_t subcode_scratch(const NearestSubcode& problem);  // bytes
void subcode_run(const NearestSubcode& problem, int64_t first, int64_t count, const int64_t* group, void* scratch,
                 void* scores, int64_t* ids);

// groups [count]: those of the tokens first .. first + count, or null to find them from the codes.
void lookup_rows(const HierLookup& problem, int64_t first, int64_t count, const int64_t* groups);

// The ops.
void nearest_code(const NearestCode& problem, const Kernels& kernels = cpu::kernels(),
                  const SearchOptions& options = {});
// The ids in the order in which they are packed, panel by panel; the padding repeats some.
std::vector<int64_t> packed_order(const NearestCode& problem, const Kernels& kernels);
void nearest_subcode(const NearestSubcode& problem);
void hier_quantize(const HierQuantize& problem);
void hier_lookup(const HierLookup& problem);
void segment_sum(const SegmentSum& problem);

// PyTorch's own thread pool; implemented in threads.cpp, so that the kernels stay free of its headers.
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
void parallel_range(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);
int64_t thread_count();

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  parallel_range(
      begin, end, grain, [](int64_t b, int64_t e, void* context) { (*static_cast<const F*>(context))(b, e); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Blocks 0 .. blocks - 1, each taken by the next free thread, so that a core that is busy with other work delays one
// block only. worker(next) runs once a thread; next() gives the next block, or -1 after the last.
template <typename F>
void parallel_blocks(int64_t blocks, int64_t grain, const F& worker) {
  std::atomic<int64_t> taken{0};
  const auto next = [&]() -> int64_t {
    const int64_t block = taken.fetch_add(1, std::memory_order_relaxed);
    return block < blocks ? block : -1;
  };
  const int64_t shares = (blocks + grain - 1) / grain, threads = thread_count();
  parallel_for(0, shares < threads ? shares : threads, 1, [&](int64_t, int64_t) { worker(next); });
}

// A parallel region costs about ten microseconds: less work than this many multiply-adds runs inline.
constexpr int64_t kInlineWork = 1 << 20;

}  // namespace semhitok::cpu
