// Packs a codebook for the search and keeps it while its bytes stay the same.
//
// What identifies a codebook is what it holds: a 128-bit digest of all its bytes, taken at every call, beside shape and
// dtype. So an in-place update, an optimiser step, a loaded state or another storage can never be answered from an old
// one, whoever did it and however; and a codebook computed anew to the same values (normalised in every forward pass)
// is found again. The digest reads the codebook once, at memory speed: tens of microseconds at 16,384 x 32.
//
// Packing: one pass finds unusable and repeated codes, one the mean and the range, one writes (codebook_simd.cpp), each
// in parallel. Only codes that can win are kept: a code with NaN or Inf cannot, nor can a copy of an earlier one.
#include "codebook.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>

#include "convert.h"

namespace semhitok::cpu {
namespace {

constexpr int64_t kDigestBytes = 1 << 16;     // digested by one thread at a time
constexpr int64_t kMeasureCodes = 1024;       // measured by one thread at a time
constexpr size_t kKeptCodebooks = 8;
constexpr int64_t kKeptBytes = 256 << 20;     // of all of them together
constexpr double kInflate = 1.0 + 1e-6;       // more than rounding takes from a norm
constexpr double kLargestPart = 1e280;        // beyond, squares and products of codes leave fp64's range
constexpr int64_t kCodeMax = 127;

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

const float* row_of(const Rows& codes, int64_t code, int64_t depth, float* scratch) {
  if (codes.dtype == Dtype::kFloat32) return static_cast<const float*>(codes.data) + code * depth;
  read(codes, code * depth, depth, scratch);
  return scratch;
}

}  // namespace

template <typename T>
T* Codebook::take(int64_t count) {
  const int64_t bytes = std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T));
  buffers_.push_back(allocate<char>(bytes));
  bytes_ += bytes;
  return reinterpret_cast<T*>(buffers_.back().get());
}

Codebook::Codebook(const Rows& codes, int64_t count, int64_t depth, const Kernels& kernels) {
  packed_.depth = depth;
  const std::vector<int32_t> ids = list_codes(codes, count, kernels);
  packed_.codes = static_cast<int64_t>(ids.size());
  if (ids.empty()) return;
  measure(codes, ids);
  packed_.int8 = packed_.int8 && kernels.step > 0 && depth <= kMaxInt8Depth;
  pack(codes, ids, kernels);
}

// The codes that can win: finite, and the first of its equals. Equal means the same bytes; codes that differ only in
// the sign of a zero stay, and tie.
std::vector<int32_t> Codebook::list_codes(const Rows& codes, int64_t count, const Kernels& kernels) {
  const int64_t depth = packed_.depth, row_bytes = depth * element_size(codes.dtype);
  const char* data = static_cast<const char*>(codes.data);
  std::vector<uint64_t> hashes(count);  // 0: unusable
  parallel_for(0, count, ceil_div(kInlineWork / 8, depth), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(depth);
    for (int64_t k = begin; k < end; ++k) {
      const float* row = row_of(codes, k, depth, scratch.data());
      float poison[8] = {};
      int64_t d = 0;
      for (; d + 8 <= depth; d += 8) {
        for (int i = 0; i < 8; ++i) poison[i] += row[d + i] * 0.0f;
      }
      for (; d < depth; ++d) poison[0] += row[d] * 0.0f;
      for (int i = 1; i < 8; ++i) poison[0] += poison[i];
      uint64_t hash[2] = {};
      if (poison[0] == 0.0f) kernels.digest(data + k * row_bytes, row_bytes, hash), hash[0] |= 1;
      hashes[k] = hash[0];
    }
  });

  int64_t slots = 16;
  while (slots < 2 * count) slots *= 2;
  std::vector<int32_t> table(slots, -1), ids;
  ids.reserve(count);
  for (int64_t k = 0; k < count; ++k) {
    if (hashes[k] == 0) continue;
    int64_t slot = static_cast<int64_t>(hashes[k] >> 20) & (slots - 1);
    while (table[slot] >= 0 && (hashes[table[slot]] != hashes[k] ||
                                std::memcmp(data + table[slot] * row_bytes, data + k * row_bytes, row_bytes) != 0)) {
      slot = (slot + 1) & (slots - 1);
    }
    if (table[slot] >= 0) continue;
    table[slot] = static_cast<int32_t>(k);
    ids.push_back(static_cast<int32_t>(k));
  }
  return ids;
}

