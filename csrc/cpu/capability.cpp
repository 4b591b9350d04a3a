// Which instruction set's kernels run: the best this machine has, or the lower one SEMHITOK_CPU_CAPABILITY names.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "backend.h"

namespace semhitok::cpu {

#if SEMHITOK_HAVE_X86_SIMD
namespace avx512_vnni { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
#if SEMHITOK_HAVE_AVX_VNNI
namespace avx_vnni { extern const Kernels table; }
#endif
namespace avx2 { extern const Kernels table; }
#endif
namespace portable { extern const Kernels table; }

int capabilities(Capability out[kMaxCapabilities]) {
  int count = 0;
#if SEMHITOK_HAVE_X86_SIMD
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  out[count++] = {"avx512_vnni", avx512 && __builtin_cpu_supports("avx512vnni"), &avx512_vnni::table};
  out[count++] = {"avx512", avx512, &avx512::table};
#if SEMHITOK_HAVE_AVX_VNNI
  out[count++] = {"avx_vnni", fma && __builtin_cpu_supports("avxvnni"), &avx_vnni::table};
#endif
  out[count++] = {"avx2", fma, &avx2::table};
#endif
  out[count++] = {"default", true, &portable::table};
  return count;
}

namespace {

// The kernels with that name, or the best without one. Null, with the names that are supported, if this machine or
// build does not have them.
const Kernels* find(const char* wanted, std::string* supported) {
  Capability all[kMaxCapabilities];
  const int count = capabilities(all);
  for (int c = 0; c < count; ++c) {
    if (!all[c].supported) continue;
    if (wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, all[c].name) == 0) return all[c].kernels;
    *supported += (supported->empty() ? "" : ", ") + std::string(all[c].name);
  }
  return nullptr;
}

const Kernels* find_or_throw(const char* what, const char* wanted) {
  std::string supported;
  const Kernels* found = find(wanted, &supported);
  if (found == nullptr) {
    throw std::runtime_error(what + (": expected one of " + supported) + " (what this machine and build have), got " +
                             wanted);
  }
  return found;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = find_or_throw("SEMHITOK_CPU_CAPABILITY", std::getenv("SEMHITOK_CPU_CAPABILITY"));
  return *chosen;
}

const Kernels& kernels_named(const char* name) {
  return *name == '\0' ? kernels() : *find_or_throw("capability", name);
}

}  // namespace semhitok::cpu
