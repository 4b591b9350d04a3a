// Codebooks made ready for the search, kept from call to call.
#pragma once

#include <memory>
#include <vector>

#include "backend.h"

namespace semhitok::cpu {

// A codebook packed for one instruction set, in segments that are searched one after the other; none when no code is
// usable. Owns their arrays.
class Codebook {
 public:
  // Takes the memory of `old`, when there is one.
  Codebook(const Rows& codes, int64_t count, int64_t depth, const Kernels& kernels, std::shared_ptr<Codebook> old);
  const std::vector<PackedCodebook>& segments() const { return segments_; }
  int64_t groups() const;  // of all segments
  int64_t bytes() const { return bytes_; }

 private:
  struct Piece {
    Buffer<char> memory;
    int64_t bytes = 0;
  };
  using Ids = std::vector<int32_t>;

  Ids list_codes(int64_t count) const;
  std::vector<Ids> split(const Ids& ids, const double* half_residual_norms) const;
  std::vector<Ids> clusters(const Ids& ids, double radius) const;
  Buffer<double> add_segment(const Ids& ids);
  void measure(PackedCodebook* segment, const Ids& ids);
  template <typename T>
  T* take(int64_t count);

  const Kernels& kernels_;
  int64_t depth_;
  const float* rows_ = nullptr;  // while packing
  std::vector<PackedCodebook> segments_;
  std::vector<Piece> pieces_, spare_;
  int64_t bytes_ = 0;
};

// The codebook of these bytes: the one kept from an earlier call, or packed now and kept.
std::shared_ptr<const Codebook> prepare(const Rows& codes, int64_t count, int64_t depth, const Kernels& kernels);

}  // namespace semhitok::cpu