// mean, scale, and the largest |c|.
void Codebook::measure(const Rows& codes, const std::vector<int32_t>& ids) {
  struct Part {
    std::vector<double> sum, low, high;
    double norm = 0.0;
  };
  const int64_t depth = packed_.depth, count = packed_.codes;
  std::vector<Part> parts(ceil_div(count, kMeasureCodes));
  parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(depth);
    for (int64_t p = begin; p < end; ++p) {
      Part& part = parts[p];
      part.sum.assign(depth, 0.0);
      part.low.assign(depth, std::numeric_limits<double>::infinity());
      part.high.assign(depth, -std::numeric_limits<double>::infinity());
      for (int64_t n = p * kMeasureCodes; n < std::min((p + 1) * kMeasureCodes, count); ++n) {
        const float* row = row_of(codes, ids[n], depth, scratch.data());
        double norm = 0.0;
        for (int64_t d = 0; d < depth; ++d) {
          const double c = row[d];
          part.sum[d] += c;
          part.low[d] = std::min(part.low[d], c), part.high[d] = std::max(part.high[d], c);
          norm += c * c;
        }
        part.norm = std::max(part.norm, norm);
      }
    }
  });

  const int64_t padded = round_up(depth, kVectorDoubles);
  packed_.mean = take<double>(padded);
  std::fill_n(packed_.mean, padded, 0.0);
  double norm = 0.0, reach = 0.0, mean_norm = 0.0;
  for (const Part& part : parts) norm = std::max(norm, part.norm);
  for (int64_t d = 0; d < depth; ++d) {
    double sum = 0.0, low = parts[0].low[d], high = parts[0].high[d];
    for (const Part& part : parts) {
      sum += part.sum[d], low = std::min(low, part.low[d]), high = std::max(high, part.high[d]);
    }
    const double mean = sum / static_cast<double>(count);
    packed_.mean[d] = mean;
    mean_norm += mean * mean;
    reach = std::max({reach, high - mean, mean - low});
  }
  packed_.max_norm = std::sqrt(norm) * kInflate;
  packed_.mean_norm = std::sqrt(mean_norm);
  packed_.scale = reach > 0.0 ? reach / kCodeMax : 1.0;
  packed_.int8 = norm < kLargestPart;
}

