// Which instruction set's kernels run: the best this machine has, or the lower one SEMHITOK_CPU_CAPABILITY names.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "backend.h"

namespace semhitok::cpu {

#if SEMHITOK_HAVE_X86_SIMD
namespace avx512 { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
#endif
namespace portable { extern const Kernels table; }

int capabilities(Capability out[kMaxCapabilities]) {
  int count = 0;
#if SEMHITOK_HAVE_X86_SIMD
  out[count++] = {"avx512", __builtin_cpu_supports("avx512f") != 0, &avx512::table};
  out[count++] = {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &avx2::table};
#endif
  out[count++] = {"default", true, &portable::table};
  return count;
}

namespace {

const Kernels* choose() {
  Capability all[kMaxCapabilities];
  const int count = capabilities(all);
  const char* wanted = std::getenv("SEMHITOK_CPU_CAPABILITY");
  std::string supported;
  for (int c = 0; c < count; ++c) {
    if (!all[c].supported) continue;
    if (wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, all[c].name) == 0) return all[c].kernels;
    supported += (supported.empty() ? "" : ", ") + std::string(all[c].name);
  }
  throw std::runtime_error("SEMHITOK_CPU_CAPABILITY: expected one of " + supported +
                           " (what this machine and build have), got " + wanted);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

}  // namespace semhitok::cpu
