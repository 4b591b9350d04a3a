// Packs a codebook for the search and keeps it while its bytes stay the same.
//
// What identifies a codebook is what it holds: a 128-bit digest of all its bytes, taken at every call, beside shape and
// dtype. So an in-place update, an optimiser step, a loaded state or another storage can never be answered from an old
// one, whoever did it and however; and a codebook computed anew to the same values (normalised in every forward pass)
// is found again. The digest reads the codebook once, at memory speed: tens of microseconds at 16,384 x 32.
//
// Packing: one pass finds unusable and repeated codes, one the mean and the range, one writes (codebook_simd.cpp), each
// in parallel. Only codes that can win are kept: a code with NaN or Inf cannot, nor can a copy of an earlier one. Codes
// of very different distance from the mean, or in a few tight clusters, become segments, each with a mean and scale of
// its own: one scale for all would leave nothing of what tells the close ones apart.
#include "codebook.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <mutex>

#include "convert.h"

namespace semhitok::cpu {
namespace {

constexpr int64_t kDigestBytes = 1 << 16;  // digested by one thread at a time
constexpr int64_t kMeasureCodes = 1024;    // measured by one thread at a time
constexpr size_t kKeptCodebooks = 8;
constexpr int64_t kKeptBytes = 256 << 20;  // of all of them together
constexpr double kInflate = 1.0 + 1e-6;    // more than rounding takes from a norm
constexpr int64_t kCodeMax = 127;
constexpr double kSegmentRatio = 8.0;   // between the largest distances from the mean of two segments
constexpr size_t kClusterSample = 256;  // codes looked at before all are
constexpr int64_t kSegmentShare = 32;   // a segment, but the first, has at least this part of the codes
constexpr int64_t kSegmentBlocks = 8;   // and a codebook of fewer superblocks has one segment

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

}  // namespace

template <typename T>
T* Codebook::take(int64_t count) {
  const int64_t bytes = std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T));
  bytes_ += bytes;
  const auto fits = [&](const Piece& piece) { return piece.bytes == bytes; };
  const auto old = std::find_if(spare_.begin(), spare_.end(), fits);
  if (old != spare_.end()) {
    pieces_.push_back(std::move(*old));
    spare_.erase(old);
  } else {
    pieces_.push_back({allocate<char>(bytes), bytes});
  }
  return reinterpret_cast<T*>(pieces_.back().memory.get());
}

Codebook::Codebook(const Rows& codes, int64_t count, int64_t depth, const Kernels& kernels,
                   std::shared_ptr<Codebook> old)
    : kernels_(kernels), depth_(depth) {
  if (old != nullptr) spare_ = std::move(old->pieces_);
  Buffer<float> converted;
  const float* rows = static_cast<const float*>(codes.data);
  if (codes.dtype != Dtype::kFloat32) {
    converted = allocate<float>(count * depth);
    parallel_for(0, count, ceil_div(kInlineWork, depth * 4), [&](int64_t begin, int64_t end) {
      read(codes, begin * depth, (end - begin) * depth, converted.get() + begin * depth);
    });
    rows = converted.get();
  }

  rows_ = rows;
  const Ids ids = list_codes(count);
  if (!ids.empty()) {
    const Buffer<double> norms = add_segment(ids);
    const std::vector<Ids> parts = split(ids, norms.get());
    if (parts.size() > 1) {
      std::move(pieces_.begin(), pieces_.end(), std::back_inserter(spare_));
      pieces_.clear(), segments_.clear(), bytes_ = 0;
      for (const Ids& part : parts) add_segment(part);
    }
  }
  spare_.clear();
  rows_ = nullptr;
}

int64_t Codebook::groups() const {
  return segments_.empty() ? 0 : segments_.back().first_group + segments_.back().padded / kGroupCodes;
}

// The ids in parts to be searched apart: bands of distance from the mean, farthest first, or a few tight clusters; one
// part where codes are alike. norms: -distance^2/2 of each id, null without an int8 pass.
std::vector<Codebook::Ids> Codebook::split(const Ids& ids, const double* norms) const {
  const int64_t count = static_cast<int64_t>(ids.size());
  if (norms == nullptr || count < kSegmentBlocks * kernels_.superblock) return {ids};
  const double most = -*std::min_element(norms, norms + count);
  const auto band_of = [&](double norm) {
    const double ratio = std::sqrt(most / std::max(-norm, most * 1e-30));
    return std::min<int64_t>(static_cast<int64_t>(std::log(ratio) / std::log(kSegmentRatio)), kMaxSegments - 1);
  };
  int64_t counts[kMaxSegments] = {}, part_of[kMaxSegments] = {};
  for (int64_t n = 0; n < count; ++n) {
    if (-norms[n] * kSegmentRatio * kSegmentRatio < most) ++counts[band_of(norms[n])];
  }
  for (int64_t band = 1; band < kMaxSegments; ++band) {
    part_of[band] = part_of[band - 1] + (counts[band] * kSegmentShare >= count);
  }
  if (part_of[kMaxSegments - 1] == 0) return clusters(ids, std::sqrt(2.0 * most) / kSegmentRatio);
  std::vector<Ids> parts(part_of[kMaxSegments - 1] + 1);
  for (int64_t n = 0; n < count; ++n) parts[part_of[band_of(norms[n])]].push_back(ids[n]);
  return parts;
}

