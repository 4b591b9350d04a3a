// Nearest code, one instruction set: the search of a block of tokens, exact by certificate.
//
// Contract: score(t, k) = sum_d x_d c_d (+ half_norm of k for l2), products in fp64, even and odd d summed apart in
// ascending order and then added; the answer is the lowest id of the greatest score, on every instruction set. A token
// with NaN or Inf gets id 0 and score NaN.
//
// Plan. x.c = x.mean + alpha mean.r + x'.r with r = c - mean and x' = x - alpha mean (l2 subtracts |c|^2/2, expanded
// about the mean too). A pass over the quantised x' and r gives every group of 16 codes an approximate maximum, off by
// at most
//     |x'| |r - r^| + |x' - x^| |r^| + fixed                  (Cauchy-Schwarz on x'.r - x^.r^; ^ = as quantised)
// where fixed covers the bias' rounding and that of fp64. Only groups whose approximation plus bound reaches the best
// exact score found are scored exactly, the most promising first; every other code is proven to lose. mean.r and
// -|r|^2/2 vary over codes and enter as a bias, which tokens of a span share, and with it one scale.
// Tokens for which the int8 bound keeps too many groups go through the fp32 pass (bound: its rounding); those whose
// fp32 scores could overflow are scored exactly throughout.
//
// Cost: that of the first pass, 2 fp64 operations per token, code of a kept group and depth, and one look at the
// maxima, padded / 16 of them a token. Scratch: the maxima of kTokenBlock tokens over a stretch of kSlots groups.
#include "convert.h"
#include "passes.h"

namespace semhitok::cpu::SEMHITOK_ISA {
namespace {

constexpr int64_t kTokenBlock = 64;
constexpr int64_t kSlots = 1024;         // maxima of a token kept at a time
constexpr int64_t kStride = kSlots + 32; // apart, so that rows of maxima do not meet in one cache set
constexpr int64_t kShortList = 48;       // slots kept without a second look
constexpr int64_t kAhead = 3;            // tokens looked at before one is scored
constexpr int64_t kLineBytes = 64;
constexpr int kExactTokens = 4;
constexpr int kTile = kTileTokens;
constexpr double kInfinity = __builtin_inf();
constexpr double kRelative = 1.0 + 1e-6;  // rounding of the bound itself
constexpr int64_t kRetryBlocks = 15;      // blocks that a pass sits out
constexpr double kEps64 = 1e-15, kEps32 = 0x1p-24;
constexpr double kLargest32 = 1e38;       // scores below this have no fp32 overflow on their way
constexpr double kWorthShifting = 0.1;  // part of |x|^2 that must lie along the mean
constexpr int64_t kUnitGroups = kUnitCodes / kGroupCodes;
constexpr int kGroupVectors = static_cast<int>(kGroupCodes) / kDoubles;
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
  int64_t* waiting; // [kMaxSegments][2] blocks before a segment's int8 and fp32 pass are tried again
  double* x;        // [kTokenBlock][padded depth]
  double* shifted;  // [kSpan][padded depth]
  float* row;       // [depth]
  uint8_t* tiles;   // int8 or fp32 tiles
  char* maxima;     // [kTokenBlock][kStride] of Acc or float
  char* top;        // [kTokenBlock] vectors
  int32_t* list;    // [kSlots]
};

// Lays the scratch out from base; returns its bytes.
int64_t lay_out(int64_t depth, char* base, Scratch* out) {
  const int64_t padded = round_up(depth, kVectorDoubles);
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    char* p = base + at;
    at += round_up(bytes, 64);
    return p;
  };
  out->waiting = reinterpret_cast<int64_t*>(take(kMaxSegments * 2 * 8));
  out->x = reinterpret_cast<double*>(take(kTokenBlock * padded * 8));
  out->shifted = reinterpret_cast<double*>(take(kSpan * padded * 8));
  out->row = reinterpret_cast<float*>(take(padded * 4));
  out->tiles = reinterpret_cast<uint8_t*>(take(kTokenBlock * padded * 4));
  out->maxima = take(kTokenBlock * kStride * 4);
  out->top = take(kTokenBlock * kVectorBytes);
  out->list = reinterpret_cast<int32_t*>(take(kSlots * 4));
  return at;
}

