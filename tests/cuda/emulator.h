// CUDA's device code on the CPU, so that the kernels can be run, and their mistakes found, where there is no GPU.
//
// A thread is a fiber, a block is run alone, and blocks are run one after another in a random order. A fiber runs until
// it waits (for a barrier, for the lanes of its warp, for a copy); who runs next is drawn from a seed, under a policy
// drawn anew for every block, so that a missing barrier shows as a wrong result. Shared memory holds garbage at first.
// What CUDA forbids and we can see fails the launch: it returns cudaErrorLaunchFailure, and message() says why.
//
// Not seen: races between blocks that run at the same time, loops that spin without a wait, reads of global memory out
// of bounds, bank conflicts, registers. The included headers of CUDA are those for the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#undef __shared__
#undef __launch_bounds__
#define __shared__ static thread_local  // for these variables lie together, even those of templates: see emulator.cpp
#define __launch_bounds__(...)

namespace emulator {

constexpr int kWarp = 32;
constexpr int64_t kMostShared = 227 * 1024;
constexpr uint32_t kDynamicAddress = 1024;    // shared addresses of the memory a launch asks for start here,
constexpr uint32_t kStaticAddress = 1 << 18;  // and those of __shared__ variables here, where no descriptor reaches

// The line of a kernel that waits.
struct Where {
  const char* file;
  int line;
};
constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

// ---- settings, and what went wrong ----

void set_seed(uint64_t seed);
void set_device(int major, int minor, int multiprocessors);
const char* message();  // why the last launch failed
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);
uint64_t launches();        // since the seed was set
uint64_t device_queries();  // attributes that were asked for

// ---- the block that runs ----

struct Thread {
  int index, warp, lane;
};
Thread this_thread();
int block_threads();
uint64_t random();
bool chance(int one_in);
void poison(void* memory, size_t bytes);  // finite garbage in every floating type
char* dynamic_shared();
bool in_shared(const void* memory, size_t bytes);
bool in_dynamic_shared(const void* memory, size_t bytes);
uint32_t shared_address(const void* memory);
const char* shared_pointer(uint32_t address, size_t bytes);  // of dynamic shared memory; fails outside of it

// ---- waiting ----

void yield(Where where);
void maybe_yield(Where where);
// Waits, until somebody calls wake with the same key, and tells a deadlock's reader what for.
void sleep(const void* key, const char* what, Where where);
void wake(const void* key);
void block_barrier(Where where);

enum class Collective {
  kSync,
  kShuffle,
  kVote,
  kAdd,
  kMin,
  kMax,
  kAnd,
  kOr,
  kXor,
  kMatch,
  kLoadMatrices,
  kMma,
  kWgmmaWait
};
// Waits for the lanes of mask. kShuffle gives the value of lane `source`; kLoadMatrices and later call `complete` with
// the values of all lanes, once.
uint64_t collective(Collective kind, unsigned mask, uint64_t value, int source, Where where,
                    void (*complete)(const uint64_t* values) = nullptr);

// Something that happens later: at a moment of the scheduler's choosing, at the latest when no thread can run.
struct Event {
  void (*run)(const Event& event);
  void *a, *b, *c;
  uint64_t n;
};
void happen_later(const Event& event);
// Called at the start and the end of each block, for what emulated_ptx.cpp keeps.
void ptx_block_begins(int threads);
void ptx_block_ends();
void ptx_thread_exits();

cudaError_t run(dim3 grid, int threads, int64_t shared_bytes, void (*body)(void*), void* arguments);

template <typename To, typename From>
To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, Where where) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a register, or two");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = collective(Collective::kShuffle, mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
int shuffle_source(char kind, int operand, int width);

// A result that the compiler must not contract with what follows.
template <typename T>
inline T rounded(T value) {
  asm("" : "+m"(value));
  return value;
}

}  // namespace emulator

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = emulator::kWarp;

// ---- barriers, shuffles, votes, reductions over a warp ----

inline void __syncthreads(emulator::Where where = emulator::here()) { emulator::block_barrier(where); }
inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Where where = emulator::here()) {
  emulator::collective(emulator::Collective::kSync, mask, 0, 0, where);
}

