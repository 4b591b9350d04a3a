// Reading any of the four dtypes as float or double. Everything here has internal linkage on purpose: this header is
// compiled into translation units with different instruction sets, and a shared inline function would let the linker
// keep the AVX-512 copy for all of them.
#pragma once

#include <cstdint>
#include <cstring>

#include "../problem.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace semhitok::cpu {
namespace {

[[maybe_unused]] inline float float_from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

[[maybe_unused]] inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

[[maybe_unused]] inline float from_bfloat16(uint16_t h) { return float_from_bits(static_cast<uint32_t>(h) << 16); }

// Exact, and free of branches so that loops over it are vectorised: rescale the exponent by a multiplication (this
// keeps Inf and NaN), or, for subnormals, place the mantissa under 0.5 and subtract it.
[[maybe_unused]] inline float from_float16(uint16_t h) {
  const uint32_t sign = (static_cast<uint32_t>(h) & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h) << 17;
  const uint32_t normal = bits_from_float(float_from_bits((magnitude >> 4) + (0xE0u << 23)) * 0x1.0p-112f);
  const uint32_t subnormal = bits_from_float(float_from_bits((magnitude >> 17) | (126u << 23)) - 0.5f);
  const uint32_t is_subnormal = 0u - static_cast<uint32_t>(magnitude < (1u << 27));
  return float_from_bits(sign | (subnormal & is_subnormal) | (normal & ~is_subnormal));
}

// out[i] = elements first .. first + count of a tensor.
template <typename T>
[[maybe_unused]] inline void read(const Rows& rows, int64_t first, int64_t count, T* out) {
  switch (rows.dtype) {
    case Dtype::kFloat32: {
      const float* in = static_cast<const float*>(rows.data) + first;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(in[i]);
      return;
    }
    case Dtype::kFloat16: {
      const uint16_t* in = static_cast<const uint16_t*>(rows.data) + first;
      int64_t i = 0;
#if defined(__AVX512F__)
      if constexpr (sizeof(T) == sizeof(float)) {
        for (; i + 16 <= count; i += 16) {
          const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i));
          _mm512_storeu_ps(out + i, _mm512_maskz_cvtph_ps(0xFFFF, halves));
        }
      }
#endif
      for (; i < count; ++i) out[i] = static_cast<T>(from_float16(in[i]));
      return;
    }
    case Dtype::kBFloat16: {
      const uint16_t* in = static_cast<const uint16_t*>(rows.data) + first;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(from_bfloat16(in[i]));
      return;
    }
    case Dtype::kFloat64: {
      const double* in = static_cast<const double*>(rows.data) + first;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(in[i]);
      return;
    }
  }
}

}  // namespace
}  // namespace semhitok::cpu
