// Categorical latents and likelihoods: K classes by their unnormalised logits, in nats.
//
// The classes of a row know each other through its largest logit and its sums, so what is here are
// the steps between such reductions, an element each. categories.h walks rows on the CPU,
// categorical.cu on CUDA.
#pragma once

#include "sweep.h"

namespace fastvae {

// The weights of a softmax: e^{(s - max) / temperature}, to be divided by their sum. Relative to
// the largest, which weighs exactly 1: a sum of weights is at least that.
struct SoftmaxWeight : Formula<Shape{.inputs = 2, .outputs = 1, .parameters = 1}> {
  template <class T>
  static FASTVAE_HD Values<T, 1> eval(T s, T max, T inverse_temperature) {
    return {{math::exp_weight((s - max) * inverse_temperature)}};
  }
};

struct Product : Formula<Shape{.inputs = 2, .outputs = 1}> {
  template <class T>
  static FASTVAE_HD Values<T, 1> eval(T a, T b) {
    return {{a * b}};
  }
};

// y = softmax((l + g) / temperature), g = -log(-log u)
// (Jang, Gu & Poole 2017, eq. 2; Maddison, Mnih & Teh 2017, eq. 10)
struct GumbelSoftmax {
  // What is compared. The noise of finite logits is finite (philox.h), and so are they.
  struct Score : Formula<Shape{.inputs = 2, .outputs = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T logit, T gumbel) {
      return {{logit + gumbel}};
    }
  };

  // d loss / d l_k = y_k (grad_k - sum_j grad_j y_j) / temperature
  struct Gradient : Formula<Shape{.inputs = 3, .outputs = 1, .parameters = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T y, T grad, T dot, T inverse_temperature) {
      return {{y * ((grad - dot) * inverse_temperature)}};
    }
  };

  struct Forward : Formula<Shape{.inputs = 1, .noise = true, .outputs = 1, .parameters = 1}> {};
  // From grad and logits, the noise drawn again; or from grad and y.
  struct Backward : Formula<Shape{.inputs = 2, .noise = true, .outputs = 1, .parameters = 1}> {};
  struct BackwardFromSample
      : Formula<Shape{.inputs = 2, .outputs = 1, .parameters = 1, .cpu_only = true}> {};

  // 1 / temperature, as finite: at the largest score it multiplies 0.
  template <class T>
  static FASTVAE_HD T inverse(double inverse_temperature) {
    return inverse_temperature < double{math::largest<T>()} ? static_cast<T>(inverse_temperature)
                                                            : math::largest<T>();
  }
};

// Straight-through (Bengio, Leonard & Courville 2013): forward the one class with the largest
// score, of several the first; backward as GumbelSoftmax. A row whose softmax is NaN stays NaN.
struct GumbelOneHot {
  struct Forward : Formula<Shape{.inputs = 1, .noise = true, .outputs = 1, .parameters = 1}> {};
  struct Backward : GumbelSoftmax::Backward {};

  // Where no class is the largest: one is NaN or +inf, or all are -inf. NaN stays the largest.
  template <class T>
  static FASTVAE_HD T larger(T max, T s) {
    return s > max || s != s ? s : max;
  }
  template <class T>
  static FASTVAE_HD bool has_largest(T max) {
    return math::abs(max) <= math::largest<T>();
  }
};

// KL(q || p) = sum_k q_k (log q_k - log p_k) of q = softmax(l), p = softmax(m), or p_k = 1/K.
// With d_k = log p_k - log q_k it is also
//   sum_k q_k (e^{d_k} - 1 - d_k),
// since q and p both sum to 1: no term is negative, and near q = p all are of second order in d, so
// that nothing cancels. An error that all d_k share, of the normalisers, is of second order as
// well.
template <bool kPrior>
struct CategoricalKl {
  struct Forward : Formula<Shape{.inputs = kPrior ? 2 : 1, .row_sums = 1}> {};
  struct Backward
      : Formula<Shape{.inputs = kPrior ? 2 : 1, .row_inputs = 1, .outputs = kPrior ? 2 : 1}> {};
};