#define EMULATED_SHUFFLE(name, kind)                                                                                   \
  template <typename T>                                                                                                \
  T name(unsigned mask, T value, int operand, int width = emulator::kWarp, emulator::Where where = emulator::here()) { \
    return emulator::shuffle(mask, value, emulator::shuffle_source(kind, operand, width), where);                      \
  }
EMULATED_SHUFFLE(__shfl_sync, 'i')
EMULATED_SHUFFLE(__shfl_up_sync, 'u')
EMULATED_SHUFFLE(__shfl_down_sync, 'd')
EMULATED_SHUFFLE(__shfl_xor_sync, 'x')
#undef EMULATED_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Where where = emulator::here()) {
  return static_cast<unsigned>(emulator::collective(emulator::Collective::kVote, mask, predicate != 0, 0, where));
}
inline int __all_sync(unsigned mask, int predicate, emulator::Where where = emulator::here()) {
  return __ballot_sync(mask, predicate, where) == mask;
}
inline int __any_sync(unsigned mask, int predicate, emulator::Where where = emulator::here()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, emulator::Where where = emulator::here()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return static_cast<unsigned>(emulator::collective(emulator::Collective::kMatch, mask, bits, 0, where));
}

#define EMULATED_REDUCTION(name, kind)                                                                     \
  inline unsigned name(unsigned mask, unsigned value, emulator::Where where = emulator::here()) {          \
    return static_cast<unsigned>(emulator::collective(emulator::Collective::kind, mask, value, 0, where)); \
  }
#define EMULATED_SIGNED_REDUCTION(name, kind, offset)                                               \
  EMULATED_REDUCTION(name, kind)                                                                    \
  inline int name(unsigned mask, int value, emulator::Where where = emulator::here()) {             \
    return static_cast<int>(name(mask, static_cast<unsigned>(value) ^ (offset), where) ^ (offset)); \
  }
EMULATED_SIGNED_REDUCTION(__reduce_add_sync, kAdd, 0u)
EMULATED_SIGNED_REDUCTION(__reduce_min_sync, kMin, 0x80000000u)
EMULATED_SIGNED_REDUCTION(__reduce_max_sync, kMax, 0x80000000u)
EMULATED_REDUCTION(__reduce_and_sync, kAnd)
EMULATED_REDUCTION(__reduce_or_sync, kOr)
EMULATED_REDUCTION(__reduce_xor_sync, kXor)
#undef EMULATED_REDUCTION
#undef EMULATED_SIGNED_REDUCTION

// ---- fences, atomics: nothing else runs between two waits, so plain operations are atomic ----

inline void __threadfence(emulator::Where where = emulator::here()) { emulator::maybe_yield(where); }
inline void __threadfence_block(emulator::Where where = emulator::here()) { emulator::maybe_yield(where); }
inline void __threadfence_system(emulator::Where where = emulator::here()) { emulator::maybe_yield(where); }
inline void __nanosleep(unsigned, emulator::Where where = emulator::here()) { emulator::yield(where); }
[[noreturn]] inline void __trap() { emulator::fail("__trap()"); }

namespace emulator {
template <typename T, typename Change>
T atomic(T* address, Where where, Change change) {
  maybe_yield(where);
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) fail("%s:%d: atomic not aligned", where.file, where.line);
  const T old = *address;
  *address = change(old);
  return old;
}
}  // namespace emulator

#define EMULATED_ATOMIC(name, T, expression)                                                    \
  inline T name(T* address, T value, emulator::Where where = emulator::here()) {                \
    return emulator::atomic(address, where, [&](T old) { return static_cast<T>(expression); }); \
  }
#define EMULATED_INTEGER_ATOMICS(T)                                                               \
  EMULATED_ATOMIC(atomicMin, T, old < value ? old : value)                                        \
  EMULATED_ATOMIC(atomicMax, T, old > value ? old : value)                                        \
  EMULATED_ATOMIC(atomicExch, T, ((void)old, value))                                              \
  EMULATED_ATOMIC(atomicAnd, T, old& value)                                                       \
  EMULATED_ATOMIC(atomicOr, T, old | value)                                                       \
  EMULATED_ATOMIC(atomicXor, T, old ^ value)                                                      \
  inline T atomicCAS(T* address, T compare, T value, emulator::Where where = emulator::here()) {  \
    return emulator::atomic(address, where, [&](T old) { return old == compare ? value : old; }); \
  }
