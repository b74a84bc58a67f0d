// Diagonal Gaussians, parameterised by mu and log_var = log sigma^2. All in nats.
#pragma once

#include "sweep.h"

namespace fastvae {

// z = mu + sigma eps,  sigma = e^{log_var / 2},  eps ~ N(0, 1)   (Kingma & Welling 2014, eq. 4)
struct Reparameterize {
  struct Forward : Formula<Shape{.inputs = 2, .noise = true, .outputs = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T mu, T log_var, T eps) {
      return {{mu + math::exp(T(0.5) * log_var) * eps}};
    }
  };

  // dz/dmu = 1, which needs no kernel; dz/dlog_var = sigma eps / 2, the noise drawn again.
  struct Backward : Formula<Shape{.inputs = 2, .noise = true, .outputs = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T grad_z, T log_var, T eps) {
      return {{grad_z * (T(0.5) * (math::exp(T(0.5) * log_var) * eps))}};
    }
  };

  // The same where z is at hand: sigma eps = z - mu, but for what z lost when it was rounded.
  struct BackwardFromSample
      : Formula<Shape{.inputs = 4, .noise = true, .outputs = 1, .cpu_only = true}> {
    template <class T>
    static FASTVAE_HD bool needs_noise(T, T mu, T log_var, T) {
      return !surely_recovers(mu, log_var);
    }
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T grad_z, T mu, T log_var, T z, T eps) {
      return {{grad_z * (T(0.5) * sigma_eps(mu, math::exp(T(0.5) * log_var), z, eps))}};
    }
  };

  // From z where that gives it to 64 ulp of sigma, else from the noise: a choice for each element
  // by itself, so that a gradient does not depend on what a thread happens to visit together.
  template <class T>
  static FASTVAE_HD T sigma_eps(T mu, T sigma, T z, T eps) {
    return math::abs(mu) < T(65) * sigma ? z - mu : sigma * eps;
  }

  // Whether |mu| < 64 sigma, by a bound on log mu^2 that takes no logarithm. No for NaN and inf.
  template <class T>
  static FASTVAE_HD bool surely_recovers(T mu, T log_var) {
    constexpr T kLn2 = T(0.6931471805599453);
    const T bound = (math::exponent(mu * mu) - T(11)) * kLn2;  // > log(mu^2 / 64^2)
    return bound <= log_var && log_var < T(80);
  }
};

// KL(N(mu, e^log_var) || N(0, 1)) = (mu^2 + e^log_var - 1 - log_var) / 2   (ibid., appendix B)
struct StandardGaussianKl {
  struct Forward : Formula<Shape{.inputs = 2, .row_sums = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T mu, T log_var) {
      return {{T(0.5) * mu * mu + math::half_expm1_minus(log_var)}};
    }
  };

  struct Backward : Formula<Shape{.inputs = 2, .row_inputs = 1, .outputs = 2}> {
    template <class T>
    static FASTVAE_HD Values<T, 2> eval(T mu, T log_var, T grad_kl) {
      return {{grad_kl * mu, grad_kl * math::half_expm1(log_var)}};
    }
  };
};

// The sample and its KL to the standard prior in one pass.
struct ReparameterizeKl {
  struct Forward : Formula<Shape{.inputs = 2, .noise = true, .outputs = 1, .row_sums = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 2> eval(T mu, T log_var, T eps) {
      const math::HalfExp<T> e = math::half_exp(log_var);
      return {{mu + e.exp_half * eps, T(0.5) * mu * mu + e.half_expm1_minus}};
    }
  };

  struct Backward : Formula<Shape{.inputs = 3, .row_inputs = 1, .noise = true, .outputs = 2}> {
    template <class T>
    static FASTVAE_HD Values<T, 2> eval(T grad_z, T mu, T log_var, T grad_kl, T eps) {
      const math::HalfExp<T> e = math::half_exp(log_var);
      return {
          {grad_z + grad_kl * mu, T(0.5) * grad_z * (e.exp_half * eps) + grad_kl * e.half_expm1}};
    }
  };

  struct BackwardFromSample
      : Formula<Shape{
            .inputs = 4, .row_inputs = 1, .noise = true, .outputs = 2, .cpu_only = true}> {
    template <class T>
    static FASTVAE_HD bool needs_noise(T, T mu, T log_var, T, T) {
      return !Reparameterize::surely_recovers(mu, log_var);
    }
    template <class T>
    static FASTVAE_HD Values<T, 2> eval(T grad_z, T mu, T log_var, T z, T grad_kl, T eps) {
      const math::HalfExp<T> e = math::half_exp(log_var);
      const T sigma_eps = Reparameterize::sigma_eps(mu, e.exp_half, z, eps);
      return {{grad_z + grad_kl * mu, T(0.5) * grad_z * sigma_eps + grad_kl * e.half_expm1}};
    }
  };
};

// KL(N(mu_q, e^log_var_q) || N(mu_p, e^log_var_p))
//   = ((mu_q - mu_p)^2 e^-log_var_p + e^delta - 1 - delta) / 2,   delta = log_var_q - log_var_p
struct GaussianKl {
  struct Forward : Formula<Shape{.inputs = 4, .row_sums = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T mu_q, T log_var_q, T mu_p, T log_var_p) {
      const T score = (mu_q - mu_p) * inverse_sigma(log_var_p);
      return {{T(0.5) * score * score + math::half_expm1_minus(log_var_q - log_var_p)}};
    }
  };

  struct Backward : Formula<Shape{.inputs = 4, .row_inputs = 1, .outputs = 4}> {
    template <class T>
    static FASTVAE_HD Values<T, 4> eval(T mu_q, T log_var_q, T mu_p, T log_var_p, T grad_kl) {
      const T precision_root = inverse_sigma(log_var_p);
      const T score = (mu_q - mu_p) * precision_root;
      const T grad_mu = grad_kl * (score * precision_root);
      const T grad_log_var = grad_kl * math::half_expm1(log_var_q - log_var_p);
      return {
          {grad_mu, grad_log_var, -grad_mu, -grad_log_var - grad_kl * (T(0.5) * score * score)}};
    }
  };

  // e^{-log_var / 2}, kept finite: a sample exactly at the mean scores 0, not 0 * inf.
  template <class T>
  static FASTVAE_HD T inverse_sigma(T log_var) {
    return math::min(math::largest<T>(), math::exp(T(-0.5) * log_var));
  }
};

// log N(x; mu, e^log_var) = -(log 2 pi + log_var + (x - mu)^2 e^-log_var) / 2
struct Gaussian {
  static constexpr const char* kName = "gaussian_log_prob";
  static constexpr int kInputs = 3;
  static constexpr const char* kArguments[] = {"x", "mu", "log_var"};
  static constexpr bool kKeeps = false;
  static constexpr double kLog2Pi = 1.837877066409345483560659472811;

  template <class T>
  static FASTVAE_HD T term(T x, T mu, T log_var) {
    const T score = (x - mu) * GaussianKl::inverse_sigma(log_var);
    const T finite_log_var = math::max(-math::largest<T>(), log_var);  // not -inf + inf
    return T(-0.5) * (T(kLog2Pi) + finite_log_var + score * score);
  }
  template <class T>
  static FASTVAE_HD Values<T, 3> gradient(T x, T mu, T log_var) {
    const T precision_root = GaussianKl::inverse_sigma(log_var);
    const T score = (x - mu) * precision_root;
    const T grad_mu = score * precision_root;
    return {{-grad_mu, grad_mu, T(0.5) * (score * score - T(1))}};
  }
};
using GaussianLogProb = RowSum<Gaussian>;

}  // namespace fastvae
