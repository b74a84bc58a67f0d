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

#include <ATen/Parallel.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "rows.h"

#ifdef FASTVAE_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fastvae {

using at::Tensor;
using torch::autograd::variable_list;

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
// What a row sum of the input comes in: half types sum in, and return, float32.
at::TensorOptions row_options(const Tensor& input);
// A new tensor, of huge pages if it is large.
Tensor allocate(c10::SymIntArrayRef shape, at::TensorOptions options);

// One call of one op: checks its inputs, broadcasts them to [..., columns], runs formulas over
// them. Nothing here depends on concrete sizes until the kernel is launched, so a dynamic shape
// stays one.
class RowOp {
 public:
  // Throws unless the inputs are floating, of one dtype, on one device, and broadcast together.
  RowOp(const char* name, std::initializer_list<Argument> inputs);

  // A row input (the gradient of a row sum), broadcast to one value a row.
  RowOp& row_input(const char* name, const Tensor& value);
  RowOp& key(const Tensor& key);

  template <class F>
  struct Result {
    std::array<Tensor, F::shape.outputs> outputs;
    Tensor row_sum;
  };
  // Outputs that are not wanted come back undefined, and are not written.
  template <class F>
  Result<F> run(std::array<bool, F::shape.outputs> wanted);
  template <class F>
  Result<F> run() {
    std::array<bool, F::shape.outputs> all;
    all.fill(true);
    return run<F>(all);
  }

 protected:         // what an op with an engine of its own shares (bound.cpp)
  Sweep lay_out();  // of the inputs; sizes are concrete from here on

  const char* name_;
  c10::SmallVector<Tensor, kMaxInputs> inputs_;
  c10::SymDimVector shape_;
  Tensor row_input_, key_;

 private:
  template <class F>
  void launch(Sweep& sweep) const;
};

template <class F>
RowOp::Result<F> RowOp::run(std::array<bool, F::shape.outputs> wanted) {
  static_assert(F::shape.inputs <= kMaxInputs && F::shape.outputs <= kMaxOutputs);
  Result<F> result;
  for (int k = 0; k < F::shape.outputs; ++k) {
    if (wanted[k]) result.outputs[k] = allocate(shape_, inputs_[0].options());
  }
  if constexpr (F::shape.row_sums > 0) {
    result.row_sum =
        allocate(c10::SymIntArrayRef(shape_).slice(0, shape_.size() - 1), row_options(inputs_[0]));
  }
  if (inputs_[0].is_meta()) return result;

  Sweep sweep = lay_out();
  for (int k = 0; k < F::shape.outputs; ++k) {
    if (wanted[k]) sweep.outputs[k] = result.outputs[k].mutable_data_ptr();
  }
  if constexpr (F::shape.row_sums > 0) sweep.row_sum = result.row_sum.mutable_data_ptr();
  if (sweep.rows() > 0) launch<F>(sweep);
  return result;
}

template <class F>
void RowOp::launch(Sweep& sweep) const {
  // Rows too long for one worker are summed in segments, whose sums are added afterwards.
  const bool is_cpu = inputs_[0].is_cpu();
  TORCH_INTERNAL_ASSERT(is_cpu || !F::shape.cpu_only);
  const int64_t segments =
      is_cpu ? cpu::segments_per_row(sweep.columns) : cuda::segments_per_row(sweep.columns);
  Tensor partial_sums;
  if (F::shape.row_sums > 0 && segments > 1) {
    partial_sums = at::empty({sweep.rows() * segments}, inputs_[0].options().dtype(at::kDouble));
    sweep.partial_sums = partial_sums.mutable_data_ptr<double>();
  }
#ifdef FASTVAE_CUDA
  if constexpr (!F::shape.cpu_only)
    if (!is_cpu) {
      const c10::cuda::CUDAGuard guard(inputs_[0].device());
      const char* error = cuda::sweep_rows<F>(sweep, c10::cuda::getCurrentCUDAStream().stream());
      TORCH_CHECK(error == nullptr, "fastvae::", name_, ": CUDA launch failed: ", error);
      return;
    }
#endif
  // Below this many elements a second thread costs more than it brings.
  constexpr int64_t kGrain = F::shape.noise ? 4096 : 16384;
  const int64_t unit_size = std::max<int64_t>(1, std::min(sweep.columns, cpu::kSegment));
  at::parallel_for(0, sweep.rows() * segments, std::max<int64_t>(1, kGrain / unit_size),
                   [&](int64_t begin, int64_t end) { cpu::sweep_units<F>(sweep, begin, end); });
  if (sweep.partial_sums != nullptr) cpu::add_segments(sweep);
}

