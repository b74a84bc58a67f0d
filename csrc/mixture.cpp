// Mixtures of Gaussians as torch ops. The formulas are in mixture.h, the engine in pairs.h.
#include "mixture.h"

#include <ATen/Parallel.h>

#include "binding.h"
#include "pairs.h"

namespace fastvae {

namespace cuda {
// mixture.cu. Null, or what CUDA complains of.
const char* sweep_pairs(const Pairing& pairing, bool backward, void* stream);
}  // namespace cuda

namespace {

using c10::string_view;
using std::optional;

// One call: rows of z meet components. Inputs of any layout and half types are copied to contiguous
// ones of the type computed in, which is little beside the pairs.
class PairOp {
 public:
  PairOp(const char* name, const Tensor& z, const Tensor& mu, const Tensor& log_var,
         string_view parameterization)
      : name_(name), z_(z), mu_(mu), log_var_(log_var) {
    for (const Argument& argument :
         {Argument{"z", z}, Argument{"mu", mu}, Argument{"log_var", log_var}}) {
      check_input(name, argument, {"z", z});
    }
    scale_map_ = scale_map(name, parameterization);
    rows_.assign(z.sym_sizes().begin(), z.sym_sizes().end() - 1);
  }

  // Each component with a weight of its own, or all alike.
  PairOp& mixture(const optional<Tensor>& log_weights) {
    if (log_weights) check_input(name_, {"log_weights", *log_weights}, {"z", z_});
    TORCH_CHECK_VALUE(mu_.dim() == 2 && mu_.sym_size(1) == z_.sym_size(-1), "fastvae::", name_,
                      ": mu must have shape [K, D] with the D of z, got ", mu_.sym_sizes(), " and ",
                      z_.sym_sizes());
    TORCH_CHECK_VALUE(log_var_.sym_sizes() == mu_.sym_sizes(), "fastvae::", name_,
                      ": log_var must have the shape of mu, got ", log_var_.sym_sizes(), " and ",
                      mu_.sym_sizes());
    if (!log_weights) return *this;
    TORCH_CHECK_VALUE(log_weights->dim() == 1 && log_weights->sym_size(0) == mu_.sym_size(0),
                      "fastvae::", name_,
                      ": log_weights must have shape [K] with the K of mu, got ",
                      log_weights->sym_sizes(), " and ", mu_.sym_sizes());
    log_weights_ = *log_weights;
    return *this;
  }

  // The posteriors of a batch, weighted as an estimator of q(z) has it.
  PairOp& aggregate(optional<int64_t> dataset_size, string_view estimator, bool legacy) {
    TORCH_CHECK_VALUE(z_.dim() == 2, "fastvae::", name_, ": z must have shape [B, D], got ",
                      z_.sym_sizes());
    for (const Argument& x : {Argument{"mu", mu_}, Argument{"log_var", log_var_}}) {
      TORCH_CHECK_VALUE(x.tensor.sym_sizes() == z_.sym_sizes(), "fastvae::", name_, ": ", x.name,
                        " must have the shape of z, got ", x.tensor.sym_sizes(), " and ",
                        z_.sym_sizes());
    }
    TORCH_CHECK_VALUE(estimator == "mws" || estimator == "mss", "fastvae::", name_,
                      ": estimator must be mws or mss, got ", estimator);
    stratified_ = estimator == "mss";
    TORCH_CHECK_VALUE(stratified_ || !legacy, "fastvae::", name_,
                      ": legacy_mss must go with estimator mss, got estimator ", estimator);
    TORCH_CHECK_VALUE(dataset_size || !stratified_, "fastvae::", name_,
                      ": dataset_size must be given for estimator mss, got None");
    TORCH_CHECK_VALUE(
        !dataset_size ||
            c10::SymInt(*dataset_size).sym_ge(z_.sym_size(0)).guard_bool(__FILE__, __LINE__),
        "fastvae::", name_, ": dataset_size must be at least the size of the batch, got ",
        *dataset_size, " and ", z_.sym_size(0));
    dataset_size_ = dataset_size;
    legacy_ = legacy;
    marginals_ = true;
    return *this;
  }

