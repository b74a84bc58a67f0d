// Diagonal Gaussians as torch ops. The formulas are in gaussian.h.
#include "gaussian.h"

#include "binding.h"

namespace fastvae {
namespace {

using std::optional;

struct ReparameterizeOp {
  static constexpr const char* kName = "reparameterize";
  static constexpr Keeps kKeeps{.sample = true};

  static Tensor forward(const Tensor& mu, const Tensor& log_var, const Tensor& key) {
    RowOp op(kName, {{"mu", mu}, {"log_var", log_var}});
    return op.key(key).run<Reparameterize::Forward>().outputs[0];
  }

  static std::tuple<Tensor, Tensor> backward(const Tensor& grad_z, const Tensor& mu,
                                             const Tensor& log_var, const Tensor& key,
                                             const optional<Tensor>& z,
                                             std::array<bool, 2> wanted) {
    if (!wanted[1]) return {};  // the gradient of mu is grad_z itself
    if (z) {
      RowOp op(kName, {{"grad_z", grad_z}, {"mu", mu}, {"log_var", log_var}, {"z", *z}});
      auto result = op.key(key).run<Reparameterize::BackwardFromSample>({wanted[1]});
      return {Tensor(), result.outputs[0]};
    }
    RowOp op(kName, {{"grad_z", grad_z}, {"log_var", log_var}});
    auto result = op.key(key).run<Reparameterize::Backward>({wanted[1]});
    return {Tensor(), result.outputs[0]};
  }
};

struct ReparameterizeKlOp {
  static constexpr const char* kName = "reparameterize_kl";
  static constexpr Keeps kKeeps{.sample = true};

  static std::tuple<Tensor, Tensor> forward(const Tensor& mu, const Tensor& log_var,
                                            const Tensor& key) {
    RowOp op(kName, {{"mu", mu}, {"log_var", log_var}});
    auto result = op.key(key).run<ReparameterizeKl::Forward>();
    return {result.outputs[0], result.row_sum};
  }

  // Where only one output is used, the other's gradient is absent, not zero: 0 * sigma eps is NaN
  // once sigma has overflowed.
  static std::tuple<Tensor, Tensor> backward(const optional<Tensor>& grad_z,
                                             const optional<Tensor>& grad_kl, const Tensor& mu,
                                             const Tensor& log_var, const Tensor& key,
                                             const optional<Tensor>& z,
                                             std::array<bool, 2> wanted) {
    if (!grad_kl) return ReparameterizeOp::backward(*grad_z, mu, log_var, key, z, wanted);
    if (!grad_z) {
      RowOp op(kName, {{"mu", mu}, {"log_var", log_var}});
      auto [d_mu, d_log_var] =
          op.row_input("grad_kl", *grad_kl).run<StandardGaussianKl::Backward>(wanted).outputs;
      return {d_mu, d_log_var};
    }
    if (z) {
      RowOp op(kName, {{"grad_z", *grad_z}, {"mu", mu}, {"log_var", log_var}, {"z", *z}});
      auto [d_mu, d_log_var] = op.key(key)
                                   .row_input("grad_kl", *grad_kl)
                                   .run<ReparameterizeKl::BackwardFromSample>(wanted)
                                   .outputs;
      return {d_mu, d_log_var};
    }
    RowOp op(kName, {{"grad_z", *grad_z}, {"mu", mu}, {"log_var", log_var}});
    auto [d_mu, d_log_var] =
        op.key(key).row_input("grad_kl", *grad_kl).run<ReparameterizeKl::Backward>(wanted).outputs;
    return {d_mu, d_log_var};
  }
};

struct GaussianKlOp {
  static constexpr const char* kName = "gaussian_kl";

  static Tensor forward(const Tensor& mu_q, const Tensor& log_var_q, const optional<Tensor>& mu_p,
                        const optional<Tensor>& log_var_p) {
    if (is_standard(mu_p, log_var_p)) {
      RowOp op(kName, {{"mu_q", mu_q}, {"log_var_q", log_var_q}});
      return op.run<StandardGaussianKl::Forward>().row_sum;
    }
    RowOp op(
        kName,
        {{"mu_q", mu_q}, {"log_var_q", log_var_q}, {"mu_p", *mu_p}, {"log_var_p", *log_var_p}});
    return op.run<GaussianKl::Forward>().row_sum;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
      const Tensor& grad_kl, const Tensor& mu_q, const Tensor& log_var_q,
      const optional<Tensor>& mu_p, const optional<Tensor>& log_var_p, std::array<bool, 4> wanted) {
    if (is_standard(mu_p, log_var_p)) {
      RowOp op(kName, {{"mu_q", mu_q}, {"log_var_q", log_var_q}});
      auto [d_mu, d_log_var] = op.row_input("grad_kl", grad_kl)
                                   .run<StandardGaussianKl::Backward>({wanted[0], wanted[1]})
                                   .outputs;
      return {d_mu, d_log_var, Tensor(), Tensor()};
    }
    RowOp op(
        kName,
        {{"mu_q", mu_q}, {"log_var_q", log_var_q}, {"mu_p", *mu_p}, {"log_var_p", *log_var_p}});
    auto [d_mu_q, d_log_var_q, d_mu_p, d_log_var_p] =
        op.row_input("grad_kl", grad_kl).run<GaussianKl::Backward>(wanted).outputs;
    return {d_mu_q, d_log_var_q, d_mu_p, d_log_var_p};
  }

  static bool is_standard(const optional<Tensor>& mu_p, const optional<Tensor>& log_var_p) {
    TORCH_CHECK_VALUE(mu_p.has_value() == log_var_p.has_value(),
                      "fastvae::gaussian_kl: mu_p and log_var_p must be given together, got only ",
                      mu_p.has_value() ? "mu_p" : "log_var_p");
    return !mu_p.has_value();
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define<ReparameterizeOp>(m, "(Tensor mu, Tensor log_var, Tensor key) -> Tensor",
                           "(Tensor grad_z, Tensor mu, Tensor log_var, Tensor key, "
                           "Tensor? z, bool[2] wanted) -> (Tensor, Tensor)");
  define<ReparameterizeKlOp>(m, "(Tensor mu, Tensor log_var, Tensor key) -> (Tensor z, Tensor kl)",
                             "(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor log_var, "
                             "Tensor key, Tensor? z, bool[2] wanted) -> (Tensor, Tensor)");
  define<GaussianKlOp>(m,
                       "(Tensor mu_q, Tensor log_var_q, Tensor? mu_p=None, "
                       "Tensor? log_var_p=None) -> Tensor",
                       "(Tensor grad_kl, Tensor mu_q, Tensor log_var_q, Tensor? mu_p, "
                       "Tensor? log_var_p, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  define_row_sum<GaussianLogProb>(m);
}

}  // namespace fastvae
