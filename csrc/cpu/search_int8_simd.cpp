// The int8 stage of a search, for one instruction set: quantises tokens, runs the pass, scores the panels that its
// bound leaves. nearest_code_simd.cpp explains the certificate.
//
// Tokens are sorted by size and divided into spans of kSpan, which share a scale if there is a bias. A span's alpha is
// how much of the codebook's mean its tokens contain. Maxima are kept for kSlots panels at a time: of each such
// stretch, a token's best panel is scored first, and then the panels that can reach its score.
//
// The pass computes integer dot products of every token with every code and keeps the maximum of each panel of 16.
//
// Contract: maxima[t][g] = max over the 16 codes k of panel g of I(t, k) = sum_d q(t, d) q(k, d) + bias(t, k), exact in
// the accumulator type. The token is given as u = q + kTokenOffset, because the instructions need one unsigned operand;
// the codes' `offset` corrects this and initialises the accumulators, so it costs no instruction. The 16-bit
// accumulator may wrap on the way: wrapping sums are exact if the final value fits, which quantise_span ensures.
//
// Layout of the codes: [superblock][vector pair][step][2][lane][kStepDims]. Lane l of the 16 vectors of a superblock
// holds 16 consecutive codes, so the lane-wise maximum over its vectors is the maximum of a panel: one max instruction
// a vector of codes, no index and no horizontal step.
//
// Cost per token: padded * depth / kVectorBytes multiply instructions (twice as many, one half of them additions, with
// 16-bit accumulators) and padded / kAccLanes max instructions; padded / 16 maxima written.
#include "search_simd.h"

#if SEMHITOK_INT8

namespace semhitok::cpu::SEMHITOK_ISA {
namespace {

constexpr int64_t kShortList = 48;      // slots that are kept without a second scan
constexpr int64_t kAhead = 3;           // tokens scanned before one is scored
constexpr double kWorthShifting = 0.1;  // part of |x|^2 that must lie along the mean
constexpr double kEps64 = 1e-15;

// The bias that a span of tokens shares: mean * mean_term + norm * norm_term, in accumulator units; none if both are 0.
struct SpanBias {
  float mean, norm;
};

typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));
constexpr int kStepBytes = kTile * kStepDims;

static_assert(sizeof(Acc) == kStepDims, "a step of a token is as wide as the lane that it is added to");

// acc + sum over a step of token (unsigned) * code (signed). The 32-bit instruction is inline assembly because
// GCC's builtin copies the accumulator; taking and returning it by value keeps the tile in registers.
inline AccVec dot(AccVec acc, Bytes token, Bytes code) {
#if defined(__AVX512VNNI__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(token), "v"(code));
  return acc;
#elif defined(__AVXVNNI__)
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(token), "x"(code));
  return acc;
#elif defined(__AVX512BW__)
  return acc + (AccVec)_mm512_maddubs_epi16((__m512i)token, (__m512i)code);
#else
  return acc + (AccVec)_mm256_maddubs_epi16((__m256i)token, (__m256i)code);
#endif
}

// maxima[r * kStride ..] = those of the superblock's panels for token r of the tile; top[r] is updated. Not inlined, or
// GCC would keep the code vectors on the stack and load them again for every token. kSteps: the number of steps if it
// is known, so that short loops unroll, or 0.
template <int kSteps>
__attribute__((noinline)) void superblock_maxima(const uint8_t* __restrict x, const int8_t* __restrict codes,
                                                 const Acc* __restrict start, int64_t any_steps, Acc* __restrict maxima,
                                                 AccVec* __restrict top) {
  const int64_t steps = kSteps > 0 ? kSteps : any_steps;
  AccVec best[kTile];
  for (int v = 0; v < kSuperVectors; v += 2) {
    AccVec acc0[kTile], acc1[kTile];
    const AccVec start0 = load(start + v * kAccLanes), start1 = load(start + (v + 1) * kAccLanes);
    for (int r = 0; r < kTile; ++r) acc0[r] = start0, acc1[r] = start1;
    const uint8_t* xs = x;
    if (kSteps > 0) __asm__("" : "+r"(xs));  // or all broadcasts would be hoisted, and spill
    for (int64_t s = 0; s < steps; ++s, codes += 2 * kVectorBytes, xs += kStepBytes) {
      const Bytes c0 = load_as<Bytes>(codes), c1 = load_as<Bytes>(codes + kVectorBytes);
      for (int r = 0; r < kTile; ++r) {
        const Bytes token = (Bytes)splat(load_as<Acc>(xs + r * kStepDims));
        acc0[r] = dot(acc0[r], token, c0);
        acc1[r] = dot(acc1[r], token, c1);
      }
    }
    for (int r = 0; r < kTile; ++r) {
      const AccVec both = larger(acc0[r], acc1[r]);
      best[r] = v == 0 ? both : larger(best[r], both);
    }
  }
  for (int r = 0; r < kTile; ++r) {
    store(maxima + r * kStride, best[r]);
    top[r] = larger(top[r], best[r]);
  }
}

