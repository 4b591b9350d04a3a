// Codebooks made ready for the search, kept from call to call.
#pragma once

#include <memory>
#include <vector>

#include "backend.h"

namespace semhitok::cpu {

// Owns the arrays of a PackedCodebook.
class Codebook {
 public:
  // Takes the memory of `old`, when there is one.
  Codebook(const Rows& codes, int64_t count, int64_t depth, const Kernels& kernels, std::shared_ptr<Codebook> old);
  const PackedCodebook& packed() const { return packed_; }
  int64_t bytes() const { return bytes_; }

 private:
  struct Piece {
    Buffer<char> memory;
    int64_t bytes = 0;
  };

  std::vector<int32_t> list_codes(const float* rows, int64_t count, const Kernels& kernels) const;
  void measure(const float* rows, const std::vector<int32_t>& ids, const Kernels& kernels);
  void pack(const float* rows, const std::vector<int32_t>& ids, const Kernels& kernels);
  template <typename T>
  T* take(int64_t count);

  PackedCodebook packed_{};
  std::vector<Piece> pieces_, spare_;
  int64_t bytes_ = 0;
};

// The codebook of these bytes: the one kept from an earlier call, or packed now and kept.
std::shared_ptr<const Codebook> prepare(const Rows& codes, int64_t count, int64_t depth, const Kernels& kernels);

}  // namespace semhitok::cpu
