// The int8 stage of a search, for one instruction set: quantises tokens, runs the pass, scores the panels that its
// bound leaves. nearest_code_simd.cpp explains the certificate.
//
// Tokens are sorted by size and divided into spans of kSpan, which share a scale if there is a bias. A span's alpha is
// how much of the codebook's mean its tokens contain. Maxima are kept for kSlots panels at a time: of each such
// stretch, a token's best panel is scored first, and then the panels that can reach its score.
#include "search_simd.h"

#if SEMHITOK_INT8

namespace semhitok::cpu::SEMHITOK_ISA {
namespace {

constexpr int64_t kShortList = 48;      // slots that are kept without a second scan
constexpr int64_t kAhead = 3;           // tokens scanned before one is scored
constexpr double kWorthShifting = 0.1;  // part of |x|^2 that must lie along the mean
constexpr double kEps64 = 1e-15;
constexpr int64_t kLineBytes = 64;

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
  const int64_t row_lines = book.depth * kPanelCodes * 4;
  for (int64_t i = 0; i < kept; ++i) {
    found->list[i] = list[i];
    if (maxima[list[i]] + margin < most) continue;
    const char* rows = reinterpret_cast<const char*>(book.rows + (first_panel + list[i]) * kPanelCodes * book.depth);
    for (int64_t line = 0; line < row_lines; line += kLineBytes) __builtin_prefetch(rows + line);
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
    int8_pass(book, s, here, scratch.tiles, tile_count, bias, s == 0 ? ahead : RowsAhead{}, maxima, kStride, top);
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
