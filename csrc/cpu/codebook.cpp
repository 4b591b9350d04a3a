// Packs a codebook for the search.
//
// One pass finds the codes that can win: those without NaN and Inf that are not copies of earlier ones. One finds their
// mean and range, and one writes them (codebook_simd.cpp), each in parallel. Codes whose distances from the mean differ
// widely, or that form a few tight clusters, are divided into parts, each with its own mean and scale: a single scale
// would round away the differences between close codes.
#include "codebook.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>

#include "convert.h"

namespace semhitok::cpu {
namespace {

constexpr int64_t kMeasureCodes = 1024;  // measured by one thread at a time
constexpr double kInflate = 1.0 + 1e-6;  // more than rounding takes from a norm
constexpr int64_t kCodeMax = 127;
constexpr double kPartRatio = 8.0;      // between the largest distances from the mean of two parts
constexpr size_t kClusterSample = 256;  // codes looked at before all are
constexpr int64_t kPartShare = 32;      // every part but the first has at least 1/kPartShare of the codes
constexpr int64_t kMinSuperblocks = 8;  // a codebook of fewer superblocks is one part

}  // namespace

template <typename T>
T* Codebook::take(int64_t count) {
  const int64_t bytes = std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T));
  bytes_ += bytes;
  const auto fits = [&](const Array& array) { return array.bytes == bytes; };
  const auto reused = std::find_if(spare_.begin(), spare_.end(), fits);
  if (reused != spare_.end()) {
    arrays_.push_back(std::move(*reused));
    spare_.erase(reused);
  } else {
    arrays_.push_back({allocate<char>(bytes), bytes});
  }
  return reinterpret_cast<T*>(arrays_.back().memory.get());
}

Codebook::Codebook(const Rows& codes, int64_t count, int64_t depth, const Kernels& kernels,
                   std::shared_ptr<Codebook> former)
    : kernels_(kernels), depth_(depth) {
  if (former != nullptr) spare_ = std::move(former->arrays_);
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
    const Buffer<double> norms = add_part(ids);
    const std::vector<Ids> parts = split(ids, norms.get());
    if (parts.size() > 1) {
      std::move(arrays_.begin(), arrays_.end(), std::back_inserter(spare_));
      arrays_.clear(), parts_.clear(), bytes_ = 0;
      for (const Ids& part : parts) add_part(part);
    }
  }
  spare_.clear();
  rows_ = nullptr;
}

// Divides the ids into the parts to be searched one by one: bands of distance from the mean, farthest first, or a few
// tight clusters; one part if the codes are alike. norms: -distance^2/2 of each id, null without an int8 pass.
std::vector<Codebook::Ids> Codebook::split(const Ids& ids, const double* norms) const {
  const int64_t count = static_cast<int64_t>(ids.size());
  if (norms == nullptr || count < kMinSuperblocks * kernels_.superblock) return {ids};
  const double most = -*std::min_element(norms, norms + count);
  const auto band_of = [&](double norm) {
    const double ratio = std::sqrt(most / std::max(-norm, most * 1e-30));
    return std::min<int64_t>(static_cast<int64_t>(std::log(ratio) / std::log(kPartRatio)), kMaxParts - 1);
  };
  int64_t counts[kMaxParts] = {}, part_of[kMaxParts] = {};
  for (int64_t n = 0; n < count; ++n) {
    if (-norms[n] * kPartRatio * kPartRatio < most) ++counts[band_of(norms[n])];
  }
  for (int64_t band = 1; band < kMaxParts; ++band) {
    part_of[band] = part_of[band - 1] + (counts[band] * kPartShare >= count);
  }
  if (part_of[kMaxParts - 1] == 0) return clusters(ids, std::sqrt(2.0 * most) / kPartRatio);
  std::vector<Ids> parts(part_of[kMaxParts - 1] + 1);
  for (int64_t n = 0; n < count; ++n) parts[part_of[band_of(norms[n])]].push_back(ids[n]);
  return parts;
}

// At most kMaxParts clusters with every code within `radius` of its cluster's centre, or else all ids in one. Centres
// are chosen farthest first from a sample, which costs next to nothing if there are no such clusters.
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
    if (centres.size() == kMaxParts) return {ids};
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

