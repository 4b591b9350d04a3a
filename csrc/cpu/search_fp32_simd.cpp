// The fp32 stage of a search, for one instruction set: for tokens without an int8 pass, or that it left. The bound is
// the rounding of fp32. Tokens for which even this keeps most of the codes are left, to be scored exactly with all
// codes.
//
// Contract of the pass: the score of code k is half_norm[k] (l2) or 0, plus the products in ascending depth, one FMA
// (or multiply and add) a step: within (depth + 2) 2^-24 (sum |x c| + |half_norm|) of the exact one while nothing
// overflows.
// Plan. Each code has a lane, the 16 of a panel side by side. The tile of kTile x 2 vectors is in registers; two max
// instructions a token end it. A unit is 16 KB at depth 32: it stays in L1 for all tiles of tokens.
// Cost: tokens * padded * depth FMAs.
#include "search_simd.h"

namespace semhitok::cpu::SEMHITOK_ISA {
namespace {

constexpr int64_t kShortList = 48;  // so few slots are scored, whatever their share of all
constexpr double kEps32 = 0x1p-24;
constexpr int kUnitVectors = static_cast<int>(kUnitCodes) / kLanes;
constexpr int kPanelLanes = static_cast<int>(kPanelCodes) / kLanes;  // vectors of a panel
static_assert(kPanelLanes * kLanes == kPanelCodes && kUnitVectors % 2 == 0, "a unit is pairs of whole vectors");

inline const float* vector_of(const float* unit, int v, int64_t depth) {
  return unit + (v / kPanelLanes) * kPanelCodes * depth + (v % kPanelLanes) * kLanes;
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

// Multiplies tiles [tile][depth][kTile] of tokens with a stretch of units; l2 adds half_norm. Not inlined, so that the
// loop above has the registers for itself.
__attribute__((noinline)) void fp32_pass(const PackedCodebook& codebook, bool l2, int64_t first_unit, int64_t units,
                                         const float* tiles, int64_t tile_count, float* maxima, Vec* top) {
  const int64_t depth = codebook.depth;
  for (int64_t u = 0; u < units; ++u) {
    const int64_t first = (first_unit + u) * kUnitCodes;
    for (int64_t tile = 0; tile < tile_count; ++tile) {
      Vec best[kTile];
      const float* bias = l2 ? codebook.half_norm + first : nullptr;
      unit_maxima(tiles + tile * depth * kTile, codebook.rows + first * depth, bias, depth, best);
      for (int r = 0; r < kTile; ++r) {
        const int64_t t = tile * kTile + r;
        store(maxima + t * kStride + u * kLanes, best[r]);
        top[t] = larger(top[t], best[r]);
      }
    }
  }
}

// The bound of the fp32 pass: the rounding of each step, and results below the normal range.
inline double fp32_bound(const PackedCodebook& book, bool l2, const Token& token, double scale) {
  const double reach = token.norm * book.max_norm + (l2 ? 0.5 * book.max_norm * book.max_norm : 0.0);
  return scale * static_cast<double>(book.depth + 3) * (kEps32 * kRelative * reach + 0x1p-125);
}

void settle_fp32(const PackedCodebook& book, bool l2, const double* x, const float* maxima, int64_t first_unit,
                 int64_t slots, float most, double scale, int32_t* list, Token* token) {
  const double bound = fp32_bound(book, l2, *token, scale);
  const auto rounded_down = [](double value) {
    return static_cast<float>(value - __builtin_fabs(value) * 0x1p-23 - 0x1p-140);
  };
  const auto rescore_unit = [&](int64_t unit) {
    for (int64_t g = 0; g < kUnitPanels; ++g) rescore(book, l2, (first_unit + unit) * kUnitPanels + g, x, token);
  };
  double low = most - 2.0 * bound;
  if (token->best - bound > low) low = token->best - bound;
  int64_t count = scan(maxima, slots, rounded_down(low), list);
  if (count == 0) return;
  if (count > kShortList && count > slots / 4) {
    token->kind = Kind::kExact;
    return;
  }
  int64_t first = list[0];
  for (int64_t i = 1; i < count; ++i) first = maxima[list[i]] > maxima[first] ? list[i] : first;
  first /= kLanes;
  rescore_unit(first);
  for (int64_t i = 0, last = first; i < count; ++i) {
    const int64_t unit = list[i] / kLanes;
    if (unit == first || unit == last || maxima[list[i]] + bound < token->best) continue;
    rescore_unit(unit);
    last = unit;
  }
}

}  // namespace

void search_fp32(const PackedCodebook& book, bool l2, int64_t count, const SearchOptions& options, int64_t first,
                 const Scratch& scratch, Token* tokens) {
  const int64_t depth = book.depth, padded = round_up(depth, kVectorDoubles);
  int32_t order[kTokenBlock];
  int64_t searched = 0;
  for (int64_t t = 0; t < count; ++t) {
    if (tokens[t].kind == Kind::kFp32) order[searched++] = static_cast<int32_t>(t);
  }
  if (searched == 0) return;
  const int64_t tile_count = ceil_div(searched, kTile);
  float* tiles = reinterpret_cast<float*>(scratch.tiles);
  for (int64_t t = 0; t < tile_count * kTile; ++t) {
    float* out = tiles + t / kTile * kTile * depth + t % kTile;
    const double* x = scratch.x + (t < searched ? order[t] * padded : 0);
    for (int64_t d = 0; d < depth; ++d) out[d * kTile] = t < searched ? static_cast<float>(x[d]) : 0.0f;
  }

  float* maxima = reinterpret_cast<float*>(scratch.maxima);
  Vec* top = reinterpret_cast<Vec*>(scratch.top);
  constexpr float kLeast = -__builtin_inff();
  const int64_t units = book.padded / kUnitCodes, stretch = kSlots / kLanes;
  for (int64_t u = 0; u < units; u += stretch) {
    const int64_t here = units - u < stretch ? units - u : stretch, slots = round_up(here * kLanes, 64);
    for (int64_t t = 0; t < tile_count * kTile; ++t) {
      top[t] = splat(kLeast);
      for (int64_t s = here * kLanes; s < slots; ++s) maxima[t * kStride + s] = kLeast;
    }
    fp32_pass(book, l2, u, here, tiles, tile_count, maxima, top);
    for (int64_t t = 0; t < searched; ++t) {
      Token& token = tokens[order[t]];
      const bool first_pass = options.fp32_first || !book.int8;
      if (options.approximate != nullptr && first_pass) {
        for (int64_t n = 0; n < here; ++n) {
          const int64_t to = ((first + order[t]) * options.panels + book.first_panel) / kUnitPanels + u + n;
          float most = kLeast;
          for (int l = 0; l < kLanes; ++l) {
            const float m = maxima[t * kStride + n * kLanes + l];
            most = m > most ? m : most;
          }
          options.approximate[to] = most, options.bound[to] = fp32_bound(book, l2, token, 1.0);
        }
      }
      if (token.kind != Kind::kFp32) continue;
      settle_fp32(book, l2, scratch.x + order[t] * padded, maxima + t * kStride, u, slots, greatest(top[t]),
                  options.bound_scale, scratch.list, &token);
    }
  }
}

}  // namespace semhitok::cpu::SEMHITOK_ISA
