// Nearest sub-code in fp32, for one instruction set: each token searches the sub-codebook of its group.
//
// Contract: score(t, j) = z[t].c[j] + bias, c = sub_codebooks[group[t]], summed in fp64 and rounded to fp32 once; the
// lowest j of the greatest score wins. id 0 and score NaN for a group out of range, a token with NaN or Inf, or no
// score above -inf. Scores and ids have the same bits on every instruction set.
//
// Plan. No packing: a sub-codebook is contiguous and read once. The sum over the depth runs in kSumLanes lanes and ends
// in a fixed tree, whatever the size of the registers. Products of two fp32 values are exact in fp64, so it does not
// matter whether they are fused into the sum. No sum of finite products overflows, so NaN or Inf in the token or the
// code shows in the total and needs no test of its own. kTile sub-codes are summed together and their lanes added by
// one transposition. Rows of tokens ahead are prefetched into the second-level cache: the first has too few slots for
// lines in flight, and the addresses are random in a table larger than the caches.
// Cost: tokens * subcodes * depth values read, converted to fp64 and multiplied once (ip) or twice (l2); with
// sub-codebooks of different sizes, each token counts its own.
#include "convert.h"
#include "kernels.h"
#include "simd.h"

#if defined(__clang__)
#define SEMHITOK_SHUFFLE(v, a, b, c, d) __builtin_shufflevector(v, v, a, b, c, d)
#else
#define SEMHITOK_SHUFFLE(v, a, b, c, d) __builtin_shuffle(v, TileIds{a, b, c, d})
#endif

