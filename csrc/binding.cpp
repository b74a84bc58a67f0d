#include "binding.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastvae {

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

namespace {

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

c10::SymDimVector broadcast_rows(const char* op, const Argument& z, const Argument& line,
                                 c10::SymIntArrayRef lines) {
  const auto sizes = z.tensor.sym_sizes();
  c10::SymDimVector rows(sizes.begin(), sizes.end() - 1);
  try {
    return at::infer_size_symdimvector(rows, lines.slice(0, lines.size() - 1));
  } catch (const c10::Error&) {
    TORCH_CHECK_VALUE(false, "fastvae::", op, ": ", line.name, " must broadcast with ", z.name,
                      " in its leading dimensions, got ", line.tensor.sym_sizes(), " and ", sizes);
  }
}

RowOp::RowOp(const char* name, std::initializer_list<Argument> inputs)
    : name_(name), first_name_(inputs.begin()->name) {
  for (const Argument& argument : inputs) input(argument.name, argument.tensor);
}

RowOp& RowOp::input(const char* name, const Tensor& x) {
  const Argument first{first_name_, inputs_.empty() ? x : inputs_[0]};
  check_input(name_, {name, x}, first);
  if (inputs_.empty()) {
    shape_.assign(x.sym_sizes().begin(), x.sym_sizes().end());
  } else if (x.sym_sizes() != c10::SymIntArrayRef(shape_)) {
    try {
      shape_ = at::infer_size_symdimvector(shape_, x.sym_sizes());
    } catch (const c10::Error&) {
      TORCH_CHECK_VALUE(false, "fastvae::", name_, ": ", name, " must broadcast with ", first_name_,
                        ", got ", x.sym_sizes(), " and ", first.tensor.sym_sizes());
    }
  }
  inputs_.push_back(x);
  return *this;
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
  if (!options.device().is_cpu()) return at::empty_symint(shape, options);
  // Past the dispatcher, which takes as long as a small kernel.
  Tensor x = at::detail::empty_cpu(C10_AS_INTARRAYREF_SLOW(shape), options.dtype().toScalarType());
#ifdef MADV_HUGEPAGE
  // malloc maps blocks this large anew for many a call, and faults them in page by page: up to 25
  // ms for 64 MB where the kernel itself takes 15. Huge pages make that 32 faults, and spare the
  // kernel a third of its time where the pages are there but too many for the TLB.
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20, kLarge = uintptr_t{8} << 20;
  if (x.nbytes() >= kLarge) {
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
  sweep.parameters[0] = parameter_;
  if (key_.defined()) {
    key_ = key_.contiguous();
    sweep.key = key_.const_data_ptr<int64_t>();
  }
  return sweep;
}

void RowOp::run(const CompiledFormula& formula, const bool* wanted, Tensor* outputs,
                Tensor& row_sum) {
  const Shape& shape = formula.on_cpu.shape;
  for (int k = 0; k < shape.outputs; ++k) {
    if (wanted[k]) outputs[k] = allocate(shape_, inputs_[0].options());
  }
  if (shape.row_sums > 0) {
    row_sum =
        allocate(c10::SymIntArrayRef(shape_).slice(0, shape_.size() - 1), row_options(inputs_[0]));
  }
  if (inputs_[0].is_meta()) return;

  Sweep sweep = lay_out();
  for (int k = 0; k < shape.outputs; ++k) {
    if (wanted[k]) sweep.outputs[k] = outputs[k].mutable_data_ptr();
  }
  if (shape.row_sums > 0) sweep.row_sum = row_sum.mutable_data_ptr();
  if (sweep.rows() > 0) launch(formula, sweep);
}

void RowOp::launch(const CompiledFormula& formula, Sweep& sweep) const {
  // Rows too long for one worker are summed in segments, whose sums are added afterwards.
  const bool is_cpu = inputs_[0].is_cpu();
  TORCH_INTERNAL_ASSERT(is_cpu || formula.on_cuda != nullptr);
  const Shape& shape = formula.on_cpu.shape;
  const int64_t segments =
      is_cpu ? cpu::segments_per_row(sweep.columns) : cuda::segments_per_row(sweep.columns);
  Tensor partial_sums;
  if (shape.row_sums > 0 && segments > 1) {
    partial_sums = at::empty({sweep.rows() * segments}, inputs_[0].options().dtype(at::kDouble));
    sweep.partial_sums = partial_sums.mutable_data_ptr<double>();
  }
#ifdef FASTVAE_CUDA
  if (!is_cpu) {
    launch_on_cuda(name_, inputs_[0], [&](void* stream) { return formula.on_cuda(sweep, stream); });
    return;
  }
#endif
  // Below this many elements a second thread costs more than it brings.
  const int64_t grain = shape.noise ? 4096 : 16384;
  const int64_t unit_size = std::max<int64_t>(1, std::min(sweep.columns, cpu::kSegment));
  at::parallel_for(
      0, sweep.rows() * segments, std::max<int64_t>(1, grain / unit_size),
      [&](int64_t begin, int64_t end) { cpu::sweep_units(formula.on_cpu, sweep, begin, end); });
  if (sweep.partial_sums != nullptr) cpu::add_segments(sweep);
}

Tensor chain_rule(const char* name, const Tensor& grad, const Tensor& derivative) {
  RowOp op(name, {{"kept", derivative}});
  return op.row_input("grad", grad).run<ChainRule>().outputs[0];
}

}  // namespace fastvae