// At most kMaxSegments clusters with every code within `radius` of its cluster's centre, or all ids. Centres are chosen
// farthest first from a sample, which costs next to nothing where there are no such clusters.
std::vector<Codebook::Ids> Codebook::clusters(const Ids& ids, double radius) const {
  const auto distance2 = [&](int32_t a, int32_t b) {
    double total = 0.0;
    for (int64_t d = 0; d < depth_; ++d) {
      const double difference = static_cast<double>(rows_[a * depth_ + d]) - rows_[b * depth_ + d];
      total += difference * difference;
    }
    return total;
  };
  const size_t stride = (ids.size() / kClusterSample) | 1;  // odd, or it might see every other cluster only
  Ids sample, centres{ids[0]};
  for (size_t n = 0; n < ids.size(); n += stride) sample.push_back(ids[n]);
  std::vector<double> nearest(sample.size(), std::numeric_limits<double>::infinity());
  while (true) {
    for (size_t n = 0; n < sample.size(); ++n) {
      nearest[n] = std::min(nearest[n], distance2(sample[n], centres.back()));
    }
    const auto farthest = std::max_element(nearest.begin(), nearest.end());
    if (*farthest <= radius * radius) break;
    if (centres.size() == kMaxSegments) return {ids};
    centres.push_back(sample[farthest - nearest.begin()]);
  }
  std::vector<Ids> parts(centres.size());
  for (const int32_t id : ids) {
    size_t part = 0;
    double least = distance2(id, centres[0]);
    for (size_t c = 1; c < centres.size(); ++c) {
      const double other = distance2(id, centres[c]);
      if (other < least) least = other, part = c;
    }
    if (least > radius * radius) return {ids};
    parts[part].push_back(id);
  }
  return parts;
}

// The codes that can win: finite, and the first of its equals. Equal means the same bytes; codes that differ only in
// the sign of a zero stay, and tie.
Codebook::Ids Codebook::list_codes(int64_t count) const {
  const int64_t depth = depth_;
  const float* rows = rows_;
  const size_t row_bytes = static_cast<size_t>(depth) * sizeof(float);
  std::vector<uint64_t> hashes(count);  // 0: unusable
  parallel_for(0, count, ceil_div(kInlineWork, depth * 4 + 32),
               [&](int64_t begin, int64_t end) { kernels_.hash_rows(rows, depth, begin, end - begin, hashes.data()); });

  uint64_t slots = 16;
  while (slots < 2 * static_cast<uint64_t>(count)) slots *= 2;
  std::vector<int32_t> table(slots, -1);
  Ids ids;
  ids.reserve(count);
  for (int64_t k = 0; k < count; ++k) {
    if (hashes[k] == 0) continue;
    uint64_t slot = (hashes[k] >> 20) & (slots - 1);
    const auto equal = [&](int64_t other) {
      return hashes[other] == hashes[k] && std::memcmp(rows + other * depth, rows + k * depth, row_bytes) == 0;
    };
    while (table[slot] >= 0 && !equal(table[slot])) slot = (slot + 1) & (slots - 1);
    if (table[slot] >= 0) continue;
    table[slot] = static_cast<int32_t>(k);
    ids.push_back(static_cast<int32_t>(k));
  }
  return ids;
}

// The mean and the scale.
void Codebook::measure(PackedCodebook* segment, const Ids& ids) {
  const int64_t depth = depth_, count = segment->codes, parts = ceil_div(count, kMeasureCodes);
  std::vector<double> sums(parts * depth);
  std::vector<float> lows(parts * depth), highs(parts * depth);
  parallel_for(0, parts, ceil_div(kInlineWork, kMeasureCodes * depth * 2), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      kernels_.measure(rows_, depth, &ids[p * kMeasureCodes], std::min(kMeasureCodes, count - p * kMeasureCodes),
                       &sums[p * depth], &lows[p * depth], &highs[p * depth]);
    }
  });

  const int64_t padded = round_up(depth, kVectorDoubles);
  segment->mean = take<double>(padded);
  std::fill_n(segment->mean, padded, 0.0);
  double reach = 0.0, norm = 0.0;
  for (int64_t d = 0; d < depth; ++d) {
    double sum = 0.0, low = lows[d], high = highs[d];
    for (int64_t p = 0; p < parts; ++p) {
      sum += sums[p * depth + d];
      low = std::min<double>(low, lows[p * depth + d]), high = std::max<double>(high, highs[p * depth + d]);
    }
    const double mean = sum / static_cast<double>(count);
    segment->mean[d] = mean;
    norm += mean * mean;
    reach = std::max({reach, high - mean, mean - low});
  }
  segment->mean_norm = std::sqrt(norm);
  segment->scale = reach > 0.0 ? reach / kCodeMax : 1.0;
}

