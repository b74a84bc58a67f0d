// Diagonal Gaussians as torch ops. The formulas are in gaussian.h.
#include "gaussian.h"

#include "binding.h"

namespace fastvae {
namespace {

using std::optional;

using c10::string_view;

// The KL is never negative, so that forward always has its maximum with the free bits, 0 of none.
// Backward would have to know the KL for it: a formula of its own.
constexpr bool kFreeBits = true;

void check_free_bits(const char* op, double free_bits) {
  TORCH_CHECK_VALUE(free_bits >= 0, "fastvae::", op, ": free_bits must be non-negative, got ",
                    free_bits);
}

struct ReparameterizeOp {
  static constexpr const char* kName = "reparameterize";
  static constexpr Keeps kKeeps{.sample = true};

  static Tensor forward(const Tensor& mu, const Tensor& log_var, const Tensor& key,
                        string_view parameterization) {
    RowOp op(kName, {{"mu", mu}, {"log_var", log_var}});
    op.key(key);
    return with_scale(kName, parameterization, [&]<class S>(S) {
      return op.run<typename Reparameterize<S>::Forward>().outputs[0];
    });
  }

  static std::tuple<Tensor, Tensor> backward(const Tensor& grad_z, const Tensor& mu,
                                             const Tensor& log_var, const Tensor& key,
                                             const optional<Tensor>& z,
                                             string_view parameterization,
                                             std::array<bool, 2> wanted) {
    if (!wanted[1]) return {};  // the gradient of mu is grad_z itself
    return with_scale(kName, parameterization, [&]<class S>(S) -> std::tuple<Tensor, Tensor> {
      if (z) {
        RowOp op(kName, {{"grad_z", grad_z}, {"mu", mu}, {"log_var", log_var}, {"z", *z}});
        auto result = op.key(key).run<typename Reparameterize<S>::BackwardFromSample>({wanted[1]});
        return {Tensor(), result.outputs[0]};
      }
      RowOp op(kName, {{"grad_z", grad_z}, {"log_var", log_var}});
      auto result = op.key(key).run<typename Reparameterize<S>::Backward>({wanted[1]});
      return {Tensor(), result.outputs[0]};
    });
  }
};

struct ReparameterizeKlOp {
  static constexpr const char* kName = "reparameterize_kl";
  static constexpr Keeps kKeeps{.sample = true};

  static std::tuple<Tensor, Tensor> forward(const Tensor& mu, const Tensor& log_var,
                                            const Tensor& key, string_view parameterization,
                                            double free_bits) {
    check_free_bits(kName, free_bits);
    RowOp op(kName, {{"mu", mu}, {"log_var", log_var}});
    op.key(key).parameter(free_bits);
    return with_scale(kName, parameterization, [&]<class S>(S) -> std::tuple<Tensor, Tensor> {
      auto result = op.run<typename ReparameterizeKl<S, kFreeBits>::Forward>();
      return {result.outputs[0], result.row_sum};
    });
  }

  // Where only one output is used, the other's gradient is absent, not zero: 0 * sigma eps is NaN
  // once sigma has overflowed.
  static std::tuple<Tensor, Tensor> backward(const optional<Tensor>& grad_z,
                                             const optional<Tensor>& grad_kl, const Tensor& mu,
                                             const Tensor& log_var, const Tensor& key,
                                             const optional<Tensor>& z,
                                             string_view parameterization, double free_bits,
                                             std::array<bool, 2> wanted) {
    if (!grad_kl) {
      return ReparameterizeOp::backward(*grad_z, mu, log_var, key, z, parameterization, wanted);
    }
    check_free_bits(kName, free_bits);
    const auto run = [&]<class F>(RowOp op) -> std::tuple<Tensor, Tensor> {
      op.row_input("grad_kl", *grad_kl).parameter(free_bits);
      auto [d_mu, d_log_var] = op.run<F>(wanted).outputs;
      return {d_mu, d_log_var};
    };
    const bool free = free_bits > 0;
    return with_scale(kName, parameterization, [&]<class S>(S) {
      if (!grad_z) {
        const RowOp op(kName, {{"mu", mu}, {"log_var", log_var}});
        using Kl = StandardGaussianKl<S>;
        using FreeKl = StandardGaussianKl<S, kFreeBits>;
        return free ? run.template operator()<typename FreeKl::Backward>(op)
                    : run.template operator()<typename Kl::Backward>(op);
      }
      if (z && !free) {
        RowOp op(kName, {{"grad_z", *grad_z}, {"mu", mu}, {"log_var", log_var}, {"z", *z}});
        return run.template operator()<typename ReparameterizeKl<S>::BackwardFromSample>(
            op.key(key));
      }
      RowOp op(kName, {{"grad_z", *grad_z}, {"mu", mu}, {"log_var", log_var}});
      op.key(key);
      return free ? run.template operator()<typename ReparameterizeKl<S, kFreeBits>::Backward>(op)
                  : run.template operator()<typename ReparameterizeKl<S>::Backward>(op);
    });
  }
};

struct GaussianKlOp {
  static constexpr const char* kName = "gaussian_kl";

