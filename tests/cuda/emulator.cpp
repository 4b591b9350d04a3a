// The scheduler: fibers, the barrier of a block, the collectives of a warp, and what happens later.
#include "emulator.h"

#include <link.h>
#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// ---- switching between fibers ----

#ifdef __x86_64__
using Context = void*;  // a stack pointer, above it the registers a function must keep
extern "C" void emulator_switch(Context* from, Context to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
static void switch_context(Context& from, Context& to) { emulator_switch(&from, to); }
static void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  constexpr int kKept = 6;
  void** top = reinterpret_cast<void**>(stack + bytes);  // aligned to 16
  *--top = nullptr;                                      // the entry finds the stack as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kKept; ++i) *--top = nullptr;
  context = top;
}
#else
using Context = ucontext_t;
static void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
static void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

namespace emulator {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kMostWarps = kMostThreads / kWarp;
constexpr size_t kPage = 4096;
constexpr size_t kStack = 128 * 1024;
constexpr size_t kStride = kStack + kPage;  // a page below each stack is forbidden
constexpr int kColours = 32;                // stacks start at different offsets, lest all fall into one set of a cache
constexpr size_t kColourBytes = 128;
constexpr size_t kPoison = 256 * 1024;
constexpr unsigned kAll = 0xffffffffu;

struct Open {  // a collective some lanes of which wait
  Collective kind;
  unsigned mask, arrived;
};

struct Warp {
  std::vector<Open> open;
  uint64_t value[kWarp], result[kWarp];
  uint8_t source[kWarp];
  unsigned exited;
  int priority;
};

struct Fiber {
  Context context;
  bool exited;
  const char* waits_for;  // null while it can run
  const void* key;
  Where where;
};

struct Policy {
  int candidates;    // of so many threads drawn, the one of the best warp runs
  bool sticky;       // the warp that ran last is the best
  int events_every;  // something that happens later happens one time in so many; 0: when nothing else can
};

struct State {
  // settings
  uint64_t seed = 1;
  uint64_t random = 1;
  uint64_t launches = 0;
  std::string message;
  // memory
  char* stacks = nullptr;
  char* shared = nullptr;                               // what a launch asks for
  char *variables = nullptr, *variables_end = nullptr;  // the __shared__ variables of all kernels
  std::vector<uint64_t> poison;
  // the launch
  bool failed = false;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  // the block
  Context host;
  int threads = 0, alive = 0, current = 0, arrived = 0;
  int64_t shared_bytes = 0;
  std::array<Fiber, kMostThreads> fibers;
  std::array<Warp, kMostWarps> warps;
  std::vector<int> ready, at_barrier;
  std::vector<std::pair<const void*, int>> sleepers;
  std::vector<Event> events;
  Policy policy{};
} state;

Fiber& me() { return state.fibers[state.current]; }

[[noreturn]] void leave() {
  Context unused;
  switch_context(unused, state.host);
  __builtin_unreachable();
}

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash == nullptr ? path : slash + 1;
}

std::string who_waits() {
  std::map<std::string, std::vector<int>> groups;
  for (int i = 0; i < state.threads; ++i) {
    const Fiber& f = state.fibers[i];
    if (f.exited || f.waits_for == nullptr) continue;
    const std::string line = base_name(f.where.file) + std::string(":") + std::to_string(f.where.line);
    groups[std::string(f.waits_for) + " at " + line].push_back(i);
  }
  std::string text;
  for (const auto& [what, who] : groups) {
    text += "\n  " + what + ": threads";
    for (size_t i = 0; i < who.size();) {
      size_t j = i;
      while (j + 1 < who.size() && who[j + 1] == who[j] + 1) ++j;
      text += " " + std::to_string(who[i]) + (j > i ? "-" + std::to_string(who[j]) : "");
      i = j + 1;
    }
  }
  return text + "\n  exited: " + std::to_string(state.threads - state.alive) + " of " + std::to_string(state.threads);
}

void make_ready(int fiber) {
  state.fibers[fiber].waits_for = nullptr;
  state.ready.push_back(fiber);
}

void run_an_event() {
  const size_t i = random() % state.events.size();
  const Event event = state.events[i];
  state.events.erase(state.events.begin() + static_cast<ptrdiff_t>(i));
  event.run(event);
}

