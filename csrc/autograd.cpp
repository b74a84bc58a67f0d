// How an op meets autograd, torch.func, forward-mode AD and autocast: one boxed kernel for each,
// for all ops. What they need to know of an op they read off its schemas once, in wire().
#include <deque>

#include <ATen/ExpandUtils.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "binding.h"

namespace fastvae {
namespace {

using c10::IValue;
using c10::OperatorHandle;
using torch::autograd::variable_list;
using Settings = at::ArrayRef<IValue>;  // the arguments of an op that are no tensors
using Stack = torch::jit::Stack;
using Inputs = c10::SmallVector<Tensor, 6>;

struct Op {
  std::string name;
  Keeps keeps;
  OperatorHandle forward, backward;
  std::optional<OperatorHandle> forward_keeping;
  size_t tensors, settings, outputs;  // arguments of forward, and what it returns
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

// The op's twin in plain PyTorch, fastvae.reference.<name>, differentiable in every way torch
// knows. It serves where a C++ autograd function cannot: under the transforms of torch.func, in
// forward-mode AD, and for gradients of gradients. Same noise from the same key.
OperatorHandle twin(const Op& op) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("fastvae_reference::" + op.name).c_str(),
                                                        "");
}

// ---- arguments on a stack -----------------------------------------------------------------------

void push(Stack& stack, const Tensor& x) { stack.push_back(x.defined() ? IValue(x) : IValue()); }

// All that an op takes beyond its gradients: tensors, the missing ones absent, and settings.
void push_arguments(Stack& stack, const Op& op, const variable_list& inputs, Settings settings,
                    const Tensor* kept = nullptr) {
  for (size_t i = 0; i < op.tensors; ++i) push(stack, i < inputs.size() ? inputs[i] : Tensor());
  if (kept != nullptr) push(stack, *kept);
  stack.insert(stack.end(), settings.begin(), settings.end());
}

Tensor tensor_of(const IValue& x) { return x.isNone() ? Tensor() : x.toTensor(); }

// The tensors that an op was given: what is absent at their end is left out.
Inputs inputs_of(const Op& op, const Stack& stack) {
  Inputs inputs;
  const size_t first = stack.size() - op.tensors - op.settings;
  for (size_t i = 0; i < op.tensors; ++i) inputs.push_back(tensor_of(stack[first + i]));
  while (!inputs.back().defined()) inputs.pop_back();
  return inputs;
}

Settings settings_of(const Op& op, const Stack& stack) {
  return Settings(stack).slice(stack.size() - op.settings);
}

variable_list outputs_of(const Stack& stack) {
  variable_list outputs;
  outputs.reserve(stack.size());
  for (const IValue& x : stack) outputs.push_back(tensor_of(x));
  return outputs;
}

// ---- gradients ----------------------------------------------------------------------------------

// d outputs / d inputs of the twin, itself differentiable. Undefined where not wanted. Of aliases
// of the inputs: where one is made of another, or given twice, its own path alone is this node's.
variable_list reference_backward(const Op& op, const variable_list& grads, variable_list inputs,
                                 Settings settings, const std::vector<bool>& wanted) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (wanted[i]) inputs[i] = inputs[i].view_as(inputs[i]);
  }
  Stack stack;
  push_arguments(stack, op, inputs, settings);
  twin(op).callBoxed(stack);
  const variable_list twins = outputs_of(stack);
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
                            const Tensor& kept, Settings settings,
                            const std::vector<bool>& wanted) {
  Stack stack;
  stack.reserve(grads.size() + op.tensors + op.settings + 2);
  for (const Tensor& grad : grads) push(stack, grad);
  push_arguments(stack, op, inputs, settings, op.backward_takes_kept ? &kept : nullptr);
  c10::List<bool> mask;
  for (size_t i = 0; i < op.backward.schema().returns().size(); ++i) {
    mask.push_back(i < wanted.size() && wanted[i]);
  }
  stack.emplace_back(std::move(mask));
  op.backward.callBoxed(stack);
  variable_list result = outputs_of(stack);
  result.resize(inputs.size());
  return result;
}

// Whether training keeps what the op can keep. A derivative only as far as it stays in the cache:
// beyond, to write and read it takes longer than the exponential that it saves.
bool keeps(const Op& op, const Inputs& inputs) {
  if (op.keeps.everywhere) return true;
  const at::ScalarType type = inputs[0].scalar_type();
  if (!inputs[0].device().is_cpu() || (type != at::kFloat && type != at::kDouble)) return false;
  constexpr int64_t kInCache = int64_t{1} << 19;  // elements
  const bool is_small = inputs.back().sym_numel().maybe_as_int().value_or(0) <= kInCache;
  return op.keeps.sample || (op.keeps.derivative && is_small);
}

