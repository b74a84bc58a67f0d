// How an op meets autograd, torch.func, forward-mode AD and autocast: one boxed kernel for each,
// for all ops. What they need to know of an op they read off its schemas once, in wire().
#include <deque>

#include <ATen/ExpandUtils.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include "binding.h"

namespace fastvae {
namespace {

using c10::IValue;
using c10::OperatorHandle;
using torch::autograd::variable_list;
using Settings = std::vector<IValue>;  // the arguments of an op that are no tensors
using Stack = torch::jit::Stack;

struct Op {
  std::string name;
  Keeps keeps;
  OperatorHandle forward, backward;
  std::optional<OperatorHandle> forward_keeping;
  size_t tensors, settings;  // arguments
  bool backward_takes_kept;

  int64_t index;  // in all_ops(): how an autograd node remembers its op
};

std::deque<Op>& all_ops() {
  static std::deque<Op> ops;
  return ops;
}

bool is_tensor(const c10::Argument& argument) {
  const c10::TypePtr& type = argument.type();
  const auto optional = type->cast<c10::OptionalType>();
  return (optional ? optional->getElementType() : type)->kind() == c10::TypeKind::TensorType;
}

size_t count_tensors(const OperatorHandle& op) {
  const auto& arguments = op.schema().arguments();
  return static_cast<size_t>(std::count_if(arguments.begin(), arguments.end(), is_tensor));
}

void push(Stack& stack, const Tensor& x) { stack.push_back(x.defined() ? IValue(x) : IValue()); }

// Calls an op with as many tensors as it takes, the missing ones absent.
variable_list call(const OperatorHandle& op, at::TensorList inputs, size_t tensors,
                   const Settings& settings) {
  Stack stack;
  stack.reserve(tensors + settings.size());
  for (size_t i = 0; i < tensors; ++i) push(stack, i < inputs.size() ? inputs[i] : Tensor());
  stack.insert(stack.end(), settings.begin(), settings.end());
  op.callBoxed(stack);
  variable_list outputs;
  outputs.reserve(stack.size());
  for (IValue& x : stack) outputs.push_back(x.isNone() ? Tensor() : std::move(x).toTensor());
  return outputs;
}

variable_list call_forward(const Op& op, at::TensorList inputs, const Settings& settings) {
  return call(op.forward, inputs, op.tensors, settings);
}

// The op's twin in plain PyTorch, fastvae.reference.<name>, differentiable in every way torch
// knows. It serves where a C++ autograd function cannot: under the transforms of torch.func, in
// forward-mode AD, and for gradients of gradients. Same noise from the same key.
variable_list call_reference(const Op& op, at::TensorList inputs, const Settings& settings) {
  const auto twin =
      c10::Dispatcher::singleton().findSchemaOrThrow(("fastvae_reference::" + op.name).c_str(), "");
  return call(twin, inputs, op.tensors, settings);
}

// d outputs / d inputs of the twin, itself differentiable. Undefined where not wanted.
variable_list reference_backward(const Op& op, const variable_list& grads,
                                 const variable_list& inputs, const Settings& settings,
                                 const std::vector<bool>& wanted) {
  const variable_list twins = call_reference(op, inputs, settings);
  variable_list outputs, output_grads, wanted_inputs, result(inputs.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i].defined()) continue;
    outputs.push_back(twins[i]);
    output_grads.push_back(grads[i]);
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (wanted[i]) wanted_inputs.push_back(inputs[i]);
  }
  const variable_list computed =
      torch::autograd::grad(outputs, wanted_inputs, output_grads, /*retain_graph=*/true,
                            /*create_graph=*/true, /*allow_unused=*/true);
  for (size_t i = 0, k = 0; i < inputs.size(); ++i) {
    if (wanted[i]) result[i] = computed[k++];
  }
  return result;
}

