// The most that this GPU can do of each thing that limits the searches, as JSON on stdout. ceilings.py builds and runs
// this; the benchmark computes its floors from the output.
//
// - issue_per_sm_per_clock: instructions of one kind that the threads of an SM retire a clock, by the SM's own clock
// - sm_clock_mhz: those clocks over the time of the launch, while it does arithmetic
// - mma_tflops: tensor cores on random operands (zeros take less power and run faster), by events over a long launch
// - l2_read_gb_s, hbm_read_gb_s, hbm_copy_gb_s: the last counts bytes read and bytes written
//
// Each is the best of kRepeats launches. null: this GPU, or the compiled architecture, does not have the instruction.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/cuda/ptx.cuh"

namespace {

using namespace semhitok::cuda;

constexpr int kRepeats = 3;
constexpr int64_t kMiB = 1 << 20;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "cuda_ceilings: %s: %s: %s\n", what, cudaGetErrorName(error), cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check((call), #call)

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : bytes_(count * static_cast<int64_t>(sizeof(T))) {
    CHECK(cudaMalloc(&data_, static_cast<size_t>(bytes_)));
  }
  ~Buffer() { (void)cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return static_cast<T*>(data_); }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_;
};

// Milliseconds of the fastest of kRepeats launches, after one to warm up.
template <typename Launch>
double fastest(Launch launch_once) {
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  float best = 0;
  for (int repeat = 0; repeat <= kRepeats; ++repeat) {
    CHECK(cudaEventRecord(start));
    CHECK(launch_once());
    CHECK(cudaEventRecord(stop));
    CHECK(cudaEventSynchronize(stop));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    if (repeat == 1 || (repeat > 1 && ms < best)) best = ms;
  }
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(stop));
  return best;
}

__host__ __device__ uint32_t hash(uint32_t x) {  // Wang's: operands that are not alike
  x = (x ^ 61) ^ (x >> 16);
  x *= 9;
  x ^= x >> 4;
  x *= 0x27d4eb2d;
  return x ^ (x >> 15);
}

// ---- issue rates ----
//
// A thread has kChains values, and each step of an instruction reads three of them. Results are needed twice, so that
// nothing is folded into a wider instruction, and 8 warps of 8 chains for each scheduler hide every latency.

constexpr int kChains = 8, kSweeps = 8, kIssueThreads = 1024;
constexpr int64_t kWholeSM = 120 * 1024;  // bytes of shared memory that leave no room for a second block

struct Vimnmx3 {
  using Value = int;
  static constexpr const char* kName = "VIMNMX3";
  static __device__ int step(int a, int b, int c) { return __vimax3_s32(a, b, c); }
};
struct Vimnmx {
  using Value = int;
  static constexpr const char* kName = "VIMNMX";
  static __device__ int step(int a, int b, int) { return max(a, b); }
};
struct Lop3 {
  using Value = int;
  static constexpr const char* kName = "LOP3";
  static __device__ int step(int a, int b, int c) {
    asm volatile("lop3.b32 %0, %0, %1, %2, 0xe8;" : "+r"(a) : "r"(b), "r"(c));
    return a;
  }
};
struct Imad {
  using Value = int;
  static constexpr const char* kName = "IMAD";
  static __device__ int step(int a, int b, int c) {
    asm volatile("mad.lo.s32 %0, %0, %1, %2;" : "+r"(a) : "r"(b), "r"(c));
    return a;
  }
};
struct Fmnmx {
  using Value = float;
  static constexpr const char* kName = "FMNMX";
  static __device__ float step(float a, float b, float) { return fmaxf(a, b); }
};
struct Ffma {
  using Value = float;
  static constexpr const char* kName = "FFMA";
  static __device__ float step(float a, float b, float c) { return fmaf(a, b, c); }
};

template <typename Op>
__global__ void __launch_bounds__(kIssueThreads, 1) issue_kernel(int sweeps, uint32_t* sink, long long* clocks) {
  using Value = typename Op::Value;
  Value x[kChains];
#pragma unroll
  for (int i = 0; i < kChains; ++i) {
    x[i] = static_cast<Value>(hash(threadIdx.x * kChains + i + sweeps) & 0xffff) / static_cast<Value>(3);
  }
  __syncthreads();
  const long long start = clock64();
#pragma unroll 1
  for (int sweep = 0; sweep < sweeps; sweep += kSweeps) {
#pragma unroll
    for (int i = 0; i < kChains * kSweeps; ++i) {
      Value& a = x[i % kChains];
      a = Op::step(a, x[(i + 1) % kChains], x[(i + 3) % kChains]);
    }
  }
  __syncthreads();
  const long long stop = clock64();
  if (threadIdx.x == 0) clocks[blockIdx.x] = stop - start;
  Value sum = 0;
#pragma unroll
  for (int i = 0; i < kChains; ++i) sum += x[i];
  sink[blockIdx.x * kIssueThreads + threadIdx.x] = static_cast<uint32_t>(sum);
}

struct Issue {
  double per_clock, mhz;
};

