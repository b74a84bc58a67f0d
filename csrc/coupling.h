// Affine couplings: each column moved by a scale and a shift that a network made of other columns.
//
// A kind says what a network's number s makes of sigma, and how the shift t joins:
//
//   Exp      y = sigma x + t,              sigma = e^s
//   TanhExp  y = sigma x + t,              sigma = e^tanh(s)            RealNVP, 2017
//   Sigmoid  y = sigma (x + t),            sigma = 1 / (1 + e^-(s + 2))    Glow, 2018
//   Gated    y = sigma x + (1 - sigma) t,  sigma = 1 / (1 + e^-s)           IAF, 2016
//
// and each row's log-determinant is the sum of log sigma, of the inverse minus that. Gradients are
// with respect to x, t and s.
#pragma once

#include "sweep.h"

namespace fastvae {

enum class AffineKind : int { kExp, kTanhExp, kSigmoid, kGated, kAdditive };

// A scale: log sigma and its derivative, sigma and 1 / sigma. What a formula does not use of these
// is not computed.
template <class T>
struct Factor {
  T log_sigma, slope, sigma, inverse;
};

// What moves x as e^{log sigma} x + t.
struct Scaled {
  static constexpr bool kAddsShift = true;  // dy/dt = 1, which needs no kernel

  template <class T>
  static FASTVAE_HD T apply(T x, T t, const Factor<T>& e) {
    return e.sigma * x + t;
  }
  template <class T>
  static FASTVAE_HD T invert(T y, T t, const Factor<T>& e) {
    return (y - t) * e.inverse;
  }
  template <class T>  // what sigma multiplies
  static FASTVAE_HD T stretched(T x, T) {
    return x;
  }
  template <class T>
  static FASTVAE_HD T d_shift(const Factor<T>&) {
    return T(1);
  }
  template <class T>  // of x = invert(y, t), but for the sign
  static FASTVAE_HD T d_shift_inverse(const Factor<T>& e) {
    return e.inverse;
  }
};

struct Exp : Scaled {
  static constexpr const char* kName = "exp";
  static constexpr AffineKind kKind = AffineKind::kExp;

  template <class T>
  static FASTVAE_HD Factor<T> factor(T s) {
    return {s, T(1), math::exp(s), math::exp(-s)};
  }
};

struct TanhExp : Scaled {
  static constexpr const char* kName = "tanh_exp";
  static constexpr AffineKind kKind = AffineKind::kTanhExp;

  template <class T>
  static FASTVAE_HD Factor<T> factor(T s) {
    const math::Tanh<T> bounded = math::tanh(s);
    return {bounded.value, bounded.slope, math::exp_weight(bounded.value),
            math::exp_weight(-bounded.value)};
  }
};

// sigma = 1 / (1 + e^-s), slope = 1 - sigma
template <class T>
FASTVAE_HD Factor<T> logistic_factor(T s) {
  const T e = math::exp_nonpositive(-math::abs(s));
  return {math::min(T(0), s) - math::log1p_unit(e), math::sigmoid(-s, e), math::sigmoid(s, e),
          T(1) + math::exp(-s)};
}

struct Sigmoid {
  static constexpr const char* kName = "sigmoid";
  static constexpr AffineKind kKind = AffineKind::kSigmoid;
  static constexpr bool kAddsShift = false;

  template <class T>
  static FASTVAE_HD Factor<T> factor(T s) {
    return logistic_factor(s + T(2));
  }
  template <class T>
  static FASTVAE_HD T apply(T x, T t, const Factor<T>& e) {
    return e.sigma * (x + t);
  }
  template <class T>
  static FASTVAE_HD T invert(T y, T t, const Factor<T>& e) {
    return y * e.inverse - t;
  }
  template <class T>
  static FASTVAE_HD T stretched(T x, T t) {
    return x + t;
  }
  template <class T>
  static FASTVAE_HD T d_shift(const Factor<T>& e) {
    return e.sigma;
  }
  template <class T>
  static FASTVAE_HD T d_shift_inverse(const Factor<T>&) {
    return T(1);
  }
};

struct Gated {
  static constexpr const char* kName = "gated";
  static constexpr AffineKind kKind = AffineKind::kGated;
  static constexpr bool kAddsShift = false;

