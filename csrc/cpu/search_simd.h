// What the stages of a search share, for one instruction set: tokens and certificates, scratch, the scan of maxima,
// exact scores. nearest_code_simd.cpp has the plan.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace semhitok::cpu::SEMHITOK_ISA {

constexpr int64_t kTokenBlock = 64;
constexpr int64_t kSlots = 1024;          // maxima of a token that are kept at a time
constexpr int64_t kStride = kSlots + 32;  // with padding, so that rows of maxima do not share cache sets
constexpr int kTile = kTileTokens;        // tokens that a pass multiplies at once
constexpr int kSpan = 16;                 // tokens that share a bias
constexpr double kInfinity = __builtin_inf();
constexpr double kRelative = 1.0 + 1e-6;  // rounding of the bound itself
constexpr int64_t kUnitPanels = kUnitCodes / kPanelCodes;
constexpr int kPanelVectors = static_cast<int>(kPanelCodes) / kDoubles;
static_assert(kTokenBlock % kSpan == 0 && kSpan % kTile == 0 && 8 % kTile == 0, "a block of tokens is whole tiles");
static_assert(kSlots % kAccLanes == 0 && kSlots % kLanes == 0 && kSlots % 64 == 0, "a stretch is whole vectors");
static_assert(kSuperblock % kUnitCodes == 0, "a codebook padded to superblocks is whole units");

enum class Kind : uint8_t { kDone, kInt8, kFp32, kExact };

struct Token {
  Kind kind;
  int32_t id;
  double best;          // greatest exact score so far
  double norm, along;   // |x|, x.mean
  double base, unit;    // score ~ base + unit * integer
  double length, loss;  // |x'|, |x' - x^|
  double fixed;
  int64_t rescored;
};

struct Scratch {
  int64_t* waiting;  // [kMaxParts][2] blocks that a part's int8 and fp32 pass still skip
  double* x;         // [kTokenBlock][padded depth]
  double* shifted;   // [kSpan][padded depth]
  float* row;        // [depth]
  uint8_t* tiles;    // int8 or fp32 tiles
  char* maxima;      // [kTokenBlock][kStride] of Acc or float
  char* top;         // [kTokenBlock] vectors
  int32_t* list;     // [kSlots]
};

namespace {

// Lays the scratch out from base; returns its bytes.
[[maybe_unused]] inline int64_t lay_out(int64_t depth, char* base, Scratch* out) {
  const int64_t padded = round_up(depth, kVectorDoubles);
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    char* p = base + at;
    at += round_up(bytes, 64);
    return p;
  };
  out->waiting = reinterpret_cast<int64_t*>(take(kMaxParts * 2 * 8));
  out->x = reinterpret_cast<double*>(take(kTokenBlock * padded * 8));
  out->shifted = reinterpret_cast<double*>(take(kSpan * padded * 8));
  out->row = reinterpret_cast<float*>(take(padded * 4));
  out->tiles = reinterpret_cast<uint8_t*>(take(kTokenBlock * padded * 4));
  out->maxima = take(kTokenBlock * kStride * 4);
  out->top = take(kTokenBlock * kVectorBytes);
  out->list = reinterpret_cast<int32_t*>(take(kSlots * 4));
  return at;
}

// ---- scanning maxima ----

// Bit i: values[i] >= threshold, for 64 of them.
inline uint64_t reaching(const float* values, float threshold) {
  uint64_t bits = 0;
#if defined(__AVX512F__)
  for (int i = 0; i < 64; i += 16) {
    const uint64_t m = _mm512_cmp_ps_mask(_mm512_loadu_ps(values + i), _mm512_set1_ps(threshold), _CMP_GE_OQ);
    bits |= m << i;
  }
#elif defined(__AVX2__)
  for (int i = 0; i < 64; i += 8) {
    const __m256 ge = _mm256_cmp_ps(_mm256_loadu_ps(values + i), _mm256_set1_ps(threshold), _CMP_GE_OQ);
    bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_ps(ge))) << i;
  }
#else
  for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(values[i] >= threshold) << i;
#endif
  return bits;
}

#if SEMHITOK_INT8
inline uint64_t reaching(const Acc* values, Acc threshold) {
  uint64_t bits = 0;
#if defined(__AVX512F__)
  for (int i = 0; i < 64; i += kAccLanes) {
    const __m512i v = _mm512_loadu_si512(values + i);
    uint64_t m;
    if (sizeof(Acc) == 4) {
      m = _mm512_cmpge_epi32_mask(v, _mm512_set1_epi32(threshold));
    } else {
      m = _mm512_cmpge_epi16_mask(v, _mm512_set1_epi16(static_cast<int16_t>(threshold)));
    }
    bits |= m << i;
  }
#else
  if (sizeof(Acc) == 4) {
    for (int i = 0; i < 64; i += 8) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
      const __m256i less = _mm256_cmpgt_epi32(_mm256_set1_epi32(threshold), v);
      bits |= static_cast<uint64_t>(~_mm256_movemask_ps((__m256)less) & 0xFF) << i;
    }
  } else {
    const __m256i t = _mm256_set1_epi16(static_cast<int16_t>(threshold));
    for (int i = 0; i < 64; i += 32) {
      const __m256i* p = reinterpret_cast<const __m256i*>(values + i);
      const __m256i a = _mm256_cmpgt_epi16(t, _mm256_loadu_si256(p));
      const __m256i b = _mm256_cmpgt_epi16(t, _mm256_loadu_si256(p + 1));
      const __m256i less = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xD8);
      bits |= static_cast<uint64_t>(~static_cast<uint32_t>(_mm256_movemask_epi8(less))) << i;
    }
  }
#endif
  return bits;
}
#endif

