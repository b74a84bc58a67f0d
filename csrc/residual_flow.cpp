// Residual flows as torch ops. The formulas are in residual_flow.h, the engine in steps.h.
#include "residual_flow.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros_like.h>

#include "binding.h"
#include "steps.h"

namespace fastvae {

namespace cuda {
// residual_flow.cu. Null, or what CUDA complains of. Scratch is as much as flow_scratch asks for.
template <class F>
const char* sweep_flow(const FlowSweep& sweep, bool backward, void* scratch, void* stream);
template <class F>
int64_t flow_scratch(const FlowSweep& sweep, bool backward);  // bytes
}  // namespace cuda

namespace {

using std::optional;

template <class F>
class FlowOp {
 public:
  // z, then the vectors of lines, then their numbers
  static constexpr int kInputs = F::kInputs;
  using Inputs = std::array<Tensor, kInputs>;

  FlowOp(const Inputs& inputs, bool inverse) : inverse_(inverse) {
    const Argument first{"z", inputs[0]};
    check_input(F::kName, first, first);
    for (int i = 1; i < kInputs; ++i) check_input(F::kName, {F::kArguments[i], inputs[i]}, first);
    const auto z = inputs[0].sym_sizes();
    const auto given = inputs[1].sym_sizes();
    TORCH_CHECK_VALUE(given.size() > 1 && given.back() == z.back(), "fastvae::", F::kName, ": ",
                      F::kArguments[1], " must be [..., K, D] for the D of z, got ", given, " and ",
                      z);
    lines_.assign(given.begin(), given.end() - 1);
    TORCH_CHECK_VALUE(lines_.back() > 0, "fastvae::", F::kName, ": ", F::kArguments[1],
                      " must have at least one step, got ", given);
    for (int i = 2; i < kInputs; ++i) {
      const bool is_vector = i <= F::kVectors;
      const auto sizes = inputs[i].sym_sizes();
      TORCH_CHECK_VALUE(sizes == (is_vector ? given : c10::SymIntArrayRef(lines_)),
                        "fastvae::", F::kName, ": ", F::kArguments[i], " must have the shape of ",
                        F::kArguments[1], is_vector ? "" : " without its last dimension", ", got ",
                        sizes, " and ", given);
    }
    rows_ = broadcast_rows(F::kName, first, {F::kArguments[1], inputs[1]}, lines_);
    shared_ = lines_.size() == 1;
    c10::SymDimVector shape = rows_;
    shape.push_back(z.back());
    inputs_[0] = inputs[0].expand_symint(shape);
    for (int i = 1; i < kInputs; ++i) {
      shape = rows_;
      shape.push_back(lines_.back());
      if (i <= F::kVectors) shape.push_back(z.back());
      inputs_[i] = shared_ ? inputs[i] : inputs[i].expand_symint(shape);
    }
  }

  std::tuple<Tensor, Tensor> forward() {
    Tensor z = allocate(inputs_[0].sym_sizes(), inputs_[0].options());
    Tensor log_det = allocate(rows_, row_options(z));
    if (z.is_meta() || log_det.numel() == 0) return {z, log_det};
    if (z.numel() == 0) return {z, log_det.zero_()};  // no columns: the determinant of nothing is 1
    FlowSweep sweep = lay_out();
    sweep.out = z.mutable_data_ptr();
    sweep.log_det = log_det.mutable_data_ptr();
    launch(sweep, false);
    return {z, log_det};
  }

  Inputs backward(const optional<Tensor>& grad_z, const optional<Tensor>& grad_log_det,
                  std::array<bool, kInputs> wanted) {
    if (grad_z) RowOp(F::kName, {{"z", inputs_[0]}, {"grad_z", *grad_z}});
    if (grad_log_det)
      check_row_values(F::kName, {"grad_log_det", *grad_log_det}, rows_, inputs_[0]);
    Inputs gradients;
    for (int i = 0; i < kInputs; ++i) {
      if (wanted[i]) gradients[i] = allocate(inputs_[i].sym_sizes(), inputs_[i].options());
    }
    if (inputs_[0].is_meta()) return gradients;
    FlowSweep sweep = lay_out();
    if (sweep.rows == 0 || sweep.dims == 0) {
      for (Tensor& x : gradients) x = x.defined() ? at::zeros_like(x) : x;
      return gradients;
    }
    const Tensor grad =
        grad_z ? grad_z->expand_symint(inputs_[0].sym_sizes()).contiguous() : Tensor();
    const Tensor row_grad = grad_log_det ? grad_log_det->contiguous() : Tensor();
    if (grad_z) sweep.grad_out = grad.const_data_ptr();
    if (grad_log_det) sweep.grad_log_det = row_grad.const_data_ptr();
    const auto data = [](Tensor& x) { return x.defined() ? x.mutable_data_ptr() : nullptr; };
    sweep.d_z = data(gradients[0]);
    for (int i = 0; i < F::kVectors; ++i) sweep.d_vectors[i] = data(gradients[1 + i]);
    for (int i = 0; i < F::kGiven; ++i) sweep.d_given[i] = data(gradients[1 + F::kVectors + i]);
    launch(sweep, true);
    return gradients;
  }

