#include "binding.h"

#include <ATen/ExpandUtils.h>
#include <torch/csrc/autograd/autograd.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastvae {

namespace {

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat16;
  }
}

bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

}  // namespace

void check_input(const char* op, const Argument& argument, const Argument& first) {
  const Tensor& x = argument.tensor;
  TORCH_CHECK(x.defined(), "fastvae::", op, ": ", argument.name, " must be a tensor, got None");
  TORCH_CHECK_TYPE(is_supported(x.scalar_type()), "fastvae::", op, ": ", argument.name,
                   " must be float32, float64, bfloat16 or float16, got ", x.scalar_type());
  TORCH_CHECK_TYPE(x.scalar_type() == first.tensor.scalar_type(), "fastvae::", op, ": ",
                   argument.name, " must have the dtype of ", first.name, ", got ", x.scalar_type(),
                   " and ", first.tensor.scalar_type());
  TORCH_CHECK(x.device() == first.tensor.device(), "fastvae::", op, ": ", argument.name,
              " must be on the device of ", first.name, ", got ", x.device(), " and ",
              first.tensor.device());
#ifndef FASTVAE_CUDA
  TORCH_CHECK(!x.is_cuda(), "fastvae::", op, ": ", argument.name, " must be on cpu, got ",
              x.device(), ": fastvae was built without CUDA; rebuild with FASTVAE_CUDA=ON");
#endif
  TORCH_CHECK(x.dim() > 0, "fastvae::", op, ": ", argument.name,
              " must have at least one dimension, got a 0-dim tensor");
}

void check_row_values(const char* op, const Argument& values, c10::SymIntArrayRef rows,
                      const Tensor& input) {
  const Tensor& x = values.tensor;
  const auto type = row_options(input).dtype().toScalarType();
  TORCH_CHECK_VALUE(x.sym_sizes() == rows, "fastvae::", op, ": ", values.name,
                    " must have one value per row, got ", x.sym_sizes(), " and ", rows);
  TORCH_CHECK_TYPE(x.scalar_type() == type, "fastvae::", op, ": ", values.name, " must be ", type,
                   ", got ", x.scalar_type());
  TORCH_CHECK(x.device() == input.device(), "fastvae::", op, ": ", values.name,
              " must be on the device of the inputs, got ", x.device(), " and ", input.device());
}

RowOp::RowOp(const char* name, std::initializer_list<Argument> inputs) : name_(name) {
  const Argument& first = *inputs.begin();
  for (const Argument& argument : inputs) {
    check_input(name, argument, first);
    const Tensor& x = argument.tensor;
    if (inputs_.empty()) {
      shape_.assign(x.sym_sizes().begin(), x.sym_sizes().end());
    } else if (x.sym_sizes() != c10::SymIntArrayRef(shape_)) {
      try {
        shape_ = at::infer_size_symdimvector(shape_, x.sym_sizes());
      } catch (const c10::Error&) {
        TORCH_CHECK_VALUE(false, "fastvae::", name, ": ", argument.name, " must broadcast with ",
                          first.name, ", got ", x.sym_sizes(), " and ", first.tensor.sym_sizes());
      }
    }
    inputs_.push_back(x);
  }
}

RowOp& RowOp::row_input(const char* name, const Tensor& value) {
  check_row_values(name_, {name, value}, {shape_.data(), shape_.size() - 1}, inputs_[0]);
  row_input_ = value;
  return *this;
}

RowOp& RowOp::key(const Tensor& key) {
  TORCH_CHECK_TYPE(key.scalar_type() == at::kLong, "fastvae::", name_,
                   ": key must be int64 (seed, offset), got ", key.scalar_type());
  TORCH_CHECK_VALUE(key.dim() == 1 && key.sym_size(0) == 2, "fastvae::", name_,
                    ": key must have shape [2] (seed, offset), got ", key.sym_sizes());
  TORCH_CHECK(key.device() == inputs_[0].device(), "fastvae::", name_,
              ": key must be on the device of the inputs, got ", key.device(), " and ",
              inputs_[0].device());
  key_ = key;
  return *this;
}

Tensor allocate(c10::SymIntArrayRef shape, at::TensorOptions options) {
  Tensor x = at::empty_symint(shape, options);
#ifdef MADV_HUGEPAGE
  // malloc maps blocks this large anew for many a call, and faults them in page by page: up to 25
  // ms for 64 MB where the kernel itself takes 15. Huge pages make that 32 faults, and spare the
  // kernel a third of its time where the pages are there but too many for the TLB.
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20, kLarge = uintptr_t{8} << 20;
  if (x.is_cpu() && x.nbytes() >= kLarge) {
    const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr()), end = begin + x.nbytes();
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(first), (end - first) / kHugePage * kHugePage, MADV_HUGEPAGE);
  }