// d loss / d input, one of a derivative that forward kept: grad, of the row's sum, times it.
struct ChainRule : Formula<Shape{.inputs = 1, .row_inputs = 1, .outputs = 1, .cpu_only = true}> {
  template <class T>
  static FASTVAE_HD Values<T, 1> eval(T derivative, T grad) {
    return {{grad * derivative}};
  }
};
Tensor chain_rule(const char* name, const Tensor& grad, const Tensor& derivative);

// ---- autograd ---------------------------------------------------------------------------------
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
// On a CPU arithmetic is dear, so there an op in float32 or float64 may keep something for backward
// (see keeps()), which then takes it as an optional tensor after the inputs. Either
//
//     static constexpr bool kKeepsDerivative = true;
//     static std::tuple<Tensor, Tensor> forward_keeping(x, mu, log_var);
//
// takes the place of forward in training, with one output more, which is kept (everywhere and in
// every dtype if kKeepsEverywhere is true); or
//
//     static constexpr bool kKeepsSample = true;
//
// keeps the first output, as long as nobody changes it in place: it is the user's own.

// The arguments of an op that are no tensors.
using Settings = std::vector<c10::IValue>;

template <class Arg>
inline constexpr bool kIsTensor = std::is_same_v<std::decay_t<Arg>, Tensor> ||
                                  std::is_same_v<std::decay_t<Arg>, std::optional<Tensor>>;

// Between typed signatures and lists of tensors, in which an absent tensor is undefined or, at the
// end, left out; and of settings.
template <class Signature>
struct Unpack;
template <class R, class... Args>
struct Unpack<R(Args...)> {
  using Typed = c10::TypedOperatorHandle<R(Args...)>;
  using Types = std::tuple<Args...>;
  static constexpr size_t kTensors = (size_t{0} + ... + (kIsTensor<Args> ? 1 : 0));

  template <class Arg>
  static decltype(auto) as(const Tensor& x) {
    if constexpr (std::is_same_v<std::decay_t<Arg>, Tensor>) {
      return (x);
    } else {
      return x.defined() ? std::optional<Tensor>(x) : std::nullopt;
    }
  }
  // As many tensors and settings as the signature has, and the rest.
  template <class... Rest>
  static variable_list call(const Typed& op, at::TensorList in, const Settings& settings,
                            const Rest&... rest) {
    constexpr size_t kSettings = sizeof...(Args) - kTensors - sizeof...(Rest);
    return call(op, in, settings, std::make_index_sequence<kTensors>{},
                std::make_index_sequence<kSettings>{}, rest...);
  }
  template <size_t... I, size_t... S, class... Rest>
  static variable_list call(const Typed& op, at::TensorList in, const Settings& settings,
                            std::index_sequence<I...>, std::index_sequence<S...>,
                            const Rest&... rest) {
    return list(op.call(
        as<std::tuple_element_t<I, Types>>(in[I])...,
        settings[S].template to<std::decay_t<std::tuple_element_t<kTensors + S, Types>>>()...,
        rest...));
  }
  static variable_list list(const Tensor& x) { return {x}; }
  template <class... Ts>
  static variable_list list(const std::tuple<Ts...>& xs) {
    return std::apply([](const auto&... x) { return variable_list{x...}; }, xs);
  }
  static R result(variable_list outputs) {
    if constexpr (std::is_same_v<R, Tensor>) {
      return std::move(outputs[0]);
    } else {
      return {std::move(outputs[0]), std::move(outputs[1])};
    }
  }
  template <class Arg>
  static void pack(const Arg& x, Tensor*& input, Settings& settings) {
    if constexpr (std::is_same_v<Arg, Tensor>) {
      *input++ = x;
    } else if constexpr (kIsTensor<Arg>) {
      *input++ = x.value_or(Tensor());
    } else if constexpr (std::is_same_v<Arg, c10::string_view>) {
      settings.emplace_back(std::string(x));
    } else {
      settings.emplace_back(x);
    }
  }
  // The typed function that packs its arguments, calls Function, and unpacks the result.
  template <variable_list (*Function)(at::TensorList, const Settings&)>
  static R adapt(Args... args) {
    std::array<Tensor, kTensors> inputs;
    Tensor* input = inputs.data();
    Settings settings;
    (pack<std::decay_t<Args>>(args, input, settings), ...);
    return result(Function(inputs, settings));
  }
};

