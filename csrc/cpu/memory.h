// Aligned memory for the CPU backend.
#pragma once

#include <cstdint>
#include <memory>

namespace semhitok::cpu {

constexpr int64_t kAlignment = 64;  // bytes

struct FreeAligned {
  void operator()(void* p) const;
};
template <typename T>
using Buffer = std::unique_ptr<T[], FreeAligned>;

void* allocate_aligned(int64_t bytes);  // to kAlignment; throws std::bad_alloc

template <typename T>
Buffer<T> allocate(int64_t count) {
  return Buffer<T>(static_cast<T*>(allocate_aligned(count * static_cast<int64_t>(sizeof(T)))));
}

}  // namespace semhitok::cpu
