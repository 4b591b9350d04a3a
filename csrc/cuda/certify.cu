// The second pass of the certified search (int8_codebook.cuh): from the kept slices to exact ids.
//
// Contract: id and score of every token, the score an fp64 sum rounded once, the lowest id among equal fp64 scores; or
// the token goes on the list of those without a certificate. rescored: how many codes were scored in fp64, -1 for a
// token on the list.
//
// Plan. Eight lanes a token, so that a warp has four chains of loads in flight. The best slice is scored again in int8,
// four codes a lane. Its greatest A gives an exact score, and this a threshold for A. If the last key of every lane is
// below the threshold, all codes at or above it, in any kept slice, are scored in fp64.
// Cost a token at D = 32: about 1.7 slices of 1 KiB and 1.7 codes of 128 bytes from L2; 150 MB at N = 65,536, K =
// 16,384, 27 us at 5.5 TB/s.
#include <climits>
#include <cmath>

#include "int8_codebook.cuh"

namespace semhitok::cuda {
namespace {

constexpr int kBlocksPerMultiprocessor = 2;  // three would spill
constexpr int kCodesPerLane = kSliceCodes / kTeam;
constexpr double kExactRounding = 1e-12;  // of fp64 sums, times |x||c|: far more than their rounding
constexpr double kMostThreshold = 1 << 30;
static_assert(kSliceCodes % kTeam == 0, "every lane has as many codes");

template <typename T>
__device__ __forceinline__ T team_get(T value, int lane) {
  return __shfl_sync(team_mask(), value, lane, kTeam);
}
// A bit for every lane of the team.
__device__ __forceinline__ unsigned team_vote(bool yes) {
  return __ballot_sync(team_mask(), yes) >> (threadIdx.x % kWarp / kTeam * kTeam) & 0xFF;
}

// Where code number `code` of a slice stands in its tile.
__device__ __forceinline__ int slice_column(int lane, int code) { return code / 2 * 8 + 2 * lane + code % 2; }

struct Slice {
  int64_t tile;
  int lane;
};

// The slice that key number e of a token names.
__device__ __forceinline__ Slice slice_of(const CertifiedScratch& scratch, int e, int32_t key, int bits) {
  const int split = e / (kSliceLanes * kKeys);
  const int32_t place = key & ((1 << bits) - 1);
  return {int64_t{split} * scratch.shares.tiles_per_split + place, e / kKeys % kSliceLanes};
}

// A of this lane's codes of a slice: numbers lane, lane + 8, ...
__device__ __forceinline__ void score_slice(const CertifiedScratch& scratch, const Slice& slice, int steps,
                                            const char* token, int (&scores)[kCodesPerLane]) {
  const char* tile = scratch.codes + slice.tile * int8_tile_bytes(steps);
#pragma unroll
  for (int i = 0; i < kCodesPerLane; ++i) scores[i] = 0;
#pragma unroll 2
  for (int column = 0; column < 2 * steps; ++column) {
    const int4 x = *reinterpret_cast<const int4*>(token + column * kColumnBytes);
#pragma unroll
    for (int i = 0; i < kCodesPerLane; ++i) {
      const int4 c = *reinterpret_cast<const int4*>(tile + column * kTileColumnBytes +
                                                    slice_column(slice.lane, team_lane() + kTeam * i) * kColumnBytes);
      scores[i] = __dp4a(x.x, c.x, __dp4a(x.y, c.y, __dp4a(x.z, c.z, __dp4a(x.w, c.w, scores[i]))));
    }
  }
}

// The score of a code in fp64, NaN if the code holds NaN or Inf.
__device__ __forceinline__ double exact_score(const NearestCode& p, int64_t token, int64_t k) {
  double dot = 0.0, squared = 0.0, poison = 0.0;
  for (int64_t d = team_lane(); d < p.depth; d += kTeam) {
    const double c = read<float>(p.codebook, k * p.depth + d);
    dot += read<float>(p.z, token * p.depth + d) * c;
    squared += c * c;
    poison += c * 0.0;
  }
  return team_sum(dot) + bias_of(p.metric, team_sum(squared)) + team_sum(poison);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    certify_kernel(NearestCode p, CertifiedScratch scratch, int steps, double root_depth, double bound_scale,
                   int64_t* rescored) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTeamsPerBlock + threadIdx.x / kTeam;
  if (token >= p.tokens) return;
  const int lane = team_lane(), bits = key_tile_bits(steps);
  const TokenInfo info = scratch.info[token];
  const CodebookStats& stats = *scratch.stats;
  const char* x = scratch.tokens + token * (steps * kInt8StepDepth);
  const int entries = scratch.shares.splits * kSliceLanes * kKeys;
  const int64_t rows = int64_t{scratch.shares.row_tiles} * kInt8TileTokens;
  const auto key_at = [&](int e) {  // INT_MIN: no slice
    const int split = e / (kSliceLanes * kKeys);
    return scratch.keys[(split * rows + token) * (kSliceLanes * kKeys) + e % (kSliceLanes * kKeys)];
  };

  double best = -infinity(double());
  int64_t id = 0, counted = 0;
  const auto consider = [&](int64_t k) {
    const double score = exact_score(p, token, k);
    ++counted;
    if (score > best || (score == best && k < id)) best = score, id = k;
  };

  bool certified = info.state == TokenState::kCertifiable;
  if (certified) {
    // The slice of greatest A, the first of such keys; then its best code, the lowest id of such.
    int64_t first = INT64_MIN;
    for (int e = lane; e < entries; e += kTeam) {
      const int64_t ordered = (int64_t{key_at(e)} >> bits) * (int64_t{1} << 32) + (INT_MAX - e);
      first = max(first, ordered);
    }
    first = team_max(first);
    const int best_entry = INT_MAX - static_cast<int>(first & 0xFFFFFFFF);
    const Slice slice = slice_of(scratch, best_entry, key_at(best_entry), bits);
    int scores[kCodesPerLane];
    score_slice(scratch, slice, steps, x, scores);
    int64_t top = INT64_MIN;
#pragma unroll
    for (int i = 0; i < kCodesPerLane; ++i) {
      const int64_t k = slice.tile * kTileCodes + slice_column(slice.lane, lane + kTeam * i);
      if (k < p.num_codes) top = max(top, int64_t{scores[i]} * (int64_t{1} << 32) + (INT_MAX - k));
    }
    top = team_max(top);
    if (top != INT64_MIN) consider(INT_MAX - (top & 0xFFFFFFFF));
    const double longest = stats.largest * root_depth;  // no code is longer; nor is the mean, nor x beyond y and mean
    const double size = (info.norm + (p.metric == Metric::kL2 ? longest : 0.0)) * longest;
    const double bound = bound_scale * (double{info.norm} * stats.residual + double{info.residual} * stats.norm +
                                        stats.bias_residual + info.dropped_bias) +
                         kExactRounding * size;
    const double lowest = floor((best - info.offset - bound) * info.inverse_scale);
    const int32_t threshold = static_cast<int32_t>(max(min(lowest, kMostThreshold), -kMostThreshold));
    bool dropped = !(best > -infinity(double()));  // nothing to compare with
    for (int e = lane * kKeys + kKeys - 1; e < entries; e += kTeam * kKeys) {
      dropped |= key_at(e) != INT_MIN && key_at(e) >> bits >= threshold;
    }
    certified = team_vote(dropped) == 0;

    const int64_t seen = id;
    Slice current = slice;
    int base = -kTeam;  // the keys of the whole team, eight at a time; a vote for each slice that may hold a winner
    int32_t key = INT_MIN;
    unsigned votes = 0;
    while (certified) {
      unsigned able = 0;  // bit n: code n of the slice
#pragma unroll
      for (int i = 0; i < kCodesPerLane; ++i) able |= team_vote(scores[i] >= threshold) << (kTeam * i);
      for (; able != 0; able &= able - 1) {
        const int64_t k = current.tile * kTileCodes + slice_column(current.lane, __ffs(able) - 1);
        if (k < p.num_codes && k != seen) consider(k);
      }
      while (votes == 0 && (base += kTeam) < entries) {
        const int e = base + lane;
        key = e < entries && e != best_entry ? key_at(e) : INT_MIN;
        votes = team_vote(key != INT_MIN && key >> bits >= threshold);
      }
      if (votes == 0) break;
      const int voter = __ffs(votes) - 1;
      votes &= votes - 1;
      current = slice_of(scratch, base + voter, team_get(key, voter), bits);
      score_slice(scratch, current, steps, x, scores);
    }
  }
  if (lane != 0) return;
  if (!certified && info.state != TokenState::kNotFinite) {
    scratch.list[atomicAdd(&scratch.stats->uncertified, 1)] = static_cast<int32_t>(token);
    if (rescored) rescored[token] = -1;
    return;
  }
  const bool any = best > -infinity(double());
  static_cast<float*>(p.scores)[token] = any ? static_cast<float>(best) : nan_of(float());
  p.ids[token] = any ? id : 0;
  if (rescored) rescored[token] = counted;
}

}  // namespace

cudaError_t certify(const NearestCode& p, const CertifiedScratch& scratch, const SearchOptions& options,
                    cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(p.tokens, kTeamsPerBlock));
  return launch(certify_kernel, blocks, kThreads, 0, stream, p, scratch, int8_steps(p),
                std::sqrt(static_cast<double>(p.depth)), options.bound_scale, options.rescored);
}

}  // namespace semhitok::cuda