template <class Op>
concept KeepsDerivative = requires { requires Op::kKeepsDerivative; };
template <class Op>
concept KeepsSample = requires { requires Op::kKeepsSample; };

template <class Op>
concept KeepsEverywhere = requires { requires Op::kKeepsEverywhere; };

template <class Op>
bool keeps(const Tensor& input) {
  if constexpr (KeepsEverywhere<Op>) return true;
  const bool single = input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble;
  return (KeepsDerivative<Op> || KeepsSample<Op>) && input.device().is_cpu() && single;
}

template <class Op>
struct Calls {
  using Forward = std::remove_pointer_t<decltype(&Op::forward)>;
  using Backward = std::remove_pointer_t<decltype(&Op::backward)>;

  template <class Signature>
  static const auto& handle(const char* suffix) {
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow((std::string("fastvae::") + Op::kName + suffix).c_str(), "")
            .template typed<Signature>();
    return op;
  }

  static variable_list forward(at::TensorList inputs, const Settings& settings) {
    return call<Forward>("", inputs, settings);
  }
  static variable_list forward_keeping(at::TensorList inputs, const Settings& settings)
    requires KeepsDerivative<Op>
  {
    return call<std::remove_pointer_t<decltype(&Op::forward_keeping)>>("_keeping", inputs,
                                                                       settings);
  }

  static variable_list backward(const variable_list& grads, const variable_list& inputs,
                                const Tensor& kept, const Settings& settings,
                                const std::vector<bool>& wanted) {
    using Types = typename Unpack<Backward>::Types;
    constexpr size_t kTensors = Unpack<Backward>::kTensors;
    std::decay_t<std::tuple_element_t<std::tuple_size_v<Types> - 1, Types>> mask;
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = i < wanted.size() && wanted[i];
    std::array<Tensor, kTensors> arguments;
    std::copy(grads.begin(), grads.end(), arguments.begin());
    std::copy(inputs.begin(), inputs.end(), arguments.begin() + grads.size());
    if (kTensors > grads.size() + kInputs) arguments[kTensors - 1] = kept;
    variable_list result =
        Unpack<Backward>::call(handle<Backward>("_backward"), arguments, settings, mask);
    result.resize(inputs.size());
    return result;
  }

 private:
  static constexpr size_t kInputs = Unpack<Forward>::kTensors;

  template <class Signature>
  static variable_list call(const char* suffix, at::TensorList inputs, const Settings& settings) {
    std::array<Tensor, kInputs> padded;
    std::copy(inputs.begin(), inputs.end(), padded.begin());
    return Unpack<Signature>::call(handle<Signature>(suffix), padded, settings);
  }
};

// The op's twin in plain PyTorch, fastvae.reference.<name>, differentiable in every way torch
// knows. It serves where a C++ autograd function cannot: under the transforms of torch.func, in
// forward-mode AD, and for gradients of gradients. Same noise from the same key.
variable_list call_reference(const char* name, at::TensorList inputs, const Settings& settings);