int take_next() {
  for (;;) {
    const bool now = state.policy.events_every != 0 && chance(state.policy.events_every);
    if (!state.events.empty() && (state.ready.empty() || now)) {
      run_an_event();
    } else {
      break;
    }
  }
  if (state.ready.empty()) fail("deadlock: no thread can run%s", who_waits().c_str());
  size_t best = random() % state.ready.size();
  const auto priority = [](size_t i) {
    const int warp = state.ready[i] / kWarp;
    return state.policy.sticky && warp == state.current / kWarp ? kMostWarps : state.warps[warp].priority;
  };
  for (int i = 1; i < state.policy.candidates; ++i) {
    const size_t other = random() % state.ready.size();
    if (priority(other) > priority(best)) best = other;
  }
  const int next = state.ready[best];
  state.ready[best] = state.ready.back();
  state.ready.pop_back();
  return next;
}

void resume(int next) {
  const int last = state.current;
  state.current = next;
  threadIdx.x = static_cast<unsigned>(next);
  if (next != last) switch_context(state.fibers[last].context, state.fibers[next].context);
}

void wait_for(const char* what, Where where) {
  me().waits_for = what;
  me().where = where;
  resume(take_next());
  me().waits_for = nullptr;
}

void release_barrier() {
  for (const int fiber : state.at_barrier) make_ready(fiber);
  state.at_barrier.clear();
}

void fiber_main() {
  state.body(state.arguments);
  const Thread thread = this_thread();
  ptx_thread_exits();
  me().exited = true;
  --state.alive;
  Warp& warp = state.warps[thread.warp];
  warp.exited |= 1u << thread.lane;
  for (const Open& open : warp.open) {
    if ((open.mask & warp.exited) == 0) continue;
    fail("thread %d has exited: its warp waits for it%s", thread.index, who_waits().c_str());
  }
  if (state.alive == 0) {
    ptx_block_ends();
    leave();
  }
  if (static_cast<int>(state.at_barrier.size()) == state.alive) release_barrier();
  resume(take_next());
  __builtin_unreachable();
}

// The __shared__ variables are the thread-local ones of this library, and nothing else of it is thread-local.
thread_local volatile char variable = 0;
int find_variables(dl_phdr_info* library, size_t, void*) {
  variable = 1;  // now this thread has a copy of them
  const auto address = [&](int i) { return library->dlpi_addr + library->dlpi_phdr[i].p_vaddr; };
  bool ours = false;
  size_t bytes = 0;
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const auto& segment = library->dlpi_phdr[i];
    const auto in_us = reinterpret_cast<uintptr_t>(&state);
    if (segment.p_type == PT_LOAD) ours |= in_us >= address(i) && in_us < address(i) + segment.p_memsz;
    if (segment.p_type == PT_TLS) bytes = segment.p_memsz;
  }
  if (!ours) return 0;
  state.variables = static_cast<char*>(library->dlpi_tls_data);
  state.variables_end = state.variables + bytes;
  return 1;
}

bool allocate() {
  if (state.stacks != nullptr) return true;
  const auto map = [](size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
  };
  state.stacks = map(kMostThreads * kStride);
  state.shared = map(kMostShared + kPage);  // pages are aligned to 1024 bytes
  if (state.stacks == nullptr || state.shared == nullptr) return false;
  dl_iterate_phdr(&find_variables, nullptr);
  for (int i = 0; i < kMostThreads; ++i) mprotect(state.stacks + i * kStride, kPage, PROT_NONE);
  state.poison.resize(2 * kPoison / sizeof(uint64_t));
  for (uint64_t& word : state.poison) word = (random() & ~0x0400040004000400ull) | 0x4000400040004000ull;
  return true;
}

void begin_block(int threads, int64_t shared_bytes) {
  state.threads = state.alive = threads;
  state.shared_bytes = shared_bytes;
  state.ready.clear();
  state.at_barrier.clear();
  state.sleepers.clear();
  state.events.clear();
  constexpr int kOdds[] = {0, 1, 4, 64};
  state.policy = Policy{};
  state.policy.events_every = kOdds[random() % 4];
  state.policy.candidates = chance(2) ? 1 : 4;
  state.policy.sticky = state.policy.candidates > 1 && chance(2);
  const bool starve = chance(2);
  const int starved = static_cast<int>(random() % ((threads + kWarp - 1) / kWarp));
  for (int w = 0; w * kWarp < threads; ++w) {
    Warp& warp = state.warps[w];
    warp.open.clear();
    const int lanes = std::min(kWarp, threads - w * kWarp);
    warp.exited = lanes == kWarp ? 0 : ~((1u << lanes) - 1);
    warp.priority = starve ? (w == starved ? 0 : 1) : static_cast<int>(random() % kMostWarps);
  }
  for (int i = 0; i < threads; ++i) {
    Fiber& f = state.fibers[i];
    f.exited = false;
    f.waits_for = nullptr;
    prepare_context(f.context, state.stacks + i * kStride + kPage, kStack - i % kColours * kColourBytes, &fiber_main);
    state.ready.push_back(i);
  }
  poison(state.variables, static_cast<size_t>(state.variables_end - state.variables));
  poison(state.shared, static_cast<size_t>(shared_bytes));
  ptx_block_begins(threads);
}

}  // namespace