EMULATED_INTEGER_ATOMICS(int)
EMULATED_INTEGER_ATOMICS(unsigned)
EMULATED_INTEGER_ATOMICS(unsigned long long)
EMULATED_ATOMIC(atomicMin, long long, old < value ? old : value)
EMULATED_ATOMIC(atomicMax, long long, old > value ? old : value)
EMULATED_ATOMIC(atomicAdd, int, static_cast<unsigned>(old) + static_cast<unsigned>(value))
EMULATED_ATOMIC(atomicAdd, unsigned, old + value)
EMULATED_ATOMIC(atomicAdd, unsigned long long, old + value)
EMULATED_ATOMIC(atomicAdd, float, old + value)
EMULATED_ATOMIC(atomicAdd, double, old + value)
EMULATED_ATOMIC(atomicExch, float, ((void)old, value))
EMULATED_ATOMIC(atomicSub, int, static_cast<unsigned>(old) - static_cast<unsigned>(value))
EMULATED_ATOMIC(atomicSub, unsigned, old - value)
EMULATED_ATOMIC(atomicInc, unsigned, old >= value ? 0u : old + 1)
#undef EMULATED_ATOMIC
#undef EMULATED_INTEGER_ATOMICS

// ---- bits ----

inline int __float_as_int(float x) { return emulator::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return emulator::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return emulator::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return emulator::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator::bits_as<double>(x); }
inline int __double2hiint(double x) { return static_cast<int>(__double_as_longlong(x) >> 32); }
inline int __double2loint(double x) { return static_cast<int>(__double_as_longlong(x)); }
inline double __hiloint2double(int hi, int lo) {
  return __longlong_as_double(
      static_cast<long long>(static_cast<uint64_t>(static_cast<uint32_t>(hi)) << 32 | static_cast<uint32_t>(lo)));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
unsigned __brev(unsigned x);
unsigned __byte_perm(unsigned low, unsigned high, unsigned selector);
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

#define EMULATED_LOADS_AND_STORES(T)                            \
  inline T __ldg(const T* address) { return *address; }         \
  inline T __ldcg(const T* address) { return *address; }        \
  inline T __ldcs(const T* address) { return *address; }        \
  inline T __ldca(const T* address) { return *address; }        \
  inline void __stcg(T* address, T value) { *address = value; } \
  inline void __stcs(T* address, T value) { *address = value; }
EMULATED_LOADS_AND_STORES(char)
EMULATED_LOADS_AND_STORES(signed char)
EMULATED_LOADS_AND_STORES(unsigned char)
EMULATED_LOADS_AND_STORES(short)
EMULATED_LOADS_AND_STORES(unsigned short)
EMULATED_LOADS_AND_STORES(int)
EMULATED_LOADS_AND_STORES(unsigned)
EMULATED_LOADS_AND_STORES(long)
EMULATED_LOADS_AND_STORES(unsigned long)
EMULATED_LOADS_AND_STORES(long long)
EMULATED_LOADS_AND_STORES(unsigned long long)
EMULATED_LOADS_AND_STORES(float)
EMULATED_LOADS_AND_STORES(double)
EMULATED_LOADS_AND_STORES(int2)
EMULATED_LOADS_AND_STORES(int4)
EMULATED_LOADS_AND_STORES(uint2)
EMULATED_LOADS_AND_STORES(uint4)
EMULATED_LOADS_AND_STORES(float2)
EMULATED_LOADS_AND_STORES(float4)
EMULATED_LOADS_AND_STORES(double2)
#undef EMULATED_LOADS_AND_STORES

// ---- arithmetic ----

#define EMULATED_MIN_MAX(T)                           \
  constexpr T min(T a, T b) { return b < a ? b : a; } \
  constexpr T max(T a, T b) { return a < b ? b : a; }
EMULATED_MIN_MAX(int)
EMULATED_MIN_MAX(unsigned)
EMULATED_MIN_MAX(long)
EMULATED_MIN_MAX(unsigned long)
EMULATED_MIN_MAX(long long)
EMULATED_MIN_MAX(unsigned long long)
#undef EMULATED_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// c and the four products of the bytes of a and b.
int __dp4a(int a, int b, int c);
unsigned __dp4a(unsigned a, unsigned b, unsigned c);
inline int __mulhi(int a, int b) { return static_cast<int>((static_cast<int64_t>(a) * b) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline int __vimax3_s32(int a, int b, int c) { return max(max(a, b), c); }
inline int __vimin3_s32(int a, int b, int c) { return min(min(a, b), c); }
inline unsigned __vimax3_u32(unsigned a, unsigned b, unsigned c) { return max(max(a, b), c); }
inline unsigned __vimin3_u32(unsigned a, unsigned b, unsigned c) { return min(min(a, b), c); }
inline int __viaddmax_s32(int a, int b, int c) {
  return max(static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)), c);
}
inline int __vibmax_s32(int a, int b, bool* first) { return *first = a >= b, max(a, b); }
inline int __vibmin_s32(int a, int b, bool* first) { return *first = a <= b, min(a, b); }
unsigned __vimax3_s16x2(unsigned a, unsigned b, unsigned c);
unsigned __vmaxs2(unsigned a, unsigned b);

// Rounded as the suffix says: rn, rz, ru, rd.
#define EMULATED_ROUNDED(T, prefix, fma_prefix)                          \
  inline T prefix##add_rn(T a, T b) { return emulator::rounded(a + b); } \
  inline T prefix##sub_rn(T a, T b) { return emulator::rounded(a - b); } \
  inline T prefix##mul_rn(T a, T b) { return emulator::rounded(a * b); } \
  inline T prefix##div_rn(T a, T b) { return emulator::rounded(a / b); } \
  inline T prefix##sqrt_rn(T a) { return std::sqrt(a); }                 \
  inline T fma_prefix##_rn(T a, T b, T c) { return std::fma(a, b, c); }  \
  T prefix##add_rz(T a, T b);                                            \
  T prefix##add_ru(T a, T b);                                            \
  T prefix##add_rd(T a, T b);                                            \
  T prefix##sub_rz(T a, T b);                                            \
  T prefix##sub_ru(T a, T b);                                            \
  T prefix##sub_rd(T a, T b);                                            \
  T prefix##mul_rz(T a, T b);                                            \
  T prefix##mul_ru(T a, T b);                                            \
  T prefix##mul_rd(T a, T b);                                            \
  T prefix##div_rz(T a, T b);                                            \
  T prefix##div_ru(T a, T b);                                            \
  T prefix##div_rd(T a, T b);                                            \
  T prefix##sqrt_ru(T a);                                                \
  T prefix##sqrt_rd(T a);                                                \
  T fma_prefix##_rz(T a, T b, T c);                                      \
  T fma_prefix##_ru(T a, T b, T c);                                      \
  T fma_prefix##_rd(T a, T b, T c);
EMULATED_ROUNDED(float, __f, __fmaf)
EMULATED_ROUNDED(double, __d, __fma)
#undef EMULATED_ROUNDED
float __double2float_rn(double x);
float __double2float_rz(double x);
float __double2float_ru(double x);
float __double2float_rd(double x);

// Saturating, NaN to 0 (to the smallest from double), as the device does.
int __float2int_rn(float x);
int __float2int_rz(float x);
int __float2int_ru(float x);
int __float2int_rd(float x);
unsigned __float2uint_rn(float x);
unsigned __float2uint_rz(float x);
long long __float2ll_rn(float x);
int __double2int_rn(double x);
int __double2int_rz(double x);
long long __double2ll_rn(double x);
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline double __int2double_rn(int x) { return x; }
inline double __ll2double_rn(long long x) { return static_cast<double>(x); }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

// ---- what device.cuh leaves to us ----

namespace semhitok::cuda {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, cudaStream_t,
                   Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> parameters;  // every thread gets a copy of its own
  } call{kernel, std::tuple<std::decay_t<Parameters>...>(std::forward<Arguments>(arguments)...)};
  const auto body = [](void* context) {
    Call& made = *static_cast<Call*>(context);
    std::apply(made.kernel, made.parameters);
  };
  return emulator::run(grid, threads, shared_bytes, body, &call);
}

inline char* dynamic_shared() { return emulator::dynamic_shared(); }

}  // namespace semhitok::cuda
