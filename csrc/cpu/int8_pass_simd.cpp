// The int8 first pass, one instruction set: integer dot products of every token with every code, kept as the maximum
// of each group of 16.
//
// Contract: maxima[t][g] = max over the 16 codes k of group g of I(t, k) = sum_d q(t, d) q(k, d) + bias(t, k), exact in
// the accumulator type. The token comes as u = q + kTokenOffset, unsigned, as the instructions want one such side; the
// codes' `offset` takes that back out and starts the accumulators, so it costs no instruction. The 16-bit accumulator
// may wrap on the way: wrapping sums are exact as soon as the final value fits, which the caller sees to.
//
// Layout of the codes: [superblock][vector pair][step][2][lane][kStepDims]. Lane l of the 16 vectors of a superblock
// holds 16 consecutive codes, so the lane-wise maximum over its vectors is the maximum of a group: one max instruction
// a vector of codes, no index and no horizontal step.
//
// Cost per token: padded * depth / kVectorBytes multiply instructions (twice as many, one half of them additions, with
// 16-bit accumulators) and padded / kAccLanes max instructions; padded / 16 maxima written.
#include "passes.h"

#if SEMHITOK_INT8

namespace semhitok::cpu::SEMHITOK_ISA {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));
constexpr int kStepBytes = kTileTokens * kStepDims;
constexpr int kTile = kTileTokens;
static_assert(kTile * 3 + 3 <= kRegisters, "the register tile spills");

inline Bytes load_bytes(const void* p) {
  Bytes v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// One step of a token, the same in every lane.
inline Bytes broadcast(const uint8_t* p) {
#if defined(__AVX512F__)
  if (kStepDims == 4) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return (Bytes)_mm512_set1_epi32(word);
  }
  int16_t word;
  __builtin_memcpy(&word, p, 2);
  return (Bytes)_mm512_set1_epi16(word);
#else
  if (kStepDims == 4) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return (Bytes)_mm256_set1_epi32(word);
  }
  int16_t word;
  __builtin_memcpy(&word, p, 2);
  return (Bytes)_mm256_set1_epi16(word);
#endif
}

// acc + sum over a step of token (unsigned) * code (signed). The 32-bit instruction is spelled out because GCC's
// builtin copies the accumulator around it; taking and returning it by value keeps the tile in registers.
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

// maxima[r * stride ..] = those of the superblock's groups for token r of the tile; top[r] follows. A function of its
// own: inlined, GCC keeps the code vectors on the stack and loads them again for every token.
__attribute__((noinline)) void superblock_maxima(const uint8_t* __restrict x, const int8_t* __restrict codes,
                                                 const Acc* __restrict start, int64_t steps, Acc* __restrict maxima,
                                                 int64_t stride, AccVec* __restrict top) {
  AccVec best[kTile];
  for (int v = 0; v < kSuperVectors; v += 2) {
    AccVec acc0[kTile], acc1[kTile];
    const AccVec start0 = load(start + v * kAccLanes), start1 = load(start + (v + 1) * kAccLanes);
    for (int r = 0; r < kTile; ++r) acc0[r] = start0, acc1[r] = start1;
    const uint8_t* xs = x;
    for (int64_t s = 0; s < steps; ++s, codes += 2 * kVectorBytes, xs += kStepBytes) {
      const Bytes c0 = load_bytes(codes), c1 = load_bytes(codes + kVectorBytes);
      for (int r = 0; r < kTile; ++r) {
        const Bytes token = broadcast(xs + r * kStepDims);
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
    store(maxima + r * stride, best[r]);
    top[r] = larger(top[r], best[r]);
  }
}

// The accumulators' start with a tile's bias: the codes' offset plus the bias, truncated to an integer.
inline void biased_start(const PackedCodebook& codebook, int64_t superblock, TileBias bias, Acc* start) {
  const int64_t first = superblock * kSuperblock;
  const Acc* offset = static_cast<const Acc*>(codebook.offset) + first;
  const float* mean = codebook.mean_part + first;
  const float* norm = codebook.norm_part + first;
  for (int64_t n = 0; n < kSuperblock; n += kLanes) {
    Vec part = load(norm + n) * bias.norm;
    if (bias.mean != 0.0f) part += load(mean + n) * bias.mean;
    const IntVec whole = __builtin_convertvector(part, IntVec);
    typedef Acc Narrow __attribute__((vector_size(kLanes * sizeof(Acc))));
    Narrow from;
    __builtin_memcpy(&from, offset + n, sizeof from);
    from += __builtin_convertvector(whole, Narrow);
    __builtin_memcpy(start + n, &from, sizeof from);
  }
}

}  // namespace

void int8_pass(const PackedCodebook& codebook, int64_t first_superblock, int64_t superblocks, const uint8_t* tiles,
               int64_t tile_count, const TileBias* bias, Acc* maxima, int64_t stride, AccVec* top) {
  const int64_t steps = codebook.steps, tile_bytes = steps * kStepBytes;
  const int64_t superblock_bytes = kSuperVectors * steps * kVectorBytes;
  alignas(64) Acc biased[kSuperblock];
  for (int64_t s = 0; s < superblocks; ++s) {
    const int64_t block = first_superblock + s;
    const int8_t* codes = codebook.quantised + block * superblock_bytes;
    for (int64_t tile = 0; tile < tile_count; ++tile) {
      const Acc* start = static_cast<const Acc*>(codebook.offset) + block * kSuperblock;
      if (bias[tile].mean != 0.0f || bias[tile].norm != 0.0f) {
        biased_start(codebook, block, bias[tile], biased);
        start = biased;
      }
      superblock_maxima(tiles + tile * tile_bytes, codes, start, steps, maxima + tile * kTile * stride + s * kAccLanes,
                        stride, top + tile * kTile);
    }
  }
}

}  // namespace semhitok::cpu::SEMHITOK_ISA

#endif
