// semhitok._C for Python: importing it registers the ops (ops.cpp, probes.cpp). It exports only what was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "build_config.h"
#include "cpu/backend.h"

#if SEMHITOK_WITH_CUDA
#include <stdexcept>

#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace {

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
    cuda["architectures"] = py::str(SEMHITOK_CUDA_ARCHITECTURES).attr("split")(";");
    info["cuda"] = cuda;
  }
  return info;
}

#if SEMHITOK_WITH_CUDA
std::string cuda_search(int64_t tokens, int64_t num_codes, int64_t depth, bool wide, int index) {
  using namespace semhitok;
  cuda::Device device{};
  const cudaError_t error = cuda::get_device(index, &device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  NearestCode problem{};
  problem.tokens = tokens, problem.num_codes = num_codes, problem.depth = depth, problem.wide = wide;
  return cuda::chosen_search(problem, device).name;
}
#endif

std::vector<std::string> cuda_searches() {
  std::vector<std::string> names;
#if SEMHITOK_WITH_CUDA
  for (const auto& search : semhitok::cuda::searches()) names.push_back(search.name);
#endif
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of semhitok (torch.ops.semhitok) and what they were built with.";
  m.def("build_info", &build_info,
        "version, cxx, torch_headers, cpu {compiled, found, used}, cuda {toolkit, architectures} or None.");
  m.def("cuda_searches", &cuda_searches,
        "The names of the searches behind nearest_code on CUDA, simplest first; none in a build without CUDA.");
#if SEMHITOK_WITH_CUDA
  m.def("cuda_search", &cuda_search, py::arg("tokens"), py::arg("num_codes"), py::arg("depth"), py::arg("wide") = false,
        py::arg("device") = 0, "The name of the search that nearest_code runs for such a problem on a CUDA device.");
#endif
}