variable_list call_backward(const Op& op, const variable_list& grads, const variable_list& inputs,
                            const Tensor& kept, const Settings& settings,
                            const std::vector<bool>& wanted) {
  variable_list arguments = grads;
  arguments.insert(arguments.end(), inputs.begin(), inputs.end());
  arguments.resize(grads.size() + op.tensors);
  if (op.backward_takes_kept) arguments.push_back(kept);
  c10::List<bool> mask;
  for (size_t i = 0; i < op.backward.schema().returns().size(); ++i) {
    mask.push_back(i < wanted.size() && wanted[i]);
  }
  Settings rest = settings;
  rest.emplace_back(std::move(mask));
  variable_list result = call(op.backward, arguments, arguments.size(), rest);
  result.resize(inputs.size());
  return result;
}

bool keeps(const Op& op, const Tensor& input) {
  if (op.keeps.everywhere) return true;
  const bool single = input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble;
  return (op.keeps.derivative || op.keeps.sample) && input.device().is_cpu() && single;
}

struct Differentiable : torch::autograd::Function<Differentiable> {
  static variable_list forward(torch::autograd::AutogradContext* ctx, at::TensorList inputs,
                               const Settings& settings, const Op* op) {
    ctx->set_materialize_grads(false);  // an output that was not used has no gradient
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    variable_list saved = inputs.vec(), outputs;
    if (op->keeps.derivative && keeps(*op, inputs[0])) {
      outputs = call(*op->forward_keeping, inputs, op->tensors, settings);
      saved.push_back(std::move(outputs.back()));
      outputs.pop_back();
    } else {
      outputs = call_forward(*op, inputs, settings);
    }
    if (op->keeps.sample && keeps(*op, inputs[0])) remember(ctx, outputs[0]);
    ctx->saved_data["op"] = op->index;
    ctx->saved_data["inputs"] = static_cast<int64_t>(inputs.size());
    if (!settings.empty()) ctx->saved_data["settings"] = c10::ivalue::Tuple::create(settings);
    ctx->save_for_backward(std::move(saved));
    return outputs;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    const Op& op = all_ops()[static_cast<size_t>(ctx->saved_data["op"].toInt())];
    variable_list inputs = ctx->get_saved_variables();
    const auto count = static_cast<size_t>(ctx->saved_data["inputs"].toInt());
    Tensor kept = inputs.size() > count ? inputs.back() : recall(ctx);
    inputs.resize(count);
    const auto stored = ctx->saved_data.find("settings");
    const Settings settings =
        stored == ctx->saved_data.end() ? Settings() : stored->second.toTupleRef().elements().vec();
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& g) { return g.defined(); })) {
      return settled(variable_list(count));
    }
    std::vector<bool> wanted(count);
    for (size_t i = 0; i < count; ++i) wanted[i] = ctx->needs_input_grad(i);
    if (at::GradMode::is_enabled()) {
      return settled(reference_backward(op, grads, inputs, settings, wanted));
    }
    at::AutoDispatchBelowADInplaceOrView below_autograd;  // the backward op has no kernel above
    variable_list result = call_backward(op, grads, inputs, kept, settings, wanted);
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
  // Autograd wants one answer for each argument of forward: none for the settings and the op.
  static variable_list settled(variable_list grads) {
    grads.resize(grads.size() + 2);
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

// ---- what is registered -----------------------------------------------------------------------

// Whether a tensor is wrapped by torch.func (grad, vjp, jvp) or carries a forward-mode tangent.
bool is_transformed(const Tensor& x) {
  return x.key_set().has(c10::DispatchKey::FuncTorchGradWrapper) || x._fw_grad(0).defined();
}

// Under the Autograd key: out of the way at once when no gradient is asked for.
variable_list call_autograd(const Op& op, at::TensorList inputs, const Settings& settings) {
  while (!inputs.back().defined()) inputs = inputs.slice(0, inputs.size() - 1);
  bool requires_grad = false;
  for (const Tensor& input : inputs) {
    if (!input.defined()) continue;
    if (is_transformed(input)) return call_reference(op, inputs, settings);
    requires_grad |= input.requires_grad();
  }
  if (requires_grad && at::GradMode::is_enabled()) {
    return Differentiable::apply(inputs, settings, &op);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_forward(op, inputs, settings);
}

// Under autocast, inputs of several floating types meet in the widest: a float32 x and bfloat16
// logits score in float32. Types that already agree are left alone; row sums are float32 anyway.
variable_list promote(c10::DeviceType device, at::TensorList inputs) {
  at::ScalarType widest = at::autocast::get_lower_precision_fp_from_device_type(device);
  const Tensor* first = nullptr;
  bool agree = true;
  for (const Tensor& input : inputs) {
    if (!input.defined() || !input.is_floating_point()) continue;
    widest = c10::promoteTypes(widest, input.scalar_type());
    if (first == nullptr) first = &input;
    agree = agree && input.scalar_type() == first->scalar_type();
  }
  variable_list result;
  for (const Tensor& input : inputs) {
    const bool cast = !agree && input.defined() && input.is_floating_point();
    result.push_back(cast ? at::autocast::cached_cast(widest, input, device) : input);
  }
  return result;
}

template <c10::DeviceType Device>
variable_list call_autocast(const Op& op, at::TensorList inputs, const Settings& settings) {
  constexpr auto kKey =
      Device == c10::kCUDA ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKeySet(kKey)};
  return call_forward(op, promote(Device, inputs), settings);
}

// Takes the op's arguments off the stack and puts its outputs there.
template <variable_list (*kCall)(const Op&, at::TensorList, const Settings&)>
struct Boxed final : c10::OperatorKernel {
  explicit Boxed(const Op& op) : op_(op) {}

  void operator()(const OperatorHandle&, c10::DispatchKeySet, Stack* stack) {
    const auto first = stack->end() - static_cast<int64_t>(op_.tensors + op_.settings);
    c10::SmallVector<Tensor, 6> inputs;
    for (size_t i = 0; i < op_.tensors; ++i) {
      IValue& x = first[static_cast<int64_t>(i)];
      inputs.push_back(x.isNone() ? Tensor() : std::move(x).toTensor());
    }
    const Settings settings(first + static_cast<int64_t>(op_.tensors), stack->end());
    stack->erase(first, stack->end());
    for (Tensor& x : kCall(op_, inputs, settings)) stack->emplace_back(std::move(x));
  }

 private:
  const Op& op_;
};

}  // namespace

