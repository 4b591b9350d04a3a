// What the kernels share: launching, reading any of the four dtypes, the best of several lanes, scratch.
//
// SEMHITOK_EMULATED: the tests also compile the kernels for the CPU, to run them without a GPU. tests/cuda then
// provides what CUDA's compiler would.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>

#include "../problem.h"

#ifdef SEMHITOK_EMULATED
#include "emulator.h"  // and its launch(), dynamic_shared()
#endif

namespace semhitok::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 256;  // of a block, where a kernel does not say otherwise
constexpr int kWarpsPerBlock = kThreads / kWarp;
constexpr int64_t kScratchAlignment = 256;

template <typename T>
__device__ __forceinline__ T read(const Rows& rows, int64_t i) {
  switch (rows.dtype) {  // the same for every thread of a launch
    case Dtype::kFloat32: return static_cast<T>(static_cast<const float*>(rows.data)[i]);
    case Dtype::kFloat16: return static_cast<T>(__half2float(static_cast<const __half*>(rows.data)[i]));
    case Dtype::kBFloat16: return static_cast<T>(__bfloat162float(static_cast<const __nv_bfloat16*>(rows.data)[i]));
    default: return static_cast<T>(static_cast<const double*>(rows.data)[i]);
  }
}

// Gives each of kLanes neighbouring lanes the greatest score of them all, and the lowest id that has it.
template <int kLanes, typename T, typename Id>
__device__ __forceinline__ void best_of_lanes(T& best, Id& id, unsigned mask = kAllLanes) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    const T score = __shfl_xor_sync(mask, best, offset);
    const Id other = __shfl_xor_sync(mask, id, offset);
    if (score > best || (score == best && other < id)) best = score, id = other;
  }
}

__device__ __forceinline__ float infinity(float) { return __int_as_float(0x7f800000); }
__device__ __forceinline__ double infinity(double) { return __longlong_as_double(0x7ff0000000000000ll); }
__device__ __forceinline__ float nan_of(float) { return __int_as_float(0x7fc00000); }
__device__ __forceinline__ double nan_of(double) { return __longlong_as_double(0x7ff8000000000000ll); }

// Hands out aligned arrays from one scratch allocation. With a null base it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(base_ + used_);
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kScratchAlignment) * kScratchAlignment;
    return array;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

#ifndef SEMHITOK_EMULATED
// kernel<<<grid, threads, shared_bytes, stream>>>(arguments...), also with more than 48 KiB of shared memory a block.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, static_cast<size_t>(shared_bytes), stream>>>(std::forward<Arguments>(arguments)...);
  return cudaGetLastError();
}

// The shared memory a launch asked for.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
#endif

}  // namespace semhitok::cuda