template <typename Op>
Issue issue_rate(int sms) {
  constexpr int kLaunchSweeps = 1 << 17;
  const Buffer<uint32_t> sink(int64_t{sms} * kIssueThreads);
  const Buffer<long long> clocks(sms);
  const double ms = fastest([&] {
    return launch(issue_kernel<Op>, static_cast<unsigned>(sms), kIssueThreads, kWholeSM, nullptr, kLaunchSweeps,
                  sink.data(), clocks.data());
  });
  std::vector<long long> seen(static_cast<size_t>(sms));
  CHECK(cudaMemcpy(seen.data(), clocks.data(), static_cast<size_t>(clocks.bytes()), cudaMemcpyDeviceToHost));
  std::sort(seen.begin(), seen.end());
  const double median = static_cast<double>(seen[seen.size() / 2]);
  return {static_cast<double>(kIssueThreads) * kChains * kLaunchSweeps / median, median / ms / 1e3};
}

// ---- tensor cores ----

constexpr int kMmaThreads = 512, kMmaTiles = 8;

__global__ void __launch_bounds__(kMmaThreads, 1) mma_sync_kernel(int steps, float* sink) {
  float d[kMmaTiles][4] = {};
  uint32_t a[4], b[2];
  for (uint32_t& r : a) r = 0x3c003c00u ^ (hash(threadIdx.x * 4 + (&r - a)) & 0x83ff83ffu);  // fp16 in +-[1, 2)
  for (uint32_t& r : b) r = 0x3c003c00u ^ (hash(threadIdx.x * 2 + (&r - b) + 9999) & 0x83ff83ffu);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (auto& tile : d) mma_f16(tile, a, b[0], b[1]);
  }
  float sum = 0;
#pragma unroll
  for (auto& tile : d) sum += tile[0] + tile[1] + tile[2] + tile[3];
  sink[blockIdx.x * kMmaThreads + threadIdx.x] = sum;
}

// Four warpgroups, each with its own a and d, over the same kDepthSteps slices of b in shared memory.
constexpr int kTileRows = 64, kTileCodes = 128, kDepthSteps = 4, kDepthBytes = 32;
constexpr int kSliceBytes = kTileCodes * kDepthBytes, kCoreColumn = kTileCodes * 16, kCoreRows = 8 * 16;
static_assert(kDepthSteps * kSliceBytes <= kWholeSM, "b fits the shared memory asked for");
static_assert(kMmaThreads % (4 * kWarp) == 0, "whole warpgroups");

template <typename T>
__global__ void __launch_bounds__(kMmaThreads, 1) wgmma_kernel(int steps, uint32_t* sink) {
#ifdef SEMHITOK_HOPPER
  constexpr bool kInteger = std::is_same_v<T, int32_t>;
  char* const b = dynamic_shared();
  const auto operand = [](uint32_t seed) { return kInteger ? hash(seed) : 0x3c003c00u ^ (hash(seed) & 0x83ff83ffu); };
  for (int i = threadIdx.x; i < kDepthSteps * kSliceBytes / 4; i += kMmaThreads) {
    reinterpret_cast<uint32_t*>(b)[i] = operand(static_cast<uint32_t>(i));
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // so that wgmma sees ordinary stores
  __syncthreads();
  T d[64];
#pragma unroll
  for (T& value : d) value = 0;
  uint32_t a[kDepthSteps][4];
#pragma unroll
  for (int i = 0; i < kDepthSteps * 4; ++i) a[i / 4][i % 4] = operand(threadIdx.x * 16 + i + 77777);
#pragma unroll 1
  for (int step = 0; step < steps; step += kDepthSteps) {
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < kDepthSteps; ++s) {
      const uint64_t slice = matrix_descriptor(b + s * kSliceBytes, kCoreColumn, kCoreRows);
      if constexpr (kInteger) {
        wgmma_s8(d, a[s], slice, true);
      } else {
        wgmma_f16(d, a[s], slice, true);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
  }
  T sum = 0;
#pragma unroll
  for (const T& value : d) sum += value;
  sink[blockIdx.x * kMmaThreads + threadIdx.x] = static_cast<uint32_t>(sum);
#else
  (void)steps, (void)sink;
#endif
}

double mma_sync_tflops(int sms) {
  constexpr int kSteps = 1 << 17;
  const Buffer<float> sink(int64_t{sms} * kMmaThreads);
  const double ms = fastest([&] {
    return launch(mma_sync_kernel, static_cast<unsigned>(sms), kMmaThreads, kWholeSM, nullptr, kSteps, sink.data());
  });
  return 2.0 * 16 * 8 * 16 * kMmaTiles * kSteps * (kMmaThreads / kWarp) * sms / ms / 1e9;
}

template <typename T>
double wgmma_tflops(int sms) {
  constexpr int kSteps = 1 << 17;
  constexpr int kDepth = kDepthBytes / (std::is_same_v<T, int32_t> ? 1 : 2);
  const Buffer<uint32_t> sink(int64_t{sms} * kMmaThreads);
  const double ms = fastest([&] {
    return launch(wgmma_kernel<T>, static_cast<unsigned>(sms), kMmaThreads, kWholeSM, nullptr, kSteps, sink.data());
  });
  return 2.0 * kTileRows * kTileCodes * kDepth * kSteps * (kMmaThreads / (4 * kWarp)) * sms / ms / 1e9;
}

// ---- memory ----

constexpr int kReadThreads = 1024, kLoads = 4;

__global__ void __launch_bounds__(kReadThreads)
    read_kernel(const uint4* from, int64_t count, int passes, uint32_t* sink) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kReadThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kReadThreads + threadIdx.x;
  uint32_t seen = 0;
  for (int pass = 0; pass < passes; ++pass) {
    for (int64_t i = first; i < count; i += kLoads * threads) {  // count is a multiple of kLoads * threads
      uint4 quad[kLoads];
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {  // bypasses L1; asm volatile: another pass is not a copy of the first
        asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(quad[load].x), "=r"(quad[load].y), "=r"(quad[load].z), "=r"(quad[load].w)
                     : "l"(from + i + load * threads));
      }
#pragma unroll
      for (const uint4& q : quad) seen ^= q.x ^ q.y ^ q.z ^ q.w;
    }
  }
  if (seen == 0x12345678u) sink[0] = seen;
}

