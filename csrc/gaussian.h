// Diagonal Gaussians, parameterised by mu and a scale (scale.h). All in nats.
#pragma once

#include "scale.h"
#include "sweep.h"

namespace fastvae {

// z = mu + sigma eps,  eps ~ N(0, 1)   (Kingma & Welling 2014, eq. 4)
template <class S>
struct Reparameterize {
  struct Forward : Formula<Shape{.inputs = 2, .noise = true, .outputs = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T mu, T s, T eps) {
      return {{mu + S::sigma(s) * eps}};
    }
  };

  // dz/dmu = 1, which needs no kernel; dz/ds = sigma' eps, the noise drawn again.
  struct Backward : Formula<Shape{.inputs = 2, .noise = true, .outputs = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T grad_z, T s, T eps) {
      return {{grad_z * (S::d_sigma(s) * eps)}};
    }
  };

  // The same where z is at hand: sigma eps = z - mu, but for what z lost when it was rounded.
  struct BackwardFromSample
      : Formula<Shape{.inputs = 4, .noise = true, .outputs = 1, .cpu_only = true}> {
    template <class T>
    static FASTVAE_HD bool needs_noise(T, T mu, T s, T) {
      return !S::surely_recovers(mu, s);
    }
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T grad_z, T mu, T s, T z, T eps) {
      return {{grad_z * d_sigma_eps(mu, s, S::sigma(s), S::d_sigma(s), z, eps)}};
    }
  };

  // From z where that gives it to 64 ulp of sigma, else from the noise: a choice for each element
  // by itself, so that a gradient does not depend on what a thread happens to visit together.
  template <class T>
  static FASTVAE_HD T d_sigma_eps(T mu, T s, T sigma, T d_sigma, T z, T eps) {
    return math::abs(mu) < T(65) * sigma ? S::d_log_sigma(s) * (z - mu) : d_sigma * eps;
  }
};

// Free bits (Kingma et al. 2016): a KL of less than that costs nothing, and its gradient is zero.
// Formulas that know them come in two kinds, the one without having no such parameter.
template <class T>
FASTVAE_HD T at_least(T kl) {
  return kl;
}
template <class T>
FASTVAE_HD T at_least(T kl, T free_bits) {
  return math::max(free_bits, kl);
}
template <class T>
FASTVAE_HD T unless_free(T grad, T) {
  return grad;
}
template <class T>
FASTVAE_HD T unless_free(T grad, T kl, T free_bits) {
  return kl < free_bits ? T(0) : grad;
}

// KL(N(mu, sigma^2) || N(0, 1)) = (mu^2 + sigma^2 - 1) / 2 - log sigma   (ibid., appendix B)
template <class S, bool kFreeBits = false>
struct StandardGaussianKl {
  struct Forward : Formula<Shape{.inputs = 2, .row_sums = 1, .parameters = kFreeBits}> {
    template <class T, class... Free>
    static FASTVAE_HD Values<T, 1> eval(T mu, T s, Free... free_bits) {
      return {{at_least(T(0.5) * mu * mu + S::kl(s), free_bits...)}};
    }
  };

  struct Backward
      : Formula<Shape{.inputs = 2, .row_inputs = 1, .outputs = 2, .parameters = kFreeBits}> {
    template <class T, class... Free>
    static FASTVAE_HD Values<T, 2> eval(T mu, T s, T grad_kl, Free... free_bits) {
      const T kl = kFreeBits ? T(0.5) * mu * mu + S::kl(s) : T(0);
      const T grad = unless_free(grad_kl, kl, free_bits...);
      return {{grad * mu, grad * S::d_kl(s)}};
    }
  };
};

// The sample and its KL to the standard prior in one pass.
template <class S, bool kFreeBits = false>
struct ReparameterizeKl {
  struct Forward : Formula<Shape{.inputs = 2,
                                 .noise = true,
                                 .outputs = 1,
                                 .row_sums = 1,
                                 .parameters = kFreeBits,
                                 .many_registers = S::kManyRegisters}> {
    template <class T, class... Free>
    static FASTVAE_HD Values<T, 2> eval(T mu, T s, T eps, Free... free_bits) {
      const ScaleTerms<T> e = S::terms(s);
      return {{mu + e.sigma * eps, at_least(T(0.5) * mu * mu + e.kl, free_bits...)}};
    }
  };

