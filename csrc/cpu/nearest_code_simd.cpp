// Nearest code, fp32, one instruction set: packing a codebook and searching it for a block of tokens.
//
// Contract: score(t, k) = bias[k] + sum_d z[t][d] c[k][d], the sum in ascending d with one FMA (or multiply and add) a
// step, the same steps for every code wherever it stands, so that equal codes have equal scores. The winner is the
// lowest k of the greatest score. A token with NaN or Inf, or without any score above -inf, gets id 0 and score NaN.
//
// Plan. Codes sit in lanes: a block is two vectors of codes, a group kGroupBlocks blocks (16 KB at depth 32: it stays
// in L1 while all tokens of the block of tokens pass over it). The tile of kTileTokens x 2 vectors lives in registers;
// its epilogue is two max instructions a token, with no index: only the group of a lane's best score is kept. The
// winner's group is then scored again, with the same steps, to find the code in it.
// Cost: tokens * codes * depth FMAs, 1 / (number of groups) of it again for the second look; packing reads and writes
// the codebook once.
#include "convert.h"
#include "kernels.h"
#include "simd.h"

namespace semhitok::cpu::SEMHITOK_ISA {
namespace {

constexpr int kBlockCodes = 2 * kLanes;
constexpr int kGroupBlocks = 4;
constexpr int kGroupCodes = kGroupBlocks * kBlockCodes;
constexpr int kTokenBlock = 8 * kTileTokens;
constexpr int kScratchPerToken = 2 * kLanes;  // best score and its group, a lane each
constexpr float kInfinity = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");
static_assert(kTokenBlock % kTileTokens == 0, "a block of tokens is whole tiles");
static_assert(kTokenBlock % 16 == 0, "what follows the tokens in scratch stays aligned to 64 bytes");

void pack_group(const Rows& codebook, Metric metric, int64_t group, const PackedCodebook& out, float* row,
                float* max_abs, float* max_bias) {
  const int64_t depth = out.depth, first = group * kGroupCodes;
  float* packed = out.packed + first * depth;
  *max_abs = *max_bias = 0.0f;
  for (int64_t n = 0; n < kGroupCodes; ++n) {
    float* column = packed + (n / kBlockCodes) * kBlockCodes * depth + n % kBlockCodes;
    bool usable = first + n < out.codes;
    float bias = 0.0f, largest = 0.0f;
    if (usable) {
      const float* code;
      if (codebook.dtype == Dtype::kFloat32) {
        code = static_cast<const float*>(codebook.data) + (first + n) * depth;
      } else {
        read(codebook, (first + n) * depth, depth, row);
        code = row;
      }
      double norm = 0.0;
      float poison = 0.0f;  // NaN as soon as one component is NaN or Inf
      for (int64_t d = 0; d < depth; ++d) {
        const float c = code[d], a = c < 0.0f ? -c : c;
        column[d * kBlockCodes] = c;
        largest = a > largest ? a : largest;
        norm += static_cast<double>(c) * c;
        poison += c * 0.0f;
      }
      if (metric == Metric::kL2) bias = static_cast<float>(-0.5 * norm);
      usable = poison == poison && bias > -kInfinity;
    }
    if (!usable) {
      for (int64_t d = 0; d < depth; ++d) column[d * kBlockCodes] = 0.0f;
      bias = -kInfinity;
    } else {
      *max_abs = largest > *max_abs ? largest : *max_abs;
      *max_bias = -bias > *max_bias ? -bias : *max_bias;
    }
    out.bias[first + n] = bias;
  }
}

// best[r] = lane-wise maximum over the group's codes of the scores of tile token r. x is [depth][kTileTokens].
inline void group_maxima(const float* __restrict x, const float* __restrict codes, const float* __restrict bias,
                         int64_t depth, Vec best[kTileTokens]) {
  for (int r = 0; r < kTileTokens; ++r) best[r] = splat(-kInfinity);
  for (int b = 0; b < kGroupBlocks; ++b) {
    Vec acc0[kTileTokens], acc1[kTileTokens];
    const Vec bias0 = load(bias + b * kBlockCodes), bias1 = load(bias + b * kBlockCodes + kLanes);
    for (int r = 0; r < kTileTokens; ++r) acc0[r] = bias0, acc1[r] = bias1;
    const float* c = codes + b * kBlockCodes * depth;
    const float* xd = x;
    for (int64_t d = 0; d < depth; ++d, c += kBlockCodes, xd += kTileTokens) {
      const Vec c0 = load(c), c1 = load(c + kLanes);
      for (int r = 0; r < kTileTokens; ++r) {
        acc0[r] += xd[r] * c0;
        acc1[r] += xd[r] * c1;
      }
    }
    for (int r = 0; r < kTileTokens; ++r) best[r] = larger(larger(acc0[r], acc1[r]), best[r]);
  }
}

// Scores one token (x with stride kTileTokens) against a group and keeps the first greatest. NaN never wins.
inline void scan_group(const PackedCodebook& codebook, int64_t group, const float* x, float* score, int64_t* id) {
  const int64_t depth = codebook.depth, first = group * kGroupCodes;
  for (int b = 0; b < kGroupBlocks; ++b) {
    const int64_t start = first + b * kBlockCodes;
    const float* c = codebook.packed + start * depth;
    Vec acc0 = load(codebook.bias + start), acc1 = load(codebook.bias + start + kLanes);
    for (int64_t d = 0; d < depth; ++d, c += kBlockCodes) {
      const float xd = x[d * kTileTokens];
      acc0 += xd * load(c);
      acc1 += xd * load(c + kLanes);
    }
    float scores[kBlockCodes];
    store(scores, acc0);
    store(scores + kLanes, acc1);
    for (int n = 0; n < kBlockCodes; ++n) {
      if (scores[n] > *score) *score = scores[n], *id = start + n;
    }
  }
}

void search(const PackedCodebook& codebook, const Rows& z, int64_t first, int64_t count, float* scratch, float* scores,
            int64_t* ids) {
  const int64_t depth = codebook.depth;
  const int64_t tiles = ceil_div(count, kTileTokens), padded = tiles * kTileTokens;
  float* x = scratch;  // [tiles][depth][kTileTokens]
  Vec* top = reinterpret_cast<Vec*>(x + kTokenBlock * depth);
  IntVec* top_group = reinterpret_cast<IntVec*>(top + kTokenBlock);
  float* row = reinterpret_cast<float*>(top_group + kTokenBlock);
  enum Kind : unsigned char { kPlain, kCareful, kBad };
  Kind kind[kTokenBlock];

  // A token whose scores cannot overflow takes the fast path, where no NaN can arise; a finite one that could is
  // scanned code by code, and one with NaN or Inf is answered at once.
  const double reach = codebook.max_abs, base = codebook.max_bias;
  for (int64_t t = 0; t < padded; ++t) {
    float* xt = x + (t / kTileTokens) * kTileTokens * depth + t % kTileTokens;
    double size = 0.0;
    if (t < count) {
      read(z, (first + t) * depth, depth, row);
    } else {
      for (int64_t d = 0; d < depth; ++d) row[d] = 0.0f;
    }
    for (int64_t d = 0; d < depth; ++d) {
      xt[d * kTileTokens] = row[d];
      size += row[d] < 0.0f ? -static_cast<double>(row[d]) : static_cast<double>(row[d]);
    }
    const bool finite = size < static_cast<double>(kInfinity);
    kind[t] = !finite ? kBad : size * reach + base < 3.0e38 ? kPlain : kCareful;
  }

  for (int64_t t = 0; t < padded; ++t) top[t] = splat(-kInfinity), top_group[t] = IntVec{};
  for (int64_t group = 0; group < codebook.groups; ++group) {
    const float* codes = codebook.packed + group * kGroupCodes * depth;
    const float* bias = codebook.bias + group * kGroupCodes;
    const IntVec index = IntVec{} + static_cast<int32_t>(group);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      Vec best[kTileTokens];
      group_maxima(x + tile * kTileTokens * depth, codes, bias, depth, best);
      Vec* tile_top = top + tile * kTileTokens;
      IntVec* tile_group = top_group + tile * kTileTokens;
      for (int r = 0; r < kTileTokens; ++r) {
        const IntVec wins = best[r] > tile_top[r];
        tile_top[r] = wins ? best[r] : tile_top[r];
        tile_group[r] = wins ? index : tile_group[r];
      }
    }
  }

  for (int64_t t = 0; t < count; ++t) {
    const float* xt = x + (t / kTileTokens) * kTileTokens * depth + t % kTileTokens;
    float best = -kInfinity;
    int64_t id = 0;
    if (kind[t] == kPlain) {
      int32_t group = 0;
      for (int l = 0; l < kLanes; ++l) {
        const float s = top[t][l];
        const int32_t g = top_group[t][l];
        if (s > best || (s == best && g < group)) best = s, group = g;
      }
      best = -kInfinity;
      scan_group(codebook, group, xt, &best, &id);
    } else if (kind[t] == kCareful) {
      for (int64_t group = 0; group < codebook.groups; ++group) scan_group(codebook, group, xt, &best, &id);
    }
    scores[t] = best > -kInfinity ? best : kNaN;
    ids[t] = id;
  }
}

}  // namespace

void subcode(const NearestSubcode&, int64_t, int64_t, const int64_t*, float*, float*, int64_t*);

extern const Kernels table;
const Kernels table = {kTokenBlock, kGroupCodes, kScratchPerToken, pack_group, search, subcode};

}  // namespace semhitok::cpu::SEMHITOK_ISA