  struct Forward {
    Tensor log_prob, log_prod, kept;
  };
  Forward forward(bool keep) {
    Forward result;
    result.log_prob = allocate(rows_, row_options(z_));
    if (marginals_) result.log_prod = allocate(rows_, row_options(z_));
    if (keep) result.kept = allocate(kept_shape(), row_options(z_));
    if (z_.is_meta()) return result;
    const auto data = [](const Tensor& x) { return x.defined() ? x.mutable_data_ptr() : nullptr; };
    Pairing p = lay_out();
    p.log_prob = data(result.log_prob);
    p.log_prod = data(result.log_prod);
    p.kept = data(result.kept);
    if (p.rows > 0) launch(p, /*backward=*/false);
    return result;
  }

  // The gradients of z, mu, log_var and log_weights.
  std::array<Tensor, 4> backward(const optional<Tensor>& grad, const optional<Tensor>& grad_prod,
                                 const optional<Tensor>& kept, std::array<bool, 4> wanted) {
    if (grad) check_row_values(name_, {"grad", *grad}, rows_, z_);
    if (grad_prod) check_row_values(name_, {"grad_prod", *grad_prod}, rows_, z_);
    if (kept) {
      TORCH_CHECK_VALUE(kept->sym_sizes() == c10::SymIntArrayRef(kept_shape()), "fastvae::", name_,
                        ": kept must be what forward kept, got ", kept->sym_sizes(), " and ",
                        z_.sym_sizes());
      check_input(name_, {"kept", *kept}, {"grad", grad ? *grad : *grad_prod});
    }
    std::array<Tensor, 4> result;
    const Tensor* inputs[] = {&z_, &mu_, &log_var_, &log_weights_};
    for (size_t i = 0; i < result.size(); ++i) {
      if (!wanted[i] || !inputs[i]->defined()) continue;
      const bool half = inputs[i]->scalar_type() != row_options(z_).dtype().toScalarType();
      const auto options = z_.is_meta() || !half ? inputs[i]->options() : row_options(z_);
      result[i] = allocate(inputs[i]->sym_sizes(), options);
    }
    if (z_.is_meta()) return result;

    const Tensor normalisers = (kept ? *kept : forward(/*keep=*/true).kept).contiguous();
    const Tensor grads[] = {grad ? grad->contiguous() : Tensor(),
                            grad_prod ? grad_prod->contiguous() : Tensor()};
    const auto read = [](const Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; };
    const auto write = [](const Tensor& x) { return x.defined() ? x.mutable_data_ptr() : nullptr; };
    Pairing p = lay_out();
    p.kept = normalisers.data_ptr();
    p.grad = read(grads[0]);
    p.grad_prod = read(grads[1]);
    p.d_z = write(result[0]);
    p.d_mu = write(result[1]);
    p.d_log_var = write(result[2]);
    p.d_log_weights = write(result[3]);
    launch(p, /*backward=*/true);
    for (size_t i = 0; i < result.size(); ++i) {
      if (result[i].defined()) result[i] = result[i].to(inputs[i]->scalar_type());
    }
    return result;
  }

 private:
  c10::SymDimVector kept_shape() const {  // [..., Pairing::kept_columns()]
    c10::SymDimVector shape = rows_;
    shape.push_back(marginals_ ? z_.sym_size(-1) + 2 : c10::SymInt(2));
    return shape;
  }

  Pairing lay_out() {
    const auto type = row_options(z_).dtype().toScalarType();
    const auto plain = [&](Tensor& x) {
      if (!x.defined()) return static_cast<const void*>(nullptr);
      held_.push_back(x.to(type).contiguous());
      return held_.back().const_data_ptr();
    };
    Pairing p;
    p.dtype = type == at::kDouble ? DType::kFloat64 : DType::kFloat32;
    p.marginals = marginals_;
    p.scale_map = scale_map_;
    p.dims = z_.size(-1);
    p.rows = 1;
    for (const c10::SymInt& size : rows_) p.rows *= size.expect_int();
    p.components = mu_.size(0);
    p.z = plain(z_);
    p.mu = plain(mu_);
    p.log_var = plain(log_var_);
    p.log_weights = plain(log_weights_);
    p.weights = weights(p);
    return p;
  }

