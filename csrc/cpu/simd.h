// The instruction set a *_simd.cpp file is compiled for: its vector type and register tile.
//
// The build compiles each of those files once per instruction set with SEMHITOK_ISA naming it (avx512, avx2, portable).
// They keep everything in namespace SEMHITOK_ISA, use no standard templates and no shared inline functions.
#pragma once

#include <cstdint>

#ifndef SEMHITOK_ISA
#error "SEMHITOK_ISA names the instruction set: compile this file through CMakeLists.txt"
#endif

namespace semhitok::cpu::SEMHITOK_ISA {

// kTileTokens x 2 vectors of accumulators, kTileTokens running maxima, two code vectors and a broadcast must fit the
// registers: 32 of them with AVX-512 and on ARM, 16 otherwise.
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

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));

namespace {

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline Vec splat(float x) { return Vec{} + x; }
// Takes b where either is NaN, as the max instruction does.
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

}  // namespace
}  // namespace semhitok::cpu::SEMHITOK_ISA
