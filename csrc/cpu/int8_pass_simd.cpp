// The int8 first pass, for one instruction set: integer dot products of every token with every code, kept as the
// maximum of each panel of 16.
//
// Contract: maxima[t][g] = max over the 16 codes k of panel g of I(t, k) = sum_d q(t, d) q(k, d) + bias(t, k), exact in
// the accumulator type. The token is given as u = q + kTokenOffset, because the instructions need one unsigned operand;
// the codes' `offset` corrects this and initialises the accumulators, so it costs no instruction. The 16-bit
// accumulator may wrap on the way: wrapping sums are exact if the final value fits, which the caller ensures.
//
// Layout of the codes: [superblock][vector pair][step][2][lane][kStepDims]. Lane l of the 16 vectors of a superblock
// holds 16 consecutive codes, so the lane-wise maximum over its vectors is the maximum of a panel: one max instruction
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
constexpr int64_t kLineBytes = 64;
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

// maxima[r * stride ..] = those of the superblock's panels for token r of the tile; top[r] is updated. Not inlined, or
// GCC would keep the code vectors on the stack and load them again for every token. kSteps: the number of steps if it
// is known, so that short loops unroll, or 0.
template <int kSteps>
__attribute__((noinline)) void superblock_maxima(const uint8_t* __restrict x, const int8_t* __restrict codes,
                                                 const Acc* __restrict start, int64_t any_steps, Acc* __restrict maxima,
                                                 int64_t stride, AccVec* __restrict top) {
  const int64_t steps = kSteps > 0 ? kSteps : any_steps;
  AccVec best[kTile];
  for (int v = 0; v < kSuperVectors; v += 2) {
    AccVec acc0[kTile], acc1[kTile];
    const AccVec start0 = load(start + v * kAccLanes), start1 = load(start + (v + 1) * kAccLanes);
    for (int r = 0; r < kTile; ++r) acc0[r] = start0, acc1[r] = start1;
    const uint8_t* xs = x;
    if (kSteps > 0) __asm__("" : "+r"(xs));  // or all broadcasts would be hoisted, and spill
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
    AccVec whole;
    const IntVec low = whole_bias(mean + n, norm + n, bias);
    if (sizeof(Acc) == 4) {
      __builtin_memcpy(&whole, &low, sizeof whole);
    } else {
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

}  // namespace

void int8_pass(const PackedCodebook& codebook, int64_t first_superblock, int64_t superblocks, const uint8_t* tiles,
               int64_t tile_count, const SpanBias* bias, const RowsAhead& ahead, Acc* maxima, int64_t stride,
               AccVec* top) {
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
      const char* row = ahead.table + ahead.rows[r] * ahead.row_bytes;
      for (int64_t b = 0; b < ahead.row_bytes; b += kLineBytes) __builtin_prefetch(row + b, 0, 2);
    }
    for (int64_t tile = 0; tile < tile_count; ++tile) {
      const SpanBias& own = bias[tile * kTile / kSpan];
      const bool is_biased = own.mean != 0.0f || own.norm != 0.0f;
      if (is_biased && tile * kTile % kSpan == 0) biased_start(codebook, block, own, biased);
      maxima_of(tiles + tile * tile_bytes, codes, is_biased ? biased : start, steps,
                maxima + tile * kTile * stride + s * kAccLanes, stride, top + tile * kTile);
    }
  }
}

}  // namespace semhitok::cpu::SEMHITOK_ISA

#endif