double read_gb_s(int sms, int64_t wanted_bytes, int passes) {
  const unsigned blocks = static_cast<unsigned>(2 * sms);
  const int64_t round = int64_t{blocks} * kReadThreads * kLoads;
  const int64_t count = std::max<int64_t>(wanted_bytes / static_cast<int64_t>(sizeof(uint4)) / round, 1) * round;
  const Buffer<uint4> from(count);
  const Buffer<uint32_t> sink(1);
  CHECK(cudaMemset(from.data(), 1, static_cast<size_t>(from.bytes())));
  const double ms = fastest(
      [&] { return launch(read_kernel, blocks, kReadThreads, 0, nullptr, from.data(), count, passes, sink.data()); });
  return static_cast<double>(from.bytes()) * passes / ms / 1e6;
}

double copy_gb_s(int64_t bytes) {
  const Buffer<char> from(bytes), to(bytes);
  CHECK(cudaMemset(from.data(), 1, static_cast<size_t>(bytes)));
  const double ms = fastest(
      [&] { return cudaMemcpyAsync(to.data(), from.data(), static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice); });
  return 2.0 * static_cast<double>(bytes) / ms / 1e6;
}

std::string number(bool has, double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  return has ? text : "null";
}

}  // namespace

int main() {
  int index = 0;
  cudaDeviceProp device{};
  CHECK(cudaGetDevice(&index));
  CHECK(cudaGetDeviceProperties(&device, index));
  const int sms = device.multiProcessorCount;
  cudaFuncAttributes compiled{};
  CHECK(cudaFuncGetAttributes(&compiled, wgmma_kernel<float>));
  const bool hopper = device.major == 9 && compiled.binaryVersion == 90 && compiled.numRegs > 64;  // not the empty body

  std::string rates;
  Issue issue{};
  const auto add = [&](const char* name, Issue measured) {
    rates += (rates.empty() ? "\"" : ", \"") + std::string(name) + "\": " + number(true, measured.per_clock);
    issue = measured;
  };
  add(Vimnmx3::kName, issue_rate<Vimnmx3>(sms));
  add(Vimnmx::kName, issue_rate<Vimnmx>(sms));
  add(Lop3::kName, issue_rate<Lop3>(sms));
  add(Imad::kName, issue_rate<Imad>(sms));
  add(Fmnmx::kName, issue_rate<Fmnmx>(sms));
  add(Ffma::kName, issue_rate<Ffma>(sms));
  const double mma_sync = mma_sync_tflops(sms);
  const double f16 = hopper ? wgmma_tflops<float>(sms) : 0, s8 = hopper ? wgmma_tflops<int32_t>(sms) : 0;
  const int64_t in_l2 = std::min<int64_t>(device.l2CacheSize / 4, 16 * kMiB);
  const double l2 = read_gb_s(sms, in_l2, 1000), hbm = read_gb_s(sms, 4096 * kMiB, 1), copy = copy_gb_s(2048 * kMiB);
  std::printf(
      "{\n \"gpu\": \"%s\",\n \"sms\": %d,\n \"l2_mib\": %.1f,\n \"sm_clock_mhz\": %.0f,\n"
      " \"issue_per_sm_per_clock\": {%s},\n"
      " \"mma_tflops\": {\"mma.sync f16 m16n8k16\": %s, \"wgmma f16 m64n128k16\": %s, \"wgmma s8 m64n128k32\": %s},\n"
      " \"l2_read_gb_s\": %.0f,\n \"hbm_read_gb_s\": %.0f,\n \"hbm_copy_gb_s\": %.0f\n}\n",
      device.name, sms, device.l2CacheSize / static_cast<double>(kMiB), issue.mhz, rates.c_str(),
      number(device.major >= 8, mma_sync).c_str(), number(hopper, f16).c_str(), number(hopper, s8).c_str(), l2, hbm,
      copy);
  return 0;
}