  static Tensor forward(const Tensor& mu_q, const Tensor& log_var_q, const optional<Tensor>& mu_p,
                        const optional<Tensor>& log_var_p, string_view parameterization,
                        double free_bits) {
    check_free_bits(kName, free_bits);
    RowOp op = inputs(mu_q, log_var_q, mu_p, log_var_p);
    op.parameter(free_bits);
    return with_scale(kName, parameterization, [&]<class S>(S) {
      return mu_p ? op.run<typename GaussianKl<S, kFreeBits>::Forward>().row_sum
                  : op.run<typename StandardGaussianKl<S, kFreeBits>::Forward>().row_sum;
    });
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
      const Tensor& grad_kl, const Tensor& mu_q, const Tensor& log_var_q,
      const optional<Tensor>& mu_p, const optional<Tensor>& log_var_p, string_view parameterization,
      double free_bits, std::array<bool, 4> wanted) {
    check_free_bits(kName, free_bits);
    RowOp op = inputs(mu_q, log_var_q, mu_p, log_var_p);
    op.row_input("grad_kl", grad_kl).parameter(free_bits);
    using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;
    const auto standard = [&]<class F>(F) -> Gradients {
      auto [d_mu, d_log_var] = op.run<F>({wanted[0], wanted[1]}).outputs;
      return {d_mu, d_log_var, Tensor(), Tensor()};
    };
    const auto prior = [&]<class F>(F) -> Gradients {
      auto [d_mu_q, d_log_var_q, d_mu_p, d_log_var_p] = op.run<F>(wanted).outputs;
      return {d_mu_q, d_log_var_q, d_mu_p, d_log_var_p};
    };
    const bool free = free_bits > 0;
    return with_scale(kName, parameterization, [&]<class S>(S) {
      if (mu_p) {
        return free ? prior(typename GaussianKl<S, kFreeBits>::Backward())
                    : prior(typename GaussianKl<S>::Backward());
      }
      return free ? standard(typename StandardGaussianKl<S, kFreeBits>::Backward())
                  : standard(typename StandardGaussianKl<S>::Backward());
    });
  }

  static RowOp inputs(const Tensor& mu_q, const Tensor& log_var_q, const optional<Tensor>& mu_p,
                      const optional<Tensor>& log_var_p) {
    TORCH_CHECK_VALUE(mu_p.has_value() == log_var_p.has_value(),
                      "fastvae::gaussian_kl: mu_p and log_var_p must be given together, got only ",
                      mu_p.has_value() ? "mu_p" : "log_var_p");
    if (!mu_p) return RowOp(kName, {{"mu_q", mu_q}, {"log_var_q", log_var_q}});
    return RowOp(
        kName,
        {{"mu_q", mu_q}, {"log_var_q", log_var_q}, {"mu_p", *mu_p}, {"log_var_p", *log_var_p}});
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  const std::string map = "str parameterization=\"log_var\"", free = "float free_bits=0.0";
  const std::string sample = "(Tensor mu, Tensor log_var, Tensor key, " + map;
  define<ReparameterizeOp>(m, sample + ") -> Tensor",
                           "(Tensor grad_z, Tensor mu, Tensor log_var, Tensor key, Tensor? z, "
                           "str parameterization, bool[2] wanted) -> (Tensor, Tensor)");
  define<ReparameterizeKlOp>(m, sample + ", " + free + ") -> (Tensor z, Tensor kl)",
                             "(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor log_var, "
                             "Tensor key, Tensor? z, str parameterization, float free_bits, "
                             "bool[2] wanted) -> (Tensor, Tensor)");
  define<GaussianKlOp>(m,
                       "(Tensor mu_q, Tensor log_var_q, Tensor? mu_p=None, "
                       "Tensor? log_var_p=None, " +
                           map + ", " + free + ") -> Tensor",
                       "(Tensor grad_kl, Tensor mu_q, Tensor log_var_q, Tensor? mu_p, "
                       "Tensor? log_var_p, str parameterization, float free_bits, bool[4] wanted) "
                       "-> (Tensor, Tensor, Tensor, Tensor)");
  define_row_sum<GaussianLogProb, LogVar, LogScale, Scale, Softplus>(m);
}

}  // namespace fastvae
