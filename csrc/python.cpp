// semhitok._C for Python: importing it registers the ops (ops.cpp); what it exports is only what was built.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "build_config.h"
#include "cpu/backend.h"

#if SEMHITOK_WITH_CUDA
#include <stdexcept>

#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace {

py::list split(const std::string& text, char separator) {
  py::list parts;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(separator, begin), text.size());
    parts.append(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

py::dict build_info() {
  using namespace semhitok::cpu;
  Capability all[kMaxCapabilities];
  const int count = capabilities(all);
  py::list compiled, found;
  py::object used = py::none();
  for (int c = 0; c < count; ++c) {
    compiled.append(all[c].name);
    if (all[c].supported) found.append(all[c].name);
    if (all[c].kernels == &kernels()) used = py::str(all[c].name);
  }
  py::dict cpu;
  cpu["compiled"] = compiled;
  cpu["found"] = found;
  cpu["used"] = used;

  py::dict info;
  info["version"] = SEMHITOK_VERSION;
  info["cxx"] = SEMHITOK_CXX_COMPILER;
  info["torch_headers"] = SEMHITOK_TORCH_HEADERS;
  info["cpu"] = cpu;
  info["cuda"] = py::none();
  if (SEMHITOK_WITH_CUDA) {
    py::dict cuda;
    cuda["toolkit"] = SEMHITOK_CUDA_VERSION;
    cuda["architectures"] = split(SEMHITOK_CUDA_ARCHITECTURES, ';');
    info["cuda"] = cuda;
  }
  return info;
}

#if SEMHITOK_WITH_CUDA
std::string cuda_search(int64_t tokens, int64_t codes, int64_t depth, bool wide, int device) {
  using namespace semhitok;
  int previous = 0;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  NearestCode problem{};
  problem.tokens = tokens, problem.codes = codes, problem.depth = depth, problem.wide = wide;
  const cuda::Search search = cuda::chosen_search(problem);
  (void)cudaSetDevice(previous);
  return cuda::kSearchNames[static_cast<int>(search)];
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of semhitok (torch.ops.semhitok) and what they were built with.";
  m.def("build_info", &build_info,
        "version, cxx, torch_headers, cpu {compiled, found, used}, cuda {toolkit, architectures} or None.");
#if SEMHITOK_WITH_CUDA
  m.def("cuda_search", &cuda_search, py::arg("tokens"), py::arg("codes"), py::arg("depth"), py::arg("wide") = false,
        py::arg("device") = 0,
        "The name of the search that nearest_code runs for such a problem on a CUDA device (csrc/cuda/search.h).");
#endif
}
