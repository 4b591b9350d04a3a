// The pixel stage: each token searches the sub-codebook of its group, either alone (nearest_subcode) or followed by
// what hier_quantize writes for the token. One kernel for both, so that they agree bit for bit.
//
// Contract: score(t, j) = z[t].c[j] + bias, c = sub_codebooks[group[t]]; the lowest j of the greatest score wins. id 0
// and score NaN for a group out of range or without sub-codes, a token with NaN or Inf, or no score above -inf.
//
// Arithmetic. score = sum_d c_d (z_d + h c_d), h = -1/2 for l2 and 0 for ip: two FMAs a value and one sum, where a dot
// product, a norm and a test for NaN and Inf would be three. (Written as FMAs, so that all kernels here give the same
// bits.) z_d + h c_d is rounded once, so the error is that of the plain form: at most (depth + 2) eps/2 sum |c_d|
// |z_d + h c_d|. An Inf or NaN in c makes the second factor NaN (ip) or the product -Inf or NaN (l2), and the sum never
// +Inf: the code cannot win. fp64 would not be free: its conversions alone take a third of the time of the reads below,
// and far longer on GPUs with few fp64 units.
//
// Plan. kLanes lanes a token, a lane holding 16 bytes of every code: 8 lanes, so 4 tokens a warp, at 32 fp32 values.
// kBatch codes at a time: kBatch loads in flight a lane, then a butterfly that halves the scores a lane holds with
// every step, so that 4 codes cost 4 shuffles over 8 lanes instead of 12. Each lane keeps the best of the codes whose
// sums end with it; the lanes are merged once, by (score descending, id ascending). Tables whose rows are not whole
// pieces, have more than 32 pieces, or are fp64, and all fp64 arithmetic, are read value by value (Scalar), by the same
// plan.
//
// A table of sub-codebooks of more than kLargeRow bytes is larger than L2, so the tokens are taken in the order of
// their groups. Tokens of one group are then in one warp, where equal addresses are one read, and in one block and its
// neighbours, which find the rows in L1 and L2. So a sub-codebook comes from memory once, however the tokens are
// distributed over the groups, and no block waits for the largest group.
//
// Sub-codebooks with their own sizes: the tokens of a warp continue together until the largest is searched; those that
// are done repeat their last code, which cannot win against itself. kLargeRow is compared with the mean size, because
// the others are not known without waiting for the device.
//
// Cost, tokens 65,536, subcodes 12, depth 32, fp32, H200: reads 1.5 KiB of sub-codes a token from L2 (the table is 25
// MB) = 100 MB, z 8 MB, winners' rows 8 to 16 MB, writes 17 MB: 24 us at 5.5 TB/s. Issue: about 500 instructions for 4
// tokens (72 a batch of 4 codes), 9 us. In flight: 4 x 512 bytes a warp, 40 warps an SM: 80 KB, where 5.5 TB/s x 1 us
// needs 42. With large sub-codebooks, subcodes 64, depth 64: the table of 268 MB read once 56 us, issue 40 us, sort 20
// us; unsorted tokens would read 1.1 GB. Scratch: none, or 16 bytes a token and the sort's.
#include <algorithm>

#include "device.cuh"
#include "kernels.h"
#include "rows.cuh"
#include "sort.h"

namespace semhitok::cuda {
namespace {

constexpr int kBatch = 4;
constexpr int64_t kLargeRow = 8192;  // bytes of a sub-codebook
constexpr int64_t kMostIds = (int64_t{1} << 31) - 1 - kBatch;

// A lane's share of its token, whose sub-codebook begins with row `code`, and of the scores: one piece of 16 bytes of
// every code. kWhole: every lane has one, so the codes of a batch are at constant distances.
template <Dtype kDtype, int kLanes, bool kWhole>
class Vector {
 public:
  using Score = float;
  using Id = int32_t;
  static constexpr int kBlocks = kDtype == Dtype::kFloat32 ? 5 : 4;  // an SM: up to 48 or 64 registers a thread

