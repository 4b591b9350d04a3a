// ldmatrix, mma.sync and wgmma. A wgmma is four warps' work, each of which has 16 rows of its own: a warp's part runs
// at some moment after its 32 lanes have issued it and before their wait returns, whatever the other warps do.
#include "emulated_tensor_cores.h"

#include <algorithm>
#include <array>
#include <deque>
#include <vector>

#include "emulated_ptx.h"

namespace emulator {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kMostWarps = kMostThreads / kWarp;
constexpr int kGroupWarps = 4;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kRows = 16;    // of a warp's part
constexpr int kCodes = 128;  // rows of b
constexpr int kBytes = 32;   // of depth
constexpr int kHalves = kBytes / 2;
constexpr int kChunk = 16;  // a row of a core matrix
constexpr int kChunkRows = 8;
constexpr int kAccumulators = 64;

Sum sum_mode = Sum::kNearest;

const float* half_table() {  // by bits
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (unsigned bits = 0; bits < values.size(); ++bits) {
      values[bits] = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    }
    return values;
  }();
  return table.data();
}

float truncated_sum(float start, const float* a, const float* b, int stride) {
  double terms[kHalves + 1], most = std::fabs(start);
  for (int k = 0; k < kHalves; ++k) {
    terms[k] = static_cast<double>(a[k]) * b[k * stride];
    most = std::max(most, std::fabs(terms[k]));
  }
  terms[kHalves] = start;
  double sum = 0;
  if (!std::isfinite(most) || most == 0) {
    for (const double term : terms) sum += term;
    return static_cast<float>(sum);
  }
  const double unit = std::ldexp(1.0, std::ilogb(most) - kSumBits);
  for (const double term : terms) sum += std::trunc(term / unit) * unit;
  const float near = static_cast<float>(sum);
  return std::fabs(near) > std::fabs(sum) ? std::nextafter(near, 0.0f) : near;
}

// sums[16][codes] += a[16][16] b[16][codes]
template <int kWide>
void add_products(float (*sums)[kWide], const float (*a)[kHalves], const float (*b)[kWide]) {
  if (sum_mode == Sum::kTruncate) {
    for (int r = 0; r < kRows; ++r) {
      for (int n = 0; n < kWide; ++n) sums[r][n] = truncated_sum(sums[r][n], a[r], &b[0][n], kWide);
    }
    return;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kHalves; ++k) {
      const float factor = a[r][k];
      for (int n = 0; n < kWide; ++n) sums[r][n] += factor * b[k][n];
    }
  }
}

// ---- a warp's part of a wgmma ----

struct Part {
  bool integer, add;
  uint64_t b;
  int group;
  unsigned lanes, saved;  // that issued it; whose accumulators were put aside
  bool done;
  void* d[kWarp];
  uint32_t a[kWarp][4];
  uint32_t accumulators[kWarp][kAccumulators];
};

struct Lane {
  uint64_t issued;
  int commits;
  bool fenced;
};

struct Issued {
  bool integer, add;
  uint64_t b;
};

std::array<Lane, kMostThreads> lanes;
std::array<std::deque<Part>, kMostWarps> parts;  // issued, not waited for
std::array<uint64_t, kMostWarps> first_part;
std::array<std::vector<Issued>, kMostWarps / kGroupWarps> history;
int block_warps = 0;

void gather(const Part& part, uint8_t (*b)[kBytes]) {
  const auto field = [&](int shift) { return static_cast<uint32_t>(part.b >> shift & 0x3FFF) << 4; };
  const uint32_t start = field(0), along_depth = field(16), along_rows = field(32);
  if (part.b >> 46 != 0) fail("wgmma: descriptor %016llx asks for swizzling", static_cast<unsigned long long>(part.b));
  for (int rows = 0; rows < kCodes / kChunkRows; ++rows) {
    for (int chunk = 0; chunk < kBytes / kChunk; ++chunk) {
      const uint32_t address =
          start + static_cast<uint32_t>(rows) * along_rows + static_cast<uint32_t>(chunk) * along_depth;
      const char* matrix = shared_pointer(address, kChunkRows * kChunk);
      for (int r = 0; r < kChunkRows; ++r) {
        if (!was_bulk_written(matrix + r * kChunk)) {
          fail("wgmma reads shared memory that no bulk copy has written since: address %u", address + r * kChunk);
        }
        std::memcpy(&b[rows * kChunkRows + r][chunk * kChunk], matrix + r * kChunk, kChunk);
      }
    }
  }
}

// Calls visit(accumulator, row, column) for all of a lane's.
template <typename Visit>
void accumulators(int lane, Visit visit) {
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < kAccumulators; ++i) visit(i, g + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * t + i % 2);
}

