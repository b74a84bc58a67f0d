// What every op's torch file shares: the check of its arguments, the launch of its formula on the
// device at hand, and the wiring to autograd and autocast. With it an op is two short functions,
// forward and backward, and two schemas (see gaussian.cpp).
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "rows.h"
#include "scale.h"

#ifdef FASTVAE_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fastvae {

using at::Tensor;

namespace cuda {
// rows.cuh, instantiated in <family>.cu. Null, or what CUDA complains of.
template <class F>
const char* sweep_rows(const Sweep& sweep, void* stream);
}  // namespace cuda

// ---- checks and launch ------------------------------------------------------------------------

struct Argument {
  const char* name;
  const Tensor& tensor;
};

// Throws unless the argument is floating, of the dtype and on the device of the first, and no
// scalar.
void check_input(const char* op, const Argument& argument, const Argument& first);
// Throws unless the values, such as the gradient of a row sum, are one for each row of the inputs.
void check_row_values(const char* op, const Argument& values, c10::SymIntArrayRef rows,
                      const Tensor& input);
// The rows that z, and what has a line for each of `lines`, [.., K], broadcast to: of lines that
// are [K] all rows share them.
c10::SymDimVector broadcast_rows(const char* op, const Argument& z, const Argument& line,
                                 c10::SymIntArrayRef lines);
// What a row sum of the input comes in: half types sum in, and return, float32.
at::TensorOptions row_options(const Tensor& input);
DType dtype_of(const Tensor& x);
// A new tensor, of huge pages if it is large.
Tensor allocate(c10::SymIntArrayRef shape, at::TensorOptions options);

#ifdef FASTVAE_CUDA
// Calls launch(stream), which says what CUDA complains of, on the device of x.
template <class Launch>
void launch_on_cuda(const char* op, const Tensor& x, const Launch& launch) {
  const c10::cuda::CUDAGuard guard(x.device());
  const char* error = launch(c10::cuda::getCurrentCUDAStream().stream());
  TORCH_CHECK(error == nullptr, "fastvae::", op, ": CUDA launch failed: ", error);
}
#endif

// A formula compiled for every device, as RowOp launches it.
struct CompiledFormula {
  const cpu::Kernel& on_cpu;
  const char* (*on_cuda)(const Sweep& sweep, void* stream);  // null: not for CUDA
};
template <class F>
CompiledFormula formula_of() {
#ifdef FASTVAE_CUDA
  if constexpr (!F::shape.cpu_only) return {cpu::kernel_of<F>(), &cuda::sweep_rows<F>};
#endif
  return {cpu::kernel_of<F>(), nullptr};
}

// One call of one op: checks its inputs, broadcasts them to [..., columns], runs formulas over
// them. Nothing here depends on concrete sizes until the kernel is launched, so a dynamic shape
// stays one.
class RowOp {
 public:
  // Throws unless the inputs are floating, of one dtype, on one device, and broadcast together.
  RowOp(const char* name, std::initializer_list<Argument> inputs);
  RowOp& input(const char* name, const Tensor& x);  // one more

  // A row input (the gradient of a row sum), broadcast to one value a row.
  RowOp& row_input(const char* name, const Tensor& value);
  RowOp& key(const Tensor& key);

  // What the inputs broadcast to.
  c10::SymIntArrayRef shape() const { return shape_; }

  RowOp& parameter(double value) {
    parameter_ = value;
    return *this;
  }

  template <class F>
  struct Result {
    std::array<Tensor, F::shape.outputs> outputs;
    Tensor row_sum;
  };
  // Outputs that are not wanted come back undefined, and are not written.
  template <class F>
  Result<F> run(std::array<bool, F::shape.outputs> wanted) {
    static_assert(F::shape.inputs <= kMaxInputs && F::shape.outputs <= kMaxOutputs);
    Result<F> result;
    run(formula_of<F>(), wanted.data(), result.outputs.data(), result.row_sum);
    return result;
  }
  template <class F>
  Result<F> run() {
    std::array<bool, F::shape.outputs> all;
    all.fill(true);
    return run<F>(all);
  }

 protected:         // what an op with an engine of its own shares (bound.cpp)
  Sweep lay_out();  // of the inputs; sizes are concrete from here on

  const char* name_;
  const char* first_name_;
  c10::SmallVector<Tensor, kMaxInputs> inputs_;
  c10::SymDimVector shape_;
  Tensor row_input_, key_;
  double parameter_ = 0;

 private:
  void run(const CompiledFormula& formula, const bool* wanted, Tensor* outputs, Tensor& row_sum);
  void launch(const CompiledFormula& formula, Sweep& sweep) const;
};

