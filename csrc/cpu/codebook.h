// A codebook packed for the search.
#pragma once

#include "backend.h"

namespace semhitok::cpu {

// A codebook packed for one instruction set, in parts that are searched one after the other; there is none when no code
// is usable. Owns the arrays of its parts.
class Codebook {
 public:
  // Reuses the memory of `former` if it is not null.
  Codebook(const Rows& codes, int64_t count, int64_t depth, const Kernels& kernels, std::shared_ptr<Codebook> former);
  const std::vector<PackedCodebook>& parts() const { return parts_; }
  int64_t bytes() const { return bytes_; }

 private:
  struct Array {
    Buffer<char> memory;
    int64_t bytes = 0;
  };
  using Ids = std::vector<int32_t>;

  Ids list_codes(int64_t count) const;
  std::vector<Ids> split(const Ids& ids, const double* half_residual_norms) const;
  std::vector<Ids> clusters(const Ids& ids, double radius) const;
  Buffer<double> add_part(const Ids& ids);
  void measure(PackedCodebook* part, const Ids& ids);
  template <typename T>
  T* take(int64_t count);

  const Kernels& kernels_;
  int64_t depth_;
  const float* rows_ = nullptr;  // while packing
  std::vector<PackedCodebook> parts_;
  std::vector<Array> arrays_, spare_;
  int64_t bytes_ = 0;
};

// The codebook with these bytes: the one kept from an earlier call, or one packed now and kept (codebook_cache.cpp).
std::shared_ptr<const Codebook> prepare(const Rows& codes, int64_t count, int64_t depth, const Kernels& kernels);

}  // namespace semhitok::cpu