#endif
  return x;
}

at::TensorOptions row_options(const Tensor& input) {
  const bool is_double = input.scalar_type() == at::kDouble;
  return input.options().dtype(is_double ? at::kDouble : at::kFloat);
}

Sweep RowOp::lay_out() {
  struct Group {  // adjacent leading dimensions that every input walks as one
    int64_t size;
    std::array<int64_t, kMaxInputs> strides;
  };
  c10::SmallVector<int64_t, 6> shape;
  for (const c10::SymInt& size : shape_) shape.push_back(size.guard_int(__FILE__, __LINE__));
  const auto ndim = static_cast<int64_t>(shape.size());

  // The stride of an input along a dimension of the common shape: 0 where it is broadcast.
  const auto stride = [&](size_t k, int64_t dim) -> int64_t {
    const int64_t own = dim - (ndim - inputs_[k].dim());
    return own < 0 || inputs_[k].size(own) == 1 ? 0 : inputs_[k].stride(own);
  };
  const auto collapse = [&] {
    c10::SmallVector<Group, 4> groups;  // innermost first
    for (int64_t dim = ndim - 2; dim >= 0; --dim) {
      if (shape[dim] == 1) continue;
      Group group{shape[dim], {}};
      bool merges = !groups.empty();
      for (size_t k = 0; k < inputs_.size(); ++k) {
        group.strides[k] = stride(k, dim);
        merges = merges && group.strides[k] == groups.back().strides[k] * groups.back().size;
      }
      if (merges) {
        groups.back().size *= group.size;
      } else {
        groups.push_back(group);
      }
    }
    return groups;
  };

  auto groups = collapse();
  if (groups.size() > 2) {  // interleaved broadcasts beyond what a sweep can walk: copy
    for (Tensor& input : inputs_) input = input.expand(shape).contiguous();
    groups = collapse();
  }
  Sweep sweep;
  sweep.dtype = dtype_of(inputs_[0]);
  sweep.columns = shape.back();
  sweep.inner = groups.empty() ? 1 : groups[0].size;
  sweep.outer = groups.size() < 2 ? 1 : groups[1].size;
  for (size_t k = 0; k < inputs_.size(); ++k) {
    sweep.inputs[k] = {inputs_[k].const_data_ptr(), groups.size() < 2 ? 0 : groups[1].strides[k],
                       groups.empty() ? 0 : groups[0].strides[k], stride(k, ndim - 1)};
  }
  if (row_input_.defined()) {
    row_input_ = row_input_.contiguous();
    sweep.row_inputs[0] = row_input_.const_data_ptr();
  }
  if (key_.defined()) {
    key_ = key_.contiguous();
    sweep.key = key_.const_data_ptr<int64_t>();
  }
  return sweep;
}

Tensor chain_rule(const char* name, const Tensor& grad, const Tensor& derivative) {
  RowOp op(name, {{"kept", derivative}});
  return op.row_input("grad", grad).run<ChainRule>().outputs[0];
}

variable_list call_reference(const char* name, at::TensorList inputs, const Settings& settings) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(
      (std::string("fastvae_reference::") + name).c_str(), "");
  torch::jit::Stack stack;
  for (const Tensor& input : inputs) {
    stack.push_back(input.defined() ? c10::IValue(input) : c10::IValue());
  }
  stack.resize(op.schema().arguments().size() - settings.size());  // absent ones are None
  stack.insert(stack.end(), settings.begin(), settings.end());
  op.callBoxed(&stack);
  variable_list outputs;
  for (const c10::IValue& output : stack) outputs.push_back(output.toTensor());
  return outputs;
}

bool is_transformed(const Tensor& x) {
  return x.key_set().has(c10::DispatchKey::FuncTorchGradWrapper) || x._fw_grad(0).defined();
}

variable_list reference_backward(const char* name, const variable_list& grads,
                                 const variable_list& inputs, const Settings& settings,
                                 const std::vector<bool>& wanted) {
  const variable_list twins = call_reference(name, inputs, settings);
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

variable_list promote(c10::DeviceType device, at::TensorList inputs) {
  at::ScalarType widest = at::autocast::get_lower_precision_fp_from_device_type(device);
  for (const Tensor& input : inputs) {
    if (input.defined() && input.is_floating_point()) {
      widest = c10::promoteTypes(widest, input.scalar_type());
    }
  }
  bool agree = true;
  for (const Tensor& input : inputs) {
    agree = agree && (!input.defined() || !input.is_floating_point() ||
                      input.scalar_type() == inputs[0].scalar_type());
  }
  variable_list result;
  for (const Tensor& input : inputs) {
    const bool cast = !agree && input.defined() && input.is_floating_point();
    result.push_back(cast ? at::autocast::cached_cast(widest, input, device) : input);
  }
  return result;
}

}  // namespace fastvae