// Sets the mean and the scale.
void Codebook::measure(PackedCodebook* part, const Ids& ids) {
  const int64_t depth = depth_, count = part->num_codes, chunks = ceil_div(count, kMeasureCodes);
  std::vector<double> sums(chunks * depth);
  std::vector<float> lows(chunks * depth), highs(chunks * depth);
  parallel_for(0, chunks, ceil_div(kInlineWork, kMeasureCodes * depth * 2), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      kernels_.measure(rows_, depth, &ids[c * kMeasureCodes], std::min(kMeasureCodes, count - c * kMeasureCodes),
                       &sums[c * depth], &lows[c * depth], &highs[c * depth]);
    }
  });

  const int64_t padded = round_up(depth, kVectorDoubles);
  part->mean = take<double>(padded);
  std::fill_n(part->mean, padded, 0.0);
  double reach = 0.0, norm = 0.0;
  for (int64_t d = 0; d < depth; ++d) {
    double sum = 0.0, low = lows[d], high = highs[d];
    for (int64_t c = 0; c < chunks; ++c) {
      sum += sums[c * depth + d];
      low = std::min<double>(low, lows[c * depth + d]), high = std::max<double>(high, highs[c * depth + d]);
    }
    const double mean = sum / static_cast<double>(count);
    part->mean[d] = mean;
    norm += mean * mean;
    reach = std::max({reach, high - mean, mean - low});
  }
  part->mean_norm = std::sqrt(norm);
  part->scale = reach > 0.0 ? reach / kCodeMax : 1.0;
}

// Packs the codes with these ids as the next part; returns -|r|^2/2 of each, null without an int8 pass.
Buffer<double> Codebook::add_part(const Ids& ids) {
  PackedCodebook p{};
  p.depth = depth_;
  p.num_codes = static_cast<int64_t>(ids.size());
  if (!parts_.empty()) p.first_panel = parts_.back().first_panel + parts_.back().padded / kPanelCodes;
  p.int8 = kernels_.step > 0 && depth_ <= kMaxInt8Depth;
  measure(&p, ids);
  const int64_t depth = p.depth, superblocks = ceil_div(p.num_codes, kernels_.superblock);
  p.padded = superblocks * kernels_.superblock;
  const int64_t panels = p.padded / kPanelCodes;
  p.ids = take<int32_t>(p.padded);
  for (int64_t n = 0; n < p.padded; ++n) p.ids[n] = ids[std::min(n, p.num_codes - 1)];
  p.rows = take<float>(p.padded * depth);
  p.half_norm = take<float>(p.padded);
  p.half_norm64 = take<double>(p.padded);
  Buffer<double> dots, norms;
  BiasTerms terms{};
  if (p.int8) {
    p.steps = ceil_div(depth, kernels_.step);
    p.quantised = take<int8_t>(p.padded * p.steps * kernels_.step);
    p.offset = take<int32_t>(p.padded);
    p.mean_term = take<float>(p.padded);
    p.norm_term = take<float>(p.padded);
    p.panel_residual = take<float>(panels);
    p.panel_norm = take<float>(panels);
    dots = allocate<double>(p.padded), norms = allocate<double>(p.padded);
    terms = {dots.get(), norms.get()};
  }

  std::vector<double> largest(superblocks);
  const int64_t grain = ceil_div(kInlineWork, kernels_.superblock * depth * 8);
  parallel_for(0, superblocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) kernels_.pack(p, s, rows_, terms, &largest[s]);
  });
  p.max_norm = std::sqrt(-2.0 * *std::min_element(p.half_norm64, p.half_norm64 + p.padded)) * kInflate;
  if (!p.int8) {
    parts_.push_back(p);
    return norms;
  }

  p.max_quantised = std::sqrt(*std::max_element(largest.begin(), largest.end())) * kInflate;
  p.residual = *std::max_element(p.panel_residual, p.panel_residual + panels);
  p.norm = *std::max_element(p.panel_norm, p.panel_norm + panels);
  double dot = 0.0;
  const auto [least, most] = std::minmax_element(norms.get(), norms.get() + p.padded);
  for (int64_t n = 0; n < p.padded; ++n) dot = std::max(dot, std::fabs(dots[n]));
  p.mean_size = dot / p.scale;
  p.norm_middle = 0.5 * (*least + *most);
  p.norm_size = 0.5 * (*most - *least) * kInflate / p.scale;
  parallel_for(0, superblocks, ceil_div(kInlineWork, kernels_.superblock * 4), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) kernels_.pack_terms(p, s, terms);
  });
  parts_.push_back(p);
  return norms;
}

}  // namespace semhitok::cpu
