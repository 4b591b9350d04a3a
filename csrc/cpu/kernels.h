// The functions that each instruction set provides (the *_simd.cpp files) and their data. Those files include this
// header and no standard header with code in it: see simd.h.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace semhitok::cpu {

[[maybe_unused]] static constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Loads a row into the cache; kLocality is that of __builtin_prefetch. Always inline: GCC 12 treats a function that
// only prefetches as one without effects and drops its calls.
template <int kLocality>
__attribute__((always_inline)) static inline void prefetch_row(const void* row, int64_t bytes) {
  constexpr int64_t kLineBytes = 64;
  for (int64_t b = 0; b < bytes; b += kLineBytes) __builtin_prefetch(static_cast<const char*>(row) + b, 0, kLocality);
}

static constexpr int64_t kPanelCodes = 16;  // a panel: packed side by side, kept or dropped together by the int8 pass
static constexpr int64_t kUnitCodes = 128;  // kept or dropped together by the fp32 pass
static constexpr int64_t kMaxInt8Depth = 512;  // deeper codes go to the fp32 pass at once
static constexpr int64_t kMaxParts = 4;
static constexpr int64_t kVectorDoubles = 8;  // rows of doubles are padded to this many

// A codebook packed for the search, or one of the parts it is searched in. It has only usable codes, each distinct one
// once, in ascending order of id: a code with NaN or Inf never wins, nor does a copy of an earlier one. The tail of the
// last superblock repeats the last code and its id. The int8 pass sees r = c - mean: without the common offset, which
// does not change the winner, |r| and with it the rounding is smaller.
struct PackedCodebook {
  int64_t num_codes;     // without the padding
  int64_t first_panel;   // its first among the panels of all parts
  int64_t padded;        // codes with the padding: whole superblocks
  int64_t depth, steps;  // steps: of the int8 pass, ceil(depth / dimensions of a step)
  bool int8;             // whether it has the int8 arrays below
  int32_t* ids;          // [padded]
  float* rows;           // [padded / 16][depth][16], as given
  float* half_norm;      // [padded] -|c|^2/2, fp32
  double* half_norm64;   // [padded] the same in fp64
  double max_norm;       // largest |c|

  double* mean;           // [depth, zero-padded to kVectorDoubles]
  double mean_norm;       // |mean|
  double scale;           // r ~ scale * q
  double max_quantised;   // largest |q|
  double residual, norm;  // largest |r - scale q| and |scale q|
  float* panel_residual;  // [padded / 16] the same of a panel
  float* panel_norm;
  int8_t* quantised;  // q, in the int8 pass's order (search_int8_simd.cpp)
  void* offset;       // [padded] -(token offset) * sum of q, in that order, as the accumulator type
  float* mean_term;   // [padded] (mean . r) / (mean_size * scale), in that order
  float* norm_term;   // [padded] (-|r|^2/2 - norm_middle) / (norm_size * scale), in that order
  double mean_size, norm_size, norm_middle;
};

// What a packing kernel returns to its driver for each code, in ascending order: mean . r and -|r|^2/2, not scaled.
struct BiasTerms {
  double* mean_dot;
  double* half_residual_norm;
};

// What only tests and benchmarks set: a change to the search, and what it reports besides its answer.
struct SearchOptions {
  double bound_scale = 1.0;       // less shows that the bound is needed
  bool fp32_first = false;        // skip the int8 pass
  int64_t* rescored = nullptr;    // [tokens] codes scored exactly
  int64_t panels = 0;             // of all parts
  double* approximate = nullptr;  // [tokens][panels, or units] the greatest score of each as the first pass sees it
  double* bound = nullptr;        // [tokens][panels, or units] how far from the exact score that may be
};

// The scratch of a search for sub-codes: a token in fp64 and kSubcodeRows codes in fp32, rows padded to
// kSubcodePadding.
[[maybe_unused]] static constexpr int64_t kSubcodePadding = 16, kSubcodeRows = 64;
[[maybe_unused]] static constexpr int64_t subcode_floats(int64_t depth) {
  return (2 + kSubcodeRows) * round_up(depth, kSubcodePadding);
}

// Rows of a table to load into the cache during a search: the next stage will read them.
struct RowsAhead {
  const char* table;
  int64_t row_bytes;
  const int64_t* rows;  // [count]
  int64_t count;
};

struct Kernels {
  int64_t token_block;  // the most tokens a call of search takes
  int64_t superblock;   // codes are padded to a multiple of this
  int64_t step;         // dimensions of a step of the int8 pass; 0 without one
  // A digest of bytes: equal bytes have equal digests, others with a chance of about 2^-64 a word.
  void (*digest)(const void* data, int64_t bytes, uint64_t out[2]);
  // hashes[n] of fp32 rows first .. first + count: 0 for a row with NaN or Inf; equal rows have equal hashes, others
  // rarely.
  void (*hash_rows)(const float* rows, int64_t depth, int64_t first, int64_t count, uint64_t* hashes);
  // Sum and range of rows ids[0 .. count), per dimension.
  void (*measure)(const float* rows, int64_t depth, const int32_t* ids, int64_t count, double* sum, float* low,
                  float* high);
  // Writes superblock s from the rows that its ids name; max_quantised receives its largest |q|^2.
  void (*pack)(const PackedCodebook& codebook, int64_t s, const float* rows, const BiasTerms& terms,
               double* max_quantised);
  // Writes mean_term and norm_term of superblock s from parts.
  void (*pack_terms)(const PackedCodebook& codebook, int64_t s, const BiasTerms& terms);
  int64_t (*search_scratch)(int64_t depth);  // bytes, 64-byte aligned, the first 64 zero before the first search
  // Tokens first .. first + count of z, count <= token_block; scores and ids point at the first of them.
  void (*search)(const PackedCodebook* parts, int64_t part_count, const Rows& z, Metric metric, int64_t first,
                 int64_t count, const RowsAhead& ahead, const SearchOptions& options, void* scratch, float* scores,
                 int64_t* ids);
  // Tokens first .. first + count of problem; group, scores and ids point at the first of them.
  // scratch is subcode_floats(depth) floats.
  void (*subcode)(const NearestSubcode& problem, int64_t first, int64_t count, const int64_t* group, float* scratch,
                  float* scores, int64_t* ids);
};

}  // namespace semhitok::cpu