  template <class T>
  static FASTVAE_HD Factor<T> factor(T s) {
    return logistic_factor(s);
  }
  template <class T>
  static FASTVAE_HD T apply(T x, T t, const Factor<T>& e) {
    return e.sigma * x + e.slope * t;
  }
  template <class T>
  static FASTVAE_HD T invert(T y, T t, const Factor<T>& e) {
    return t + (y - t) * e.inverse;
  }
  template <class T>
  static FASTVAE_HD T stretched(T x, T t) {
    return x - t;
  }
  template <class T>
  static FASTVAE_HD T d_shift(const Factor<T>& e) {
    return e.slope;
  }
  template <class T>
  static FASTVAE_HD T d_shift_inverse(const Factor<T>& e) {
    return e.slope * e.inverse;
  }
};

// y = x + t: no number says sigma.
struct Additive {
  static constexpr const char* kName = "additive";
  static constexpr AffineKind kKind = AffineKind::kAdditive;
};

// Calls f with the kind of that number: f(Exp{}). The additive is that of s = 0, which is exact.
template <class F>
FASTVAE_HD auto with_kind(AffineKind kind, const F& f) {
  switch (kind) {
    case AffineKind::kTanhExp:
      return f(TanhExp{});
    case AffineKind::kSigmoid:
      return f(Sigmoid{});
    case AffineKind::kGated:
      return f(Gated{});
    default:
      return f(Exp{});
  }
}

// With a mask, one number more after s: where it is 1, and not 0, a column passes as it is.
template <class T>
FASTVAE_HD bool passes(T mask) {
  return mask > T(0.5);
}

template <class Kind, bool kInverse, bool kMasked = false>
struct AffineCoupling {
  // The gradient of the shift is that of y itself.
  static constexpr bool kPassesGradient = Kind::kAddsShift && !kInverse && !kMasked;

  struct Forward : Formula<Shape{.inputs = 3 + kMasked, .outputs = 1, .row_sums = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 2> eval(T x, T t, T s) {
      const Factor<T> e = Kind::factor(s);
      if constexpr (kInverse) return {{Kind::invert(x, t, e), -e.log_sigma}};
      return {{Kind::apply(x, t, e), e.log_sigma}};
    }
    template <class T>
    static FASTVAE_HD Values<T, 2> eval(T x, T t, T s, T mask) {
      const Values<T, 2> moved = eval(x, t, s);
      return {{passes(mask) ? x : moved.v[0], passes(mask) ? T(0) : moved.v[1]}};
    }
  };

  struct Backward : Formula<Shape{.inputs = 4 + kMasked, .row_inputs = 1, .outputs = 3}> {
    template <class T>
    static FASTVAE_HD Values<T, 3> eval(T grad, T x, T t, T s, T grad_log_det) {
      const Factor<T> e = Kind::factor(s);
      if constexpr (kInverse) {  // of z = invert(x): dz/ds = -slope (what sigma multiplies)
        const T z = Kind::invert(x, t, e);
        return {{grad * e.inverse, -grad * Kind::d_shift_inverse(e),
                 -e.slope * (grad * Kind::stretched(z, t) + grad_log_det)}};
      }
      const T d_sigma = e.sigma * Kind::stretched(x, t);
      return {{grad * e.sigma, grad * Kind::d_shift(e), e.slope * (grad * d_sigma + grad_log_det)}};
    }
    template <class T>
    static FASTVAE_HD Values<T, 3> eval(T grad, T x, T t, T s, T mask, T grad_log_det) {
      const Values<T, 3> moved = eval(grad, x, t, s, grad_log_det);
      return {{passes(mask) ? grad : moved.v[0], passes(mask) ? T(0) : moved.v[1],
               passes(mask) ? T(0) : moved.v[2]}};
    }
  };

  // Where only the log-determinant was used: 0 * sigma x is NaN once sigma overflows.
  struct BackwardOfLogDet : Formula<Shape{.inputs = 1 + kMasked, .row_inputs = 1, .outputs = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T s, T grad_log_det) {
      const T slope = Kind::factor(s).slope;
      return {{grad_log_det * (kInverse ? -slope : slope)}};
    }
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T s, T mask, T grad_log_det) {
      return {{passes(mask) ? T(0) : eval(s, grad_log_det).v[0]}};
    }
  };
};

}  // namespace fastvae
