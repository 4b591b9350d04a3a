// Runs a problem on the backend of its tensors: directly on the CPU; on CUDA on PyTorch's current stream, with scratch
// from its allocator.
#pragma once

#include "build_config.h"
#include "checks.h"
#include "cpu/backend.h"

#if SEMHITOK_WITH_CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"
// This symbol is in the CUDA half of PyTorch: weak, so that this module also loads with a CPU-only one.
#pragma weak aoti_torch_get_current_cuda_stream
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace semhitok {

inline void throw_on(cudaError_t error) {
  check(error == cudaSuccess, "CUDA: ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

// Makes a device current for PyTorch and for the CUDA runtime linked here, which keeps its own current device.
class CudaGuard {
 public:
  explicit CudaGuard(int index) : guard_(index) {
    throw_on(cudaGetDevice(&previous_));
    throw_on(cudaSetDevice(index));
  }
  ~CudaGuard() { (void)cudaSetDevice(previous_); }
  CudaGuard(const CudaGuard&) = delete;
  CudaGuard& operator=(const CudaGuard&) = delete;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int previous_ = 0;
};

// scratch_bytes(device), then op(device, scratch, stream), on the device of `like`.
template <typename ScratchBytes, typename Op>
void run_cuda(const Tensor& like, const ScratchBytes& scratch_bytes, const Op& op) {
  const int index = like.get_device_index();
  const CudaGuard guard(index);
  cuda::Device device{};
  throw_on(cuda::get_device(index, &device));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  const Tensor scratch = new_tensor(like, {scratch_bytes(device)}, ScalarType::Byte);
  throw_on(op(device, scratch.data_ptr(), static_cast<cudaStream_t>(stream)));
}

}  // namespace semhitok

#define SEMHITOK_RUN(op, problem, like)                                                          \
  do {                                                                                           \
    if ((like).is_cpu()) {                                                                       \
      cpu::op(problem);                                                                          \
    } else {                                                                                     \
      run_cuda(                                                                                  \
          like, [&](const cuda::Device& device) { return cuda::op##_scratch(problem, device); }, \
          [&](const cuda::Device& device, void* scratch, cudaStream_t stream) {                  \
            return cuda::op(problem, device, scratch, stream);                                   \
          });                                                                                    \
    }                                                                                            \
  } while (0)
#else
#define SEMHITOK_RUN(op, problem, like)                                                                             \
  do {                                                                                                              \
    check((like).is_cpu(), #op ": expected tensors on cpu, got ", device_of(like),                                  \
          ": this build of semhitok has no CUDA kernels; install the CUDA toolkit (nvcc on PATH) and rebuild with " \
          "SEMHITOK_CUDA=1 pip install -e .");                                                                      \
    cpu::op(problem);                                                                                               \
  } while (0)
#endif