// A pointer to a new node: since torch 2.13 autograd counts references in the node itself.
template <class Pointer, class Node>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<Node>(new Node, [](Node* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Node>();
  }
}

// The node of a call in autograd's graph. Function::apply, which torch offers to make one, keeps
// the shapes of all inputs and outputs besides, and looks for outputs that are views of inputs:
// half of what a small call costs. So the node is put together here.
struct Differentiable : torch::autograd::Function<Differentiable> {
  using Node = torch::autograd::CppNode<Differentiable>;

  // Of the op's arguments on the stack makes its outputs there.
  static void apply(const Op& op, const Inputs& inputs, Stack& stack) {
    const auto node = make_node<decltype(torch::autograd::Edge::function), Node>();
    node->is_variable_input_.assign(inputs.size(), true);
    node->set_ctx_grad_fn(node);
    node->set_next_edges(torch::autograd::collect_next_edges(at::TensorList(inputs)));
    forward(&node->ctx_, op, inputs, stack);
    for (const IValue& output : torch::jit::last(stack, op.outputs)) {
      torch::autograd::set_history(output.toTensor(), node);
    }
    node->save_variables_to_ctx();
  }

  static void forward(torch::autograd::AutogradContext* ctx, const Op& op, const Inputs& inputs,
                      Stack& stack) {
    ctx->set_materialize_grads(false);  // an output that was not used has no gradient
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const bool is_kept = keeps(op, inputs), is_derivative = is_kept && op.keeps.derivative;
    std::vector<IValue> saved{op.index, static_cast<int64_t>(inputs.size()), int64_t{0}};
    const Settings settings = settings_of(op, stack);
    saved.insert(saved.end(), settings.begin(), settings.end());
    variable_list tensors(inputs.begin(), inputs.end());

    (is_derivative ? *op.forward_keeping : op.forward).callBoxed(&stack);
    if (is_derivative) tensors.push_back(torch::jit::pop(stack).toTensor());
    if (is_kept && op.keeps.sample) {
      saved[kVersion] = remember(ctx, torch::jit::peek(stack, 0, op.outputs).toTensor());
    }
    ctx->saved_data["call"] = c10::ivalue::Tuple::create(std::move(saved));
    ctx->save_for_backward(std::move(tensors));
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    const IValue call = ctx->saved_data["call"];
    const Settings saved = call.toTupleRef().elements();
    const Op& op = all_ops()[static_cast<size_t>(saved[kOp].toInt())];
    const Settings settings = saved.slice(kSettings);
    variable_list inputs = ctx->get_saved_variables();
    const auto count = static_cast<size_t>(saved[kInputs].toInt());
    Tensor kept = inputs.size() > count ? inputs.back() : recall(ctx, saved[kVersion].toInt());
    inputs.resize(count);
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& g) { return g.defined(); })) {
      return variable_list(count);
    }
    std::vector<bool> wanted(count);
    for (size_t i = 0; i < count; ++i) wanted[i] = ctx->needs_input_grad(i);
    if (at::GradMode::is_enabled()) {
      return reference_backward(op, grads, inputs, settings, wanted);
    }
    at::AutoDispatchBelowADInplaceOrView below_autograd;  // the backward op has no kernel above
    variable_list result = call_backward(op, grads, inputs, kept, settings, wanted);
    for (size_t i = 0; i < count; ++i) {
      if (!wanted[i]) {
        result[i] = Tensor();
        continue;
      }
      if (!result[i].defined()) result[i] = grads[0];  // which may be absent itself
      if (result[i].defined() &&
          result[i].sym_sizes() != inputs[i].sym_sizes()) {  // sum over what was broadcast
        result[i] = at::sum_to(result[i], inputs[i].sym_sizes());
      }
    }
    return result;
  }

 private:
  enum { kOp, kInputs, kVersion, kSettings };  // what is saved of a call

  // A sample that was changed in place since is forgotten, and backward draws its noise again: in
  // eager PyTorch such a change is legal. Not while tracing, where a version says nothing.
  static int64_t remember(torch::autograd::AutogradContext* ctx, const Tensor& sample) {
    if (at::isTensorSubclassLike(sample)) return 0;
    ctx->saved_data["sample"] = sample.tensor_data();  // no reference cycle, the same version
    return static_cast<int64_t>(sample._version());
  }
  static Tensor recall(torch::autograd::AutogradContext* ctx, int64_t version) {
    const auto sample = ctx->saved_data.find("sample");
    if (sample == ctx->saved_data.end()) return Tensor();
    const Tensor& z = sample->second.toTensor();
    return z._version() == version ? z : Tensor();
  }
};

