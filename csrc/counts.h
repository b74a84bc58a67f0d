// Likelihoods of counts p(x | z), x >= 0, in nats. What their logarithms are made of is in math.h.
#pragma once

#include "sweep.h"

namespace fastvae {

// log Poisson(x; e^r) = x r - e^r - log x! = -x (e^t - 1 - t) - gap(x),   t = r - log x
// The second form is of second order in t: nothing large cancels where the rate fits the count.
struct Poisson {
  static constexpr const char* kName = "poisson_log_prob";
  static constexpr int kInputs = 2;
  static constexpr const char* kArguments[] = {"x", "log_rate"};
  static constexpr bool kKeeps = true;

  template <class T>
  static FASTVAE_HD T term(T x, T log_rate) {
    const T t = log_rate - math::log_normal(math::max(math::Real<T>::kTiny, x));
    const T some = T(-2) * x * math::half_expm1_minus(t) - math::stirling_gap(x);
    return is_count(x) ? (x == T(0) ? -math::exp(log_rate) : some) : nan<T>();
  }
  template <class T>
  static FASTVAE_HD Values<T, 2> gradient(T x, T log_rate) {
    const T d_x = log_rate - digamma_of_next(x);
    return {{is_count(x) ? d_x : nan<T>(), is_count(x) ? x - math::exp(log_rate) : nan<T>()}};
  }

  template <class T>
  static FASTVAE_HD bool is_count(T x) {
    return (x >= T(0)) & (x <= math::largest<T>());
  }
  template <class T>
  static FASTVAE_HD T digamma_of_next(T x) {
    return math::digamma_gap(x + T(1)) + math::log_normal(x + T(1));
  }
  template <class T>
  static FASTVAE_HD constexpr T nan() {
    return T(__builtin_nanf(""));
  }
};
using PoissonLogProb = RowSum<Poisson>;

// log NB(x; mu, theta) = log Gamma(x + theta) - log Gamma(theta) - log x!
//                        + theta log(theta / (theta + mu)) + x log(mu / (theta + mu)),
// mean mu and inverse dispersion theta as in scVI (Lopez et al. 2018). With gap as above,
//   = x log(mu (theta + x) / (x (theta + mu))) - theta log((theta + mu) / (theta + x))
//     + gap(x + theta) - gap(theta) - gap(x) - log(1 + x / theta),
// whose logarithms vanish where mu = x, and which goes over into the Poisson's as theta grows.
struct NegativeBinomial {
  static constexpr const char* kName = "negative_binomial_log_prob";
  static constexpr int kInputs = 3;
  static constexpr const char* kArguments[] = {"x", "mu", "theta"};
  static constexpr bool kKeeps = false;

  template <class T>
  static FASTVAE_HD T term(T x, T mu, T theta) {
    const T n = x + theta, m = mu + theta, d = mu - x, y = x == T(0) ? T(1) : x;
    const T first =
        math::log_near(math::max(math::Real<T>::kTiny, (mu / y) * (n / m)), (theta / m) * (d / y));
    const T deviance = theta * math::log_near(m / n, d / n) - (x == T(0) ? T(0) : x * first);
    const T log_n = math::log_near(n / theta, x / theta);
    const T value = (math::stirling_gap(n) - math::stirling_gap(theta)) -
                    (math::stirling_gap(x) + log_n) - deviance;
    const T possible = (mu == T(0)) & (x > T(0)) ? -math::kInfinity<T> : value;
    return is_valid(x, mu, theta) ? possible : Poisson::nan<T>();
  }
  template <class T>
  static FASTVAE_HD Values<T, 3> gradient(T x, T mu, T theta) {
    const T n = x + theta, m = mu + theta, d = mu - x;
    const T d_mu = x == T(0) ? -theta / m : -(theta / m) * (d / mu);
    const T f = -d / m;  // n / m - 1
    const T d_theta = math::digamma_gap_rise(theta, x) + math::log_near_minus(n / m, f);
    const T d_x = math::digamma_gap(n) - Poisson::digamma_of_next(x) + math::log_near(n / m, f) +
                  math::log_normal(math::max(math::Real<T>::kTiny, mu));
    const bool valid = is_valid(x, mu, theta);
    const T nan = Poisson::nan<T>();
    return {{valid ? d_x : nan, valid ? d_mu : nan, valid ? d_theta : nan}};
  }

  template <class T>
  static FASTVAE_HD bool is_valid(T x, T mu, T theta) {
    return Poisson::is_count(x) & (mu >= T(0)) & (mu <= math::largest<T>()) & (theta > T(0)) &
           (theta <= math::largest<T>());
  }
};
using NegativeBinomialLogProb = RowSum<NegativeBinomial>;

// The same, but zero with probability pi = sigmoid(l) whatever the counts say:
//   x > 0: log(1 - pi) + log NB(x);   x = 0: log(pi + (1 - pi) NB(0))
//                                            = softplus(log NB(0) - l) - softplus(-l)
struct ZeroInflatedNegativeBinomial {
  static constexpr const char* kName = "zero_inflated_negative_binomial_log_prob";
  static constexpr int kInputs = 4;
  static constexpr const char* kArguments[] = {"x", "mu", "theta", "logits"};
  static constexpr bool kKeeps = false;

  template <class T>
  static FASTVAE_HD T term(T x, T mu, T theta, T logit) {
    const T counts = NegativeBinomial::term(x, mu, theta);
    return x == T(0) ? softplus(counts - logit) - softplus(-logit) : counts - softplus(logit);
  }
  template <class T>
  static FASTVAE_HD Values<T, 4> gradient(T x, T mu, T theta, T logit) {
    const bool zero = x == T(0);
    const Values<T, 3> g = NegativeBinomial::gradient(x, mu, theta);
    const T m = mu + theta;
    const T at_zero = -theta * math::log_near(m / theta, mu / theta);  // log NB(0)
    const T from_counts = zero ? sigmoid(at_zero - logit) : T(1);      // that a zero is a count
    const T d_logit = zero ? sigmoid(-logit) - from_counts : -sigmoid(logit);
    return {{from_counts * g.v[0], from_counts * g.v[1], from_counts * g.v[2], d_logit}};
  }

  template <class T>
  static FASTVAE_HD T softplus(T x) {
    return math::max(T(0), x) + math::log1p_unit(math::exp_nonpositive(-math::abs(x)));
  }
  template <class T>
  static FASTVAE_HD T sigmoid(T x) {
    return math::sigmoid(x, math::exp_nonpositive(-math::abs(x)));
  }
};
using ZeroInflatedNegativeBinomialLogProb = RowSum<ZeroInflatedNegativeBinomial>;

}  // namespace fastvae
