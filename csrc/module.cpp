// fastvae._C: importing it registers the ops (static initialisers of the families). What it offers
// itself is no tensor op: facts of the build, and probes for the tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "gaussian.h"
#include "noise.h"

namespace py = pybind11;

namespace {

// The instruction set that the hot loops run on here.
const char* isa() {
#if defined(FASTVAE_MULTIVERSION)
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
  return "x86-64";
#else
  return FASTVAE_ISA;
#endif
}

py::list words(const fastvae::philox::Words& w) {
  py::list result;
  for (const uint32_t x : w.x) result.append(x);
  return result;
}

py::list philox(int rounds, std::array<uint32_t, 4> c, std::array<uint32_t, 2> key) {
  const fastvae::philox::Words counter{{c[0], c[1], c[2], c[3]}};
  if (rounds == 7) return words(fastvae::philox::rounds<7>(counter, key[0], key[1]));
  if (rounds == 10) return words(fastvae::philox::rounds<10>(counter, key[0], key[1]));
  throw std::invalid_argument("fastvae::philox: rounds must be 7 or 10, got " +
                              std::to_string(rounds));
}

// as many counters as the CPU engine draws at once
py::list philox_group(uint64_t seed, uint64_t offset, uint64_t index) {
  fastvae::cpu::NoiseWords group;
  fastvae::cpu::philox_words({seed, offset}, index, fastvae::cpu::kNoiseChunk, group);
  py::list result;
  for (int l = 0; l < fastvae::cpu::kLanes * fastvae::cpu::kNoiseChunk; ++l) {
    for (int j = 0; j < 4; ++j) result.append(group[j][l]);
  }
  return result;
}

template <class T>
T evaluate(const std::string& name, T x) {
  namespace m = fastvae::math;
  if (name == "exp") return m::exp(x);
  if (name == "exp_nonpositive") return m::exp_nonpositive(x);
  if (name == "log") return m::log(x);
  if (name == "exp_weight") return m::exp_weight(x);
  if (name == "decay.value") return m::decay(x).value;
  if (name == "decay.loss") return m::decay(x).loss;
  if (name == "tanh.value") return m::tanh(x).value;
  if (name == "tanh.slope") return m::tanh(x).slope;
  if (name == "half_expm1") return m::half_expm1(x);
  if (name == "half_expm1_minus") return m::half_expm1_minus(x);
  if (name == "half_exp.exp_half") return m::half_exp(x).exp_half;
  if (name == "half_exp.half_expm1") return m::half_exp(x).half_expm1;
  if (name == "half_exp.half_expm1_minus") return m::half_exp(x).half_expm1_minus;
  if (name == "log_normal") return m::log_normal(x);
  if (name == "log1p_unit") return m::log1p_unit(x);
  if (name == "sin_turn") return m::sincos_turn(x).sin;
  if (name == "cos_turn") return m::sincos_turn(x).cos;
  throw std::invalid_argument("fastvae::math: no function " + name);
}

template <class T>
void define_math(py::module_& m) {
  m.def(
      "math",
      [](const std::string& name, py::array_t<T> x) {
        return py::vectorize([&name](T value) { return evaluate(name, value); })(std::move(x));
      },
      py::arg("name"), py::arg("x").noconvert(), "A function of math.h at each x, by its type.");
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
#ifdef FASTVAE_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
  m.def("isa", &isa);
  m.def("philox", &philox, "One Philox4x32 block of `rounds` rounds.");
  m.def("philox_group", &philox_group, "The blocks that the CPU engine draws at once.");
  define_math<float>(m);
  define_math<double>(m);
}
