// The fp32 first pass, for one instruction set: fp32 scores of every token with every code, kept as lane-wise maxima of
// units of 128 codes. It is used if there is no int8 pass, beyond its depth, and for the tokens it cannot settle.
//
// Contract: the score of code k is half_norm[k] (l2) or 0, plus the products in ascending depth, one FMA (or multiply
// and add) a step: within (depth + 2) 2^-24 (sum |x c| + |half_norm|) of the exact one while nothing overflows.
//
// Plan. Each code has a lane, the 16 of a panel side by side. The tile of kTileTokens x 2 vectors is in registers; two
// max instructions a token end it. A unit is 16 KB at depth 32: it stays in L1 for all tiles of tokens.
// Cost: tokens * padded * depth FMAs.
#include "passes.h"

namespace semhitok::cpu::SEMHITOK_ISA {
namespace {

constexpr int kTile = kTileTokens;
constexpr int kUnitVectors = static_cast<int>(kUnitCodes) / kLanes;
constexpr int kPanelVectors = static_cast<int>(kPanelCodes) / kLanes;
static_assert(kPanelVectors * kLanes == kPanelCodes && kUnitVectors % 2 == 0, "a unit is pairs of whole vectors");

inline const float* vector_of(const float* unit, int v, int64_t depth) {
  return unit + (v / kPanelVectors) * kPanelCodes * depth + (v % kPanelVectors) * kLanes;
}

inline void unit_maxima(const float* __restrict x, const float* __restrict unit, const float* __restrict bias,
                        int64_t depth, Vec best[kTile]) {
  for (int v = 0; v < kUnitVectors; v += 2) {
    Vec acc0[kTile], acc1[kTile];
    const Vec bias0 = bias ? load(bias + v * kLanes) : Vec{}, bias1 = bias ? load(bias + (v + 1) * kLanes) : Vec{};
    for (int r = 0; r < kTile; ++r) acc0[r] = bias0, acc1[r] = bias1;
    const float* a = vector_of(unit, v, depth);
    const float* b = vector_of(unit, v + 1, depth);
    const float* xd = x;
    for (int64_t d = 0; d < depth; ++d, a += kPanelCodes, b += kPanelCodes, xd += kTile) {
      const Vec c0 = load(a), c1 = load(b);
      for (int r = 0; r < kTile; ++r) {
        acc0[r] += xd[r] * c0;
        acc1[r] += xd[r] * c1;
      }
    }
    for (int r = 0; r < kTile; ++r) {
      const Vec both = larger(acc0[r], acc1[r]);
      best[r] = v == 0 ? both : larger(best[r], both);
    }
  }
}

}  // namespace

void fp32_pass(const PackedCodebook& codebook, bool l2, int64_t first_unit, int64_t units, const float* tiles,
               int64_t tile_count, float* maxima, int64_t stride, Vec* top) {
  const int64_t depth = codebook.depth;
  for (int64_t u = 0; u < units; ++u) {
    const int64_t first = (first_unit + u) * kUnitCodes;
    for (int64_t tile = 0; tile < tile_count; ++tile) {
      Vec best[kTile];
      const float* bias = l2 ? codebook.half_norm + first : nullptr;
      unit_maxima(tiles + tile * depth * kTile, codebook.rows + first * depth, bias, depth, best);
      for (int r = 0; r < kTile; ++r) {
        const int64_t t = tile * kTile + r;
        store(maxima + t * stride + u * kLanes, best[r]);
        top[t] = larger(top[t], best[r]);
      }
    }
  }
}

}  // namespace semhitok::cpu::SEMHITOK_ISA
