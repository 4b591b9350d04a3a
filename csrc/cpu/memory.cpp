#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace semhitok::cpu {

void FreeAligned::operator()(void* p) const { std::free(p); }

void* allocate_aligned(int64_t bytes) {
  void* p = std::aligned_alloc(kAlignment, static_cast<size_t>(round_up(std::max<int64_t>(bytes, 1), kAlignment)));
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

}  // namespace semhitok::cpu