// Bias truncated to integers, for kLanes codes.
inline IntVec whole_bias(const float* mean, const float* norm, SpanBias bias) {
  Vec part = load(norm) * bias.norm;
  if (bias.mean != 0.0f) part += load(mean) * bias.mean;
  return __builtin_convertvector(part, IntVec);
}

// The accumulators' start with a span's bias: the codes' offset plus the bias.
inline void biased_start(const PackedCodebook& codebook, int64_t superblock, SpanBias bias, Acc* start) {
  const int64_t first = superblock * kSuperblock;
  const Acc* offset = static_cast<const Acc*>(codebook.offset) + first;
  const float* mean = codebook.mean_term + first;
  const float* norm = codebook.norm_term + first;
  for (int64_t n = 0; n < kSuperblock; n += kAccLanes) {
    const IntVec low = whole_bias(mean + n, norm + n, bias);
    AccVec whole = (AccVec)low;
    if (sizeof(Acc) == 2) {
      const IntVec high = whole_bias(mean + n + kLanes, norm + n + kLanes, bias);
#if defined(__AVX512F__)
      const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
      const __m512i packed = _mm512_packs_epi32((__m512i)low, (__m512i)high);
      whole = (AccVec)_mm512_maskz_permutexvar_epi64(0xFF, order, packed);
#else
      whole = (AccVec)_mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)low, (__m256i)high), 0xD8);
#endif
    }
    store(start + n, load(offset + n) + whole);
  }
}

// tiles: [tile][step][kTile][kStepDims] bytes. Prefetches the rows of `ahead` on the way. Not inlined, so that it takes
// no registers from the scoring of panels.
__attribute__((noinline)) void int8_pass(const PackedCodebook& codebook, int64_t first_superblock, int64_t superblocks,
                                         const uint8_t* tiles, int64_t tile_count, const SpanBias* bias,
                                         const RowsAhead& ahead, Acc* maxima, AccVec* top) {
  const int64_t steps = codebook.steps, tile_bytes = steps * kStepBytes;
  const int64_t superblock_bytes = kSuperVectors * steps * kVectorBytes;
  const bool unroll = kRegisters == 32 && kStepDims == 4;
  const auto maxima_of = unroll && steps == 2   ? superblock_maxima<2>
                         : unroll && steps == 4 ? superblock_maxima<4>
                                                : superblock_maxima<0>;
  alignas(64) Acc biased[kSuperblock];
  for (int64_t s = 0; s < superblocks; ++s) {
    const int64_t block = first_superblock + s;
    const int8_t* codes = codebook.quantised + block * superblock_bytes;
    const Acc* start = static_cast<const Acc*>(codebook.offset) + block * kSuperblock;
    for (int64_t r = ahead.count * s / superblocks; r < ahead.count * (s + 1) / superblocks; ++r) {
      prefetch_row<2>(ahead.table + ahead.rows[r] * ahead.row_bytes, ahead.row_bytes);
    }
    for (int64_t tile = 0; tile < tile_count; ++tile) {
      const SpanBias& own = bias[tile * kTile / kSpan];
      const bool is_biased = own.mean != 0.0f || own.norm != 0.0f;
      if (is_biased && tile * kTile % kSpan == 0) biased_start(codebook, block, own, biased);
      maxima_of(tiles + tile * tile_bytes, codes, is_biased ? biased : start, steps,
                maxima + tile * kTile * kStride + s * kAccLanes, top + tile * kTile);
    }
  }
}

// Quantises the tokens of a span (-1: none) into its tiles and sets their bounds.
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
  // alpha: how much of the mean the span's tokens contain, if removing it is worth the bias. With alpha = plain, 0
  // (inner product) or 1 (l2), no bias is needed for it. gain: by how much alpha reduces the sum of |x'|^2 compared
  // with plain.
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

// What a scan of a token's maxima over one stretch of panels found: the slots that may hold its best code.
struct Found {
  Acc most;       // the greatest maximum
  int32_t first;  // a slot that has it; -1: the stretch has nothing for this token
  int64_t count;  // how many may; if more than kShortList, they are scanned again once the first is scored
  int32_t list[kShortList];
};