// ---- what is registered -----------------------------------------------------------------------

// Whether a tensor is wrapped by torch.func (grad, vjp, jvp) or carries a forward-mode tangent.
bool is_transformed(const Tensor& x) {
  return x.key_set().has(c10::DispatchKey::FuncTorchGradWrapper) || x._fw_grad(0).defined();
}

// What the op has to say against its arguments, which its twin does not check: said by the op, of
// tensors of the same shapes without memory, whatever transforms are in force.
void check(const Op& op, const Stack& stack) {
  using c10::DispatchKey;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_transforms{c10::DispatchKeySet{
      DispatchKey::FuncTorchDynamicLayerFrontMode, DispatchKey::FuncTorchDynamicLayerBackMode,
      DispatchKey::FuncTorchVmapMode, DispatchKey::FuncTorchBatched,
      DispatchKey::FuncTorchGradWrapper}};
  const auto arguments = static_cast<std::ptrdiff_t>(op.tensors + op.settings);
  Stack shapes(stack.end() - arguments, stack.end());
  for (size_t i = 0; i < op.tensors; ++i) {
    if (shapes[i].isNone()) continue;
    const Tensor& x = shapes[i].toTensor();
    shapes[i] = at::empty_symint(x.sym_sizes(), x.options().device(at::kMeta));
  }
  op.forward.callBoxed(shapes);
}

void call_twin(const Op& op, Stack& stack) {
  check(op, stack);
  twin(op).callBoxed(stack);
}

// Under the Autograd key: out of the way at once when no gradient is asked for.
void call_autograd(const Op& op, Stack& stack) {
  const Inputs inputs = inputs_of(op, stack);
  bool requires_grad = false;
  for (const Tensor& input : inputs) {
    if (!input.defined()) continue;
    if (is_transformed(input)) return call_twin(op, stack);
    requires_grad |= input.requires_grad();
  }
  if (requires_grad && at::GradMode::is_enabled()) return Differentiable::apply(op, inputs, stack);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  op.forward.callBoxed(stack);
}

// Under vmap the twin broadcasts; torch's fallback would call the kernel once per example.
void call_batched(const Op& op, Stack& stack) { call_twin(op, stack); }

// Under autocast, inputs of several floating types meet in the widest: a float32 x and bfloat16
// logits score in float32. Types that already agree are left alone; row sums are float32 anyway.
template <c10::DeviceType kDevice>
void call_autocast(const Op& op, Stack& stack) {
  constexpr auto kKey =
      kDevice == c10::kCUDA ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKeySet(kKey)};
  at::ScalarType widest = at::autocast::get_lower_precision_fp_from_device_type(kDevice);
  const size_t first = stack.size() - op.tensors - op.settings;
  c10::SmallVector<size_t, 6> floating;
  for (size_t i = first; i < first + op.tensors; ++i) {
    if (stack[i].isNone() || !stack[i].toTensor().is_floating_point()) continue;
    floating.push_back(i);
    widest = c10::promoteTypes(widest, stack[i].toTensor().scalar_type());
  }
  const bool agree = std::all_of(floating.begin(), floating.end(), [&](size_t i) {
    return stack[i].toTensor().scalar_type() == stack[floating[0]].toTensor().scalar_type();
  });
  for (size_t i = agree ? floating.size() : 0; i < floating.size(); ++i) {
    IValue& x = stack[floating[i]];
    x = at::autocast::cached_cast(widest, x.toTensor(), kDevice);
  }
  op.forward.callBoxed(stack);
}

template <void (*kCall)(const Op&, Stack&)>
struct Boxed final : c10::OperatorKernel {
  explicit Boxed(const Op& op) : op_(op) {}
  void operator()(const OperatorHandle&, c10::DispatchKeySet, Stack* stack) { kCall(op_, *stack); }

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
         forward.schema().arguments().size() - tensors, outputs,
         count_tensors(backward) > outputs + tensors, static_cast<int64_t>(all_ops().size())});

  const auto add = [&](c10::DispatchKey key, auto kernel) {
    m.impl(name.c_str(),
           torch::dispatch(key, torch::CppFunction::makeFromBoxedFunctor(std::move(kernel))));
  };
  add(c10::DispatchKey::Autograd, std::make_unique<Boxed<call_autograd>>(op));
  add(c10::DispatchKey::FuncTorchBatched, std::make_unique<Boxed<call_batched>>(op));
  add(c10::DispatchKey::AutocastCPU, std::make_unique<Boxed<call_autocast<c10::kCPU>>>(op));
  add(c10::DispatchKey::AutocastCUDA, std::make_unique<Boxed<call_autocast<c10::kCUDA>>>(op));
}

}  // namespace fastvae