  LogWeights weights(const Pairing& p) const {
    LogWeights w;
    const auto n = static_cast<double>(p.components);
    if (!marginals_) {
      w.rest = log_weights_.defined() || p.components == 0 ? 0.0 : -std::log(n);
    } else if (!stratified_) {
      w.rest = -std::log(n) - std::log(static_cast<double>(dataset_size_.value_or(1)));
    } else if (p.rows > 1) {  // a single row stands for all the others: weight 1
      const double size = static_cast<double>(*dataset_size_), m = n - 1;
      w.weighting = legacy_ ? Weighting::kLegacy : Weighting::kStratified;
      w.rest = -std::log(m);
      w.own = -std::log(size);
      w.next = std::log(size - m) - std::log(size) - std::log(m);
    }
    return w;
  }

  void launch(Pairing& p, bool backward) {
#ifdef FASTVAE_CUDA
    if (z_.is_cuda()) {
      const Tensor scratch = allocate({cuda::scratch_bytes(p)}, z_.options().dtype(at::kByte));
      p.scratch = scratch.mutable_data_ptr();
      launch_on_cuda(name_, z_,
                     [&](void* stream) { return cuda::sweep_pairs(p, backward, stream); });
      return;
    }
#endif
    const auto run = backward ? &PairOp::run<true> : &PairOp::run<false>;
    (this->*run)(p);
  }

  template <bool kBackward>
  void run(Pairing& p) const {
    // Backward knows nothing of the marginals if no gradient comes through them.
    const bool marginals = p.marginals && (!kBackward || p.grad_prod != nullptr);
    if (p.dtype == DType::kFloat64) {
      return marginals ? run<kBackward, double, true>(p) : run<kBackward, double, false>(p);
    }
    return marginals ? run<kBackward, float, true>(p) : run<kBackward, float, false>(p);
  }

  template <bool kBackward, class T, bool kMarginals>
  void run(Pairing& p) const {
    const Tensor scratch = allocate({cpu::PackedPairs<T, kMarginals>::size(p)}, row_options(z_));
    p.scratch = scratch.mutable_data_ptr();
    cpu::PairTask<T, kMarginals> task{p};
    const int64_t rows = cpu::blocks_of(p.rows), components = cpu::blocks_of(p.components);
    // Blocks a thread should have at least, by how many elements each meets.
    const auto parallel = [&](int64_t blocks, int64_t elements, auto method) {
      constexpr int64_t kGrain = 4096;
      const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
      at::parallel_for(0, blocks, grain,
                       [&](int64_t begin, int64_t end) { (task.*method)(begin, end); });
    };
    using Task = cpu::PairTask<T, kMarginals>;
    parallel(rows, p.dims, &Task::pack_rows);
    parallel(components, p.dims, &Task::pack_components);
    if constexpr (!kBackward) {
      parallel(rows, p.components * p.dims, &Task::forward);
    } else {
      if (p.d_z != nullptr) parallel(rows, p.components * p.dims, &Task::backward_rows);
      if (p.d_mu != nullptr || p.d_log_var != nullptr || p.d_log_weights != nullptr) {
        parallel(components, p.rows * p.dims, &Task::backward_components);
      }
    }
  }

  const char* name_;
  Tensor z_, mu_, log_var_, log_weights_;
  c10::SymDimVector rows_;
  c10::SmallVector<Tensor, 4> held_;  // alive while the engine reads them
  bool marginals_ = false, stratified_ = false, legacy_ = false;
  optional<int64_t> dataset_size_;
  ScaleMap scale_map_;
};

struct GaussianMixtureLogProbOp {
  static constexpr const char* kName = "gaussian_mixture_log_prob";
  static constexpr Keeps kKeeps{.derivative = true, .everywhere = true};

  static Tensor forward(const Tensor& z, const Tensor& mu, const Tensor& log_var,
                        const optional<Tensor>& log_weights, string_view parameterization) {
    return PairOp(kName, z, mu, log_var, parameterization)
        .mixture(log_weights)
        .forward(false)
        .log_prob;
  }

