// semhitok._C for Python: importing it registers the ops (ops.cpp); what it exports is only what was built.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "build_config.h"
#include "cpu/backend.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of semhitok (torch.ops.semhitok) and what they were built with.";
  m.def("build_info", &build_info,
        "version, cxx, torch_headers, cpu {compiled, found, used}, cuda {toolkit, architectures} or None.");
}