void set_seed(uint64_t seed) {
  state.seed = state.random = (seed + 1) * 0x9E3779B97F4A7C15ull;
  state.launches = 0;
}
uint64_t launches() { return state.launches; }
const char* message() { return state.message.c_str(); }

uint64_t random() {  // splitmix64
  uint64_t x = state.random += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
bool chance(int one_in) { return random() % static_cast<uint64_t>(one_in) == 0; }

void fail(const char* format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  state.message = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
                  std::to_string(blockIdx.z) + "), thread " + std::to_string(state.current) + ": " + text;
  state.failed = true;
  leave();
}

Thread this_thread() { return {state.current, state.current / kWarp, state.current % kWarp}; }
int block_threads() { return state.threads; }

void poison(void* memory, size_t bytes) {
  char* to = static_cast<char*>(memory);
  while (bytes > 0) {
    const size_t piece = std::min(bytes, kPoison);
    std::memcpy(to, state.poison.data() + random() % (kPoison / sizeof(uint64_t)), piece);
    to += piece;
    bytes -= piece;
  }
}

char* dynamic_shared() { return state.shared; }
bool in_dynamic_shared(const void* memory, size_t bytes) {
  const char* p = static_cast<const char*>(memory);
  return p >= state.shared && p + bytes <= state.shared + state.shared_bytes;
}
bool in_shared(const void* memory, size_t bytes) {
  const char* p = static_cast<const char*>(memory);
  return in_dynamic_shared(memory, bytes) || (p >= state.variables && p + bytes <= state.variables_end);
}
uint32_t shared_address(const void* memory) {
  if (!in_shared(memory, 0)) fail("%p is not in shared memory", memory);
  const char* p = static_cast<const char*>(memory);
  if (in_dynamic_shared(memory, 0)) return kDynamicAddress + static_cast<uint32_t>(p - state.shared);
  return kStaticAddress + static_cast<uint32_t>(p - state.variables);
}
const char* shared_pointer(uint32_t address, size_t bytes) {
  if (address < kDynamicAddress || address - kDynamicAddress + static_cast<int64_t>(bytes) > state.shared_bytes) {
    fail("%zu bytes at shared address %u: the block has %lld bytes at %u", bytes, address,
         static_cast<long long>(state.shared_bytes), kDynamicAddress);
  }
  return state.shared + (address - kDynamicAddress);
}

void yield(Where where) {
  state.ready.push_back(state.current);
  wait_for(nullptr, where);
}
void maybe_yield(Where where) {
  if (chance(4)) yield(where);
}

void sleep(const void* key, const char* what, Where where) {
  state.sleepers.emplace_back(key, state.current);
  wait_for(what, where);
}
void wake(const void* key) {
  const auto kept = std::remove_if(state.sleepers.begin(), state.sleepers.end(), [key](const auto& sleeper) {
    if (sleeper.first != key) return false;
    make_ready(sleeper.second);
    return true;
  });
  state.sleepers.erase(kept, state.sleepers.end());
}

void block_barrier(Where where) {
  state.at_barrier.push_back(state.current);
  if (static_cast<int>(state.at_barrier.size()) == state.alive) release_barrier();
  wait_for("__syncthreads", where);
}

void happen_later(const Event& event) {
  if (state.policy.events_every == 1) return event.run(event);
  state.events.push_back(event);
}

// ---- collectives ----

namespace {

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::kSync: return "__syncwarp";
    case Collective::kShuffle: return "a shuffle";
    case Collective::kVote: return "a vote";
    case Collective::kMatch: return "__match_any_sync";
    case Collective::kLoadMatrices: return "load_matrices";
    case Collective::kMma: return "mma_f16";
    case Collective::kWgmmaWait: return "wgmma_wait";
    default: return "a reduction";
  }
}

