// Packing a codebook and digesting its bytes, one instruction set.
//
// pack writes one superblock: the fp32 rows transposed by groups of 16 codes, and, for the int8 pass,
// q = round((c - mean) / scale) with the norms that bound what rounding loses, all measured in fp64 and rounded up.
// half_norm64 enters exact scores, so its order of summation is the same everywhere: eight partial sums, d mod 8, added
// pairwise. Products of two fp32 numbers are exact in fp64, so FMA or not makes no difference.
// Cost: the superblock read once and written twice, some ten fp64 operations an element.
#include "passes.h"

namespace semhitok::cpu::SEMHITOK_ISA {
namespace {

constexpr int kPartial = static_cast<int>(kVectorDoubles);
constexpr int kPartialVectors = kPartial / kDoubles;
static_assert(kPartialVectors * kDoubles == kPartial, "eight partial sums are whole vectors");
constexpr float kInflate = 1.0f + 0x1p-20f;  // more than rounding a norm to fp32 can lose

typedef int8_t QuantisedVec __attribute__((vector_size(kDoubles)));

// -|c|^2/2.
inline double half_norm_of(const float* code, int64_t depth) {
  DoubleVec partial[kPartialVectors] = {};
  int64_t d = 0;
  for (; d + kPartial <= depth; d += kPartial) {
    for (int v = 0; v < kPartialVectors; ++v) {
      const DoubleVec c = widen(code + d + v * kDoubles);
      partial[v] += c * c;
    }
  }
  double p[kPartial];
  for (int v = 0; v < kPartialVectors; ++v) store(p + v * kDoubles, partial[v]);
  for (int i = 0; d < depth; ++d, ++i) p[i] += static_cast<double>(code[d]) * code[d];
  return -0.5 * (((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7])));
}

}  // namespace

void pack(const PackedCodebook& book, int64_t s, const float* rows, const PackedParts& parts, double* max_quantised) {
  const int64_t depth = book.depth, first = s * kSuperblock, padded_depth = round_up(depth, kVectorDoubles);
  const int64_t lane_bytes = book.steps * kStepDims;
  double row[kMaxInt8Depth + kVectorDoubles];
  int8_t q[kMaxInt8Depth + kVectorDoubles];
  *max_quantised = 0.0;
  for (int64_t n = 0; n < kSuperblock; ++n) {
    const float* code = rows + n * depth;
    float* column = book.rows + (first + n) / kGroupCodes * kGroupCodes * depth + n % kGroupCodes;
    for (int64_t d = 0; d < depth; ++d) column[d * kGroupCodes] = code[d];
    book.half_norm64[first + n] = half_norm_of(code, depth);
    book.half_norm[first + n] = static_cast<float>(book.half_norm64[first + n]);
    if (!book.int8) continue;

    for (int64_t d = 0; d < depth; ++d) row[d] = code[d];
    for (int64_t d = depth; d < padded_depth; ++d) row[d] = 0.0;
    const double inverse = 1.0 / book.scale;
    DoubleVec residual{}, norm{}, total{}, dot{}, own{};
    for (int64_t d = 0; d < padded_depth; d += kDoubles) {
      const DoubleVec mean = load(book.mean + d), r = load(row + d) - mean;
      const DoubleVec whole = nearest(r * inverse), lost = r - whole * book.scale;
      residual += lost * lost;
      norm += whole * whole;
      total += whole;
      dot += mean * r;
      own += r * r;
      const QuantisedVec bytes = __builtin_convertvector(whole, QuantisedVec);
      __builtin_memcpy(q + d, &bytes, sizeof bytes);
    }
    parts.mean_dot[first + n] = sum(dot);
    parts.half_residual_norm[first + n] = -0.5 * sum(own);

    const double lost = sum(residual), size = sum(norm);
    const int64_t group = (first + n) / kGroupCodes;
    const float lost32 = static_cast<float>(__builtin_sqrt(lost)) * kInflate;
    const float norm32 = static_cast<float>(__builtin_sqrt(size) * book.scale) * kInflate;
    if (n % kGroupCodes == 0) book.group_residual[group] = book.group_norm[group] = 0.0f;
    if (lost32 > book.group_residual[group]) book.group_residual[group] = lost32;
    if (norm32 > book.group_norm[group]) book.group_norm[group] = norm32;
    if (size > *max_quantised) *max_quantised = size;

    const int64_t vector = n % kGroupCodes, lane = n / kGroupCodes;
    int8_t* words = book.quantised + (s * kSuperVectors + vector / 2 * 2) * kAccLanes * lane_bytes +
                    (vector % 2 * kAccLanes + lane) * kStepDims;
    for (int64_t d = 0; d < lane_bytes; d += kStepDims) {
      __builtin_memcpy(words + d * 2 * kAccLanes, q + d, kStepDims);
    }
    static_cast<Acc*>(book.offset)[(s * kSuperVectors + vector) * kAccLanes + lane] =
        static_cast<Acc>(-kTokenOffset * static_cast<int32_t>(sum(total)));
  }
}

