// Packing a codebook and digesting its bytes, for one instruction set.
//
// A code is usable if it is finite; only listed codes are measured and packed. pack writes one superblock: the fp32
// rows transposed by panels of 16 codes, and, for the int8 pass, q = round((c - mean) / scale) with the norms that
// bound the rounding, all measured in fp64 and rounded up. Each code has a lane, so no sum is horizontal. half_norm64
// is part of exact scores, so its order of summation is the same everywhere: ascending depth, even and odd apart.
// Products of two fp32 numbers are exact in fp64, so it makes no difference whether FMAs are used.
// Cost: the superblock read once and written twice, some ten fp64 operations an element.
#include "kernels.h"
#include "simd.h"

namespace semhitok::cpu::SEMHITOK_ISA {
namespace {

constexpr int kCodes = static_cast<int>(kPanelCodes);
constexpr int kDoubleVectors = kCodes / kDoubles;
constexpr float kInflate = 1.0f + 0x1p-20f;  // more than rounding a norm to fp32 can lose

typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
constexpr int kWords = kVectorBytes / 8;
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

inline Words first_key() {
  Words key;
  for (int l = 0; l < kWords; ++l) key[l] = kOdd1 * static_cast<uint64_t>(2 * l + 1);
  return key;
}

// The 16 rows of a panel, transposed: out [depth][16].
inline void transpose(const float* const rows[kCodes], int64_t depth, float* out) {
  int64_t d = 0;
#if defined(__SSE2__)
  for (; d + 4 <= depth; d += 4) {
    for (int n = 0; n < kCodes; n += 4) {
      __m128 a = _mm_loadu_ps(rows[n] + d), b = _mm_loadu_ps(rows[n + 1] + d);
      __m128 c = _mm_loadu_ps(rows[n + 2] + d), e = _mm_loadu_ps(rows[n + 3] + d);
      _MM_TRANSPOSE4_PS(a, b, c, e);
      _mm_storeu_ps(out + d * kCodes + n, a);
      _mm_storeu_ps(out + (d + 1) * kCodes + n, b);
      _mm_storeu_ps(out + (d + 2) * kCodes + n, c);
      _mm_storeu_ps(out + (d + 3) * kCodes + n, e);
    }
  }
#endif
  for (; d < depth; ++d) {
    for (int n = 0; n < kCodes; ++n) out[d * kCodes + n] = rows[n][d];
  }
}

// -|c|^2/2 of a panel's codes.
inline void half_norms(const float* panel, int64_t depth, double* out) {
  for (int v = 0; v < kDoubleVectors; ++v) {
    DoubleVec even{}, odd{};
    const float* c = panel + v * kDoubles;
    for (int64_t d = 0; d < depth; d += 2) {
      const DoubleVec a = widen(c + d * kCodes);
      even += a * a;
      if (d + 1 == depth) break;
      const DoubleVec b = widen(c + (d + 1) * kCodes);
      odd += b * b;
    }
    store(out + v * kDoubles, -0.5 * (even + odd));
  }
}

// Quantises the panel in lane `lane` of superblock s, whose transposed rows are `panel`.
inline double quantise_panel(const PackedCodebook& book, int64_t s, int64_t lane, const float* panel,
                             const BiasTerms& terms) {
  const int64_t depth = book.depth, index = s * kSuperblock / kCodes + lane;
  const double inverse = 1.0 / book.scale;
  DoubleVec lost[kDoubleVectors] = {}, size[kDoubleVectors] = {}, total[kDoubleVectors] = {};
  DoubleVec dot[kDoubleVectors] = {}, own[kDoubleVectors] = {};
  int8_t* out = book.quantised + s * kSuperVectors * book.steps * kVectorBytes + lane * kStepDims;
  for (int64_t step = 0; step < book.steps; ++step) {
    int32_t words[kCodes] = {};  // kStepDims bytes of each code
    for (int i = 0; i < kStepDims; ++i) {
      const int64_t d = step * kStepDims + i;
      if (d == depth) break;
      const double mean = book.mean[d];
      double q[kCodes];
      for (int v = 0; v < kDoubleVectors; ++v) {
        const DoubleVec r = widen(panel + d * kCodes + v * kDoubles) - mean;
        const DoubleVec whole = nearest(r * inverse), rest = r - whole * book.scale;
        lost[v] += rest * rest;
        size[v] += whole * whole;
        total[v] += whole;
        dot[v] += mean * r;
        own[v] += r * r;
        store(q + v * kDoubles, whole);
      }
      for (int n = 0; n < kCodes; ++n) words[n] |= (static_cast<int32_t>(q[n]) & 0xFF) << (8 * i);
    }
    for (int n = 0; n < kCodes; ++n) {
      __builtin_memcpy(out + (((n / 2) * book.steps + step) * 2 + n % 2) * kVectorBytes, words + n, kStepDims);
    }
  }

  double lost_most = 0.0, size_most = 0.0;
  for (int v = 0; v < kDoubleVectors; ++v) {
    store(terms.mean_dot + index * kCodes + v * kDoubles, dot[v]);
    store(terms.half_residual_norm + index * kCodes + v * kDoubles, -0.5 * own[v]);
    const double a = greatest(lost[v]), b = greatest(size[v]);
    lost_most = a > lost_most ? a : lost_most;
    size_most = b > size_most ? b : size_most;
    for (int l = 0; l < kDoubles; ++l) {
      const int n = v * kDoubles + l;
      static_cast<Acc*>(book.offset)[(s * kSuperVectors + n) * kAccLanes + lane] =
          static_cast<Acc>(-kTokenOffset * static_cast<int32_t>(total[v][l]));
    }
  }
  book.panel_residual[index] = static_cast<float>(__builtin_sqrt(lost_most)) * kInflate;
  book.panel_norm[index] = static_cast<float>(__builtin_sqrt(size_most) * book.scale) * kInflate;
  return size_most;
}

}  // namespace

void hash_rows(const float* rows, int64_t depth, int64_t first, int64_t count, uint64_t* hashes) {
  const Words start = first_key();
  for (int64_t n = first; n < first + count; ++n) {
    const float* row = rows + n * depth;
    Words acc{}, key = start;
    Vec poison{};  // NaN as soon as one component is NaN or Inf
    int64_t d = 0;
    for (; d < depth; d += kLanes) {
      Vec v{};
      if (d + kLanes <= depth) {
        v = load(row + d);
      } else {
        __builtin_memcpy(&v, row + d, (depth - d) * sizeof(float));
      }
      poison += v * 0.0f;
      acc += multiply_halves((Words)v ^ key);
      key += kOdd3;
    }
    uint64_t hash = kOdd2;
    float bad = 0.0f;
    for (int l = 0; l < kWords; ++l) hash += acc[l];
    for (int l = 0; l < kLanes; ++l) bad += poison[l];
    hashes[n] = bad == 0.0f ? mix(hash, kOdd1) | 1 : 0;
  }
}

void measure(const float* rows, int64_t depth, const int32_t* ids, int64_t count, double* sum, float* low,
             float* high) {
  for (int64_t d = 0; d < depth; d += kLanes) {
    const int64_t here = depth - d < kLanes ? depth - d : kLanes;
    DoubleVec even{}, odd{};
    Vec least = splat(__builtin_inff()), most = splat(-__builtin_inff());
    for (int64_t n = 0; n < count; ++n) {
      const float* row = rows + ids[n] * depth + d;
      float padded[kLanes] = {};
      if (here < kLanes) {
        __builtin_memcpy(padded, row, here * sizeof(float));
        row = padded;
      }
      const Vec v = load(row);
      even += widen(row);
      odd += widen(row + kDoubles);
      least = v < least ? v : least;
      most = larger(v, most);
    }
    double sums[kLanes];
    store(sums, even);
    store(sums + kDoubles, odd);
    for (int64_t i = 0; i < here; ++i) sum[d + i] = sums[i], low[d + i] = least[i], high[d + i] = most[i];
  }
}

void pack(const PackedCodebook& book, int64_t s, const float* rows, const BiasTerms& terms, double* max_quantised) {
  *max_quantised = 0.0;
  for (int64_t lane = 0; lane < kSuperblock / kCodes; ++lane) {
    const int64_t first = s * kSuperblock + lane * kCodes;
    const float* codes[kCodes];
    for (int n = 0; n < kCodes; ++n) codes[n] = rows + book.ids[first + n] * book.depth;
    float* panel = book.rows + first * book.depth;
    transpose(codes, book.depth, panel);
    half_norms(panel, book.depth, book.half_norm64 + first);
    for (int n = 0; n < kCodes; ++n) book.half_norm[first + n] = static_cast<float>(book.half_norm64[first + n]);
    if (!book.int8) continue;
    const double size = quantise_panel(book, s, lane, panel, terms);
    *max_quantised = size > *max_quantised ? size : *max_quantised;
  }
}

void pack_terms(const PackedCodebook& book, int64_t s, const BiasTerms& terms) {
  const int64_t first = s * kSuperblock;
  const double mean_factor = book.mean_size > 0.0 ? 1.0 / (book.mean_size * book.scale) : 0.0;
  const double norm_factor = book.norm_size > 0.0 ? 1.0 / (book.norm_size * book.scale) : 0.0;
  for (int64_t v = 0; v < kSuperVectors; ++v) {
    for (int64_t l = 0; l < kAccLanes; ++l) {
      const int64_t to = first + v * kAccLanes + l, from = first + l * kPanelCodes + v;
      book.mean_term[to] = static_cast<float>(terms.mean_dot[from] * mean_factor);
      book.norm_term[to] = static_cast<float>((terms.half_residual_norm[from] - book.norm_middle) * norm_factor);
    }
  }
}

// Every word is combined with a key for its place and its halves are multiplied. The word itself is added to the
// neighbouring accumulator, so that a product that happens to be zero hides nothing. In the end the lanes are mixed
// with 128-bit products.
void digest(const void* data, int64_t bytes, uint64_t out[2]) {
  constexpr int kStripes = 4;  // independent accumulators
  constexpr int64_t kStripeBytes = static_cast<int64_t>(kStripes) * kVectorBytes;
  const char* p = static_cast<const char*>(data);
  Words acc[kStripes], key = first_key();
  for (int i = 0; i < kStripes; ++i) acc[i] = key ^ (kOdd2 * static_cast<uint64_t>(i + 1));
  const auto absorb = [&](const char* from) {
    for (int i = 0; i < kStripes; ++i) {
      const Words w = load_as<Words>(from + i * kVectorBytes);
      acc[i] += multiply_halves(w ^ key);
      acc[i ^ 1] += w;
    }
    key += kOdd3;
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
      b = mix(b + acc[i][l], kOdd2 ^ key[l]) ^ a;
    }
  }
  out[0] = mix(a, kOdd3), out[1] = mix(b ^ kOdd1, kOdd2);
}

}  // namespace semhitok::cpu::SEMHITOK_ISA
