// Likelihoods p(x | z) other than the Gaussian, from the decoder's unconstrained outputs, in nats.
#pragma once

#include "sweep.h"

namespace fastvae {

// log Bernoulli(x; sigmoid(l)) = x l - softplus(l) = (x - [l > 0]) l - log(1 + e^-|l|)
// The second form cannot cancel: at x = 1, l >> 0 it keeps every digit of -e^-l.
struct BernoulliLogProb {
  struct Forward : Formula<Shape{.inputs = 2, .row_sums = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T x, T logit) {
      return {{log_prob(x, logit, math::exp(-math::abs(logit)))}};
    }
  };

  // Keeps x - sigmoid(l) for backward, which then needs no exponential of its own.
  struct ForwardKeeping
      : Formula<Shape{.inputs = 2, .outputs = 1, .row_sums = 1, .cpu_only = true}> {
    template <class T>
    static FASTVAE_HD Values<T, 2> eval(T x, T logit) {
      const T t = math::exp(-math::abs(logit));
      return {{x - math::sigmoid(logit, t), log_prob(x, logit, t)}};
    }
  };

  struct Backward : Formula<Shape{.inputs = 2, .row_inputs = 1, .outputs = 2}> {
    template <class T>
    static FASTVAE_HD Values<T, 2> eval(T x, T logit, T grad) {
      const T t = math::exp(-math::abs(logit));
      return {{grad * logit, grad * (x - math::sigmoid(logit, t))}};
    }
  };

  template <class T>
  static FASTVAE_HD T log_prob(T x, T logit, T t) {  // t = e^-|l|
    const T miss = logit > T(0) ? x - T(1) : x;
    const T linear = miss == T(0) ? T(0) : miss * logit;  // a certain, right bet: 0, not 0 * inf
    return linear - math::log1p_unit(t);
  }
};

}  // namespace fastvae
