// Values of any dtype, rows in pieces of 16 bytes, and copying code rows.
#pragma once

#include "device.cuh"

namespace semhitok::cuda {

template <typename T, typename Value>
__device__ __forceinline__ T convert(Value value) {
  if constexpr (sizeof(Value) == 2) {
    return static_cast<T>(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

constexpr int kPiece = 16;  // bytes: what a lane loads or stores at once

// Values of a piece: 4 in fp32, 8 in fp16 and bf16.
template <Dtype kDtype>
constexpr int kPieceValues = kDtype == Dtype::kFloat32 ? 4 : 8;

__device__ __forceinline__ float half_bits(uint32_t bits) {
  __half_raw raw;
  raw.x = static_cast<unsigned short>(bits);
  return __half2float(__half(raw));
}

template <Dtype kDtype>
__device__ __forceinline__ void unpack(const uint4& piece, float (&value)[kPieceValues<kDtype>]) {
  static_assert(kDtype != Dtype::kFloat64, "fp64 tables are read value by value");
  const uint32_t word[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kDtype == Dtype::kFloat32) {
      value[i] = __uint_as_float(word[i]);
    } else if constexpr (kDtype == Dtype::kFloat16) {
      value[2 * i] = half_bits(word[i] & 0xffffu), value[2 * i + 1] = half_bits(word[i] >> 16);
    } else {
      value[2 * i] = __uint_as_float(word[i] << 16), value[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
  }
}

inline __host__ __device__ bool in_pieces(const void* data) { return reinterpret_cast<uintptr_t>(data) % kPiece == 0; }

// Whether rows of `depth` values are whole pieces.
inline bool in_pieces(const Rows& rows, int64_t depth) {
  return in_pieces(rows.data) && depth * element_size(rows.dtype) % kPiece == 0;
}

// Pieces of a row of either codebook; none if a row or its copy is not whole pieces.
struct CodePieces {
  int64_t sem, pix;
};
inline CodePieces code_pieces(const HierLookup& p) {
  if (!in_pieces(p.sem, p.sem_depth) || !in_pieces(p.q_sem)) return {};
  if (!in_pieces(p.pix.rows, p.pix.depth) || !in_pieces(p.q_pix)) return {};
  return {p.sem_depth * element_size(p.sem.dtype) / kPiece, p.pix.depth * element_size(p.pix.rows.dtype) / kPiece};
}

// The power of two of lanes, at most a warp, that copies or reads `pieces` in the fewest steps.
inline int lanes_for(int64_t pieces) {
  int lanes = 1;
  while (lanes < pieces && lanes < kWarp) lanes *= 2;
  return lanes;
}

template <typename Bits>
__device__ __forceinline__ void copy_values(const void* table, int64_t row, int64_t depth, void* out, int64_t token,
                                            int lane, int lanes) {
  const Bits* from = static_cast<const Bits*>(table) + row * depth;
  Bits* to = static_cast<Bits*>(out) + token * depth;
  for (int64_t d = lane; d < depth; d += lanes) to[d] = from[d];
}

__device__ __forceinline__ void copy_values(const Rows& rows, int64_t row, int64_t depth, void* out, int64_t token,
                                            int lane, int lanes) {
  switch (rows.dtype) {
    case Dtype::kFloat32: return copy_values<uint32_t>(rows.data, row, depth, out, token, lane, lanes);
    case Dtype::kFloat64: return copy_values<uint64_t>(rows.data, row, depth, out, token, lane, lanes);
    default: return copy_values<uint16_t>(rows.data, row, depth, out, token, lane, lanes);
  }
}

// Copies row `group` of the semantic codebook and row `code` of the pixel one to a token's outputs, with `lanes` lanes.
// Both are read before either is written: their latency is paid once.
__device__ __forceinline__ void copy_code(const HierLookup& p, const CodePieces& pieces, int64_t group, int64_t code,
                                          int64_t token, int lane, int lanes) {
  if (pieces.sem == 0) {
    copy_values(p.sem, group, p.sem_depth, p.q_sem, token, lane, lanes);
    copy_values(p.pix.rows, code, p.pix.depth, p.q_pix, token, lane, lanes);
    return;
  }
  const uint4* sem_row = static_cast<const uint4*>(p.sem.data) + group * pieces.sem;
  const uint4* pix_row = static_cast<const uint4*>(p.pix.rows.data) + code * pieces.pix;
  uint4* q_sem = static_cast<uint4*>(p.q_sem) + token * pieces.sem;
  uint4* q_pix = static_cast<uint4*>(p.q_pix) + token * pieces.pix;
  for (int64_t i = lane; i < pieces.sem || i < pieces.pix; i += lanes) {
    uint4 a{}, b{};
    if (i < pieces.sem) a = sem_row[i];
    if (i < pieces.pix) b = pix_row[i];
    if (i < pieces.sem) q_sem[i] = a;
    if (i < pieces.pix) q_pix[i] = b;
  }
}

}  // namespace semhitok::cuda
