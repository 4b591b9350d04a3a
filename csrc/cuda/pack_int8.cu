// The int8 rows of the certified search (int8_codebook.cuh): the codes in packed tiles, the tokens row by row.
//
// Plan. Eight lanes a row, a lane four values at a time. Rows are read as fp32, and all arithmetic is in fp64;
// residuals and norms are measured, not estimated, and rounded up.
// Cost: the codebook and the tokens read once (L2 or 4.8 TB/s), a quarter of their bytes written: 6 us at N = 65,536,
// D = 32.
#include "int8_codebook.cuh"

namespace semhitok::cuda {
namespace {

constexpr int kWord = 4;  // values a lane packs at a time

constexpr int kMostWords = kMostInt8Steps * kInt8StepDepth / kWord / kTeam;  // of a lane
constexpr float kRoundUp = 1.000001f;
constexpr double kLeastScale = 1e-30, kMostScale = 1e30;  // outside, fp32 bounds would not hold: no certificate

struct Scales {
  double code, bias;  // s_c, tau
  int columns;
};

__device__ __forceinline__ Scales scales_of(const NearestCode& p, const CodebookStats& stats, int steps) {
  Scales s;
  s.code = stats.centred > 0.0f ? static_cast<double>(stats.centred) / kLargestInt8 : 1.0;
  s.columns = steps * kInt8StepDepth - static_cast<int>(p.depth);
  s.bias = p.metric == Metric::kL2 ? stats.bias / (s.code * kLargestInt8 * s.columns) : 0.0;
  return s;
}

__device__ __forceinline__ int clamp_int8(double value) {
  return static_cast<int>(min(max(rint(value), -static_cast<double>(kLargestInt8)), static_cast<double>(kLargestInt8)));
}

// Lane l of the team has value i of word w of a row at depth 4 * (l + 8 * w) + i; zero beyond the depth.
__device__ __forceinline__ int depth_of(int w, int i) { return kWord * (team_lane() + kTeam * w) + i; }

__device__ __forceinline__ void read_row(const Rows& rows, int64_t row, int64_t depth, int words,
                                         float (&x)[kMostWords][kWord]) {
#pragma unroll
  for (int w = 0; w < kMostWords; ++w) {
#pragma unroll
    for (int i = 0; i < kWord; ++i) {
      const int d = depth_of(w, i);
      x[w][i] = w < words && d < depth ? read<float>(rows, row * depth + d) : 0.0f;
    }
  }
}

__device__ __forceinline__ uint32_t pack_word(const int (&q)[kWord]) {
  return static_cast<uint32_t>(q[0] & 0xFF) | static_cast<uint32_t>(q[1] & 0xFF) << 8 |
         static_cast<uint32_t>(q[2] & 0xFF) << 16 | static_cast<uint32_t>(q[3] & 0xFF) << 24;
}

// Codes that cannot win, and places beyond the codes, are all zero, like the mean of all codes, which is never best.
__device__ __forceinline__ void pack_code(const NearestCode& p, const CertifiedScratch& scratch, int steps, int64_t k) {
  const Scales scales = scales_of(p, *scratch.stats, steps);
  const int words = steps * kInt8StepDepth / kWord / kTeam;
  float c[kMostWords][kWord] = {};
  if (k < p.num_codes) read_row(p.codebook, k, p.depth, words, c);
  float poison = 0.0f;
  double squared = 0.0;
#pragma unroll
  for (int w = 0; w < kMostWords; ++w) {
#pragma unroll
    for (int i = 0; i < kWord; ++i) {
      const int d = depth_of(w, i);
      const double r = d < p.depth ? c[w][i] - scratch.stats->mean[d] : 0.0;
      poison += c[w][i] * 0.0f;
      squared += r * r;
    }
  }
  const bool usable = team_sum(poison) == 0.0f && k < p.num_codes;
  const double bias = bias_of(p.metric, team_sum(squared)) - scratch.stats->mean_bias;
  const double bias_step = scales.bias * scales.code, inverse = 1.0 / scales.code;
  const int dealt = usable && bias_step > 0.0 ? static_cast<int>(rint(bias / bias_step)) : 0;

  double residual = 0.0, norm = 0.0;
  char* tile = scratch.codes + k / kTileCodes * int8_tile_bytes(steps);
#pragma unroll
  for (int w = 0; w < kMostWords; ++w) {
    int q[kWord];
#pragma unroll
    for (int i = 0; i < kWord; ++i) {
      const int d = depth_of(w, i);
      q[i] = 0;
      if (usable && w < words && d < p.depth) {
        const double r = c[w][i] - scratch.stats->mean[d];
        q[i] = clamp_int8(r * inverse);
        const double rounded = q[i] * scales.code;
        residual += (r - rounded) * (r - rounded);
        norm += rounded * rounded;
      } else if (usable && w < words) {  // column j of those beyond the depth: floor((dealt + j) / columns)
        const int lift = kLargestInt8 + 1;
        q[i] = (dealt + (d - static_cast<int>(p.depth)) + lift * scales.columns) / scales.columns - lift;
      }
    }
    const int byte = depth_of(w, 0);
    if (w < words) {
      *reinterpret_cast<uint32_t*>(tile + byte / kColumnBytes * kTileColumnBytes + k % kTileCodes * kColumnBytes +
                                   byte % kColumnBytes) = pack_word(q);
    }
  }
  residual = team_sum(residual);
  norm = team_sum(norm);
  if (usable && team_lane() == 0) {
    raise(&scratch.stats->residual, sqrt(residual));
    raise(&scratch.stats->norm, sqrt(norm));
    raise(&scratch.stats->bias_residual, fabs(bias - dealt * bias_step));
  }
}

__device__ __forceinline__ void pack_token(const NearestCode& p, const CertifiedScratch& scratch, int steps,
                                           int64_t token) {
  const CodebookStats& stats = *scratch.stats;
  const Scales scales = scales_of(p, stats, steps);
  const int words = steps * kInt8StepDepth / kWord / kTeam;
  float x[kMostWords][kWord] = {};
  if (token < p.tokens) read_row(p.z, token, p.depth, words, x);
  const double moved = p.metric == Metric::kL2 ? 1.0 : 0.0;  // times the mean: the origin of the token
  float poison = 0.0f;
  double largest = 0.0, norm = 0.0, offset = 0.0;
#pragma unroll
  for (int w = 0; w < kMostWords; ++w) {
#pragma unroll
    for (int i = 0; i < kWord; ++i) {
      const int d = depth_of(w, i);
      const double mean = d < p.depth ? stats.mean[d] : 0.0, value = x[w][i] - moved * mean;
      poison += x[w][i] * 0.0f;
      largest = max(largest, fabs(value));
      norm += value * value;
      offset += mean * (x[w][i] - 0.5 * moved * mean);
    }
  }
  largest = team_max(largest);
  const bool finite = team_sum(poison) == 0.0f;
  norm = team_sum(norm);
  offset = team_sum(offset);

  int multiple = 0;  // n: what the bias columns of the token hold
  if (scales.bias > 0.0) {
    const double most = kLargestInt8 * scales.bias / largest;  // infinite for a token of zeros
    multiple = most >= kLargestInt8 ? kLargestInt8 : static_cast<int>(most);
  }
  const double scale = multiple > 0 ? scales.bias / multiple : largest / kLargestInt8;
  const bool certifiable = scale > kLeastScale && scale < kMostScale && scales.code > kLeastScale &&
                           scales.code < kMostScale && stats.bias < kMostScale;
  const double inverse = 1.0 / scale;
  double residual = 0.0;
#pragma unroll
  for (int w = 0; w < kMostWords; ++w) {
    int q[kWord];
#pragma unroll
    for (int i = 0; i < kWord; ++i) {
      const int d = depth_of(w, i);
      const bool inside = d < p.depth;
      const double value = inside ? x[w][i] - moved * stats.mean[d] : 0.0;
      q[i] = !(finite && certifiable) ? 0 : inside ? clamp_int8(value * inverse) : multiple;
      const double rest = inside ? value - q[i] * scale : 0.0;
      residual += rest * rest;
    }
    if (w < words) {
      *reinterpret_cast<uint32_t*>(scratch.tokens + token * (steps * kInt8StepDepth) + depth_of(w, 0)) = pack_word(q);
    }
  }
  residual = team_sum(residual);
  if (team_lane() == 0 && token < p.tokens) {
    TokenInfo info;
    info.offset = offset + stats.mean_bias;
    info.inverse_scale = 1.0 / (scale * scales.code);
    info.norm = static_cast<float>(sqrt(norm)) * kRoundUp;
    info.residual = static_cast<float>(sqrt(residual)) * kRoundUp;
    info.dropped_bias = multiple > 0 ? 0.0f : stats.bias;
    info.state = !finite ? TokenState::kNotFinite : certifiable ? TokenState::kCertifiable : TokenState::kNoCertificate;
    scratch.info[token] = info;
  }
}

// The blocks of the codes come first.
__global__ void __launch_bounds__(kThreads)
    pack_int8_kernel(NearestCode p, CertifiedScratch scratch, int steps, int64_t code_blocks) {
  const int team = threadIdx.x / kTeam;
  if (blockIdx.x < code_blocks) {
    pack_code(p, scratch, steps, static_cast<int64_t>(blockIdx.x) * kTeamsPerBlock + team);
  } else {
    pack_token(p, scratch, steps, (blockIdx.x - code_blocks) * kTeamsPerBlock + team);
  }
}

}  // namespace

cudaError_t pack_int8(const NearestCode& p, const CertifiedScratch& scratch, cudaStream_t stream) {
  static_assert(kTileCodes % kTeamsPerBlock == 0 && kInt8TileTokens % kTeamsPerBlock == 0, "whole tiles");
  const int64_t code_blocks = int64_t{code_tiles(p)} * (kTileCodes / kTeamsPerBlock);
  const int64_t token_blocks = int64_t{scratch.shares.row_tiles} * (kInt8TileTokens / kTeamsPerBlock);
  return launch(pack_int8_kernel, static_cast<unsigned>(code_blocks + token_blocks), kThreads, 0, stream, p, scratch,
                int8_steps(p), code_blocks);
}

}  // namespace semhitok::cuda
