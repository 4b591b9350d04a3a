// What nearest_code_simd.cpp takes from the other files of its instruction set: the two first passes of a search, and
// the rest of the table of kernels.
//
// A pass takes whole tiles of tokens over a stretch of the codebook and leaves, for every token, the greatest
// approximate score of every slot: maxima[token * stride + slot], and per lane the greatest of all in top[token].
// int8: slot = panel of 16 codes. fp32: slot = lane of a unit of 128 codes; a unit is kept when one of its lanes is.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace semhitok::cpu::SEMHITOK_ISA {

void digest(const void* data, int64_t bytes, uint64_t out[2]);
void hash_rows(const float* rows, int64_t depth, int64_t first, int64_t count, uint64_t* hashes);
void measure(const float* rows, int64_t depth, const int32_t* ids, int64_t count, double* sum, float* low, float* high);
void pack(const PackedCodebook& codebook, int64_t s, const float* rows, const BiasTerms& terms, double* max_quantised);
void pack_terms(const PackedCodebook& codebook, int64_t s, const BiasTerms& terms);
void subcode(const NearestSubcode& problem, int64_t first, int64_t count, const int64_t* group, float* scratch,
             float* scores, int64_t* ids);

// Tokens that share a bias: mean * mean_term + norm * norm_term, in accumulator units; none when both are 0.
constexpr int kSpan = 16;
struct SpanBias {
  float mean, norm;
};

#if SEMHITOK_INT8
// tiles: [tile][step][kTileTokens][kStepDims] bytes.
void int8_pass(const PackedCodebook& codebook, int64_t first_superblock, int64_t superblocks, const uint8_t* tiles,
               int64_t tile_count, const SpanBias* bias, const RowsAhead& ahead, Acc* maxima, int64_t stride,
               AccVec* top);
#endif

// tiles: [tile][depth][kTileTokens]; l2 adds half_norm.
void fp32_pass(const PackedCodebook& codebook, bool l2, int64_t first_unit, int64_t units, const float* tiles,
               int64_t tile_count, float* maxima, int64_t stride, Vec* top);

}  // namespace semhitok::cpu::SEMHITOK_ISA