// d loss / d input, one of a derivative that forward kept: grad, of the row's sum, times it.
struct ChainRule : Formula<Shape{.inputs = 1, .row_inputs = 1, .outputs = 1, .cpu_only = true}> {
  template <class T>
  static FASTVAE_HD Values<T, 1> eval(T derivative, T grad) {
    return {{grad * derivative}};
  }
};
Tensor chain_rule(const char* name, const Tensor& grad, const Tensor& derivative);

// ---- registration -----------------------------------------------------------------------------
//
// An op is a struct of a name and two static functions on tensors, its bodies for every device:
//
//   struct GaussianLogProbOp {
//     static constexpr const char* kName = "gaussian_log_prob";
//     static Tensor forward(const Tensor& x, const Tensor& mu, const Tensor& log_var);
//     static std::tuple<Tensor, Tensor, Tensor> backward(      // one gradient per floating input
//         const Tensor& grad, const Tensor& x, const Tensor& mu, const Tensor& log_var,
//         std::array<bool, 3> wanted);                         // not wanted: undefined
//   };
//
// define<Op>() registers fastvae::<name> and fastvae::<name>_backward, and makes the first
// differentiable to any order. Keys, which get no gradient, come after the floating inputs;
// optional tensors come last, and if one is absent so are those after it. What is no tensor,
// numbers and strings, comes after all tensors, also in backward. A gradient that is the first of
// grads itself comes back undefined though wanted: an op may not return its argument.
//
// On a CPU arithmetic is dear, so there an op in float32 or float64 may keep something for
// backward, which then takes it as an optional tensor after the inputs. Either
//
//     static constexpr Keeps kKeeps{.derivative = true};
//     static std::tuple<Tensor, Tensor> forward_keeping(x, mu, log_var);
//
// takes the place of forward in training, with one output more, which is kept; or
//
//     static constexpr Keeps kKeeps{.sample = true};
//
// keeps the first output, as long as nobody changes it in place: it is the user's own.
struct Keeps {
  bool derivative = false, sample = false;
  bool everywhere = false;  // on every device and in every dtype
};

// Makes an op whose schemas are registered differentiable (autograd.cpp).
void wire(torch::Library& m, const std::string& name, Keeps keeps);

// Registers an op and its body for every device, and no gradient.
template <class Body>
void define_forward(torch::Library& m, const std::string& op, const std::string& arguments,
                    Body body) {
  m.def((op + arguments).c_str(), {at::Tag::pt2_compliant_tag});
  for (const auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::Meta}) {
    m.impl(op.c_str(), torch::dispatch(key, body));
  }
}

// Registers an op from its arguments' schema, "(Tensor x, Tensor mu) -> Tensor", its backward's,
// and that of forward_keeping if it has one.
template <class Op>
void define(torch::Library& m, const std::string& schema, const std::string& backward_schema,
            const std::string& keeping_schema = "") {
  const std::string name = Op::kName;
  constexpr Keeps keeps = [] {
    if constexpr (requires { Op::kKeeps; }) return Op::kKeeps;
    return Keeps{};
  }();
  define_forward(m, name, schema, TORCH_FN((Op::forward)));
  define_forward(m, name + "_backward", backward_schema, TORCH_FN((Op::backward)));
  if constexpr (keeps.derivative) {
    define_forward(m, name + "_keeping", keeping_schema, TORCH_FN((Op::forward_keeping)));
  }
  wire(m, name, keeps);
}

// ---- sums over rows ---------------------------------------------------------------------------
//
// An op that is a RowSum (sweep.h) of named tensors and nothing else is its term:
//
//   static constexpr const char* kName = "laplace_log_prob";
//   static constexpr const char* kArguments[] = {"x", "mu", "log_scale"};
//   static constexpr bool kKeeps = false;   // whether training keeps the last one's derivative
//
// and define_row_sum<LaplaceLogProb>(m).

template <class Sum, class Indices = std::make_index_sequence<Sum::kInputs>>
struct RowSumOp;

template <class Sum, size_t... I>
struct RowSumOp<Sum, std::index_sequence<I...>> {
  using Term = typename Sum::term;
  template <size_t>
  using Each = Tensor;
  using Gradients = std::tuple<Each<I>...>;
  static constexpr const char* kName = Term::kName;
  static constexpr Keeps kKeeps{.derivative = Term::kKeeps};

  static RowOp op(const Each<I>&... inputs) { return {kName, {{Term::kArguments[I], inputs}...}}; }

  static Tensor forward(const Each<I>&... inputs) {
    return op(inputs...).template run<typename Sum::Forward>().row_sum;
  }

  static std::tuple<Tensor, Tensor> forward_keeping(const Each<I>&... inputs) {
    auto result = op(inputs...).template run<typename Sum::ForwardKeeping>();
    return {result.row_sum, result.outputs[0]};
  }