struct ClassKl {
  // d_k, but for the shift that the row shares: from differences of logits, exact where those are
  // alike, or, if they overflow, from what each is below the largest.
  struct LogRatio : Formula<Shape{.inputs = 4, .outputs = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T q, T p, T max_q, T max_p) {
      const T near = (p - q) - (max_p - max_q);
      return {{near == near ? near : (p - max_p) - (q - max_q)}};
    }
  };
  // Of the sums of weights.
  struct Shift : Formula<Shape{.inputs = 2, .outputs = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T sum_q, T sum_p) {
      return {{math::log(sum_p) - math::log(sum_q)}};
    }
  };

  // Of weights, and the inverses of their sums. A class that q excludes adds p_k, the limit; one
  // that only p excludes, +inf.
  struct Term : Formula<Shape{.inputs = 6, .outputs = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T weight_q, T weight_p, T inverse_q, T inverse_p, T ratio,
                                        T shift) {
      const T q = weight_q * inverse_q, p = weight_p * inverse_p, d = ratio - shift;
      const T near = T(2) * q * math::half_expm1_minus(math::min(T(1), d));
      const T far = p - q * (T(1) + d);  // e^d may be past the range, p is not
      return {{q == T(0) ? p : (d > T(1) ? far : near)}};
    }
  };
  // d KL / d l_k = q_k (-d_k - KL),  d KL / d m_k = p_k - q_k
  struct Gradient : Formula<Shape{.inputs = 8, .outputs = 2}> {
    template <class T>
    static FASTVAE_HD Values<T, 2> eval(T weight_q, T weight_p, T inverse_q, T inverse_p, T ratio,
                                        T shift, T kl, T grad) {
      const T q = weight_q * inverse_q, p = weight_p * inverse_p;
      const T d_q = q * ((shift - ratio) - kl);
      return {{q == T(0) ? T(0) : grad * d_q, grad * (p - q)}};
    }
  };

  // The same where all classes are equally likely by p: the ratio is max_q - l, all else shared.
  struct UniformTerm : Formula<Shape{.inputs = 4, .outputs = 1, .parameters = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T weight_q, T inverse_q, T below, T shift, T p) {
      return Term::eval<T>(weight_q, p, inverse_q, T(1), -below, shift);
    }
  };
  struct UniformGradient : Formula<Shape{.inputs = 6, .outputs = 1, .parameters = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T weight_q, T inverse_q, T below, T shift, T kl, T grad,
                                        T p) {
      return {{Gradient::eval<T>(weight_q, p, inverse_q, T(1), -below, shift, kl, grad).v[0]}};
    }
  };
  struct Below : Formula<Shape{.inputs = 2, .outputs = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T logit, T max) {
      return {{logit - max}};
    }
  };
};

// log p(x) = l_x - log sum_k e^{l_k}, summed over the variables of a datum. The class x is no
// argument of a formula: where there is no such class, all is NaN, and nothing is read.
struct CategoricalLogProb {
  struct Forward : Formula<Shape{.inputs = 1, .row_sums = 1}> {};  // inputs[1]: x, int64
  struct Backward : Formula<Shape{.inputs = 1, .row_inputs = 1, .outputs = 1}> {};

  template <class T>
  static FASTVAE_HD T value(T logit, T max, T sum) {
    return (logit - max) - math::log(sum);
  }
  static FASTVAE_HD bool exists(int64_t x, int64_t classes) {
    return static_cast<uint64_t>(x) < static_cast<uint64_t>(classes);
  }
};

// The sum over a datum's variables.
struct Total : Formula<Shape{.inputs = 1, .row_sums = 1}> {
  template <class T>
  static FASTVAE_HD Values<T, 1> eval(T x) {
    return {{x}};
  }
};

template <class T>
FASTVAE_HD constexpr T not_a_number() {
  return T(__builtin_nanf(""));
}

}  // namespace fastvae
