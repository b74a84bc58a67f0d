// Likelihoods p(x | z) other than the Gaussian, from the decoder's unconstrained outputs, in nats.
#pragma once

#include "scale.h"
#include "sweep.h"

namespace fastvae {

// log Bernoulli(x; sigmoid(l)) = x l - softplus(l) = (x - [l > 0]) l - log(1 + e^-|l|)
// The second form cannot cancel: at x = 1, l >> 0 it keeps every digit of -e^-l.
struct Bernoulli {
  static constexpr const char* kName = "bernoulli_log_prob";
  static constexpr int kInputs = 2;
  static constexpr const char* kArguments[] = {"x", "logits"};
  static constexpr bool kKeeps = true;  // x - sigmoid(l): backward needs no exponential of its own

  template <class T>
  static FASTVAE_HD T term(T x, T logit) {
    return linear(x, logit) - math::log1p_unit(math::exp_nonpositive(-math::abs(logit)));
  }
  template <class T>
  static FASTVAE_HD Values<T, 2> gradient(T x, T logit) {
    return {{logit, x - math::sigmoid(logit, math::exp_nonpositive(-math::abs(logit)))}};
  }

  // (x - [l > 0]) l; for a certain, right bet 0, not 0 * inf
  template <class T>
  static FASTVAE_HD T linear(T x, T logit) {
    const T miss = logit > T(0) ? x - T(1) : x;
    return miss == T(0) ? T(0) : miss * logit;
  }
};
using BernoulliLogProb = RowSum<Bernoulli>;

// The Bernoulli of x in [0, 1], normalised (Loaiza-Ganem & Cunningham 2019): with l the logit of
// lambda, its log C(lambda) joins the softplus, and
//   log p(x) = x l - log((e^l - 1) / l) = (x - [l > 0]) l + log(|l| / (1 - e^-|l|)),
// or, where both terms vanish, (x - 1/2) l - log(sinh(l/2) / (l/2)) by its series.
struct ContinuousBernoulli {
  static constexpr const char* kName = "continuous_bernoulli_log_prob";
  static constexpr int kInputs = 2;
  static constexpr const char* kArguments[] = {"x", "logits"};
  static constexpr bool kKeeps = true;

  template <class T>
  static FASTVAE_HD T term(T x, T logit) {
    const T a = math::min(math::largest<T>(), math::abs(logit));
    const T far = Bernoulli::linear(x, logit) +
                  math::log_normal(math::max(T(1), a) / (T(-2) * math::half_expm1(-a)));
    const T near = (x - T(0.5)) * logit - log_sinhc(logit * logit);
    return a < T(1) ? near : far;
  }
  // d/dl = x - E[x], E[x] = 1 / (1 - e^-l) - 1 / l
  template <class T>
  static FASTVAE_HD Values<T, 2> gradient(T x, T logit) {
    const T a = math::abs(logit);
    const T lower = T(1) / math::max(T(1), a) - T(0.5) / math::half_expm1(a);  // at l = -a
    const T far = logit < T(0) ? lower : T(1) - lower;
    const T near = T(0.5) + logit * excess_mean(logit * logit);
    return {{logit, x - (a < T(1) ? near : far)}};
  }

  // With c_n = B_2n / (2n)! of the Bernoulli numbers, to 1 ulp for s = l^2 <= 1:
  // (E[x] - 1/2) / l = sum of c_n s^(n-1), and its integral log(sinh(l/2) / (l/2)) = sum of
  // c_n s^n / 2n.
  template <class T>
  static FASTVAE_HD T excess_mean(T s) {
    return series<T, false>(s);
  }
  template <class T>
  static FASTVAE_HD T log_sinhc(T s) {
    return s * series<T, true>(s);
  }
  template <class T, bool kIntegrated>
  static FASTVAE_HD T series(T s) {
    constexpr double c[] = {0.08333333333333333,    -0.001388888888888889,   3.306878306878307e-05,
                            -8.267195767195768e-07, 2.08767569878681e-08,    -5.284190138687493e-10,
                            1.3382536530684679e-11, -3.3896802963225827e-13, 8.586062056277845e-15,
                            -2.174868698558062e-16, 5.5090028283602295e-18};
    T sum = T(0);
    FASTVAE_UNROLL
    for (int n = sizeof(T) == 8 ? 11 : 6; n > 0; --n) {
      sum = sum * s + T(kIntegrated ? c[n - 1] / (2 * n) : c[n - 1]);
    }
    return sum;
  }
};
using ContinuousBernoulliLogProb = RowSum<ContinuousBernoulli>;

// log Laplace(x; mu, b) = -log 2 - log b - |x - mu| / b
template <class S>
struct Laplace {
  static constexpr const char* kName = "laplace_log_prob";
  static constexpr int kInputs = 3;
  static constexpr const char* kArguments[] = {"x", "mu", "log_scale"};
  static constexpr bool kKeeps = false;
  static constexpr double kLog2 = 0.693147180559945309417232121458;

  template <class T>
  static FASTVAE_HD T term(T x, T mu, T s) {
    return -T(kLog2) - S::log_sigma(s) - math::abs(deviation(x, mu, s));
  }
  template <class T>
  static FASTVAE_HD Values<T, 3> gradient(T x, T mu, T s) {
    const T d = deviation(x, mu, s), r = S::inverse_sigma(s);
    const T slope = d > T(0) ? r : (d < T(0) ? -r : d);  // 0 at the mean, as in torch; NaN stays
    return {{-slope, slope, S::d_log_sigma(s) * (math::abs(d) - T(1))}};
  }
  // (x - mu) / b; exactly at the mean 0, not 0 * inf
  template <class T>
  static FASTVAE_HD T deviation(T x, T mu, T s) {
    return x == mu ? T(0) : (x - mu) * S::any_inverse_sigma(s);
  }
};
template <class S>
using LaplaceLogProb = RowSum<Laplace<S>>;

}  // namespace fastvae
