// The functions each instruction set provides (the *_simd.cpp files) and what they work on. Those files include this
// and no standard header with code in it: see simd.h.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace semhitok::cpu {

[[maybe_unused]] static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A codebook ready for the fp32 search: codes [groups][blocks of a group][depth][2 * lanes], zero-padded to whole
// groups; bias [groups * group_codes], -inf for padding and for codes with NaN or Inf, so that neither can win.
struct PackedCodebook {
  int64_t codes, depth, groups;
  float* packed;
  float* bias;
  float max_abs;   // largest |component| of a usable code
  float max_bias;  // largest finite |bias|
};

struct Kernels {
  int64_t token_block;  // most tokens a call of search takes
  int64_t group_codes;  // codes a group of the packed codebook holds
  int64_t scratch_per_token;  // floats a token of a block needs beside its depth
  // Packs group `group` of the codebook; row is depth floats of scratch. Returns its max |component| and |bias|.
  void (*pack_group)(const Rows& codebook, Metric metric, int64_t group, const PackedCodebook& out, float* row,
                     float* max_abs, float* max_bias);
  // Tokens first .. first + count of z, count <= token_block.
  void (*search)(const PackedCodebook& codebook, const Rows& z, int64_t first, int64_t count, float* scratch,
                 float* scores, int64_t* ids);
  // Tokens first .. first + count of problem; group, scores and ids point at the first of them.
  // scratch is 2 * round_up(depth, 16) floats.
  void (*subcode)(const NearestSubcode& problem, int64_t first, int64_t count, const int64_t* group, float* scratch,
                  float* scores, int64_t* ids);
};

}  // namespace semhitok::cpu
