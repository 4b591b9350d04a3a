// The device functions of emulator.h that are not a line each.
#include <cfenv>
#include <climits>

#include "emulator.h"

unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1u) << (31 - i);
  return y;
}

unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> (4 * i);
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7))) & 0xffu;
    if ((nibble & 8) != 0) byte = (byte & 0x80u) != 0 ? 0xffu : 0u;
    result |= byte << (8 * i);
  }
  return result;
}

int __dp4a(int a, int b, int c) {
  unsigned sum = static_cast<unsigned>(c);
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<unsigned>(static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i));
  }
  return static_cast<int>(sum);
}
unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (a >> 8 * i & 0xffu) * (b >> 8 * i & 0xffu);
  return c;
}

unsigned __vmaxs2(unsigned a, unsigned b) {
  const auto half = [&](int i) {
    const int x = static_cast<int16_t>(a >> 16 * i), y = static_cast<int16_t>(b >> 16 * i);
    return static_cast<unsigned>(static_cast<uint16_t>(max(x, y))) << 16 * i;
  };
  return half(0) | half(1);
}
unsigned __vimax3_s16x2(unsigned a, unsigned b, unsigned c) { return __vmaxs2(__vmaxs2(a, b), c); }

// ---- rounding: the operands pass through memory, so that the operation stays between the two changes of mode ----

namespace {

template <typename T, typename Operation>
T in_mode(int mode, Operation operation, T a, T b = T(), T c = T()) {
  volatile T x = a, y = b, z = c;
  const int before = std::fegetround();
  std::fesetround(mode);
  volatile T result = operation(x, y, z);
  std::fesetround(before);
  return result;
}

template <typename T>
T add(T a, T b, T) {
  return a + b;
}
template <typename T>
T sub(T a, T b, T) {
  return a - b;
}
template <typename T>
T mul(T a, T b, T) {
  return a * b;
}
template <typename T>
T div(T a, T b, T) {
  return a / b;
}
template <typename T>
T root(T a, T, T) {
  return std::sqrt(a);
}
template <typename T>
T fma3(T a, T b, T c) {
  return std::fma(a, b, c);
}

}  // namespace

#define EMULATED_ROUNDED(T, prefix, fma_prefix)                                         \
  T prefix##add_rz(T a, T b) { return in_mode(FE_TOWARDZERO, add<T>, a, b); }           \
  T prefix##add_ru(T a, T b) { return in_mode(FE_UPWARD, add<T>, a, b); }               \
  T prefix##add_rd(T a, T b) { return in_mode(FE_DOWNWARD, add<T>, a, b); }             \
  T prefix##sub_rz(T a, T b) { return in_mode(FE_TOWARDZERO, sub<T>, a, b); }           \
  T prefix##sub_ru(T a, T b) { return in_mode(FE_UPWARD, sub<T>, a, b); }               \
  T prefix##sub_rd(T a, T b) { return in_mode(FE_DOWNWARD, sub<T>, a, b); }             \
  T prefix##mul_rz(T a, T b) { return in_mode(FE_TOWARDZERO, mul<T>, a, b); }           \
  T prefix##mul_ru(T a, T b) { return in_mode(FE_UPWARD, mul<T>, a, b); }               \
  T prefix##mul_rd(T a, T b) { return in_mode(FE_DOWNWARD, mul<T>, a, b); }             \
  T prefix##div_rz(T a, T b) { return in_mode(FE_TOWARDZERO, div<T>, a, b); }           \
  T prefix##div_ru(T a, T b) { return in_mode(FE_UPWARD, div<T>, a, b); }               \
  T prefix##div_rd(T a, T b) { return in_mode(FE_DOWNWARD, div<T>, a, b); }             \
  T prefix##sqrt_ru(T a) { return in_mode(FE_UPWARD, root<T>, a); }                     \
  T prefix##sqrt_rd(T a) { return in_mode(FE_DOWNWARD, root<T>, a); }                   \
  T fma_prefix##_rz(T a, T b, T c) { return in_mode(FE_TOWARDZERO, fma3<T>, a, b, c); } \
  T fma_prefix##_ru(T a, T b, T c) { return in_mode(FE_UPWARD, fma3<T>, a, b, c); }     \
  T fma_prefix##_rd(T a, T b, T c) { return in_mode(FE_DOWNWARD, fma3<T>, a, b, c); }
EMULATED_ROUNDED(float, __f, __fmaf)
EMULATED_ROUNDED(double, __d, __fma)

namespace {

float narrowed(int mode, double x) {
  volatile double from = x;
  const int before = std::fegetround();
  std::fesetround(mode);
  volatile float to = static_cast<float>(from);
  std::fesetround(before);
  return to;
}

template <typename To, typename From>
To saturated(From whole, To of_nan) {
  if (std::isnan(whole)) return of_nan;
  constexpr bool kLong = sizeof(To) == sizeof(long long);
  constexpr auto kSignedLeast = static_cast<To>(kLong ? LLONG_MIN : INT_MIN);
  constexpr To kLeast = std::is_signed<To>::value ? kSignedLeast : To(0);
  constexpr To kMost = static_cast<To>(~kLeast);
  if (whole <= static_cast<From>(kLeast)) return kLeast;
  if (whole >= static_cast<From>(kMost)) return kMost;
  return static_cast<To>(whole);
}

}  // namespace

float __double2float_rn(double x) { return static_cast<float>(x); }
float __double2float_rz(double x) { return narrowed(FE_TOWARDZERO, x); }
float __double2float_ru(double x) { return narrowed(FE_UPWARD, x); }
float __double2float_rd(double x) { return narrowed(FE_DOWNWARD, x); }
int __float2int_rn(float x) { return saturated<int>(std::nearbyint(x), 0); }
int __float2int_rz(float x) { return saturated<int>(std::trunc(x), 0); }
int __float2int_ru(float x) { return saturated<int>(std::ceil(x), 0); }
int __float2int_rd(float x) { return saturated<int>(std::floor(x), 0); }
unsigned __float2uint_rn(float x) { return saturated<unsigned>(std::nearbyint(x), 0u); }
unsigned __float2uint_rz(float x) { return saturated<unsigned>(std::trunc(x), 0u); }
long long __float2ll_rn(float x) { return saturated<long long>(std::nearbyint(x), LLONG_MIN); }
int __double2int_rn(double x) { return saturated<int>(std::nearbyint(x), INT_MIN); }
int __double2int_rz(double x) { return saturated<int>(std::trunc(x), INT_MIN); }
long long __double2ll_rn(double x) { return saturated<long long>(std::nearbyint(x), LLONG_MIN); }