 private:
  FlowSweep lay_out() {
    for (Tensor& x : inputs_) x = x.contiguous();
    FlowSweep s;
    s.dtype = dtype_of(inputs_[0]);
    s.dims = inputs_[0].size(-1);
    s.rows = 1;
    for (const c10::SymInt& size : rows_) s.rows *= size.expect_int();
    s.steps = lines_.back().expect_int();
    s.shared = shared_;
    s.inverse = inverse_;
    s.z = inputs_[0].const_data_ptr();
    for (int i = 0; i < F::kVectors; ++i) s.vectors[i] = inputs_[1 + i].const_data_ptr();
    for (int i = 0; i < F::kGiven; ++i) s.given[i] = inputs_[1 + F::kVectors + i].const_data_ptr();
    return s;
  }

  void launch(const FlowSweep& sweep, bool backward) const {
#ifdef FASTVAE_CUDA
    if (inputs_[0].is_cuda()) {
      const Tensor scratch =
          allocate({cuda::flow_scratch<F>(sweep, backward)}, inputs_[0].options().dtype(at::kByte));
      launch_on_cuda(F::kName, inputs_[0], [&](void* stream) {
        return cuda::sweep_flow<F>(sweep, backward, scratch.mutable_data_ptr(), stream);
      });
      return;
    }
#endif
    with_types(sweep.dtype,
               [&]<class T, class Stored>(Types<T, Stored>) { run<T, Stored>(sweep, backward); });
  }

  template <class T, class Stored>
  static void run(const FlowSweep& s, bool backward) {
    using Task = cpu::FlowTask<F, T, Stored>;
    const auto in_parallel = [](int64_t units, int64_t elements, const auto& work) {
      at::parallel_for(0, units, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements)),
                       work);
    };
    const auto table_of = [&](int64_t lines) {
      return allocate({lines, Task::stride_of(s)}, at::dtype(c10::CppTypeToScalarType<T>::value));
    };
    const auto each_shared_line = [&](int64_t elements, const auto& work) {
      if (s.shared) in_parallel(s.steps, elements, work);
    };
    const Tensor tables = table_of(s.shared ? s.steps : 0);
    T* table = tables.mutable_data_ptr<T>();
    each_shared_line(4 * s.dims,
                     [&](int64_t begin, int64_t end) { Task(s, table).constrain(begin, end); });
    const int64_t block = cpu::kRows * s.dims * s.steps;
    if (!backward) {
      in_parallel(Task::blocks(s), block,
                  [&](int64_t begin, int64_t end) { Task(s, table).forward(begin, end); });
      return;
    }
    const int64_t chunks = Task::chunks(s);
    const Tensor d_tables = table_of(s.shared ? chunks * s.steps : 0);
    T* d_table = d_tables.mutable_data_ptr<T>();
    in_parallel(chunks, 4 * block * Task::blocks(s) / chunks,
                [&](int64_t begin, int64_t end) { Task(s, table).backward(begin, end, d_table); });
    each_shared_line((4 + chunks / 8) * s.dims, [&](int64_t begin, int64_t end) {
      Task(s, table).finish(begin, end, d_table);
    });
  }

  Inputs inputs_;
  c10::SymDimVector rows_, lines_;  // leading dimensions, of z and what it broadcasts to; [.., K]
  bool shared_, inverse_;
};

template <class F, class Indices = std::make_index_sequence<F::kInputs>>
struct DefinedFlow;
template <class F, size_t... I>
struct DefinedFlow<F, std::index_sequence<I...>> {
  template <size_t>
  using Each = Tensor;
  static constexpr const char* kName = F::kName;

  static std::tuple<Tensor, Tensor> forward(const Each<I>&... inputs, bool inverse) {
    return FlowOp<F>({inputs...}, inverse).forward();
  }
  static std::tuple<Each<I>...> backward(const optional<Tensor>& grad_z,
                                         const optional<Tensor>& grad_log_det,
                                         const Each<I>&... inputs, bool inverse,
                                         std::array<bool, sizeof...(I)> wanted) {
    auto gradients = FlowOp<F>({inputs...}, inverse).backward(grad_z, grad_log_det, wanted);
    return {std::move(gradients[I])...};
  }
};

template <class F>
void define_flow(torch::Library& m) {
  const TensorsSchema<F> schema;
  define<DefinedFlow<F>>(
      m, "(" + schema.inputs + ", bool inverse=False) -> (Tensor z, Tensor log_det)",
      "(Tensor? grad_z, Tensor? grad_log_det, " + schema.inputs + ", bool inverse, " +
          schema.wanted + ") -> (" + schema.gradients + ")");
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define_flow<Planar>(m);
  define_flow<Radial>(m);
  define_flow<Householder>(m);
}

}  // namespace fastvae