// d outputs / d inputs of the twin, itself differentiable. Undefined where not wanted.
variable_list reference_backward(const char* name, const variable_list& grads,
                                 const variable_list& inputs, const Settings& settings,
                                 const std::vector<bool>& wanted);

// Whether a tensor is wrapped by torch.func (grad, vjp, jvp) or carries a forward-mode tangent.
bool is_transformed(const Tensor& x);

template <class Op>
struct Differentiable : torch::autograd::Function<Differentiable<Op>> {
  static variable_list forward(torch::autograd::AutogradContext* ctx, at::TensorList inputs,
                               const Settings& settings) {
    ctx->set_materialize_grads(false);  // an output that was not used has no gradient
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    variable_list saved = inputs.vec(), outputs;
    if constexpr (KeepsDerivative<Op>) {
      if (keeps<Op>(inputs[0])) {
        outputs = Calls<Op>::forward_keeping(inputs, settings);
        saved.push_back(std::move(outputs.back()));
        outputs.pop_back();
      }
    }
    if (outputs.empty()) outputs = Calls<Op>::forward(inputs, settings);
    if constexpr (KeepsSample<Op>) {
      if (keeps<Op>(inputs[0])) remember(ctx, outputs[0]);
    }
    ctx->saved_data["inputs"] = static_cast<int64_t>(inputs.size());
    if (!settings.empty()) ctx->saved_data["settings"] = c10::ivalue::Tuple::create(settings);
    ctx->save_for_backward(std::move(saved));
    return outputs;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    variable_list inputs = ctx->get_saved_variables();
    const auto count = static_cast<size_t>(ctx->saved_data["inputs"].toInt());
    Tensor kept = inputs.size() > count ? inputs.back() : recall(ctx);
    inputs.resize(count);
    const auto stored = ctx->saved_data.find("settings");
    const Settings settings =
        stored == ctx->saved_data.end() ? Settings() : stored->second.toTupleRef().elements().vec();
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& g) { return g.defined(); })) {
      return variable_list(count + 1);
    }
    std::vector<bool> wanted(count);
    for (size_t i = 0; i < count; ++i) {
      wanted[i] = ctx->needs_input_grad(i);
    }
    if (at::GradMode::is_enabled()) {
      return settled(reference_backward(Op::kName, grads, inputs, settings, wanted));
    }
    at::AutoDispatchBelowADInplaceOrView below_autograd;  // the backward op has no kernel above
    variable_list result = Calls<Op>::backward(grads, inputs, kept, settings, wanted);
    for (size_t i = 0; i < count; ++i) {
      if (!wanted[i]) {
        result[i] = Tensor();
        continue;
      }
      if (!result[i].defined()) result[i] = grads[0];
      if (result[i].sym_sizes() != inputs[i].sym_sizes()) {  // sum over what was broadcast
        result[i] = at::sum_to(result[i], inputs[i].sym_sizes());
      }
    }
    return settled(std::move(result));
  }

 private:
  // Autograd wants one answer for each argument of forward: none for the settings.
  static variable_list settled(variable_list grads) {
    grads.emplace_back();
    return grads;
  }
  // A sample that was changed in place since is forgotten, and backward draws its noise again: in
  // eager PyTorch such a change is legal. Not while tracing, where a version says nothing.
  static void remember(torch::autograd::AutogradContext* ctx, const Tensor& sample) {
    if (at::isTensorSubclassLike(sample)) return;
    ctx->saved_data["sample"] = sample.tensor_data();  // no reference cycle, the same version
    ctx->saved_data["version"] = static_cast<int64_t>(sample._version());
  }
  static Tensor recall(torch::autograd::AutogradContext* ctx) {
    const auto sample = ctx->saved_data.find("sample");
    if (sample == ctx->saved_data.end()) return Tensor();
    const Tensor& z = sample->second.toTensor();
    const bool unchanged = z._version() == ctx->saved_data["version"].toInt();
    return unchanged ? z : Tensor();
  }
};

