// Nearest code, for one instruction set: the search of a block of tokens, exact by certificate.
//
// Contract: score(t, k) = sum_d x_d c_d (+ half_norm of k for l2), products in fp64, even and odd d summed apart in
// ascending order and then added; the answer is the lowest id of the greatest score, on every instruction set. A token
// with NaN or Inf gets id 0 and score NaN.
//
// Plan. x.c = x.mean + alpha mean.r + x'.r with r = c - mean and x' = x - alpha mean (l2 subtracts |c|^2/2, expanded
// about the mean too). A pass over the quantised x' and r gives every panel of 16 codes an approximate maximum, off by
// at most
//     |x'| |r - r^| + |x' - x^| |r^| + fixed                  (Cauchy-Schwarz on x'.r - x^.r^; ^ = as quantised)
// where fixed covers the bias' rounding and that of fp64. Only panels whose approximation plus bound reaches the best
// exact score found are scored exactly, the most promising first; every other code is proven to lose. mean.r and
// -|r|^2/2 vary by code and form a bias; tokens of a span share it, and therefore a scale.
// Tokens for which the int8 bound keeps too many panels go through the fp32 pass (bound: its rounding). Tokens whose
// fp32 scores could overflow are scored exactly with all codes.
//
// Cost: that of the first pass, 2 fp64 operations per token, code of a kept panel and depth, and one look at the
// maxima, padded / 16 of them a token. Scratch: the maxima of kTokenBlock tokens over a stretch of kSlots panels.
#include "convert.h"
#include "search_simd.h"

namespace semhitok::cpu::SEMHITOK_ISA {
namespace {

constexpr int64_t kRetryBlocks = 15;  // blocks that a pass skips
constexpr double kLargest32 = 1e38;   // below this no intermediate fp32 value overflows
constexpr int kExactTokens = 4;

// All codes for the remaining tokens, a panel and a few tokens at a time, so that its rows stay in the cache.
void search_exact(const PackedCodebook& book, bool l2, int64_t count, const Scratch& scratch, Token* tokens) {
  const int64_t padded = round_up(book.depth, kVectorDoubles);
  const double* x[kTokenBlock];
  Token* left[kTokenBlock];
  int64_t searched = 0;
  for (int64_t t = 0; t < count; ++t) {
    if (tokens[t].kind == Kind::kExact) x[searched] = scratch.x + t * padded, left[searched++] = tokens + t;
  }
  for (int64_t g = 0; searched > 0 && g < ceil_div(book.num_codes, kPanelCodes); ++g) {
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

// Searches one part for all tokens that are not done. waiting: for each of the two passes, how many blocks it skips. A
// pass that settles less than half of a block skips the next ones, which are likely of the same kind.
void search_part(const PackedCodebook& book, bool l2, int64_t first, int64_t count, const RowsAhead& ahead,
                 const SearchOptions& options, const Scratch& scratch, int64_t* waiting, Token* tokens) {
  const auto skips = [&](int pass) {
    return options.approximate == nullptr && waiting[pass] > 0 && --waiting[pass] >= 0;
  };
  const auto judge = [&](int pass, int64_t unsettled) {
    if (2 * unsettled > count) waiting[pass] = kRetryBlocks;
  };
  const auto count_of = [&](Kind kind) {
    int64_t of = 0;
    for (int64_t t = 0; t < count; ++t) of += tokens[t].kind == kind;
    return of;
  };

  const bool int8 = book.int8 && !options.fp32_first && !skips(0);
  for (int64_t t = 0; t < count; ++t) {
    if (tokens[t].kind != Kind::kDone) tokens[t].kind = int8 ? Kind::kInt8 : Kind::kFp32;
  }
#if !SEMHITOK_INT8
  (void)ahead;
#else
  if (int8) {
    search_int8(book, l2, count, ahead, options, first, scratch, tokens);
    judge(0, count_of(Kind::kFp32));
  }
#endif
  const bool fp32 = count_of(Kind::kFp32) > 0 && !skips(1);
  for (int64_t t = 0; t < count; ++t) {
    const double reach = tokens[t].norm * book.max_norm + (l2 ? 0.5 * book.max_norm * book.max_norm : 0.0);
    if (tokens[t].kind == Kind::kFp32 && !(fp32 && reach < kLargest32)) tokens[t].kind = Kind::kExact;
  }
  if (fp32) {
    search_fp32(book, l2, count, options, first, scratch, tokens);
    judge(1, count_of(Kind::kExact));
  }
  search_exact(book, l2, count, scratch, tokens);
}

}  // namespace

int64_t search_scratch(int64_t depth) {
  Scratch scratch;
  return lay_out(depth, nullptr, &scratch);
}

void search(const PackedCodebook* parts, int64_t part_count, const Rows& z, Metric metric, int64_t first, int64_t count,
            const RowsAhead& ahead, const SearchOptions& options, void* memory, float* scores, int64_t* ids) {
  const bool l2 = metric == Metric::kL2;
  const int64_t depth = parts[0].depth, padded = round_up(depth, kVectorDoubles);
  Scratch scratch;
  lay_out(depth, static_cast<char*>(memory), &scratch);
  int32_t lowest = parts[0].ids[0];
  for (int64_t s = 1; s < part_count; ++s) lowest = parts[s].ids[0] < lowest ? parts[s].ids[0] : lowest;

  Token tokens[kTokenBlock];
  for (int64_t t = 0; t < count; ++t) {
    Token& token = tokens[t];
    read_token(z, first + t, depth, scratch.row, scratch.x + t * padded, &token);
    token.kind = token.norm < kInfinity ? Kind::kInt8 : Kind::kDone;
    if (token.norm == 0.0 && !l2) token.kind = Kind::kDone, token.best = 0.0, token.id = lowest;  // all scores are 0
  }
  for (int64_t s = 0; s < part_count; ++s) {
    search_part(parts[s], l2, first, count, s == 0 ? ahead : RowsAhead{}, options, scratch, scratch.waiting + 2 * s,
                tokens);
  }
  for (int64_t t = 0; t < count; ++t) {
    const Token& token = tokens[t];
    const bool found = token.best > -kInfinity;
    scores[t] = found ? static_cast<float>(token.best) : __builtin_nanf("");
    ids[t] = found ? token.id : 0;
    if (options.rescored != nullptr) options.rescored[first + t] = token.rescored;
  }
}

// In codebook_simd.cpp and nearest_subcode_simd.cpp.
void digest(const void* data, int64_t bytes, uint64_t out[2]);
void hash_rows(const float* rows, int64_t depth, int64_t first, int64_t count, uint64_t* hashes);
void measure(const float* rows, int64_t depth, const int32_t* ids, int64_t count, double* sum, float* low, float* high);
void pack(const PackedCodebook& codebook, int64_t s, const float* rows, const BiasTerms& terms, double* max_quantised);
void pack_terms(const PackedCodebook& codebook, int64_t s, const BiasTerms& terms);
void subcode(const NearestSubcode& problem, int64_t first, int64_t count, const int64_t* group, float* scratch,
             float* scores, int64_t* ids);

extern const Kernels table;
const Kernels table = {kTokenBlock, kSuperblock, SEMHITOK_INT8 ? kStepDims : 0,
                       digest,      hash_rows,   measure,
                       pack,        pack_terms,  search_scratch,
                       search,      subcode};

}  // namespace semhitok::cpu::SEMHITOK_ISA