void run_part(Part& part) {
  alignas(64) uint8_t a[kRows][kBytes], b[kCodes][kBytes];
  gather(part, b);
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) std::memcpy(&a[g + 8 * (i % 2)][kChunk * (i / 2) + 4 * t], &part.a[lane][i], 4);
  }
  alignas(64) uint32_t sums[kRows][kCodes] = {};
  if (part.add) {
    for (int lane = 0; lane < kWarp; ++lane) {
      uint32_t d[kAccumulators];
      const bool saved = (part.saved >> lane & 1) != 0;
      std::memcpy(d, saved ? static_cast<const void*>(part.accumulators[lane]) : part.d[lane], sizeof(d));
      accumulators(lane, [&](int i, int row, int column) { sums[row][column] = d[i]; });
    }
  }
  if (part.integer) {
    alignas(64) int16_t wide_a[kRows][kBytes], wide_b[kCodes][kBytes];
    for (int k = 0; k < kBytes; ++k) {
      for (int r = 0; r < kRows; ++r) wide_a[r][k] = static_cast<int8_t>(a[r][k]);
      for (int n = 0; n < kCodes; ++n) wide_b[n][k] = static_cast<int8_t>(b[n][k]);
    }
    for (int r = 0; r < kRows; ++r) {
      for (int n = 0; n < kCodes; ++n) {
        int32_t dot = 0;
        for (int k = 0; k < kBytes; ++k) dot += wide_a[r][k] * wide_b[n][k];
        sums[r][n] += static_cast<uint32_t>(dot);  // wraps
      }
    }
  } else {
    alignas(64) float wide_a[kRows][kHalves], wide_b[kHalves][kCodes], wide_sums[kRows][kCodes];
    const float* table = half_table();
    const auto value = [table](const uint8_t* bytes) {
      uint16_t bits;
      std::memcpy(&bits, bytes, sizeof(bits));
      return table[bits];
    };
    for (int k = 0; k < kHalves; ++k) {
      for (int r = 0; r < kRows; ++r) wide_a[r][k] = value(&a[r][2 * k]);
      for (int n = 0; n < kCodes; ++n) wide_b[k][n] = value(&b[n][2 * k]);
    }
    std::memcpy(wide_sums, sums, sizeof(sums));
    add_products<kCodes>(wide_sums, wide_a, wide_b);
    std::memcpy(sums, wide_sums, sizeof(sums));
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    uint32_t d[kAccumulators];
    accumulators(lane, [&](int i, int row, int column) { d[i] = sums[row][column]; });
    std::memcpy(part.d[lane], d, sizeof(d));
  }
  part.done = true;
}

void run_parts(int warp, uint64_t end) {  // those before `end`, in order
  for (size_t i = 0; i < parts[warp].size() && first_part[warp] + i < end; ++i) {
    if (!parts[warp][i].done) run_part(parts[warp][i]);
  }
}

void run_event(const Event& event) { run_parts(static_cast<int>(reinterpret_cast<intptr_t>(event.a)), event.n); }

void complete_wait(const uint64_t* due) {
  const int warp = this_thread().warp;
  uint64_t end = first_part[warp];
  for (const Part& part : parts[warp]) {
    if (part.group >= static_cast<int>(static_cast<int64_t>(due[0]))) break;
    if (part.lanes != kAll) fail("wgmma_wait: lanes %08x alone issued a wgmma", part.lanes);
    ++end;
  }
  for (int lane = 1; lane < kWarp; ++lane) {
    if (due[lane] != due[0]) fail("wgmma_wait: the lanes of a warp wait for different groups");
  }
  run_parts(warp, end);
  for (; first_part[warp] < end; ++first_part[warp]) parts[warp].pop_front();
}

}  // namespace

void set_sum(Sum sum) { sum_mode = sum; }

void tensor_cores_block_begins(int threads) {
  block_warps = (threads + kWarp - 1) / kWarp;
  std::fill_n(lanes.begin(), threads, Lane{});
  for (int w = 0; w < block_warps; ++w) {
    parts[w].clear();
    first_part[w] = 0;
    history[w / kGroupWarps].clear();
  }
}

void tensor_cores_thread_exits(Thread thread) {
  if (!parts[thread.warp].empty()) fail("thread %d exits, and nobody waited for its last wgmma", thread.index);
}

void tensor_cores_block_ends() {
  for (int w = 0; w < block_warps; ++w) {
    const int group = w / kGroupWarps;
    const auto issued = static_cast<size_t>(first_part[w]), most = history[group].size();
    if (issued != most) fail("warp %d issued %zu wgmma, others of its warpgroup %zu", w, issued, most);
  }
}

// ---- wgmma ----

uint64_t matrix_descriptor(const void* shared, uint32_t along_depth, uint32_t along_rows, Where where) {
  const uint32_t address = shared_address(shared);
  constexpr uint32_t kReach = 1 << 18;
  if (address % kChunk != 0 || along_depth % kChunk != 0 || along_rows % kChunk != 0) {
    fail("%s:%d: address %u, strides %u and %u: not multiples of 16", where.file, where.line, address, along_depth,
         along_rows);
  }
  if (address >= kReach) fail("%s:%d: the matrix is not in dynamic shared memory", where.file, where.line);
  if (along_depth >= kReach || along_rows >= kReach) {
    fail("%s:%d: strides %u and %u do not fit", where.file, where.line, along_depth, along_rows);
  }
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>(bytes >> 4); };
  return field(address) | field(along_depth) << 16 | field(along_rows) << 32;
}