// The kernel under the Autograd key: out of the way at once when no gradient is asked for.
template <class Op>
variable_list call_autograd(at::TensorList inputs, const Settings& settings) {
  while (!inputs.back().defined()) inputs = inputs.slice(0, inputs.size() - 1);
  bool requires_grad = false;
  for (const Tensor& input : inputs) {
    if (is_transformed(input)) return call_reference(Op::kName, inputs, settings);
    requires_grad |= input.requires_grad();
  }
  if (requires_grad && at::GradMode::is_enabled()) {
    return Differentiable<Op>::apply(inputs, settings);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return Calls<Op>::forward(inputs, settings);
}

// Under vmap the reference broadcasts; the fallback would call the kernel once per example.
template <class Op>
variable_list call_batched(at::TensorList inputs, const Settings& settings) {
  return call_reference(Op::kName, inputs, settings);
}

// Under autocast, inputs of several floating types meet in the widest: a float32 x and bfloat16
// logits score in float32. Types that already agree are left alone; row sums are float32 anyway.
variable_list promote(c10::DeviceType device, at::TensorList inputs);

template <class Op, c10::DeviceType Device>
variable_list call_autocast(at::TensorList inputs, const Settings& settings) {
  constexpr auto kKey =
      Device == c10::kCUDA ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKeySet(kKey)};
  return Calls<Op>::forward(promote(Device, inputs), settings);
}

// Registers an op from its arguments' schema, "(Tensor x, Tensor mu) -> Tensor", its backward's,
// and that of forward_keeping if it has one.
template <class Op>
void define(torch::Library& m, const std::string& schema, const std::string& backward_schema,
            const std::string& keeping_schema = "") {
  const std::string name = Op::kName;
  using Adapt = Unpack<typename Calls<Op>::Forward>;
  const auto add_bodies = [&](const std::string& op, const std::string& arguments, auto body) {
    m.def((op + arguments).c_str(), {at::Tag::pt2_compliant_tag});
    for (const auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::Meta}) {
      m.impl(op.c_str(), torch::dispatch(key, body));
    }
  };
  add_bodies(name, schema, TORCH_FN((Op::forward)));
  add_bodies(name + "_backward", backward_schema, TORCH_FN((Op::backward)));
  if constexpr (KeepsDerivative<Op>) {
    add_bodies(name + "_keeping", keeping_schema, TORCH_FN((Op::forward_keeping)));
  }
  const auto add = [&](c10::DispatchKey key, auto* function) {
    m.impl(name.c_str(), torch::dispatch(key, function));
  };
  add(c10::DispatchKey::Autograd, &Adapt::template adapt<&call_autograd<Op>>);
  add(c10::DispatchKey::FuncTorchBatched, &Adapt::template adapt<&call_batched<Op>>);
  add(c10::DispatchKey::AutocastCPU, &Adapt::template adapt<&call_autocast<Op, c10::kCPU>>);
  add(c10::DispatchKey::AutocastCUDA, &Adapt::template adapt<&call_autocast<Op, c10::kCUDA>>);
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
  static constexpr bool kKeepsDerivative = Term::kKeeps;

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

template <class Sum>
void define_row_sum(torch::Library& m) {
  using Term = typename Sum::term;
  std::string inputs, gradients;
  for (const char* name : Term::kArguments) {
    inputs += std::string(inputs.empty() ? "" : ", ") + "Tensor " + name;
    gradients += gradients.empty() ? "Tensor" : ", Tensor";
  }
  define<RowSumOp<Sum>>(m, "(" + inputs + ") -> Tensor",
                        "(Tensor grad, " + inputs + ", Tensor? kept, bool[" +
                            std::to_string(Sum::kInputs) + "] wanted) -> (" + gradients + ")",
                        "(" + inputs + ") -> (Tensor, Tensor)");
}

}  // namespace fastvae