void complete_collective(Warp& warp, Collective kind, unsigned mask, void (*complete)(const uint64_t*)) {
  uint64_t all = 0;
  bool first = true;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const uint64_t value = warp.value[lane];
    switch (kind) {
      case Collective::kVote: all |= value << lane; break;
      case Collective::kAdd: all += value; break;
      case Collective::kXor: all ^= value; break;
      case Collective::kOr: all |= value; break;
      case Collective::kAnd: all = first ? value : all & value; break;
      case Collective::kMin: all = first ? value : std::min(all, value); break;
      case Collective::kMax: all = first ? value : std::max(all, value); break;
      default: break;
    }
    first = false;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    if (kind == Collective::kShuffle) {
      const int source = warp.source[lane];
      if ((mask >> source & 1) != 0) {
        warp.result[lane] = warp.value[source];
      } else {
        poison(&warp.result[lane], sizeof(uint64_t));  // undefined
      }
    } else if (kind == Collective::kMatch) {
      warp.result[lane] = 0;
      for (int other = 0; other < kWarp; ++other) {
        const bool same = (mask >> other & 1) != 0 && warp.value[other] == warp.value[lane];
        warp.result[lane] |= static_cast<uint64_t>(same) << other;
      }
    } else {
      warp.result[lane] = all;
    }
  }
  if (complete != nullptr) complete(warp.value);
}

}  // namespace

uint64_t collective(Collective kind, unsigned mask, uint64_t value, int source, Where where,
                    void (*complete)(const uint64_t* values)) {
  const Thread thread = this_thread();
  Warp& warp = state.warps[thread.warp];
  const unsigned bit = 1u << thread.lane;
  const char* file = base_name(where.file);
  if ((mask & bit) == 0) {
    fail("%s at %s:%d: the mask %08x lacks the lane itself", name_of(kind), file, where.line, mask);
  }
  if ((mask & warp.exited) != 0) {
    fail("%s at %s:%d: lanes %08x of mask %08x have exited", name_of(kind), file, where.line, mask & warp.exited, mask);
  }
  warp.value[thread.lane] = value;
  warp.source[thread.lane] = static_cast<uint8_t>(source);
  size_t i = warp.open.size();
  for (size_t j = 0; j < warp.open.size(); ++j) {
    const Open& open = warp.open[j];
    if (open.mask == mask && open.kind == kind) {
      i = j;
      continue;
    }
    // Some lanes may be on their way to one and some wait at another, unless each waits for a lane at the other.
    if ((open.mask & bit) == 0 || (open.arrived & mask) == 0) continue;
    me().waits_for = name_of(kind);
    me().where = where;
    fail("lanes of one warp are at different collectives: %s, mask %08x, and %s, mask %08x%s", name_of(open.kind),
         open.mask, name_of(kind), mask, who_waits().c_str());
  }
  if (i == warp.open.size()) warp.open.push_back({kind, mask, 0});
  Open& open = warp.open[i];
  open.arrived |= bit;
  if (open.arrived == mask) {
    warp.open.erase(warp.open.begin() + static_cast<ptrdiff_t>(i));
    complete_collective(warp, kind, mask, complete);
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) != 0) make_ready(thread.warp * kWarp + lane);
    }
  }
  wait_for(name_of(kind), where);
  return warp.result[thread.lane];
}

int shuffle_source(char kind, int operand, int width) {
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) fail("a shuffle's width is %d", width);
  const int lane = this_thread().lane, first = lane & ~(width - 1), last = first + width - 1;
  switch (kind) {
    case 'i': return first | (operand & (width - 1));
    case 'u': return lane - operand < first ? lane : lane - operand;
    case 'd': return lane + operand > last ? lane : lane + operand;
    default: return (lane ^ operand) > last ? lane : lane ^ operand;
  }
}

// ---- launching ----

cudaError_t run(dim3 grid, int threads, int64_t shared_bytes, void (*body)(void*), void* arguments) {
  state.failed = false;
  state.message.clear();
  constexpr unsigned kMostBlocks = 65535;  // along y and z
  const bool fits = threads >= 1 && threads <= kMostThreads && grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 &&
                    grid.y <= kMostBlocks && grid.z >= 1 && grid.z <= kMostBlocks && shared_bytes >= 0 &&
                    shared_bytes <= kMostShared;
  if (!fits) {
    state.message = "grid (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) +
                    ") of " + std::to_string(threads) + " threads, " + std::to_string(shared_bytes) + " bytes shared";
    return cudaErrorInvalidConfiguration;
  }
  if (!allocate()) return cudaErrorMemoryAllocation;
  ++state.launches;
  state.body = body;
  state.arguments = arguments;
  gridDim = grid;
  blockDim = dim3(static_cast<unsigned>(threads));
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t j = random() % (i + 1);
    order[i] = order[j];
    order[j] = i;
  }
  for (const uint64_t block : order) {
    blockIdx = uint3{static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                     static_cast<unsigned>(block / grid.x / grid.y)};
    threadIdx = uint3{0, 0, 0};
    begin_block(threads, shared_bytes);
    state.current = take_next();
    threadIdx.x = static_cast<unsigned>(state.current);
    switch_context(state.host, state.fibers[state.current].context);
    if (state.failed) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace emulator