  __device__ Vector(const NearestSubcode& p, int64_t token, int64_t code, int lane, float half)
      : lane_(lane), ragged_(static_cast<int>(p.sub.depth / kValues)), half_(half) {
    codes_ = static_cast<const uint4*>(p.sub.rows.data) + code * pieces() + lane;
    const int64_t first = token * p.sub.depth + lane * kValues;
#pragma unroll
    for (int i = 0; i < kValues; ++i) z_[i] = 0.0f;
    if (!mine()) return;
    if (p.z.dtype == Dtype::kFloat32 && in_pieces(p.z.data)) {
#pragma unroll
      for (int i = 0; i < kValues; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(p.z.data) + first + i);
        z_[i] = four.x, z_[i + 1] = four.y, z_[i + 2] = four.z, z_[i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kValues; ++i) z_[i] = read<float>(p.z, first + i);
    }
  }

  __device__ bool finite() const {
    float poison = 0.0f;
#pragma unroll
    for (int i = 0; i < kValues; ++i) poison += z_[i] * 0.0f;
    return poison == 0.0f;
  }

  // part[u] = start + this lane's share of the score of code j + u; past the end the last code is repeated.
  __device__ void score(int32_t j, int32_t last, float start, float (&part)[kBatch]) const {
    const uint4* code = codes_ + j * pieces();
    uint4 piece[kBatch]{};
    if (mine() && last - j >= kBatch - 1) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) piece[u] = code[u * pieces()];
    } else if (mine()) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) piece[u] = code[min(u, last - j) * pieces()];
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      float c[kValues];
      unpack<kDtype>(piece[u], c);
      part[u] = start;
#pragma unroll
      for (int i = 0; i < kValues; ++i) part[u] = fmaf(c[i], fmaf(half_, c[i], z_[i]), part[u]);
    }
  }

 private:
  static constexpr int kValues = kPieceValues<kDtype>;
  __device__ int pieces() const { return kWhole ? kLanes : ragged_; }
  __device__ bool mine() const { return kWhole || lane_ < ragged_; }

  const uint4* codes_;
  int lane_, ragged_;
  float half_, z_[kValues];
};

// The same for any dtypes and depth, in fp32 or fp64.
template <typename T, int kLanes>
class Scalar {
 public:
  using Score = T;
  using Id = int64_t;
  static constexpr int kBlocks = 2;

  __device__ Scalar(const NearestSubcode& p, int64_t token, int64_t code, int lane, T half)
      : codes_(p.sub.rows), z_(p.z), depth_(p.sub.depth), code_(code * depth_), token_(token * depth_), lane_(lane),
        half_(half) {}

  __device__ bool finite() const {
    T poison = 0;
    for (int64_t d = lane_; d < depth_; d += kLanes) poison += read<T>(z_, token_ + d) * T(0);
    return poison == T(0);
  }

  __device__ void score(int64_t j, int64_t last, T start, T (&part)[kBatch]) const {
    int64_t code[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) part[u] = start, code[u] = code_ + min(j + u, last) * depth_;
    for (int64_t d = lane_; d < depth_; d += kLanes) {
      const T z = read<T>(z_, token_ + d);
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const T c = read<T>(codes_, code[u] + d);
        part[u] = fma(c, fma(half_, c, z), part[u]);
      }
    }
  }

 private:
  Rows codes_, z_;
  int64_t depth_, code_, token_;
  int lane_;
  T half_;
};

// Adds up kBatch scores over kLanes lanes. At the end a lane holds the codes first .. first + kHeld - 1.
template <int kLanes>
constexpr int kHeld = kLanes >= kBatch ? 1 : kBatch / kLanes;

template <int kLanes, typename T>
__device__ __forceinline__ int add_lanes(int lane, T (&part)[kBatch]) {
  int first = 0, held = kBatch;
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    if (held > 1) {
      held /= 2;
      const bool upper = (lane & offset) != 0;
#pragma unroll
      for (int i = 0; i < kBatch / 2; ++i) {
        if (i < held) {
          const T given = upper ? part[i] : part[i + held], kept = upper ? part[i + held] : part[i];
          part[i] = kept + __shfl_xor_sync(kAllLanes, given, offset);
        }
      }
      first += upper ? held : 0;
    } else {
      part[0] += __shfl_xor_sync(kAllLanes, part[0], offset);
    }
  }
  return first;
}