  struct Backward : Formula<Shape{.inputs = 3,
                                  .row_inputs = 1,
                                  .noise = true,
                                  .outputs = 2,
                                  .parameters = kFreeBits,
                                  .many_registers = S::kManyRegisters}> {
    template <class T, class... Free>
    static FASTVAE_HD Values<T, 2> eval(T grad_z, T mu, T s, T grad_kl, T eps, Free... free_bits) {
      const ScaleTerms<T> e = S::terms(s);
      return gradient(grad_z, mu, grad_kl, e, e.d_sigma * eps, free_bits...);
    }
  };

  struct BackwardFromSample
      : Formula<Shape{
            .inputs = 4, .row_inputs = 1, .noise = true, .outputs = 2, .cpu_only = true}> {
    template <class T>
    static FASTVAE_HD bool needs_noise(T, T mu, T s, T, T) {
      return !S::surely_recovers(mu, s);
    }
    template <class T>
    static FASTVAE_HD Values<T, 2> eval(T grad_z, T mu, T s, T z, T grad_kl, T eps) {
      const ScaleTerms<T> e = S::terms(s);
      const T d_z = Reparameterize<S>::d_sigma_eps(mu, s, e.sigma, e.d_sigma, z, eps);
      return gradient(grad_z, mu, grad_kl, e, d_z);
    }
  };

  template <class T, class... Free>
  static FASTVAE_HD Values<T, 2> gradient(T grad_z, T mu, T grad_kl, const ScaleTerms<T>& e, T d_z,
                                          Free... free_bits) {
    const T grad = unless_free(grad_kl, T(0.5) * mu * mu + e.kl, free_bits...);
    return {{grad_z + grad * mu, grad_z * d_z + grad * e.d_kl}};
  }
};

// KL(N(mu_q, sigma_q^2) || N(mu_p, sigma_p^2))
//   = ((mu_q - mu_p)^2 / sigma_p^2 + r^2 - 1) / 2 - log r,   r = sigma_q / sigma_p
template <class S, bool kFreeBits = false>
struct GaussianKl {
  struct Forward : Formula<Shape{.inputs = 4,
                                 .row_sums = 1,
                                 .parameters = kFreeBits,
                                 .many_registers = S::kManyRegisters}> {
    template <class T, class... Free>
    static FASTVAE_HD Values<T, 1> eval(T mu_q, T s_q, T mu_p, T s_p, Free... free_bits) {
      const T score = (mu_q - mu_p) * S::inverse_sigma(s_p);
      return {{at_least(T(0.5) * score * score + S::relative(s_q, s_p).kl, free_bits...)}};
    }
  };

  struct Backward : Formula<Shape{.inputs = 4,
                                  .row_inputs = 1,
                                  .outputs = 4,
                                  .parameters = kFreeBits,
                                  .many_registers = S::kManyRegisters}> {
    template <class T, class... Free>
    static FASTVAE_HD Values<T, 4> eval(T mu_q, T s_q, T mu_p, T s_p, T grad_kl,
                                        Free... free_bits) {
      const T precision_root = S::inverse_sigma(s_p);
      const T score = (mu_q - mu_p) * precision_root;
      const RelativeScale<T> r = S::relative(s_q, s_p);
      const T grad = unless_free(grad_kl, T(0.5) * score * score + r.kl, free_bits...);
      const T d_mu = grad * (score * precision_root), half_rise = grad * r.half_rise;
      const T d_log_q = T(2) * S::d_log_sigma(s_q), d_log_p = T(2) * S::d_log_sigma(s_p);
      return {{d_mu, half_rise * d_log_q, -d_mu,
               (-half_rise - grad * (T(0.5) * score * score)) * d_log_p}};
    }
  };
};

// log N(x; mu, sigma^2) = -(log 2 pi + (x - mu)^2 / sigma^2) / 2 - log sigma
template <class S>
struct Gaussian {
  static constexpr const char* kName = "gaussian_log_prob";
  static constexpr int kInputs = 3;
  static constexpr const char* kArguments[] = {"x", "mu", "log_var"};
  static constexpr bool kKeeps = false;
  static constexpr double kLog2Pi = 1.837877066409345483560659472811;

  template <class T>
  static FASTVAE_HD T term(T x, T mu, T s) {
    const T score = (x - mu) * S::inverse_sigma(s);
    return T(-0.5) * (T(kLog2Pi) + S::log_var(s) + score * score);
  }
  template <class T>
  static FASTVAE_HD Values<T, 3> gradient(T x, T mu, T s) {
    const T precision_root = S::inverse_sigma(s);
    const T score = (x - mu) * precision_root;
    const T d_mu = score * precision_root;
    return {{-d_mu, d_mu, S::d_log_sigma(s) * (score * score - T(1))}};
  }
};
template <class S>
using GaussianLogProb = RowSum<Gaussian<S>>;

}  // namespace fastvae