// The bound in units of the approximate scores, plus one for the rounding of the lines that use it.
inline double margin_of(const PackedCodebook& book, const Token& token, double scale) {
  return bound_of(token, book.residual, book.norm, scale) / token.unit + 1.0;
}

void find(const PackedCodebook& book, const Token& token, const Acc* maxima, int64_t first_panel, int64_t slots,
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
  const int64_t panel_bytes = book.depth * kPanelCodes * static_cast<int64_t>(sizeof(float));
  for (int64_t i = 0; i < kept; ++i) {
    found->list[i] = list[i];
    if (maxima[list[i]] + margin < most) continue;
    prefetch_row<3>(book.rows + (first_panel + list[i]) * kPanelCodes * book.depth, panel_bytes);
  }
}

// Scores what was found. Tokens that would need too many panels are left to the fp32 pass.
void settle(const PackedCodebook& book, bool l2, const double* x, const Acc* maxima, int64_t first_panel,
            int64_t panels, double scale, int32_t* long_list, const Found& found, Token* token) {
  const int32_t* list = found.list;
  int64_t count = found.count;
  rescore(book, l2, first_panel + found.first, x, token);
  if (count == 1) return;
  const Acc threshold = threshold_of((token->best - token->base) / token->unit - margin_of(book, *token, scale));
  if (count > kShortList) {
    count = scan(maxima, round_up(panels, 64), threshold, long_list);
    list = long_list;
    if (count > kShortList && count > panels * 3 / 8) {
      token->kind = Kind::kFp32;
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t slot = list[i], panel = first_panel + slot;
    if (slot == found.first || maxima[slot] < threshold) continue;
    const double own = bound_of(*token, book.panel_residual[panel], book.panel_norm[panel], scale);
    if (token->base + token->unit * maxima[slot] + own >= token->best) rescore(book, l2, panel, x, token);
  }
}

}  // namespace

void search_int8(const PackedCodebook& book, bool l2, int64_t count, const RowsAhead& ahead,
                 const SearchOptions& options, int64_t first, const Scratch& scratch, Token* tokens) {
  const int64_t padded = round_up(book.depth, kVectorDoubles);
  // A span shares a scale if it has a bias: put tokens of similar size together.
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
    const int64_t here = superblocks - s < stretch ? superblocks - s : stretch, panels = here * kAccLanes;
    for (int64_t t = 0; t < tile_count * kTile; ++t) top[t] = splat(kLeast);
    int8_pass(book, s, here, scratch.tiles, tile_count, bias, s == 0 ? ahead : RowsAhead{}, maxima, top);
    const int64_t first_panel = s * kAccLanes;
    for (int64_t t = 0; options.approximate != nullptr && t < searched; ++t) {
      const Token& token = tokens[order[t]];
      const int64_t row = (first + order[t]) * options.panels + book.first_panel + first_panel;
      for (int64_t g = 0; g < panels; ++g) {
        const int64_t panel = first_panel + g;
        options.approximate[row + g] = token.base + token.unit * maxima[t * kStride + g];
        options.bound[row + g] = bound_of(token, book.panel_residual[panel], book.panel_norm[panel], 1.0);
      }
    }

    // Panels with only copies of the last code are covered by that code's own panel.
    const int64_t listed = ceil_div(book.num_codes, kPanelCodes) - first_panel;
    for (int64_t t = 0; t < searched; ++t) {
      for (int64_t g = listed; g < round_up(panels, 64); ++g) maxima[t * kStride + g] = kLeast;
    }

    // Scanning runs kAhead tokens ahead of scoring, so that the rows to score are in the cache by then.
    Found found[kAhead];
    for (int64_t t = 0; t < searched + kAhead; ++t) {
      if (t >= kAhead && found[t % kAhead].first >= 0) {
        const int64_t n = t - kAhead;
        settle(book, l2, scratch.x + order[n] * padded, maxima + n * kStride, first_panel, panels, options.bound_scale,
               scratch.list, found[t % kAhead], tokens + order[n]);
      }
      if (t >= searched) continue;
      found[t % kAhead].first = -1;
      if (tokens[order[t]].kind != Kind::kInt8) continue;
      find(book, tokens[order[t]], maxima + t * kStride, first_panel, round_up(panels, 64), greatest(top[t]),
           options.bound_scale, scratch.list, found + t % kAhead);
    }
  }
}

}  // namespace semhitok::cpu::SEMHITOK_ISA

#endif