  static std::tuple<Tensor, Tensor> forward_keeping(const Tensor& z, const Tensor& mu,
                                                    const Tensor& log_var,
                                                    const optional<Tensor>& log_weights,
                                                    string_view parameterization) {
    auto result =
        PairOp(kName, z, mu, log_var, parameterization).mixture(log_weights).forward(true);
    return {result.log_prob, result.kept};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
      const Tensor& grad, const Tensor& z, const Tensor& mu, const Tensor& log_var,
      const optional<Tensor>& log_weights, const optional<Tensor>& kept,
      string_view parameterization, std::array<bool, 4> wanted) {
    PairOp op(kName, z, mu, log_var, parameterization);
    auto [d_z, d_mu, d_log_var, d_log_weights] =
        op.mixture(log_weights).backward(grad, {}, kept, wanted);
    return {d_z, d_mu, d_log_var, d_log_weights};
  }
};

struct AggregatePosteriorOp {
  static constexpr const char* kName = "aggregate_posterior";
  static constexpr Keeps kKeeps{.derivative = true, .everywhere = true};

  static std::tuple<Tensor, Tensor> forward(const Tensor& z, const Tensor& mu,
                                            const Tensor& log_var, optional<int64_t> dataset_size,
                                            string_view estimator, bool legacy_mss,
                                            string_view parameterization) {
    PairOp op(kName, z, mu, log_var, parameterization);
    auto result = op.aggregate(dataset_size, estimator, legacy_mss).forward(false);
    return {result.log_prob, result.log_prod};
  }

  static std::tuple<Tensor, Tensor, Tensor> forward_keeping(const Tensor& z, const Tensor& mu,
                                                            const Tensor& log_var,
                                                            optional<int64_t> dataset_size,
                                                            string_view estimator, bool legacy_mss,
                                                            string_view parameterization) {
    PairOp op(kName, z, mu, log_var, parameterization);
    auto result = op.aggregate(dataset_size, estimator, legacy_mss).forward(true);
    return {result.log_prob, result.log_prod, result.kept};
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(
      const optional<Tensor>& grad_log_qz, const optional<Tensor>& grad_log_prod_qz,
      const Tensor& z, const Tensor& mu, const Tensor& log_var, const optional<Tensor>& kept,
      optional<int64_t> dataset_size, string_view estimator, bool legacy_mss,
      string_view parameterization, std::array<bool, 3> wanted) {
    PairOp op(kName, z, mu, log_var, parameterization);
    auto [d_z, d_mu, d_log_var, none] = op.aggregate(dataset_size, estimator, legacy_mss)
                                            .backward(grad_log_qz, grad_log_prod_qz, kept,
                                                      {wanted[0], wanted[1], wanted[2], false});
    return {d_z, d_mu, d_log_var};
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  const std::string mixture =
      "(Tensor z, Tensor mu, Tensor log_var, Tensor? log_weights=None, str "
      "parameterization=\"log_var\") -> ";
  define<GaussianMixtureLogProbOp>(
      m, mixture + "Tensor",
      "(Tensor grad, Tensor z, Tensor mu, Tensor log_var, Tensor? log_weights, Tensor? kept, "
      "str parameterization, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
      mixture + "(Tensor, Tensor)");
  const std::string settings =
      "int? dataset_size=None, str estimator=\"mws\", bool legacy_mss=False, str "
      "parameterization=\"log_var\"";
  const std::string batch = "(Tensor z, Tensor mu, Tensor log_var, " + settings + ") -> ";
  define<AggregatePosteriorOp>(
      m, batch + "(Tensor log_qz, Tensor log_prod_qz)",
      "(Tensor? grad_log_qz, Tensor? grad_log_prod_qz, Tensor z, Tensor mu, Tensor log_var, "
      "Tensor? kept, int? dataset_size, str estimator, bool legacy_mss, str parameterization, "
      "bool[3] wanted) "
      "-> (Tensor, Tensor, Tensor)",
      batch + "(Tensor, Tensor, Tensor)");
}

}  // namespace fastvae