void pack_parts(const PackedCodebook& book, int64_t s, const PackedParts& parts) {
  const int64_t first = s * kSuperblock;
  const double mean_factor = book.mean_size > 0.0 ? 1.0 / (book.mean_size * book.scale) : 0.0;
  const double norm_factor = book.norm_size > 0.0 ? 1.0 / (book.norm_size * book.scale) : 0.0;
  for (int64_t v = 0; v < kSuperVectors; ++v) {
    for (int64_t l = 0; l < kAccLanes; ++l) {
      const int64_t to = first + v * kAccLanes + l, from = first + l * kGroupCodes + v;
      book.mean_part[to] = static_cast<float>(parts.mean_dot[from] * mean_factor);
      book.norm_part[to] = static_cast<float>((parts.half_residual_norm[from] - book.norm_middle) * norm_factor);
    }
  }
}

// ---- digest ----

namespace {

typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
constexpr int kStripes = 4;  // independent accumulators
constexpr uint64_t kOdd1 = 0x9E3779B97F4A7C15ull, kOdd2 = 0xC2B2AE3D27D4EB4Full, kOdd3 = 0x165667B19E3779F9ull;

inline Words multiply_halves(Words w) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_mul_epu32(0xFF, (__m512i)w, (__m512i)(w >> 32));
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)w, (__m256i)(w >> 32));
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)w, (__m128i)(w >> 32));
#else
  return (w & 0xFFFFFFFFull) * (w >> 32);
#endif
}

inline uint64_t mix(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

}  // namespace

// Every word is keyed by its place, its halves are multiplied, and the rotated word is added besides, so that a product
// that happens to be zero hides nothing. The lanes are then mixed with 128-bit products.
void digest(const void* data, int64_t bytes, uint64_t out[2]) {
  constexpr int64_t kStripeBytes = static_cast<int64_t>(kStripes) * kVectorBytes;
  constexpr int kWords = kVectorBytes / 8;
  const char* p = static_cast<const char*>(data);
  Words acc[kStripes], key[kStripes];
  for (int i = 0; i < kStripes; ++i) {
    for (int l = 0; l < kWords; ++l) key[i][l] = kOdd1 * static_cast<uint64_t>(2 * (i * kWords + l) + 1);
    acc[i] = key[i] ^ kOdd2;
  }
  const auto absorb = [&](const char* from) {
    for (int i = 0; i < kStripes; ++i) {
      Words w;
      __builtin_memcpy(&w, from + i * kVectorBytes, sizeof w);
      acc[i] += multiply_halves(w ^ key[i]) + ((w << 29) | (w >> 35));
      key[i] += kOdd3;
    }
  };
  int64_t at = 0;
  for (; at + kStripeBytes <= bytes; at += kStripeBytes) absorb(p + at);
  if (at < bytes) {
    char tail[kStripeBytes] = {};
    __builtin_memcpy(tail, p + at, bytes - at);
    absorb(tail);
  }
  uint64_t a = kOdd2 + static_cast<uint64_t>(bytes), b = kOdd3 ^ static_cast<uint64_t>(bytes);
  for (int i = 0; i < kStripes; ++i) {
    for (int l = 0; l < kWords; ++l) {
      a = mix(a ^ acc[i][l], kOdd1) + acc[i][l];
      b = mix(b + acc[i][l], kOdd2 ^ key[i][l]) ^ a;
    }
  }
  out[0] = mix(a, kOdd3), out[1] = mix(b ^ kOdd1, kOdd2);
}

}  // namespace semhitok::cpu::SEMHITOK_ISA
