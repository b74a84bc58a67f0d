// Categorical distributions as torch ops. The formulas are in categorical.h.
#include "categorical.h"

#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/lt.h>
#include <ATen/ops/round.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "binding.h"
#include "categories.h"

namespace fastvae {
namespace {

using std::optional;

// What the ops of categories share: an engine of their own, whose method on_cpu(engine, begin, end)
// calls; `grain` elements are enough for a thread.
class CategoryOp : public RowOp {
 protected:
  using RowOp::RowOp;

  template <class F, class Run>
  void launch(const Sweep& sweep, int64_t grain, const Run& on_cpu) const {
    if (sweep.rows() == 0 || (sweep.columns == 0 && sweep.row_sum == nullptr)) return;
#ifdef FASTVAE_CUDA
    if constexpr (!F::shape.cpu_only) {
      if (!inputs_[0].is_cpu()) {
        launch_on_cuda(name_, inputs_[0],
                       [&](void* stream) { return cuda::sweep_rows<F>(sweep, stream); });
        return;
      }
    }
#endif
    const int64_t rows = std::max<int64_t>(1, grain / std::max<int64_t>(1, sweep.columns));
    at::parallel_for(0, sweep.rows(), rows, [&](int64_t begin, int64_t end) {
      cpu::sweep_categories(sweep, [&](auto&& engine) { on_cpu(engine, begin, end); });
    });
  }

  // One value a row.
  template <class F, class Run>
  Tensor reduce(const Run& on_cpu) {
    Tensor value =
        allocate(c10::SymIntArrayRef(shape_).slice(0, shape_.size() - 1), row_options(inputs_[0]));
    if (value.is_meta()) return value;
    Sweep sweep = lay_out();
    sweep.row_sum = value.mutable_data_ptr();
    launch<F>(sweep, 8192, on_cpu);
    return value;
  }

  // Elements, those outputs that are wanted.
  template <class F, class Run, size_t N>
  std::array<Tensor, N> write(std::array<bool, N> wanted, int64_t grain, const Run& on_cpu) {
    std::array<Tensor, N> outputs;
    bool any = false;
    for (size_t k = 0; k < N; ++k) {
      if (wanted[k]) outputs[k] = allocate(shape_, inputs_[0].options());
      any = any || wanted[k];
    }
    if (!any || inputs_[0].is_meta()) return outputs;
    Sweep sweep = lay_out();
    for (size_t k = 0; k < N; ++k) {
      if (wanted[k]) sweep.outputs[k] = outputs[k].mutable_data_ptr();
    }
    launch<F>(sweep, grain, on_cpu);
    return outputs;
  }
};

class GumbelSoftmaxOp : public CategoryOp {
 public:
  static constexpr const char* kName = "gumbel_softmax";
  static constexpr Keeps kKeeps{.sample = true};

  static Tensor forward(const Tensor& logits, const Tensor& key, double temperature, bool hard) {
    GumbelSoftmaxOp op({{"logits", logits}}, key, temperature);
    return hard ? op.sample<GumbelOneHot::Forward>([](auto& engine, int64_t begin, int64_t end) {
      engine.gumbel_one_hot(begin, end);
    })
                : op.sample<GumbelSoftmax::Forward>([](auto& engine, int64_t begin, int64_t end) {
                    engine.gumbel_softmax(begin, end);
                  });
  }

  // A sample that is one-hot says nothing of its softmax: that is computed again, which makes a
  // training step 1.5 times as long as from y. To keep y would take as much memory as the output.
  static Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& key,
                         const optional<Tensor>& y, double temperature, bool hard,
                         std::array<bool, 1> wanted) {
    const bool from_sample = y && !hard;
    GumbelSoftmaxOp op({{"grad", grad}, {"logits", logits}}, key, temperature);
    if (from_sample) op = GumbelSoftmaxOp({{"grad", grad}, {"y", *y}}, key, temperature);
    if (!wanted[0]) return Tensor();
    if (from_sample) {
      return op.sample<GumbelSoftmax::BackwardFromSample>(
          [](auto& engine, int64_t begin, int64_t end) {
            engine.gumbel_backward_from_sample(begin, end);
          });
    }
    return op.sample<GumbelSoftmax::Backward>(
        [](auto& engine, int64_t begin, int64_t end) { engine.gumbel_backward(begin, end); });
  }

 private:
  GumbelSoftmaxOp(std::initializer_list<Argument> inputs, const Tensor& key, double temperature)
      : CategoryOp(kName, inputs) {
    this->key(key);
    TORCH_CHECK_VALUE(temperature > 0 && temperature <= math::largest<double>(), "fastvae::", kName,
                      ": temperature must be a positive number, got ", temperature);
    parameter(1 / temperature);
  }

  template <class F, class Run>
  Tensor sample(const Run& on_cpu) {
    return write<F>(std::array{true}, 4096, on_cpu)[0];
  }
};

class CategoricalKlOp : public CategoryOp {
 public:
  static constexpr const char* kName = "categorical_kl";

  static Tensor forward(const Tensor& logits_q, const optional<Tensor>& logits_p) {
    CategoricalKlOp op(logits_q, logits_p);
    return logits_p ? op.of<true>() : op.of<false>();
  }

