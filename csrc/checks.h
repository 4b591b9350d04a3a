// What the ops and the probes share: checks of their arguments, and the tensors they allocate. A wrong argument raises
// std::runtime_error that names it, what was expected and what was given.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "problem.h"

namespace semhitok {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

template <typename... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return torch::headeronly::toString(type);
  }
}

inline std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

inline Dtype float_dtype(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Double: return Dtype::kFloat64;
    default:
      check(false, name, ": expected float32, float16, bfloat16 or float64, got ", name_of(t.scalar_type()));
      return Dtype::kFloat32;
  }
}

inline Metric parse_metric(const char* name, const std::string& metric) {
  check(metric == "ip" || metric == "l2", name, ": expected \"ip\" or \"l2\", got \"", metric, "\"");
  return metric == "ip" ? Metric::kInnerProduct : Metric::kL2;
}

inline std::string shape_of(const Sizes& sizes) {
  std::ostringstream out;
  out << "[";
  for (size_t d = 0; d < sizes.size(); ++d) out << (d ? ", " : "") << sizes[d];
  out << "]";
  return out.str();
}

inline Sizes sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

inline void check_dims(const char* name, const Tensor& t, int64_t dims, const char* layout) {
  check(t.dim() == dims, name, ": expected ", dims, " dimensions ", layout, ", got ", t.dim());
  for (int64_t d = 0; d < dims; ++d) {
    check(t.size(d) >= 1, name, ": expected every dimension of ", layout, " to be at least 1, got ",
          shape_of(sizes_of(t)));
  }
}

// The kernels count codes, rows and segments in 32 bits.
inline void check_count(const char* name, const char* what, int64_t count) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 1;
  check(count <= kMost, name, ": expected at most ", kMost, " ", what, ", got ", count);
}

// Checks z [..., depth] and returns its leading sizes.
inline Sizes check_tokens(const char* name, const Tensor& z, const char* codebook_name, const Tensor& codebook) {
  const int64_t depth = codebook.size(codebook.dim() - 1);
  check(z.dim() >= 1, name, ": expected at least 1 dimension [..., D], got a scalar");
  check(z.size(z.dim() - 1) == depth, name, ": expected last dimension ", depth, " (", codebook_name,
        ".shape[-1]), got ", z.size(z.dim() - 1));
  Sizes leading = sizes_of(z);
  leading.pop_back();
  return leading;
}

inline void check_leading(const char* name, const Sizes& got, const char* other, const Sizes& expected) {
  check(got == expected, name, ": expected leading dimensions ", shape_of(expected), " (those of ", other, "), got ",
        shape_of(got));
}

inline void check_ids(const char* name, const Tensor& ids) {
  check(ids.scalar_type() == ScalarType::Long, name, ": expected int64, got ", name_of(ids.scalar_type()));
}

inline void check_device(const char* name, const Tensor& t, const char* other, const Tensor& first) {
  check(device_of(t) == device_of(first), name, ": expected device ", device_of(first), " (that of ", other, "), got ",
        device_of(t));
}

inline int64_t count_of(const Sizes& leading) {
  int64_t count = 1;
  for (const int64_t size : leading) count *= size;
  return count;
}

inline Sizes with_last(Sizes leading, int64_t last) {
  leading.push_back(last);
  return leading;
}

inline Tensor new_tensor(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

inline int64_t* ids_of(const Tensor& t) { return static_cast<int64_t*>(t.data_ptr()); }

inline Tensor new_floats(const Tensor& like, const Sizes& sizes, bool wide) {
  return new_tensor(like, sizes, wide ? ScalarType::Double : ScalarType::Float);
}

// Whether to compute in fp64.
inline bool is_wide(std::initializer_list<Rows> inputs) {
  return std::any_of(inputs.begin(), inputs.end(), [](const Rows& rows) { return rows.dtype == Dtype::kFloat64; });
}

// ---- nearest_code ----

// A checked problem, and the tensors that its pointers point into.
struct CodeProblem {
  NearestCode problem;
  Tensor z, codebook, scores, ids;
};

inline CodeProblem code_problem(const Tensor& z, const Tensor& codebook, const std::string& metric) {
  NearestCode p{};
  p.metric = parse_metric("metric", metric);
  p.z.dtype = float_dtype("z", z);
  p.codebook.dtype = float_dtype("codebook", codebook);
  check_dims("codebook", codebook, 2, "[K, D]");
  check_count("codebook", "codes", codebook.size(0));
  const Sizes leading = check_tokens("z", z, "codebook", codebook);
  check_device("codebook", codebook, "z", z);

  p.wide = is_wide({p.z, p.codebook});
  p.tokens = count_of(leading), p.num_codes = codebook.size(0), p.depth = codebook.size(1);
  const Tensor z_rows = torch::stable::contiguous(z), code_rows = torch::stable::contiguous(codebook);
  const Tensor scores = new_floats(z, leading, p.wide);
  const Tensor ids = new_tensor(z, leading, ScalarType::Long);
  p.z.data = z_rows.data_ptr(), p.codebook.data = code_rows.data_ptr();
  p.scores = scores.data_ptr(), p.ids = ids_of(ids);
  return {p, z_rows, code_rows, scores, ids};
}

}  // namespace semhitok