// kOwnSizes: there are offsets. They take registers that sub-codebooks of one size do not have to spare.
template <typename Lane, bool kOwnSizes>
constexpr int kStageBlocks = kOwnSizes ? std::min(Lane::kBlocks, 4) : Lane::kBlocks;

template <typename Lane, int kLanes, bool kOwnSizes>
__global__ void __launch_bounds__(kThreads, kStageBlocks<Lane, kOwnSizes>)
    stage_kernel(PixelStage p, const int32_t* order, CodePieces pieces) {
  using T = typename Lane::Score;
  using Id = typename Lane::Id;
  static_assert(kWarp % kLanes == 0 && kThreads % kWarp == 0 && kBatch == 4, "the lanes of a token are in one warp");
  const int64_t place = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  const bool inside = place < p.search.tokens;  // the others repeat the last token, and write nothing
  const int64_t position = inside ? place : p.search.tokens - 1;
  const int64_t token = order != nullptr ? order[position] : position;
  const int64_t named = p.search.group[token];
  const bool known = named >= 0 && named < p.search.sub.groups;
  const int64_t group = known ? named : 0;
  const int64_t subcodes = p.search.sub.subcodes;
  const RowRange own = kOwnSizes ? rows_of_group(p.search.sub, group) : RowRange{group * subcodes, subcodes};

  const Lane mine(p.search, token, own.first, lane, p.search.metric == Metric::kL2 ? T(-0.5) : T(0));
  constexpr unsigned kTokenLanes = kLanes == kWarp ? kAllLanes : (1u << kLanes % kWarp) - 1;
  const unsigned bad =
      __ballot_sync(kAllLanes, !mine.finite()) >> (threadIdx.x % kWarp / kLanes * kLanes) & kTokenLanes;
  const T start = known && bad == 0 && (!kOwnSizes || own.count > 0) ? T(0) : nan_of(T());

  T best = -infinity(T());
  Id id = 0;
  const Id last = !kOwnSizes || own.count > 0 ? static_cast<Id>(own.count - 1) : 0;
  Id longest = last;  // of the warp's tokens: its lanes add up together
  if constexpr (kOwnSizes) {
#pragma unroll
    for (int offset = kWarp / 2; offset >= kLanes; offset /= 2) {
      longest = max(longest, __shfl_xor_sync(kAllLanes, longest, offset));
    }
  }
  for (Id j = 0; j <= longest; j += kBatch) {
    T part[kBatch];
    mine.score(j, last, start, part);
    const int first = add_lanes<kLanes>(lane, part);
#pragma unroll
    for (int i = 0; i < kHeld<kLanes>; ++i) {  // ascending codes, strictly greater: the lowest id stays
      if (part[i] > best) best = part[i], id = j + first + i;
    }
  }
  best_of_lanes<kLanes>(best, id);

  if (!inside) return;
  if (lane == 0) {
    if (p.search.scores != nullptr) {
      static_cast<T*>(p.search.scores)[token] = best > -infinity(T()) ? best : nan_of(T());
    }
    if (p.search.ids != nullptr) p.search.ids[token] = id;
  }
  if (p.codes == nullptr) return;
  const int64_t code = own.first + id;
  if (lane == 0) p.codes[token] = code;
  copy_code(p.lookup, pieces, group, code, token, lane, kLanes);
}

using Kernel = void (*)(PixelStage, const int32_t*, CodePieces);

template <Dtype kDtype, int kLanes>
Kernel with_lanes(bool whole, bool own_sizes) {
  constexpr bool kAlwaysWhole = kLanes <= 2;
  // One kernel, whole or not, for sizes of their own: fewer kernels.
  if (own_sizes) return stage_kernel<Vector<kDtype, kLanes, kAlwaysWhole>, kLanes, true>;
  if (!whole) return stage_kernel<Vector<kDtype, kLanes, kAlwaysWhole>, kLanes, false>;
  return stage_kernel<Vector<kDtype, kLanes, true>, kLanes, false>;
}