  static std::tuple<Tensor, Tensor> backward(const Tensor& grad_kl, const Tensor& logits_q,
                                             const optional<Tensor>& logits_p,
                                             std::array<bool, 2> wanted) {
    CategoricalKlOp op(logits_q, logits_p);
    op.row_input("grad_kl", grad_kl);
    if (logits_p) {
      auto [d_q, d_p] = op.gradients<true>(wanted);
      return {d_q, d_p};
    }
    return {op.gradients<false>(std::array{wanted[0]})[0], Tensor()};
  }

 private:
  CategoricalKlOp(const Tensor& logits_q, const optional<Tensor>& logits_p)
      : CategoryOp(logits_p ? CategoryOp(kName, {{"logits_q", logits_q}, {"logits_p", *logits_p}})
                            : CategoryOp(kName, {{"logits_q", logits_q}})) {}

  template <bool kPrior>
  Tensor of() {
    return reduce<typename CategoricalKl<kPrior>::Forward>(
        [](auto& engine, int64_t begin, int64_t end) { engine.template kl<kPrior>(begin, end); });
  }
  template <bool kPrior, size_t N>
  std::array<Tensor, N> gradients(std::array<bool, N> wanted) {
    return write<typename CategoricalKl<kPrior>::Backward>(
        wanted, 8192, [](auto& engine, int64_t begin, int64_t end) {
          engine.template kl_backward<kPrior>(begin, end);
        });
  }
};

// Rows of the engine are single variables, [..., D] of them.
class CategoricalLogProbOp : public CategoryOp {
 public:
  static constexpr const char* kName = "categorical_log_prob";

  static Tensor forward(const Tensor& x, const Tensor& logits) {
    check(x, logits);
    CategoricalLogProbOp op(x, logits);
    const Tensor values = op.reduce<CategoricalLogProb::Forward>(
        [](auto& engine, int64_t begin, int64_t end) { engine.log_prob(begin, end); });
    return RowOp(kName, {{"values", values}}).run<Total>().row_sum;
  }

  static std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
                                             const Tensor& logits, std::array<bool, 2> wanted) {
    check(x, logits);
    CategoricalLogProbOp op(x, logits);
    const c10::SymIntArrayRef variables(op.shape_.data(), op.shape_.size() - 1);
    check_row_values(kName, {"grad", grad}, variables.slice(0, variables.size() - 1), logits);
    op.row_input("grad", grad.unsqueeze(-1).expand_symint(variables));
    const auto gradient = op.write<CategoricalLogProb::Backward>(
        std::array{wanted[1]}, 8192,
        [](auto& engine, int64_t begin, int64_t end) { engine.log_prob_backward(begin, end); });
    return {wanted[0] ? at::zeros_like(x) : Tensor(), gradient[0]};  // classes have no neighbours
  }

 private:
  static void check(const Tensor& x, const Tensor& logits) {
    const bool is_integral = x.scalar_type() == at::kLong;
    if (is_integral) {
      check_input(kName, {"logits", logits}, {"logits", logits});
      TORCH_CHECK(x.device() == logits.device(), "fastvae::", kName,
                  ": x must be on the device of logits, got ", x.device(), " and ",
                  logits.device());
      TORCH_CHECK(x.dim() > 0, "fastvae::", kName,
                  ": x must have at least one dimension, got a 0-dim tensor");
    } else {
      TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()), "fastvae::", kName,
                       ": x must be int64 or have the dtype of logits, got ", x.scalar_type(),
                       " and ", logits.scalar_type());
      check_input(kName, {"x", x}, {"x", x});
      check_input(kName, {"logits", logits}, {"x", x});
    }
    TORCH_CHECK_VALUE(logits.dim() > 1, "fastvae::", kName,
                      ": logits must have shape [..., D, K], got ", logits.sym_sizes());
  }

  CategoricalLogProbOp(const Tensor& x, const Tensor& logits)
      : CategoryOp(kName, {{"logits", logits}}) {
    Tensor classes = x;
    if (x.scalar_type() != at::kLong && !x.is_meta()) {  // what is no number is no class
      const Tensor nearest = at::round(x.to(at::kDouble)), none = at::full_like(nearest, -1);
      classes = at::where(at::lt(at::abs(nearest), 9e15), nearest, none).to(at::kLong);
    }
    classes = classes.unsqueeze(-1);
    try {
      shape_ = at::infer_size_symdimvector(shape_, classes.sym_sizes());
    } catch (const c10::Error&) {
      TORCH_CHECK_VALUE(false, "fastvae::", kName, ": x must broadcast with logits[..., 0], got ",
                        x.sym_sizes(), " and ", logits.sym_sizes());
    }
    inputs_.push_back(classes);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define<GumbelSoftmaxOp>(
      m, "(Tensor logits, Tensor key, float temperature, bool hard=False) -> Tensor",
      "(Tensor grad, Tensor logits, Tensor key, Tensor? y, float temperature, bool hard, "
      "bool[1] wanted) -> Tensor");
  define<CategoricalKlOp>(m, "(Tensor logits_q, Tensor? logits_p=None) -> Tensor",
                          "(Tensor grad_kl, Tensor logits_q, Tensor? logits_p, bool[2] wanted) -> "
                          "(Tensor, Tensor)");
  define<CategoricalLogProbOp>(m, "(Tensor x, Tensor logits) -> Tensor",
                               "(Tensor grad, Tensor x, Tensor logits, bool[2] wanted) -> "
                               "(Tensor, Tensor)");
}

}  // namespace fastvae