void wire(torch::Library& m, const std::string& name, Keeps keeps) {
  const auto find = [&](const char* suffix) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(("fastvae::" + name + suffix).c_str(),
                                                          "");
  };
  const OperatorHandle forward = find(""), backward = find("_backward");
  const size_t tensors = count_tensors(forward), outputs = forward.schema().returns().size();
  const Op& op = all_ops().emplace_back(
      Op{name, keeps, forward, backward,
         keeps.derivative ? std::optional(find("_keeping")) : std::nullopt, tensors,
         forward.schema().arguments().size() - tensors, count_tensors(backward) > outputs + tensors,
         static_cast<int64_t>(all_ops().size())});

  const auto add = [&](c10::DispatchKey key, auto kernel) {
    m.impl(name.c_str(),
           torch::dispatch(key, torch::CppFunction::makeFromBoxedFunctor(std::move(kernel))));
  };
  add(c10::DispatchKey::Autograd, std::make_unique<Boxed<call_autograd>>(op));
  // Under vmap the reference broadcasts; the fallback would call the kernel once per example.
  add(c10::DispatchKey::FuncTorchBatched, std::make_unique<Boxed<call_reference>>(op));
  add(c10::DispatchKey::AutocastCPU, std::make_unique<Boxed<call_autocast<c10::kCPU>>>(op));
  add(c10::DispatchKey::AutocastCUDA, std::make_unique<Boxed<call_autocast<c10::kCUDA>>>(op));
}

}  // namespace fastvae