// Packs the codes of these ids as the next segment; returns -|r|^2/2 of each, null without an int8 pass.
Buffer<double> Codebook::add_segment(const Ids& ids) {
  PackedCodebook p{};
  p.depth = depth_;
  p.codes = static_cast<int64_t>(ids.size());
  p.first_group = groups();
  p.int8 = kernels_.step > 0 && depth_ <= kMaxInt8Depth;
  measure(&p, ids);
  const int64_t depth = p.depth, superblocks = ceil_div(p.codes, kernels_.superblock);
  p.padded = superblocks * kernels_.superblock;
  const int64_t groups = p.padded / kGroupCodes;
  p.ids = take<int32_t>(p.padded);
  for (int64_t n = 0; n < p.padded; ++n) p.ids[n] = ids[std::min(n, p.codes - 1)];
  p.rows = take<float>(p.padded * depth);
  p.half_norm = take<float>(p.padded);
  p.half_norm64 = take<double>(p.padded);
  Buffer<double> dots, norms;
  PackedParts parts{};
  if (p.int8) {
    p.steps = ceil_div(depth, kernels_.step);
    p.quantised = take<int8_t>(p.padded * p.steps * kernels_.step);
    p.offset = take<int32_t>(p.padded);
    p.mean_part = take<float>(p.padded);
    p.norm_part = take<float>(p.padded);
    p.group_residual = take<float>(groups);
    p.group_norm = take<float>(groups);
    dots = allocate<double>(p.padded), norms = allocate<double>(p.padded);
    parts = {dots.get(), norms.get()};
  }

  std::vector<double> largest(superblocks);
  const int64_t grain = ceil_div(kInlineWork, kernels_.superblock * depth * 8);
  parallel_for(0, superblocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) kernels_.pack(p, s, rows_, parts, &largest[s]);
  });
  p.max_norm = std::sqrt(-2.0 * *std::min_element(p.half_norm64, p.half_norm64 + p.padded)) * kInflate;
  if (!p.int8) {
    segments_.push_back(p);
    return norms;
  }

  p.max_quantised = std::sqrt(*std::max_element(largest.begin(), largest.end())) * kInflate;
  p.residual = *std::max_element(p.group_residual, p.group_residual + groups);
  p.norm = *std::max_element(p.group_norm, p.group_norm + groups);
  double dot = 0.0;
  const auto [least, most] = std::minmax_element(norms.get(), norms.get() + p.padded);
  for (int64_t n = 0; n < p.padded; ++n) dot = std::max(dot, std::fabs(dots[n]));
  p.mean_size = dot / p.scale;
  p.norm_middle = 0.5 * (*least + *most);
  p.norm_size = 0.5 * (*most - *least) * kInflate / p.scale;
  parallel_for(0, superblocks, ceil_div(kInlineWork, kernels_.superblock * 4), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) kernels_.pack_parts(p, s, parts);
  });
  segments_.push_back(p);
  return norms;
}

// ---- the ones kept ----

namespace {

struct Kept {
  Key key;
  const void* data;  // where its codes were: the next version of the same codebook takes its place
  std::shared_ptr<Codebook> codebook;
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
  std::shared_ptr<Codebook> old;
  {
    std::unique_lock<std::mutex> lock(shelf().mutex, std::try_to_lock);
    if (lock.owns_lock()) {
      auto& kept = shelf().kept;
      const auto found = std::find_if(kept.begin(), kept.end(), [&](const Kept& k) { return k.key == key; });
      if (found != kept.end()) {
        std::rotate(found, found + 1, kept.end());
        return kept.back().codebook;
      }
      // Its former version is of no more use: its memory is, unless a search of another thread still reads it.
      const auto former = std::find_if(kept.begin(), kept.end(), [&](const Kept& k) {
        return k.data == codes.data && k.key.count == count && k.key.depth == depth && k.key.kernels == &kernels;
      });
      if (former != kept.end()) {
        if (former->codebook.use_count() == 1) old = std::move(former->codebook);
        kept.erase(former);
      }
    }
  }

  auto packed = std::make_shared<Codebook>(codes, count, depth, kernels, std::move(old));
  if (packed->bytes() > kKeptBytes) return packed;
  std::vector<Kept> dropped;  // freed after the lock
  std::unique_lock<std::mutex> lock(shelf().mutex, std::try_to_lock);
  if (!lock.owns_lock()) return packed;
  auto& kept = shelf().kept;
  kept.push_back({key, codes.data, packed});
  int64_t total = 0;
  for (const Kept& k : kept) total += k.codebook->bytes();
  while (kept.size() > kKeptCodebooks || total > kKeptBytes) {
    total -= kept.front().codebook->bytes();
    dropped.push_back(std::move(kept.front()));
    kept.erase(kept.begin());
  }
  lock.unlock();
  return packed;
}

}  // namespace semhitok::cpu