// ---- looking through maxima ----

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

// Scores the 16 codes of a group for kTokens tokens and keeps each one's greatest, the lowest id where equal. kAtOnce:
// how many of the group's vectors the registers hold sums for.
template <int kTokens, int kAtOnce>
inline void rescore(const PackedCodebook& book, bool l2, int64_t group, const double* const x[kTokens],
                    Token* const tokens[kTokens]) {
  static_assert(kGroupVectors % kAtOnce == 0, "whole vectors");
  DoubleVec scores[kTokens][kGroupVectors];
  for (int first = 0; first < kGroupVectors; first += kAtOnce) {
    const float* c = book.rows + group * kGroupCodes * book.depth + first * kDoubles;
    DoubleVec even[kTokens][kAtOnce], odd[kTokens][kAtOnce];
    for (int v = 0; v < kAtOnce; ++v) {
      const DoubleVec start =
          l2 ? load(book.half_norm64 + group * kGroupCodes + (first + v) * kDoubles) : DoubleVec{};
      for (int r = 0; r < kTokens; ++r) even[r][v] = start, odd[r][v] = DoubleVec{};
    }
    int64_t d = 0;
    for (; d + 2 <= book.depth; d += 2, c += 2 * kGroupCodes) {
      for (int v = 0; v < kAtOnce; ++v) {
        const DoubleVec a = widen(c + v * kDoubles), b = widen(c + kGroupCodes + v * kDoubles);
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
  const int32_t* ids = book.ids + group * kGroupCodes;
  for (int r = 0; r < kTokens; ++r) {
    Token* token = tokens[r];
    token->rescored += kGroupCodes;
    uint32_t bits = 0;
    for (int v = 0; v < kGroupVectors; ++v) {
      bits |= beating(scores[r][v], token->best, ids[0] < token->id) << (v * kDoubles);
    }
    if (bits == 0) continue;
    DoubleVec most = scores[r][0];
    for (int v = 1; v < kGroupVectors; ++v) most = larger(most, scores[r][v]);
    const double best = greatest(most);
    uint32_t winners = 0;
    for (int v = 0; v < kGroupVectors; ++v) winners |= beating(scores[r][v], best, true) << (v * kDoubles);
    const int32_t id = ids[__builtin_ctz(winners)];  // ids ascend within a group
    if (best > token->best || id < token->id) token->best = best, token->id = id;
  }
}

inline void rescore(const PackedCodebook& book, bool l2, int64_t group, const double* x, Token* token) {
  rescore<1, kGroupVectors>(book, l2, group, &x, &token);
}

inline double bound_of(const Token& token, double residual, double norm, double scale) {
  return scale * ((token.length * residual + token.loss * norm) * kRelative + token.fixed);
}

// The fp32 pass' bound: rounding of each of its steps, and results below the normal range.
inline double fp32_bound(const PackedCodebook& book, bool l2, const Token& token, double scale) {
  const double reach = token.norm * book.max_norm + (l2 ? 0.5 * book.max_norm * book.max_norm : 0.0);
  return scale * static_cast<double>(book.depth + 3) * (kEps32 * kRelative * reach + 0x1p-125);
}

// ---- int8 ----

#if SEMHITOK_INT8

// Quantises the tokens of a span (-1: none) into its tiles and sets what certifies them.
void quantise_span(const PackedCodebook& book, bool l2, const int32_t* members, Token* tokens, const Scratch& scratch,
                   uint8_t* tiles, SpanBias* bias) {
  const int64_t depth = book.depth, padded = round_up(depth, kVectorDoubles);
  double along = 0.0, size = 0.0;
  int count = 0;
  for (int r = 0; r < kSpan; ++r) {
    if (members[r] < 0) continue;
    const Token& token = tokens[members[r]];
    along += token.along, size += token.norm * token.norm, ++count;
  }
  // How much of the mean the span's tokens hold, where taking just that out is worth its bias. With plain = 0 (inner
  // product) or 1 (l2) there is none for it; gain is what alpha takes from the sum of |x'|^2 compared with plain.
  const double mean2 = book.mean_norm * book.mean_norm, plain = l2 ? 1.0 : 0.0;
  double alpha = mean2 > 0.0 && count > 0 ? along / (count * mean2) : plain;
  const double gain = count * mean2 * (alpha - plain) * (alpha - plain);
  if (!(__builtin_fabs(alpha) < 1e30) || gain < kWorthShifting * size) alpha = plain;
  const bool biased = l2 || alpha != 0.0;
  const double mean_factor = biased ? (l2 ? alpha - 1.0 : alpha) : 0.0;
  const double reach = biased ? __builtin_fabs(mean_factor) * book.mean_size + (l2 ? book.norm_size : 0.0) : 0.0;

  // 16-bit sums must fit: |q(x)| <= |x'| / step + sqrt(depth) / 2.
  const double loose = book.max_quantised * 0.5 * __builtin_sqrt(static_cast<double>(depth)) + 2.0;
  double step[kSpan], widest = 0.0;
  for (int r = 0; r < kSpan; ++r) {
    step[r] = 1.0;
    if (members[r] < 0) continue;
    const double* x = scratch.x + members[r] * padded;
    double* y = scratch.shifted + r * padded;
    DoubleVec most{}, square{};
    for (int64_t d = 0; d < padded; d += kDoubles) {
      const DoubleVec v = load(x + d) - alpha * load(book.mean + d);
      store(y + d, v);
      most = larger(larger(v, -v), most);
      square += v * v;
    }
    Token& token = tokens[members[r]];
    token.length = __builtin_sqrt(sum(square));
    step[r] = greatest(most) / kTokenMax;
    const double room =
        sizeof(Acc) == 2 ? (token.length * book.max_quantised + reach) / (kAccLimit - loose) : reach / kAccLimit;
    if (room > step[r]) step[r] = room;
    if (step[r] > widest) widest = step[r];
  }
  if (widest == 0.0) widest = 1.0;

  bias->mean = biased ? static_cast<float>(mean_factor * book.mean_size / widest) : 0.0f;
  bias->norm = l2 ? static_cast<float>(book.norm_size / widest) : 0.0f;
  const double bias_error =
      biased ? 1.0 + 0x1p-21 * (__builtin_fabs(static_cast<double>(bias->mean)) + bias->norm) : 0.0;
  for (int r = 0; r < kSpan; ++r) {
    uint8_t* out = tiles + (r / kTile * book.steps * kTile + r % kTile) * kStepDims;
    if (members[r] < 0) {
      for (int64_t s = 0; s < book.steps; ++s) __builtin_memset(out + s * kTile * kStepDims, kTokenOffset, kStepDims);
      continue;
    }
    Token& token = tokens[members[r]];
    const double unit = biased ? widest : step[r] > 0.0 ? step[r] : 1.0, inverse = 1.0 / unit;
    const double* y = scratch.shifted + r * padded;
    uint8_t bytes[kMaxInt8Depth + kVectorDoubles];
    DoubleVec lost{};
    for (int64_t d = 0; d < padded; d += kDoubles) {
      const DoubleVec v = load(y + d), whole = nearest(v * inverse), rest = v - whole * unit;
      lost += rest * rest;
      typedef int32_t Quantised __attribute__((vector_size(kDoubles * 4)));
      const Quantised q = __builtin_convertvector(whole, Quantised) + kTokenOffset;
      typedef uint8_t Narrow __attribute__((vector_size(kDoubles)));
      const Narrow narrow = __builtin_convertvector(q, Narrow);
      __builtin_memcpy(bytes + d, &narrow, sizeof narrow);
    }
    for (int64_t s = 0; s < book.steps; ++s) {
      __builtin_memcpy(out + s * kTile * kStepDims, bytes + s * kStepDims, kStepDims);
    }
    token.loss = __builtin_sqrt(sum(lost));
    token.unit = unit * book.scale;
    token.base = token.along + (l2 ? book.norm_middle - 0.5 * mean2 : 0.0);
    const double sizes = 2.0 * (token.norm + __builtin_fabs(alpha) * book.mean_norm) * book.max_norm +
                         (l2 ? 2.0 * book.max_norm * book.max_norm : 0.0);
    token.fixed = token.unit * bias_error + kEps64 * static_cast<double>(depth + 16) * sizes;
  }
}

inline Acc threshold_of(double value) {
  constexpr double kLeast = sizeof(Acc) == 4 ? -2147483648.0 : -32768.0;
  if (!(value > kLeast)) return static_cast<Acc>(kLeast);
  return static_cast<Acc>(value < -kLeast - 1.0 ? __builtin_floor(value) : -kLeast - 1.0);
}

// What a look at a token's maxima over one stretch of groups found: the slots that may hold its best code.
struct Found {
  Acc most;         // the greatest maximum
  int32_t first;    // a slot that has it; -1: the stretch holds nothing for this token
  int64_t count;    // how many may; beyond kShortList they are looked up again once the first is scored
  int32_t list[kShortList];
};

// The bound in units of the approximate scores, and one more for the rounding of the lines that use it.
inline double margin_of(const PackedCodebook& book, const Token& token, double scale) {
  return bound_of(token, book.residual, book.norm, scale) / token.unit + 1.0;
}

void find(const PackedCodebook& book, const Token& token, const Acc* maxima, int64_t first_group, int64_t slots,
          Acc most, double scale, int32_t* list, Found* found) {
  const double margin = margin_of(book, token, scale);
  double low = most - 2.0 * margin;
  const double reach = (token.best - token.base) / token.unit - margin;
  if (reach > low) low = reach;
  found->most = most, found->first = -1;
  if (low > most) return;
  const int64_t count = scan(maxima, slots, threshold_of(low), list);
  found->count = count;
  const int64_t kept = count < kShortList ? count : kShortList;
  int32_t first = list[0];
  for (int64_t i = 0; i < count; ++i) first = maxima[list[i]] > maxima[first] ? list[i] : first;
  found->first = first;
  const int64_t row_lines = book.depth * kGroupCodes * 4;
  for (int64_t i = 0; i < kept; ++i) {
    found->list[i] = list[i];
    if (maxima[list[i]] + margin < most) continue;
    const char* rows = reinterpret_cast<const char*>(book.rows + (first_group + list[i]) * kGroupCodes * book.depth);
    for (int64_t line = 0; line < row_lines; line += kLineBytes) __builtin_prefetch(rows + line);
  }
}

// Scores what was found. Leaves tokens that would need too many groups to the fp32 pass.
void settle(const PackedCodebook& book, bool l2, const double* x, const Acc* maxima, int64_t first_group,
            int64_t groups, double scale, int32_t* long_list, const Found& found, Token* token) {
  const int32_t* list = found.list;
  int64_t count = found.count;
  rescore(book, l2, first_group + found.first, x, token);
  if (count == 1) return;
  const Acc threshold = threshold_of((token->best - token->base) / token->unit - margin_of(book, *token, scale));
  if (count > kShortList) {
    count = scan(maxima, round_up(groups, 64), threshold, long_list);
    list = long_list;
    if (count > kShortList && count > groups * 3 / 8) {
      token->kind = Kind::kFp32;
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t slot = list[i], group = first_group + slot;
    if (slot == found.first || maxima[slot] < threshold) continue;
    const double own = bound_of(*token, book.group_residual[group], book.group_norm[group], scale);
    if (token->base + token->unit * maxima[slot] + own >= token->best) rescore(book, l2, group, x, token);
  }
}

void search_int8(const PackedCodebook& book, bool l2, int64_t count, const SearchProbe& probe, int64_t first,
                 const Scratch& scratch, Token* tokens) {
  const int64_t padded = round_up(book.depth, kVectorDoubles);
  // A span shares a scale when it has a bias: put tokens of one size together.
  int32_t order[kTokenBlock];
  int64_t searched = 0;
  const bool sorted = l2 || book.mean_norm > 0.0;
  for (int64_t t = 0; t < count; ++t) {
    if (tokens[t].kind != Kind::kInt8) continue;
    DoubleVec along{};
    for (int64_t d = 0; d < padded; d += kDoubles) along += load(scratch.x + t * padded + d) * load(book.mean + d);
    tokens[t].along = sum(along);
    int64_t at = searched++;
    for (; sorted && at > 0 && tokens[order[at - 1]].norm > tokens[t].norm; --at) order[at] = order[at - 1];
    order[at] = static_cast<int32_t>(t);
  }
  if (searched == 0) return;
  const int64_t tile_count = ceil_div(searched, kTile), tile_bytes = book.steps * kTile * kStepDims;
  for (int64_t t = searched; t < round_up(searched, kSpan); ++t) order[t] = -1;
  SpanBias bias[kTokenBlock / kSpan];
  for (int64_t t = 0; t < searched; t += kSpan) {
    quantise_span(book, l2, order + t, tokens, scratch, scratch.tiles + t / kTile * tile_bytes, bias + t / kSpan);
  }

  Acc* maxima = reinterpret_cast<Acc*>(scratch.maxima);
  AccVec* top = reinterpret_cast<AccVec*>(scratch.top);
  constexpr Acc kLeast = static_cast<Acc>(sizeof(Acc) == 4 ? INT32_MIN : INT16_MIN);
  const int64_t superblocks = book.padded / kSuperblock, stretch = kSlots / kAccLanes;
  for (int64_t s = 0; s < superblocks; s += stretch) {
    const int64_t here = superblocks - s < stretch ? superblocks - s : stretch, groups = here * kAccLanes;
    for (int64_t t = 0; t < tile_count * kTile; ++t) top[t] = splat(kLeast);
    int8_pass(book, s, here, scratch.tiles, tile_count, bias, maxima, kStride, top);
    const int64_t first_group = s * kAccLanes;
    for (int64_t t = 0; probe.approximate != nullptr && t < searched; ++t) {
      const Token& token = tokens[order[t]];
      const int64_t row = (first + order[t]) * probe.groups + book.first_group + first_group;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t group = first_group + g;
        probe.approximate[row + g] = token.base + token.unit * maxima[t * kStride + g];
        probe.bound[row + g] = bound_of(token, book.group_residual[group], book.group_norm[group], 1.0);
      }
    }

    // Groups of nothing but the tail's copies have been seen where the last code stands.
    const int64_t listed = ceil_div(book.codes, kGroupCodes) - first_group;
    for (int64_t t = 0; t < searched; ++t) {
      for (int64_t g = listed; g < round_up(groups, 64); ++g) maxima[t * kStride + g] = kLeast;
    }

    // Looking runs kAhead tokens ahead of scoring, so that the rows to score are in the cache by then.
    Found found[kAhead];
    for (int64_t t = 0; t < searched + kAhead; ++t) {
      if (t >= kAhead && found[t % kAhead].first >= 0) {
        const int64_t n = t - kAhead;
        settle(book, l2, scratch.x + order[n] * padded, maxima + n * kStride, first_group, groups, probe.bound_scale,
               scratch.list, found[t % kAhead], tokens + order[n]);
      }
      if (t >= searched) continue;
      found[t % kAhead].first = -1;
      if (tokens[order[t]].kind != Kind::kInt8) continue;
      find(book, tokens[order[t]], maxima + t * kStride, first_group, round_up(groups, 64), greatest(top[t]),
           probe.bound_scale, scratch.list, found + t % kAhead);
    }
  }
}

#endif

// ---- fp32 ----

void settle_fp32(const PackedCodebook& book, bool l2, const double* x, const float* maxima, int64_t first_unit,
                 int64_t slots, float most, double scale, int32_t* list, Token* token) {
  const double bound = fp32_bound(book, l2, *token, scale);
  const auto rounded_down = [](double value) {
    return static_cast<float>(value - __builtin_fabs(value) * 0x1p-23 - 0x1p-140);
  };
  const auto rescore_unit = [&](int64_t unit) {
    for (int64_t g = 0; g < kUnitGroups; ++g) rescore(book, l2, (first_unit + unit) * kUnitGroups + g, x, token);
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

void search_fp32(const PackedCodebook& book, bool l2, int64_t count, const SearchProbe& probe, int64_t first,
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
    fp32_pass(book, l2, u, here, tiles, tile_count, maxima, kStride, top);
    for (int64_t t = 0; t < searched; ++t) {
      Token& token = tokens[order[t]];
      const bool first_pass = probe.fp32_first || !book.int8;
      if (probe.approximate != nullptr && first_pass) {
        for (int64_t n = 0; n < here; ++n) {
          const int64_t to = ((first + order[t]) * probe.groups + book.first_group) / kUnitGroups + u + n;
          float most = kLeast;
          for (int l = 0; l < kLanes; ++l) {
            const float m = maxima[t * kStride + n * kLanes + l];
            most = m > most ? m : most;
          }
          probe.approximate[to] = most, probe.bound[to] = fp32_bound(book, l2, token, 1.0);
        }
      }
      if (token.kind != Kind::kFp32) continue;
      settle_fp32(book, l2, scratch.x + order[t] * padded, maxima + t * kStride, u, slots, greatest(top[t]),
                  probe.bound_scale, scratch.list, &token);
    }
  }
}

// Every code of the tokens left, a group and a few tokens at a time: its rows stay in the cache for all of them.
void search_exact(const PackedCodebook& book, bool l2, int64_t count, const Scratch& scratch, Token* tokens) {
  const int64_t padded = round_up(book.depth, kVectorDoubles);
  const double* x[kTokenBlock];
  Token* left[kTokenBlock];
  int64_t searched = 0;
  for (int64_t t = 0; t < count; ++t) {
    if (tokens[t].kind == Kind::kExact) x[searched] = scratch.x + t * padded, left[searched++] = tokens + t;
  }
  for (int64_t g = 0; searched > 0 && g < ceil_div(book.codes, kGroupCodes); ++g) {
    int64_t t = 0;
    for (; t + kExactTokens <= searched; t += kExactTokens) rescore<kExactTokens, 1>(book, l2, g, x + t, left + t);
    for (; t < searched; ++t) rescore(book, l2, g, x[t], left[t]);
  }
}

// Reads a token and measures it.
void read_token(const Rows& z, int64_t index, int64_t depth, float* row, double* x, Token* token) {
  const int64_t padded = round_up(depth, kVectorDoubles);
  const float* values = row;
  if (z.dtype == Dtype::kFloat32) {
    values = static_cast<const float*>(z.data) + index * depth;
  } else {
    read(z, index * depth, depth, row);
  }
  int64_t d = 0;
  for (; d + kDoubles <= depth; d += kDoubles) store(x + d, widen(values + d));
  for (; d < depth; ++d) x[d] = values[d];
  for (; d < padded; ++d) x[d] = 0.0;
  DoubleVec square{};
  for (d = 0; d < padded; d += kDoubles) square += load(x + d) * load(x + d);
  *token = Token{};
  token->best = -kInfinity, token->id = INT32_MAX;
  token->norm = __builtin_sqrt(sum(square));
}

// One segment, for all tokens not done. waiting: its two counters of blocks that a pass sits out, because it settled
// less than half of an earlier one: the next ones are likely of the same kind.
void search_segment(const PackedCodebook& book, bool l2, int64_t first, int64_t count, const SearchProbe& probe,
                    const Scratch& scratch, int64_t* waiting, Token* tokens) {
  const auto sits_out = [&](int pass) {
    return probe.approximate == nullptr && waiting[pass] > 0 && --waiting[pass] >= 0;
  };
  const auto judge = [&](int pass, int64_t unsettled) {
    if (2 * unsettled > count) waiting[pass] = kRetryBlocks;
  };
  const auto count_of = [&](Kind kind) {
    int64_t of = 0;
    for (int64_t t = 0; t < count; ++t) of += tokens[t].kind == kind;
    return of;
  };

  const bool int8 = book.int8 && !probe.fp32_first && !sits_out(0);
  for (int64_t t = 0; t < count; ++t) {
    if (tokens[t].kind != Kind::kDone) tokens[t].kind = int8 ? Kind::kInt8 : Kind::kFp32;
  }
#if SEMHITOK_INT8
  if (int8) {
    search_int8(book, l2, count, probe, first, scratch, tokens);
    judge(0, count_of(Kind::kFp32));
  }
#endif
  const bool fp32 = count_of(Kind::kFp32) > 0 && !sits_out(1);
  for (int64_t t = 0; t < count; ++t) {
    const double reach = tokens[t].norm * book.max_norm + (l2 ? 0.5 * book.max_norm * book.max_norm : 0.0);
    if (tokens[t].kind == Kind::kFp32 && !(fp32 && reach < kLargest32)) tokens[t].kind = Kind::kExact;
  }
  if (fp32) {
    search_fp32(book, l2, count, probe, first, scratch, tokens);
    judge(1, count_of(Kind::kExact));
  }
  search_exact(book, l2, count, scratch, tokens);
}

}  // namespace

int64_t search_scratch(int64_t depth) {
  Scratch scratch;
  return lay_out(depth, nullptr, &scratch);
}

void search(const PackedCodebook* segments, int64_t segment_count, const Rows& z, Metric metric, int64_t first,
            int64_t count, const SearchProbe& probe, void* memory, float* scores, int64_t* ids) {
  const bool l2 = metric == Metric::kL2;
  const int64_t depth = segments[0].depth, padded = round_up(depth, kVectorDoubles);
  Scratch scratch;
  lay_out(depth, static_cast<char*>(memory), &scratch);
  int32_t lowest = segments[0].ids[0];
  for (int64_t s = 1; s < segment_count; ++s) lowest = segments[s].ids[0] < lowest ? segments[s].ids[0] : lowest;

  Token tokens[kTokenBlock];
  for (int64_t t = 0; t < count; ++t) {
    Token& token = tokens[t];
    read_token(z, first + t, depth, scratch.row, scratch.x + t * padded, &token);
    token.kind = token.norm < kInfinity ? Kind::kInt8 : Kind::kDone;
    if (token.norm == 0.0 && !l2) token.kind = Kind::kDone, token.best = 0.0, token.id = lowest;  // all scores are 0
  }
  for (int64_t s = 0; s < segment_count; ++s) {
    search_segment(segments[s], l2, first, count, probe, scratch, scratch.waiting + 2 * s, tokens);
  }
  for (int64_t t = 0; t < count; ++t) {
    const Token& token = tokens[t];
    const bool found = token.best > -kInfinity;
    scores[t] = found ? static_cast<float>(token.best) : __builtin_nanf("");
    ids[t] = found ? token.id : 0;
    if (probe.rescored != nullptr) probe.rescored[first + t] = token.rescored;
  }
}

extern const Kernels table;
const Kernels table = {kTokenBlock, kSuperblock, SEMHITOK_INT8 ? kStepDims : 0, digest, hash_rows, measure, pack,
                       pack_parts,  search_scratch, search, subcode};

}  // namespace semhitok::cpu::SEMHITOK_ISA