// Whether one of 64 values reaches the threshold: one comparison for all.
inline bool any_reaching(const float* values, float threshold) {
#if defined(__AVX2__)
  Vec most = load(values);
  for (int i = kLanes; i < 64; i += kLanes) most = larger(most, load(values + i));
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)most, _mm512_set1_ps(threshold), _CMP_GE_OQ) != 0;
#else
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)most, _mm256_set1_ps(threshold), _CMP_GE_OQ)) != 0;
#endif
#else
  (void)values, (void)threshold;
  return true;
#endif
}

#if SEMHITOK_INT8
inline bool any_reaching(const Acc* values, Acc threshold) {
  AccVec most = load(values);
  for (int i = kAccLanes; i < 64; i += kAccLanes) most = larger(most, load(values + i));
  const AccVec reached = most >= splat(threshold);
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)reached, (__m512i)reached) != 0;
#else
  return _mm256_movemask_epi8((__m256i)reached) != 0;
#endif
}
#endif

// The slots whose maximum reaches the threshold, in ascending order; slots is a multiple of 64.
template <typename T>
inline int64_t scan(const T* maxima, int64_t slots, T threshold, int32_t* list) {
  int64_t count = 0;
  for (int64_t s = 0; s < slots; s += 64) {
    if (!any_reaching(maxima + s, threshold)) continue;
    for (uint64_t bits = reaching(maxima + s, threshold); bits != 0; bits &= bits - 1) {
      list[count++] = static_cast<int32_t>(s + __builtin_ctzll(bits));
    }
  }
  return count;
}

// ---- exact scores ----

// Scores the 16 codes of a panel for kTokens tokens and keeps the greatest of each, the lowest id if equal. kAtOnce:
// how many of the panel's vectors have their sums in registers at once.
template <int kTokens, int kAtOnce>
inline void rescore(const PackedCodebook& book, bool l2, int64_t panel, const double* const x[kTokens],
                    Token* const tokens[kTokens]) {
  static_assert(kPanelVectors % kAtOnce == 0, "whole vectors");
  DoubleVec scores[kTokens][kPanelVectors];
  for (int first = 0; first < kPanelVectors; first += kAtOnce) {
    const float* c = book.rows + panel * kPanelCodes * book.depth + first * kDoubles;
    DoubleVec even[kTokens][kAtOnce], odd[kTokens][kAtOnce];
    for (int v = 0; v < kAtOnce; ++v) {
      const DoubleVec start = l2 ? load(book.half_norm64 + panel * kPanelCodes + (first + v) * kDoubles) : DoubleVec{};
      for (int r = 0; r < kTokens; ++r) even[r][v] = start, odd[r][v] = DoubleVec{};
    }
    int64_t d = 0;
    for (; d + 2 <= book.depth; d += 2, c += 2 * kPanelCodes) {
      for (int v = 0; v < kAtOnce; ++v) {
        const DoubleVec a = widen(c + v * kDoubles), b = widen(c + kPanelCodes + v * kDoubles);
        for (int r = 0; r < kTokens; ++r) {
          even[r][v] += x[r][d] * a;
          odd[r][v] += x[r][d + 1] * b;
        }
      }
    }
    for (int v = 0; d < book.depth && v < kAtOnce; ++v) {
      for (int r = 0; r < kTokens; ++r) even[r][v] += x[r][d] * widen(c + v * kDoubles);
    }
    for (int v = 0; v < kAtOnce; ++v) {
      for (int r = 0; r < kTokens; ++r) scores[r][first + v] = even[r][v] + odd[r][v];
    }
  }
  const int32_t* ids = book.ids + panel * kPanelCodes;
  for (int r = 0; r < kTokens; ++r) {
    Token* token = tokens[r];
    token->rescored += kPanelCodes;
    uint32_t bits = 0;
    for (int v = 0; v < kPanelVectors; ++v) {
      bits |= beating(scores[r][v], token->best, ids[0] < token->id) << (v * kDoubles);
    }
    if (bits == 0) continue;
    DoubleVec most = scores[r][0];
    for (int v = 1; v < kPanelVectors; ++v) most = larger(most, scores[r][v]);
    const double best = greatest(most);
    uint32_t winners = 0;
    for (int v = 0; v < kPanelVectors; ++v) winners |= beating(scores[r][v], best, true) << (v * kDoubles);
    const int32_t id = ids[__builtin_ctz(winners)];  // ids ascend within a panel
    if (best > token->best || id < token->id) token->best = best, token->id = id;
  }
}

inline void rescore(const PackedCodebook& book, bool l2, int64_t panel, const double* x, Token* token) {
  rescore<1, kPanelVectors>(book, l2, panel, &x, &token);
}

inline double bound_of(const Token& token, double residual, double norm, double scale) {
  return scale * ((token.length * residual + token.loss * norm) * kRelative + token.fixed);
}

}  // namespace

// The int8 and the fp32 stage for the tokens of their kind; each token is settled or passed on to the next kind. first:
// that of the block.
//
// A stage's pass multiplies tiles of tokens with a stretch of the codebook. For every token it writes the greatest
// approximate score of every slot to maxima[token * kStride + slot], and the greatest of each lane to top[token].
// int8: a slot is a panel of 16 codes. fp32: a slot is a lane of a unit of 128 codes; a unit is kept if one lane is.
void search_int8(const PackedCodebook& book, bool l2, int64_t count, const RowsAhead& ahead,
                 const SearchOptions& options, int64_t first, const Scratch& scratch, Token* tokens);
void search_fp32(const PackedCodebook& book, bool l2, int64_t count, const SearchOptions& options, int64_t first,
                 const Scratch& scratch, Token* tokens);

}  // namespace semhitok::cpu::SEMHITOK_ISA