template <Dtype kDtype>
Kernel with_dtype(int lanes, bool whole, bool own_sizes) {
  switch (lanes) {
    case 1: return with_lanes<kDtype, 1>(whole, own_sizes);
    case 2: return with_lanes<kDtype, 2>(whole, own_sizes);
    case 4: return with_lanes<kDtype, 4>(whole, own_sizes);
    case 8: return with_lanes<kDtype, 8>(whole, own_sizes);
    case 16: return with_lanes<kDtype, 16>(whole, own_sizes);
    default: return with_lanes<kDtype, 32>(whole, own_sizes);
  }
}

template <typename T, int kLanes>
Kernel by_value(bool own_sizes) {
  return own_sizes ? stage_kernel<Scalar<T, kLanes>, kLanes, true> : stage_kernel<Scalar<T, kLanes>, kLanes, false>;
}

// The kernel for a problem, and the lanes it gives to a token.
Kernel choose(const SubCodebooks& s, bool wide, int* lanes) {
  const int64_t pieces = s.depth * element_size(s.rows.dtype) / kPiece;
  const bool own_sizes = s.offsets != nullptr;
  const int64_t most = own_sizes ? s.total : s.subcodes;
  if (wide || pieces > kWarp || !in_pieces(s.rows, s.depth) || most * pieces > kMostIds) {
    *lanes = s.depth <= 8 ? 8 : kWarp;
    if (*lanes == 8) return wide ? by_value<double, 8>(own_sizes) : by_value<float, 8>(own_sizes);
    return wide ? by_value<double, kWarp>(own_sizes) : by_value<float, kWarp>(own_sizes);
  }
  *lanes = lanes_for(pieces);
  const bool whole = *lanes == pieces;
  if (s.rows.dtype == Dtype::kFloat32) return with_dtype<Dtype::kFloat32>(*lanes, whole, own_sizes);
  if (s.rows.dtype == Dtype::kFloat16) return with_dtype<Dtype::kFloat16>(*lanes, whole, own_sizes);
  return with_dtype<Dtype::kBFloat16>(*lanes, whole, own_sizes);
}

// Fewer tokens than groups rarely share one: the sort would cost more than it saves.
bool by_group(const NearestSubcode& p) {
  return p.sub.subcodes * p.sub.depth * element_size(p.sub.rows.dtype) > kLargeRow && p.tokens >= p.sub.groups;
}

}  // namespace

int64_t pixel_stage_scratch(const PixelStage& stage) {
  return by_group(stage.search) ? sort_rows_scratch(stage.search.tokens, stage.search.sub.groups) : 0;
}

cudaError_t pixel_stage(const PixelStage& stage, void* scratch, cudaStream_t stream) {
  const NearestSubcode& p = stage.search;
  if (p.tokens == 0) return cudaSuccess;
  SortedRows sorted{};
  if (by_group(p)) {
    const cudaError_t error = sort_rows(p.group, p.tokens, p.sub.groups, {}, {}, scratch, &sorted, stream);
    if (error != cudaSuccess) return error;
  }
  int lanes;
  const Kernel kernel = choose(p.sub, p.wide, &lanes);
  const auto blocks = static_cast<unsigned>(ceil_div(p.tokens * lanes, kThreads));
  const CodePieces pieces = stage.codes == nullptr ? CodePieces{} : code_pieces(stage.lookup);
  return launch(kernel, blocks, kThreads, 0, stream, stage, sorted.rows, pieces);
}

int64_t nearest_subcode_scratch(const NearestSubcode& p, const Device&) {
  return pixel_stage_scratch({p, nullptr, {}});
}

cudaError_t nearest_subcode(const NearestSubcode& p, const Device&, void* scratch, cudaStream_t stream) {
  return pixel_stage({p, nullptr, {}}, scratch, stream);
}

}  // namespace semhitok::cuda
