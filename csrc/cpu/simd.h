// The instruction set that a *_simd.cpp file is compiled for: vector types, register tiles, a few special instructions.
//
// The build compiles each of those files once for each instruction set, with its name in SEMHITOK_ISA (CMakeLists.txt).
// They keep everything in namespace SEMHITOK_ISA and use no standard templates and no shared inline functions.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef SEMHITOK_ISA
#error "SEMHITOK_ISA names the instruction set: compile this file through CMakeLists.txt"
#endif

namespace semhitok::cpu::SEMHITOK_ISA {

// fp32: kTileTokens x 2 vectors of accumulators, kTileTokens running maxima, two code vectors and a broadcast must fit
// in the registers: 32 with AVX-512 and on ARM, 16 otherwise.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileTokens = 8, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTileTokens = 4, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kTileTokens = 8, kRegisters = 32;
#else
constexpr int kLanes = 4, kTileTokens = 4, kRegisters = 16;
#endif
static_assert(kTileTokens * 3 + 3 <= kRegisters, "the register tile spills");

constexpr int kDoubles = kLanes / 2;
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef float HalfVec __attribute__((vector_size(kDoubles * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef double DoubleVec __attribute__((vector_size(kDoubles * sizeof(double))));

// int8: a step multiplies kStepDims unsigned bytes of a token by as many signed bytes of a code and adds them to one
// lane. kTokenMax keeps that step exact: the 16-bit one saturates beyond 2 * 127 * 127.
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
#define SEMHITOK_INT8 1
typedef int32_t Acc;
constexpr int kStepDims = 4, kTokenMax = 127, kTokenOffset = 128;
constexpr double kAccLimit = 1 << 28;  // room for the bias: products stay far below 2^30 at kMaxInt8Depth
#elif defined(__AVX512BW__) || defined(__AVX2__)
#define SEMHITOK_INT8 1
typedef int16_t Acc;
constexpr int kStepDims = 2, kTokenMax = 63, kTokenOffset = 64;
constexpr double kAccLimit = 32700;  // for everything: final sums must fit, intermediate ones may wrap
#else
#define SEMHITOK_INT8 0
typedef int32_t Acc;
constexpr int kStepDims = 4, kTokenMax = 127, kTokenOffset = 128;
constexpr double kAccLimit = 0;
#endif
constexpr int kCodeMax = 127;
constexpr int kVectorBytes = kLanes * 4;
constexpr int kAccLanes = kVectorBytes / static_cast<int>(sizeof(Acc));
constexpr int kSuperVectors = 16;  // vectors of a superblock: its lanes l are one panel
constexpr int kSuperblock = SEMHITOK_INT8 ? kSuperVectors * kAccLanes : 128;
typedef Acc AccVec __attribute__((vector_size(kVectorBytes)));

namespace {

template <typename T>
inline T load_as(const void* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}
inline Vec load(const float* p) { return load_as<Vec>(p); }
inline DoubleVec load(const double* p) { return load_as<DoubleVec>(p); }
inline AccVec load(const Acc* p) { return load_as<AccVec>(p); }
template <typename T, typename V>
inline void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
inline Vec splat(float x) { return Vec{} + x; }
inline AccVec splat(Acc x) { return AccVec{} + x; }
// Takes b where either is NaN, as the max instruction does.
template <typename V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

// To the nearest integer, ties to even; for magnitudes below 2^51.
inline DoubleVec nearest(DoubleVec v) { return (v + 0x1.8p52) - 0x1.8p52; }
// Reductions over lanes halve the vector, instead of a chain with a step for every lane.
inline double sum(DoubleVec v) {
  double lanes[kDoubles];
  store(lanes, v);
  for (int half = kDoubles / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}
inline double greatest(DoubleVec v) {
#if defined(__AVX2__)
  __m256d parts[kVectorBytes / 32];
  __builtin_memcpy(parts, &v, sizeof v);
  const __m256d w = _mm256_max_pd(parts[0], parts[kVectorBytes / 32 - 1]);
  const __m128d m = _mm_max_pd(_mm256_castpd256_pd128(w), _mm256_extractf128_pd(w, 1));
  return _mm_cvtsd_f64(_mm_max_sd(m, _mm_unpackhi_pd(m, m)));
#else
  double most = v[0];
  for (int l = 1; l < kDoubles; ++l) most = v[l] > most ? v[l] : most;
  return most;
#endif
}
// GCC 12 splits the plain conversion of a whole register in two, and warns inside the intrinsic without a mask.
inline DoubleVec widen(const float* p) {
#if defined(__AVX512F__)
  return (DoubleVec)_mm512_maskz_cvtps_pd(0xFF, _mm256_loadu_ps(p));
#elif defined(__AVX2__)
  return (DoubleVec)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  return __builtin_convertvector(load_as<HalfVec>(p), DoubleVec);
#endif
}
// Bit l: v[l] > x, or >= x when equal counts.
inline uint32_t beating(DoubleVec v, double x, bool equal) {
#if defined(__AVX512F__)
  const __m512d a = (__m512d)v, b = _mm512_set1_pd(x);
  return equal ? _mm512_cmp_pd_mask(a, b, _CMP_GE_OQ) : _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  const __m256d a = (__m256d)v, b = _mm256_set1_pd(x);
  const __m256d bits = equal ? _mm256_cmp_pd(a, b, _CMP_GE_OQ) : _mm256_cmp_pd(a, b, _CMP_GT_OQ);
  return static_cast<uint32_t>(_mm256_movemask_pd(bits));
#else
  uint32_t bits = 0;
  for (int l = 0; l < kDoubles; ++l) bits |= static_cast<uint32_t>(equal ? v[l] >= x : v[l] > x) << l;
  return bits;
#endif
}

#if defined(__AVX2__)
inline Acc greatest(AccVec v) {
  __m256i parts[kVectorBytes / 32];
  __builtin_memcpy(parts, &v, sizeof v);
  if (sizeof(Acc) == 4) {
    __m256i w = parts[0];
    for (int i = 1; i < kVectorBytes / 32; ++i) w = _mm256_max_epi32(w, parts[i]);
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return static_cast<Acc>(_mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1))));
  }
  __m256i w = parts[0];
  for (int i = 1; i < kVectorBytes / 32; ++i) w = _mm256_max_epi16(w, parts[i]);
  // The least of the unsigned 32767 - x is the greatest x.
  const __m128i m = _mm_max_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
  const __m128i least = _mm_minpos_epu16(_mm_sub_epi16(_mm_set1_epi16(INT16_MAX), m));
  return static_cast<Acc>(INT16_MAX - static_cast<uint16_t>(_mm_cvtsi128_si32(least)));
}
#endif
inline float greatest(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] = lanes[l] > lanes[l + half] ? lanes[l] : lanes[l + half];
  }
  return lanes[0];
}

}  // namespace
}  // namespace semhitok::cpu::SEMHITOK_ISA
