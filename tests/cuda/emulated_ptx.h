// The functions of csrc/cuda/ptx.cuh on the CPU, as late as the PTX ISA allows, or as early: each copy and each wgmma
// takes effect at some moment between its issue and the wait for it, and until then its destination holds garbage.
//
// Fails the launch: addresses not aligned or out of shared memory; a barrier that was not initialised, was initialised
// without barrier_init_fence before a copy, got more arrivals than it counts, or was overwritten; a wgmma without
// wgmma_fence since the last wait, whose four warps differ, whose matrix in shared memory was not brought by copy_bulk
// (ptx.cuh has no fence that would let wgmma see ordinary stores), or that nobody waits for; a bulk copy that outlives
// its block.
//
// Not modelled: A registers are read at issue (the compiler keeps them), and sums are rounded to fp32 after every
// product in ascending depth, or as set_sum says.
#pragma once

#include "emulator.h"

namespace emulator {

// How a tensor core adds fp16 products into fp32.
enum class Sum : int {
  kNearest,   // after every product, to nearest
  kTruncate,  // sixteen products and the accumulator cut to kSumBits below the greatest of them, the sum to zero
};
constexpr int kSumBits = 24;
void set_sum(Sum sum);

void copy_async(void* shared, const void* global, Where where);
void copy_async_commit();
void copy_async_wait(int pending);

void load_matrices(uint32_t* r, const void* row, Where where);
void mma_f16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Where where);

void barrier_init(uint64_t* barrier, uint32_t arrivals, Where where);
void barrier_init_fence();
void barrier_arrive(uint64_t* barrier, uint32_t bytes, Where where);
void barrier_wait(uint64_t* barrier, uint32_t parity, Where where);
void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, Where where);

uint64_t matrix_descriptor(const void* shared, uint32_t along_depth, uint32_t along_rows, Where where);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending, Where where);
void wgmma(bool integer, void* d, const uint32_t* a, uint64_t b, bool add, Where where);

}  // namespace emulator

namespace semhitok::cuda {

using emulator::here;
using emulator::Where;

inline uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }

inline void copy_async_16(void* shared, const void* global, Where where = here()) {
  emulator::copy_async(shared, global, where);
}
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int kPending>
void copy_async_wait() {
  emulator::copy_async_wait(kPending);
}

inline void load_matrices(uint32_t (&r)[4], const void* row, Where where = here()) {
  emulator::load_matrices(r, row, where);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where = here()) {
  emulator::mma_f16(d, a, b0, b1, where);
}

inline void barrier_init(uint64_t* barrier, uint32_t arrivals, Where where = here()) {
  emulator::barrier_init(barrier, arrivals, where);
}
inline void barrier_init_fence() { emulator::barrier_init_fence(); }
inline void barrier_arrive(uint64_t* barrier, Where where = here()) { emulator::barrier_arrive(barrier, 0, where); }
inline void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes, Where where = here()) {
  emulator::barrier_arrive(barrier, bytes, where);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity, Where where = here()) {
  emulator::barrier_wait(barrier, parity, where);
}
inline void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, Where where = here()) {
  emulator::copy_bulk(shared, global, bytes, barrier, where);
}

inline uint64_t matrix_descriptor(const void* shared, uint32_t along_depth, uint32_t along_rows, Where where = here()) {
  return emulator::matrix_descriptor(shared, along_depth, along_rows, where);
}
inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending>
void wgmma_wait(Where where = here()) {
  emulator::wgmma_wait(kPending, where);
}
inline void wgmma_f16(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add, Where where = here()) {
  emulator::wgmma(false, d, a, b, add, where);
}
inline void wgmma_s8(int32_t (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add, Where where = here()) {
  emulator::wgmma(true, d, a, b, add, where);
}

}  // namespace semhitok::cuda