namespace semhitok::cpu::SEMHITOK_ISA {
namespace {

constexpr int kSumLanes = 8;
constexpr int kParts = kSumLanes / kDoubles;
constexpr int kTile = 4;
constexpr int64_t kMostCodes = 1 << 30;  // a search counts sub-codes in 32 bits
constexpr int64_t kPrefetchTokens = 8;
constexpr int64_t kPrefetchBytes = 16384;  // of a row; the hardware's prefetcher handles longer rows
constexpr float kInfinity = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");
static_assert(kSumLanes % kDoubles == 0, "the lanes of a sum are whole registers");
static_assert(kSubcodePadding % kSumLanes == 0, "padded rows are whole sums");

typedef float TileVec __attribute__((vector_size(kTile * sizeof(float))));
typedef int32_t TileIds __attribute__((vector_size(kTile * sizeof(int32_t))));

// For every s the sum over the lanes of lanes[.][s], added as the tree (l, l + 4), (l, l + 2), (l, l + 1) and rounded;
// NaN if it is not finite before rounding.
inline TileVec add_lanes(const DoubleVec lanes[kParts][kTile]) {
#if defined(__AVX2__)
  __m256d four[kTile];
  for (int s = 0; s < kTile; ++s) {
#if defined(__AVX512F__)
    four[s] = _mm512_maskz_extractf64x4_pd(0xF, lanes[0][s], 0) + _mm512_maskz_extractf64x4_pd(0xF, lanes[0][s], 1);
#else
    four[s] = lanes[0][s] + lanes[1][s];
#endif
  }
  const __m256d even = _mm256_permute2f128_pd(four[0], four[2], 0x20) + _mm256_permute2f128_pd(four[0], four[2], 0x31);
  const __m256d odd = _mm256_permute2f128_pd(four[1], four[3], 0x20) + _mm256_permute2f128_pd(four[1], four[3], 0x31);
  const __m256d total = _mm256_unpacklo_pd(even, odd) + _mm256_unpackhi_pd(even, odd);
  return _mm256_cvtpd_ps(total + (total - total));
#else
  static_assert(kParts == 4, "registers of two doubles");
  DoubleVec two[kTile];
  for (int s = 0; s < kTile; ++s) two[s] = (lanes[0][s] + lanes[2][s]) + (lanes[1][s] + lanes[3][s]);
  HalfVec scores[2];
  for (int pair = 0; pair < 2; ++pair) {
    const DoubleVec a = two[2 * pair], b = two[2 * pair + 1];
    const DoubleVec total = DoubleVec{a[0], b[0]} + DoubleVec{a[1], b[1]};
    scores[pair] = __builtin_convertvector(total + (total - total), HalfVec);
  }
  return TileVec{scores[0][0], scores[0][1], scores[1][0], scores[1][1]};
#endif
}

// The first of count codes, stride values apart, with the greatest score, and that score; 0 and -inf if none is above
// -inf. x is stride values long, a multiple of kSumLanes.
template <bool kL2>
inline int32_t best_code(const double* x, const float* codes, int64_t stride, int32_t count, float* score) {
  TileVec best = TileVec{} - kInfinity;
  TileIds best_id{}, id{0, 1, 2, 3};
  for (int32_t j = 0; j < count; j += kTile, id += kTile) {
    const float* code[kTile];
    // Past the end the last code is repeated: an equal score later cannot win.
    for (int s = 0; s < kTile; ++s) code[s] = codes + (j + s < count ? j + s : count - 1) * stride;
    DoubleVec lanes[kParts][kTile];
    for (int part = 0; part < kParts; ++part) {
      DoubleVec dot[kTile]{}, norm[kTile]{};
      for (int64_t d = part * kDoubles; d < stride; d += kSumLanes) {
        const DoubleVec xd = load(x + d);
        for (int s = 0; s < kTile; ++s) {
          const DoubleVec c = widen(code[s] + d);
          dot[s] += xd * c;
          if (kL2) norm[s] += c * c;
        }
      }
      for (int s = 0; s < kTile; ++s) lanes[part][s] = kL2 ? dot[s] - 0.5 * norm[s] : dot[s];
    }
    const TileVec scores = add_lanes(lanes);
    const TileIds wins = scores > best;
    best = wins ? scores : best;
    best_id = wins ? id : best_id;
  }
  // Across the lanes: the greatest score, then the least id that has it.
  const TileVec other = SEMHITOK_SHUFFLE(best, 2, 3, 0, 1), pair = best > other ? best : other;
  const TileVec next = SEMHITOK_SHUFFLE(pair, 1, 0, 3, 2), top = pair > next ? pair : next;
  const TileIds mine = best == top ? best_id : TileIds{} + INT32_MAX, others = SEMHITOK_SHUFFLE(mine, 2, 3, 0, 1);
  const TileIds least = mine < others ? mine : others;
  *score = top[0];
  return least[0] < least[1] ? least[0] : least[1];
}

// rows[j] = sub-code first + j as fp32, `padded` values apart. Not inlined: it would bloat the loop below.
__attribute__((noinline)) void read_codes(const SubCodebooks& s, int64_t first, int64_t count, int64_t padded,
                                          float* rows) {
  if (padded == s.depth) {
    read(s.rows, first * s.depth, count * s.depth, rows);
  } else {
    for (int64_t j = 0; j < count; ++j) read(s.rows, (first + j) * s.depth, s.depth, rows + j * padded);
  }
}

template <bool kL2>
void search(const NearestSubcode& p, int64_t first, int64_t count, const int64_t* group, float* scratch, float* scores,
            int64_t* ids) {
  const int64_t depth = p.sub.depth, padded = ceil_div(depth, kSumLanes) * kSumLanes;
  const int64_t code_bytes = depth * element_size(p.sub.rows.dtype);
  const char* table = static_cast<const char*>(p.sub.rows.data);
  // Where fp32 codes are whole sums they are read in place, elsewhere from a padded copy of a few at a time.
  const bool direct = p.sub.rows.dtype == Dtype::kFloat32 && depth == padded;
  const int64_t most = direct ? kMostCodes : kSubcodeRows;
  double* x = reinterpret_cast<double*>(scratch);
  float* rows = scratch + 2 * padded;
  for (int64_t d = 0; d < padded; ++d) x[d] = 0.0;
  for (int64_t d = 0; padded != depth && d < kSubcodeRows * padded; ++d) rows[d] = 0.0f;

  const auto known = [&](int64_t g) { return g >= 0 && g < p.sub.groups; };
  for (int64_t t = -kPrefetchTokens; t < count; ++t) {
    const int64_t ahead = t + kPrefetchTokens;
    if (ahead < count && known(group[ahead])) {
      const RowRange own = rows_of_group(p.sub, group[ahead]);
      const int64_t bytes = own.count * code_bytes;
      prefetch_row<2>(table + own.first * code_bytes, bytes < kPrefetchBytes ? bytes : kPrefetchBytes);
    }
    if (t < 0) continue;
    float best = -kInfinity;
    int64_t id = 0;
    if (known(group[t])) {
      read(p.z, (first + t) * depth, depth, x);
      const RowRange own = rows_of_group(p.sub, group[t]);
      for (int64_t j = 0; j < own.count; j += most) {
        const int64_t code = own.first + j, n = own.count - j < most ? own.count - j : most;
        const float* codes = rows;
        if (direct) {
          codes = static_cast<const float*>(p.sub.rows.data) + code * depth;
        } else {
          read_codes(p.sub, code, n, padded, rows);
        }
        float score;
        const int32_t winner = best_code<kL2>(x, codes, padded, static_cast<int32_t>(n), &score);
        if (score > best) best = score, id = j + winner;
      }
    }
    scores[t] = best > -kInfinity ? best : kNaN;
    ids[t] = id;
  }
}

}  // namespace

void subcode(const NearestSubcode& p, int64_t first, int64_t count, const int64_t* group, float* scratch, float* scores,
             int64_t* ids) {
  if (p.metric == Metric::kL2) {
    search<true>(p, first, count, group, scratch, scores, ids);
  } else {
    search<false>(p, first, count, group, scratch, scores, ids);
  }
}

}  // namespace semhitok::cpu::SEMHITOK_ISA