void wgmma_fence() { lanes[this_thread().index].fenced = true; }
void wgmma_commit() { ++lanes[this_thread().index].commits; }

void wgmma(bool integer, void* d, const uint32_t* a, uint64_t b, bool add, Where where) {
  const Thread thread = this_thread();
  const int warp = thread.warp;
  Lane& lane = lanes[thread.index];
  if ((warp | (kGroupWarps - 1)) * kWarp + kWarp > block_threads()) {
    fail("%s:%d: warp %d has no warpgroup of four", where.file, where.line, warp);
  }
  if (!lane.fenced) fail("%s:%d: no wgmma_fence since the last wait", where.file, where.line);
  const size_t i = lane.issued++ - first_part[warp];
  if (i == parts[warp].size()) {
    parts[warp].emplace_back();
    Part& part = parts[warp].back();
    part.integer = integer, part.add = add, part.b = b;
    part.group = lane.commits;
    part.lanes = part.saved = 0;
    part.done = false;
  }
  Part& part = parts[warp][i];
  if (part.integer != integer || part.add != add || part.b != b || part.group != lane.commits) {
    fail("%s:%d: the lanes of a warp issue different wgmma", where.file, where.line);
  }
  part.d[thread.lane] = d;
  std::memcpy(part.a[thread.lane], a, sizeof(part.a[0]));
  const auto uses_d = [&](const Part& earlier) { return !earlier.done && earlier.d[thread.lane] == d; };
  if (!std::any_of(parts[warp].begin(), parts[warp].begin() + static_cast<ptrdiff_t>(i), uses_d)) {
    std::memcpy(part.accumulators[thread.lane], d, sizeof(part.accumulators[0]));
    part.saved |= 1u << thread.lane;
    poison(d, sizeof(part.accumulators[0]));
  }
  part.lanes |= 1u << thread.lane;
  if (part.lanes != kAll) return;
  std::vector<Issued>& log = history[warp / kGroupWarps];
  const uint64_t number = first_part[warp] + i;
  if (number == log.size()) log.push_back({integer, add, b});
  if (log[number].integer != integer || log[number].add != add || log[number].b != b) {
    fail("%s:%d: the warps of a warpgroup issue different wgmma", where.file, where.line);
  }
  happen_later({&run_event, reinterpret_cast<void*>(static_cast<intptr_t>(warp)), nullptr, nullptr, number + 1});
}

void wgmma_wait(int pending, Where where) {
  Lane& lane = lanes[this_thread().index];
  lane.fenced = false;
  const int64_t due = static_cast<int64_t>(lane.commits) - pending;
  collective(Collective::kWgmmaWait, kAll, static_cast<uint64_t>(due), 0, where, &complete_wait);
}

// ---- ldmatrix, mma.sync ----

namespace {

struct Load {
  const char* row;
  uint32_t* r;
};

void complete_load(const uint64_t* values) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const Load& load = *reinterpret_cast<const Load*>(values[lane]);
    for (int matrix = 0; matrix < 4; ++matrix) {
      const Load& from = *reinterpret_cast<const Load*>(values[kChunkRows * matrix + lane / 4]);
      std::memcpy(&load.r[matrix], from.row + 4 * (lane % 4), 4);
    }
  }
}

struct Multiply {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

void complete_multiply(const uint64_t* values) {
  constexpr int kColumns = 8;
  const float* table = half_table();
  float a[kRows][kHalves], b[kHalves][kColumns], sums[kRows][kColumns];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Multiply& m = *reinterpret_cast<const Multiply*>(values[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][8 * (i / 2) + 2 * t + half] = table[m.a[i] >> 16 * half & 0xffff];
      for (int i = 0; i < 2; ++i) b[8 * i + 2 * t + half][g] = table[m.b[i] >> 16 * half & 0xffff];
    }
    for (int i = 0; i < 4; ++i) sums[g + 8 * (i / 2)][2 * t + i % 2] = m.d[i];
  }
  add_products<kColumns>(sums, a, b);
  for (int lane = 0; lane < kWarp; ++lane) {
    const Multiply& m = *reinterpret_cast<const Multiply*>(values[lane]);
    for (int i = 0; i < 4; ++i) m.d[i] = sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

}  // namespace

void load_matrices(uint32_t* r, const void* row, Where where) {
  if (reinterpret_cast<uintptr_t>(row) % kChunk != 0 || !in_shared(row, kChunk)) {
    fail("%s:%d: row %p is not aligned to 16 bytes, or not in shared memory", where.file, where.line, row);
  }
  const Load load{static_cast<const char*>(row), r};
  collective(Collective::kLoadMatrices, kAll, reinterpret_cast<uint64_t>(&load), 0, where, &complete_load);
}

void mma_f16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Where where) {
  const Multiply multiply{d, a, {b0, b1}};
  collective(Collective::kMma, kAll, reinterpret_cast<uint64_t>(&multiply), 0, where, &complete_multiply);
}

}  // namespace emulator
