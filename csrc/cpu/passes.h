// What nearest_code_simd.cpp uses from the other files of its instruction set: the two first passes of a search, and
// the other functions of the table of kernels.
//
// A pass multiplies whole tiles of tokens with a stretch of the codebook. For every token it writes the greatest
// approximate score of every slot to maxima[token * stride + slot], and the greatest of each lane to top[token].
// int8: a slot is a panel of 16 codes. fp32: a slot is a lane of a unit of 128 codes; a unit is kept if one lane is.
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

// The bias that a span of tokens shares: mean * mean_term + norm * norm_term, in accumulator units; none if both are 0.
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