  static Gradients backward(const Tensor& grad, const Each<I>&... inputs,
                            const std::optional<Tensor>& kept,
                            std::array<bool, sizeof...(I)> wanted) {
    std::array<Tensor, sizeof...(I)> gradients;
    if (kept && std::none_of(wanted.begin(), wanted.end() - 1, std::identity{})) {
      gradients.back() = chain_rule(kName, grad, *kept);
    } else {
      RowOp all = op(inputs...);
      gradients = all.row_input("grad", grad).template run<typename Sum::Backward>(wanted).outputs;
    }
    return {std::move(gradients[I])...};
  }
};

// The arguments of an op of named tensors, Op::kArguments, as its schemas have them.
template <class Op>
struct TensorsSchema {
  std::string inputs, gradients, wanted;
  TensorsSchema() {
    for (const char* name : Op::kArguments) {
      inputs += std::string(inputs.empty() ? "" : ", ") + "Tensor " + name;
      gradients += gradients.empty() ? "Tensor" : ", Tensor";
    }
    wanted = "bool[" + std::to_string(Op::kInputs) + "] wanted";
  }
};

template <class Sum>
void define_row_sum(torch::Library& m) {
  const TensorsSchema<typename Sum::term> s;
  define<RowSumOp<Sum>>(
      m, "(" + s.inputs + ") -> Tensor",
      "(Tensor grad, " + s.inputs + ", Tensor? kept, " + s.wanted + ") -> (" + s.gradients + ")",
      "(" + s.inputs + ") -> (Tensor, Tensor)");
}

// ---- settings that choose a formula -------------------------------------------------------------

// Calls f with the type of that kName, of those given: f(LogVar{}).
template <class First, class... Rest, class F>
auto call_with_named(c10::string_view name, const F& f) {
  if constexpr (sizeof...(Rest) > 0) {
    if (name != First::kName) return call_with_named<Rest...>(name, f);
  }
  return f(First{});
}
template <class... Types, class F>
auto with_one_of(const char* op, const char* argument, c10::string_view name, const F& f) {
  if (!((name == Types::kName) || ...)) {
    std::string known;
    ((known += (known.empty() ? "" : ", ") + std::string(Types::kName)), ...);
    TORCH_CHECK_VALUE(false, "fastvae::", op, ": ", argument, " must be one of ", known, ", got ",
                      name);
  }
  return call_with_named<Types...>(name, f);
}

// The map to a scale (scale.h), of those that the op takes: all of them, unless they are named.
template <class... Maps, class F>
auto with_scale(const char* op, c10::string_view parameterization, const F& f) {
  if constexpr (sizeof...(Maps) == 0) {
    return with_scale<LogVar, LogScale, Scale, Softplus>(op, parameterization, f);
  } else {
    return with_one_of<Maps...>(op, "parameterization", parameterization, f);
  }
}
// The map of that name, as a number.
inline ScaleMap scale_map(const char* op, c10::string_view parameterization) {
  return with_scale(op, parameterization, []<class S>(S) { return S::kMap; });
}

// A sum over rows whose last argument is a scale, given by any of the maps.
template <template <class> class Sum, class First, class... Maps>
struct ScaledRowSum {
  using Default = RowSumOp<Sum<First>>;
  static constexpr const char* kName = Default::kName;

  template <class Signature>
  struct Bodies;
  template <class... Inputs>
  struct Bodies<Tensor(Inputs...)> {
    static constexpr const char* kName = Default::kName;
    static Tensor forward(Inputs... inputs, c10::string_view parameterization) {
      return with_scale<First, Maps...>(kName, parameterization, [&](auto map) {
        return RowSumOp<Sum<decltype(map)>>::forward(inputs...);
      });
    }
    static typename Default::Gradients backward(const Tensor& grad, Inputs... inputs,
                                                c10::string_view parameterization,
                                                std::array<bool, sizeof...(Inputs)> wanted) {
      return with_scale<First, Maps...>(kName, parameterization, [&](auto map) {
        return RowSumOp<Sum<decltype(map)>>::backward(grad, inputs..., {}, wanted);
      });
    }
  };
  using Op = Bodies<std::remove_pointer_t<decltype(&Default::forward)>>;
};

template <template <class> class Sum, class First, class... Maps>
void define_row_sum(torch::Library& m) {
  const TensorsSchema<typename Sum<First>::term> s;
  const std::string setting = std::string("str parameterization=\"") + First::kName + "\"";
  define<typename ScaledRowSum<Sum, First, Maps...>::Op>(
      m, "(" + s.inputs + ", " + setting + ") -> Tensor",
      "(Tensor grad, " + s.inputs + ", str parameterization, " + s.wanted + ") -> (" + s.gradients +
          ")");
}

}  // namespace fastvae
