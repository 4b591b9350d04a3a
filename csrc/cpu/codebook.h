// Codebooks made ready for the search, kept from call to call.
#pragma once

#include <memory>
#include <vector>

#include "backend.h"

namespace semhitok::cpu {

// Owns the arrays of a PackedCodebook.
class Codebook {
 public:
  Codebook(const Rows& codes, int64_t count, int64_t depth, const Kernels& kernels);
  const PackedCodebook& packed() const { return packed_; }
  int64_t bytes() const { return bytes_; }

 private:
  std::vector<int32_t> list_codes(const Rows& codes, int64_t count, const Kernels& kernels);
  void measure(const Rows& codes, const std::vector<int32_t>& ids);
  void pack(const Rows& codes, const std::vector<int32_t>& ids, const Kernels& kernels);
  template <typename T>
  T* take(int64_t count);

  PackedCodebook packed_{};
  std::vector<Buffer<char>> buffers_;
  int64_t bytes_ = 0;
};

// The codebook of these bytes: the one kept from an earlier call, or packed now and kept.
std::shared_ptr<const Codebook> prepare(const Rows& codes, int64_t count, int64_t depth, const Kernels& kernels);

}  // namespace semhitok::cpu
