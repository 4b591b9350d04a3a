// A stand-in for CUB's radix sort, with the part of its interface that the kernels use: stable, by some bits of a key.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace cub {

struct DeviceRadixSort {
  // Without temporary storage: says how much it takes, and touches nothing else.
  template <typename Key, typename Value, typename Count>
  static cudaError_t SortPairs(void* temporary, size_t& temporary_bytes, const Key* keys, Key* sorted_keys,
                               const Value* values, Value* sorted_values, Count count, int begin_bit = 0,
                               int end_bit = static_cast<int>(sizeof(Key)) * 8, cudaStream_t = nullptr) {
    static_assert(std::is_integral<Key>::value, "floating keys would need their own order");
    using Unsigned = std::make_unsigned_t<Key>;
    const size_t needed = static_cast<size_t>(count) * (sizeof(Key) + sizeof(Value)) + 1;
    if (temporary == nullptr) {
      temporary_bytes = needed;
      return cudaSuccess;
    }
    if (temporary_bytes < needed || begin_bit < 0 || end_bit > static_cast<int>(sizeof(Key)) * 8 ||
        begin_bit >= end_bit) {
      return cudaErrorInvalidValue;
    }
    std::memset(temporary, 0x5A, temporary_bytes);  // it is ours to overwrite
    const auto digits = [&](Key key) {
      constexpr int kBits = static_cast<int>(sizeof(Key)) * 8;
      auto bits = static_cast<Unsigned>(key);
      if (std::is_signed<Key>::value) bits ^= Unsigned(1) << (kBits - 1);
      const int width = end_bit - begin_bit;
      const Unsigned mask = width == kBits ? ~Unsigned(0) : static_cast<Unsigned>((Unsigned(1) << width) - 1);
      return static_cast<Unsigned>(bits >> begin_bit & mask);
    };
    std::vector<Count> order(static_cast<size_t>(count));
    for (Count i = 0; i < count; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](Count a, Count b) { return digits(keys[a]) < digits(keys[b]); });
    for (Count i = 0; i < count; ++i) {
      sorted_keys[i] = keys[order[i]];
      sorted_values[i] = values[order[i]];
    }
    return cudaSuccess;
  }
};

}  // namespace cub
