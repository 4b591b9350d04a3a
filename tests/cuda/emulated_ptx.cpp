// Asynchronous copies and barriers in shared memory. What a barrier holds is kept here; its 64 bits in shared memory
// are a seal, so that we see when they are overwritten.
#include "emulated_ptx.h"

#include <algorithm>
#include <array>
#include <vector>

#include "emulated_tensor_cores.h"

namespace emulator {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kCopy = 16;  // bytes
constexpr int64_t kMostCount = (1 << 20) - 1;

struct Barrier {
  uint64_t* address;
  uint64_t seal;
  uint32_t arrivals, pending;
  int64_t bytes;  // expected, less those that came
  uint32_t phase;
  int made_by;
  bool fenced;
};

struct Copy {
  void* shared;
  const void* global;
  int group;
};

struct Copies {
  std::vector<Copy> under_way;  // in the order of their groups
  int groups = 0;
};

std::vector<Barrier> barriers;
std::array<Copies, kMostThreads> copies;
std::vector<bool> bulk_written;  // by 16 bytes of the dynamic shared memory
int bulk_under_way = 0;

void check_aligned(const void* address, const char* what, Where where) {
  if (reinterpret_cast<uintptr_t>(address) % kCopy != 0) {
    fail("%s:%d: %s %p is not aligned to 16 bytes", where.file, where.line, what, address);
  }
}

Barrier& find(const uint64_t* address, Where where) {
  const auto same = [&](const Barrier& b) { return b.address == address; };
  const auto found = std::find_if(barriers.begin(), barriers.end(), same);
  if (found == barriers.end()) fail("%s:%d: the barrier is not initialised", where.file, where.line);
  if (*address != found->seal) fail("%s:%d: the barrier was overwritten", where.file, where.line);
  return *found;
}

void complete_if_done(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.arrivals;
  wake(barrier.address);
}

void set_bulk_written(const void* shared, size_t bytes, bool written) {
  if (!in_dynamic_shared(shared, bytes)) return;
  const auto first = static_cast<size_t>(static_cast<const char*>(shared) - dynamic_shared());
  for (size_t i = first / kCopy; i < (first + bytes + kCopy - 1) / kCopy; ++i) bulk_written[i] = written;
}

void arrive_bulk(const Event& event) {
  auto* address = static_cast<uint64_t*>(event.c);
  std::memcpy(event.a, event.b, event.n);
  set_bulk_written(event.a, event.n, true);
  --bulk_under_way;
  Barrier& barrier = find(address, here());
  barrier.bytes -= static_cast<int64_t>(event.n);
  complete_if_done(barrier);
}

}  // namespace

void ptx_block_begins(int threads) {
  barriers.clear();
  bulk_written.assign(kMostShared / kCopy, false);
  bulk_under_way = 0;
  for (int i = 0; i < threads; ++i) {
    copies[i].under_way.clear();
    copies[i].groups = 0;
  }
  tensor_cores_block_begins(threads);
}

void ptx_block_ends() {
  if (bulk_under_way != 0) fail("%d bulk copies are under way as the block ends", bulk_under_way);
  tensor_cores_block_ends();
}

void ptx_thread_exits() { tensor_cores_thread_exits(this_thread()); }

bool was_bulk_written(const char* shared) {
  return bulk_written[static_cast<size_t>(shared - dynamic_shared()) / kCopy];
}

// ---- cp.async ----

void copy_async(void* shared, const void* global, Where where) {
  check_aligned(shared, "destination", where);
  check_aligned(global, "source", where);
  if (!in_shared(shared, kCopy)) fail("%s:%d: %p is not in shared memory", where.file, where.line, shared);
  poison(shared, kCopy);
  set_bulk_written(shared, kCopy, false);
  Copies& mine = copies[this_thread().index];
  mine.under_way.push_back({shared, global, mine.groups});
}

void copy_async_commit() { ++copies[this_thread().index].groups; }

void copy_async_wait(int pending) {
  Copies& mine = copies[this_thread().index];
  size_t done = 0;
  for (; done < mine.under_way.size() && mine.under_way[done].group < mine.groups - pending; ++done) {
    std::memcpy(mine.under_way[done].shared, mine.under_way[done].global, kCopy);
  }
  mine.under_way.erase(mine.under_way.begin(), mine.under_way.begin() + static_cast<ptrdiff_t>(done));
}

// ---- mbarrier, cp.async.bulk ----

void barrier_init(uint64_t* address, uint32_t arrivals, Where where) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(uint64_t) != 0 || !in_shared(address, sizeof(uint64_t))) {
    fail("%s:%d: barrier %p is not aligned, or not in shared memory", where.file, where.line,
         static_cast<void*>(address));
  }
  if (arrivals < 1 || arrivals > kMostCount) fail("%s:%d: %u arrivals", where.file, where.line, arrivals);
  const auto same = [&](const Barrier& b) { return b.address == address; };
  if (std::any_of(barriers.begin(), barriers.end(), same)) {
    fail("%s:%d: the barrier is initialised twice", where.file, where.line);
  }
  *address = random();
  barriers.push_back({address, *address, arrivals, arrivals, 0, 0, this_thread().index, false});
}

void barrier_init_fence() {
  for (Barrier& barrier : barriers) barrier.fenced |= barrier.made_by == this_thread().index;
}

void barrier_arrive(uint64_t* address, uint32_t bytes, Where where) {
  maybe_yield(where);
  Barrier& barrier = find(address, where);
  if (barrier.pending == 0) {
    fail("%s:%d: more arrivals than the barrier's %u", where.file, where.line, barrier.arrivals);
  }
  barrier.bytes += bytes;
  if (std::abs(barrier.bytes) > kMostCount) {
    fail("%s:%d: %lld bytes expected", where.file, where.line, static_cast<long long>(barrier.bytes));
  }
  --barrier.pending;
  complete_if_done(barrier);
}

void barrier_wait(uint64_t* address, uint32_t parity, Where where) {
  if (parity > 1) fail("%s:%d: parity %u", where.file, where.line, parity);
  maybe_yield(where);
  while (find(address, where).phase == parity) sleep(address, "barrier_wait", where);
}

void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* address, Where where) {
  check_aligned(shared, "destination", where);
  check_aligned(global, "source", where);
  if (bytes == 0 || bytes % kCopy != 0) fail("%s:%d: %u bytes", where.file, where.line, bytes);
  if (!in_shared(shared, bytes)) {
    fail("%s:%d: %u bytes at %p are not in shared memory", where.file, where.line, bytes, shared);
  }
  if (!find(address, where).fenced) fail("%s:%d: no barrier_init_fence before the copy", where.file, where.line);
  poison(shared, bytes);
  set_bulk_written(shared, bytes, false);
  ++bulk_under_way;
  happen_later({&arrive_bulk, shared, const_cast<void*>(global), address, bytes});
  maybe_yield(where);
}

}  // namespace emulator