void Codebook::pack(const Rows& codes, const std::vector<int32_t>& ids, const Kernels& kernels) {
  PackedCodebook& p = packed_;
  const int64_t depth = p.depth, superblocks = ceil_div(p.codes, kernels.superblock);
  p.padded = superblocks * kernels.superblock;
  const int64_t groups = p.padded / kGroupCodes;
  p.ids = take<int32_t>(p.padded);
  for (int64_t n = 0; n < p.padded; ++n) p.ids[n] = ids[std::min(n, p.codes - 1)];
  p.rows = take<float>(p.padded * depth);
  p.half_norm = take<float>(p.padded);
  p.half_norm64 = take<double>(p.padded);
  Buffer<double> dots, norms;
  PackedParts parts{};
  if (p.int8) {
    p.steps = ceil_div(depth, kernels.step);
    p.quantised = take<int8_t>(p.padded * p.steps * kernels.step);
    p.offset = take<int32_t>(p.padded);
    p.mean_part = take<float>(p.padded);
    p.norm_part = take<float>(p.padded);
    p.group_residual = take<float>(groups);
    p.group_norm = take<float>(groups);
    dots = allocate<double>(p.padded), norms = allocate<double>(p.padded);
    parts = {dots.get(), norms.get()};
  }

  std::vector<double> largest(superblocks);
  const int64_t work = kernels.superblock * depth * 16, grain = ceil_div(kInlineWork, work);
  parallel_for(0, superblocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> rows(kernels.superblock * depth);
    for (int64_t s = begin; s < end; ++s) {
      for (int64_t n = 0; n < kernels.superblock; ++n) {
        read(codes, p.ids[s * kernels.superblock + n] * depth, depth, &rows[n * depth]);
      }
      kernels.pack(p, s, rows.data(), parts, &largest[s]);
    }
  });
  if (!p.int8) return;

  p.max_quantised = std::sqrt(*std::max_element(largest.begin(), largest.end())) * kInflate;
  p.residual = *std::max_element(p.group_residual, p.group_residual + groups);
  p.norm = *std::max_element(p.group_norm, p.group_norm + groups);
  double dot = 0.0;
  const auto [least, most] = std::minmax_element(norms.get(), norms.get() + p.padded);
  for (int64_t n = 0; n < p.padded; ++n) dot = std::max(dot, std::fabs(dots[n]));
  p.mean_size = dot / p.scale;
  p.norm_middle = 0.5 * (*least + *most);
  p.norm_size = 0.5 * (*most - *least) * kInflate / p.scale;
  parallel_for(0, superblocks, ceil_div(kInlineWork, kernels.superblock * 4), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) kernels.pack_parts(p, s, parts);
  });
}

// ---- the ones kept ----

namespace {

struct Kept {
  Key key;
  const void* data;  // where its codes were: the next version of the same codebook takes its place
  std::shared_ptr<const Codebook> codebook;
};

// Most recently used last. Nobody waits for the lock: who does not get it packs for itself, so that a process forked
// while another thread held it still works.
struct Shelf {
  std::mutex mutex;
  std::vector<Kept> kept;
};

Shelf& shelf() {
  static Shelf* const one = new Shelf;  // never destroyed: threads may outlive static destruction
  return *one;
}

}  // namespace

std::shared_ptr<const Codebook> prepare(const Rows& codes, int64_t count, int64_t depth, const Kernels& kernels) {
  const Key key = key_of(codes, count, depth, kernels);
  {
    std::unique_lock<std::mutex> lock(shelf().mutex, std::try_to_lock);
    if (lock.owns_lock()) {
      auto& kept = shelf().kept;
      const auto found = std::find_if(kept.begin(), kept.end(), [&](const Kept& k) { return k.key == key; });
      if (found != kept.end()) {
        std::rotate(found, found + 1, kept.end());
        return kept.back().codebook;
      }
    }
  }

  auto packed = std::make_shared<const Codebook>(codes, count, depth, kernels);
  std::vector<Kept> dropped;  // freed after the lock
  {
    std::unique_lock<std::mutex> lock(shelf().mutex, std::try_to_lock);
    if (!lock.owns_lock() || packed->bytes() > kKeptBytes) return packed;
    auto& kept = shelf().kept;
    const auto drop = [&](auto position) {
      dropped.push_back(std::move(*position));
      kept.erase(position);
    };
    const auto old = std::find_if(kept.begin(), kept.end(), [&](const Kept& k) {
      return k.data == codes.data && k.key.count == count && k.key.depth == depth && k.key.kernels == &kernels;
    });
    if (old != kept.end()) drop(old);
    kept.push_back({key, codes.data, packed});
    int64_t total = 0;
    for (const Kept& k : kept) total += k.codebook->bytes();
    while (kept.size() > kKeptCodebooks || total > kKeptBytes) {
      total -= kept.front().codebook->bytes();
      drop(kept.begin());
    }
  }
  return packed;
}

}  // namespace semhitok::cpu
