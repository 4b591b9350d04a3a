// Nearest sub-code, fp32, one instruction set: each token searches the one sub-codebook its group names.
//
// Contract: score(t, j) = z[t].c[j] + bias, c = sub_codebooks[group[t]]; the lowest j of the greatest score wins. id 0
// and score NaN for a group out of range, a token with NaN or Inf, or no score above -inf.
//
// Plan. No packing: a sub-codebook is one contiguous row of subcodes * depth values, read once. Lanes run over the
// depth in two accumulators, one for z.c and one for |c|^2; a horizontal sum ends each sub-code. Rows of tokens ahead
// are prefetched, because their addresses are random in a table larger than the caches.
// Cost: tokens * subcodes * depth FMAs twice over, tokens * subcodes * depth values read.
#include "convert.h"
#include "kernels.h"
#include "simd.h"

namespace semhitok::cpu::SEMHITOK_ISA {
namespace {

constexpr int64_t kPrefetchTokens = 3;
constexpr int64_t kPrefetchBytes = 4096;
constexpr int64_t kLineBytes = 64;
static_assert(16 % kLanes == 0, "scratch rows are padded to 16 floats");

inline float sum(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

inline void prefetch_row(const char* row, int64_t bytes) {
  bytes = bytes < kPrefetchBytes ? bytes : kPrefetchBytes;
  for (int64_t b = 0; b < bytes; b += kLineBytes) __builtin_prefetch(row + b);
}

}  // namespace

void subcode(const NearestSubcode& p, int64_t first, int64_t count, const int64_t* group, float* scratch, float* scores,
             int64_t* ids) {
  constexpr float kInfinity = __builtin_inff();
  const int64_t depth = p.depth, whole = depth / kLanes * kLanes, padded = (depth + 15) / 16 * 16;
  const int64_t row_bytes = p.subcodes * depth * element_size(p.sub_codebooks.dtype);
  const char* table = static_cast<const char*>(p.sub_codebooks.data);
  const bool direct = p.sub_codebooks.dtype == Dtype::kFloat32;
  float* x = scratch;
  float* row = scratch + padded;
  for (int64_t d = 0; d < padded; ++d) x[d] = row[d] = 0.0f;

  for (int64_t t = 0; t < count; ++t) {
    if (t + kPrefetchTokens < count) {
      const int64_t ahead = group[t + kPrefetchTokens];
      if (ahead >= 0 && ahead < p.groups) prefetch_row(table + ahead * row_bytes, row_bytes);
    }
    const int64_t g = group[t];
    read(p.z, (first + t) * depth, depth, x);
    float poison = 0.0f;  // NaN as soon as one component is NaN or Inf
    for (int64_t d = 0; d < depth; ++d) poison += x[d] * 0.0f;

    float best = -kInfinity;
    int64_t id = 0;
    if (poison == 0.0f && g >= 0 && g < p.groups) {
      for (int64_t j = 0; j < p.subcodes; ++j) {
        const int64_t offset = (g * p.subcodes + j) * depth;
        const float* c = row;
        if (direct) {
          c = static_cast<const float*>(p.sub_codebooks.data) + offset;
        } else {
          read(p.sub_codebooks, offset, depth, row);
        }
        Vec dot{}, norm{}, bad{};
        for (int64_t d = 0; d < whole; d += kLanes) {
          const Vec v = load(c + d);
          dot += load(x + d) * v;
          norm += v * v;
          bad += v * 0.0f;
        }
        if (whole < depth) {
          Vec v{};
          __builtin_memcpy(&v, c + whole, (depth - whole) * sizeof(float));
          dot += load(x + whole) * v;
          norm += v * v;
          bad += v * 0.0f;
        }
        const float bias = p.metric == Metric::kL2 ? -0.5f * sum(norm) : 0.0f;
        const float score = sum(dot) + bias + sum(bad);
        if (score > best) best = score, id = j;
      }
    }
    scores[t] = best > -kInfinity ? best : __builtin_nanf("");
    ids[t] = id;
  }
}

}  // namespace semhitok::cpu::SEMHITOK_ISA
