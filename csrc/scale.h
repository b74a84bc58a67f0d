// How a network gives a scale sigma > 0: by a number s and one of four maps.
//
//   LogVar      sigma = e^{s/2}, s of any sign      LogScale   sigma = e^s, s of any sign
//   Softplus    sigma = log(1 + e^s), likewise      Scale      sigma = s; NaN where s < 0
//
// A formula with a scale is a template over the map and asks it for what it needs, each with all
// its digits: that log(sigma) of Scale is no exponential's inverse, or that sigma - 1 of Softplus
// does not cancel, is known here. Gradients are with respect to s.
//
//   sigma(s), d_sigma(s)            and its derivative
//   log_sigma(s), d_log_sigma(s)    likewise; finite at sigma = 0: not -inf + inf
//   log_var(s)                      twice the first, as finite
//   inverse_sigma(s)                finite: a sample exactly at the mean scores 0, not 0 * inf
//   any_inverse_sigma(s)            infinite where sigma is 0
//   kl(s), d_kl(s)                  (sigma^2 - 1) / 2 - log sigma >= 0
//   terms(s)                        {sigma, d_sigma, kl, d_kl} at the price of one of them
//   relative(q, p)                  {(r^2 - 1) / 2 - log r, (r^2 - 1) / 2}, r = sigma_q / sigma_p
//   surely_recovers(mu, s)          only if |mu| < 64 sigma, without an exponential: z - mu will do
//                                   for sigma eps; no for NaN and infinities
#pragma once

#include "math.h"

namespace fastvae {

// A map as a number, for an engine that applies it outside its loops.
enum class ScaleMap : int { kLogVar, kLogScale, kScale, kSoftplus };

template <class T>
struct ScaleTerms {
  T sigma, d_sigma, kl, d_kl;
};
template <class T>
struct RelativeScale {
  T kl, half_rise;
};

struct LogVar {
  static constexpr const char* kName = "log_var";
  static constexpr ScaleMap kMap = ScaleMap::kLogVar;
  static constexpr bool kManyRegisters = false;

  template <class T>
  static FASTVAE_HD T sigma(T s) {
    return math::exp(T(0.5) * s);
  }
  template <class T>
  static FASTVAE_HD T d_sigma(T s) {
    return T(0.5) * sigma(s);
  }
  template <class T>
  static FASTVAE_HD T log_var(T s) {
    return math::max(-math::largest<T>(), s);
  }
  template <class T>
  static FASTVAE_HD T log_sigma(T s) {
    return T(0.5) * log_var(s);
  }
  template <class T>
  static FASTVAE_HD T d_log_sigma(T) {
    return T(0.5);
  }
  template <class T>
  static FASTVAE_HD T inverse_sigma(T s) {
    return math::min(math::largest<T>(), any_inverse_sigma(s));
  }
  template <class T>
  static FASTVAE_HD T any_inverse_sigma(T s) {
    return math::exp(T(-0.5) * s);
  }
  template <class T>
  static FASTVAE_HD T kl(T s) {
    return math::half_expm1_minus(s);
  }
  template <class T>
  static FASTVAE_HD T d_kl(T s) {
    return math::half_expm1(s);
  }
  template <class T>
  static FASTVAE_HD ScaleTerms<T> terms(T s) {
    const math::HalfExp<T> e = math::half_exp(s);
    return {e.exp_half, T(0.5) * e.exp_half, e.half_expm1_minus, e.half_expm1};
  }
  template <class T>
  static FASTVAE_HD RelativeScale<T> relative(T q, T p) {
    return {math::half_expm1_minus(q - p), math::half_expm1(q - p)};
  }
  // By a bound on log mu^2 that takes no logarithm.
  template <class T>
  static FASTVAE_HD bool surely_recovers(T mu, T s) {
    constexpr T kLn2 = T(0.6931471805599453);
    const T bound = (math::exponent(mu * mu) - T(11)) * kLn2;  // > log(mu^2 / 64^2)
    return bound <= s && s < T(80);
  }
};

struct LogScale {  // LogVar at 2s
  static constexpr const char* kName = "log_scale";
  static constexpr ScaleMap kMap = ScaleMap::kLogScale;
  static constexpr bool kManyRegisters = false;

  template <class T>
  static FASTVAE_HD T sigma(T s) {
    return math::exp(s);
  }
  template <class T>
  static FASTVAE_HD T d_sigma(T s) {
    return sigma(s);
  }
  template <class T>
  static FASTVAE_HD T log_var(T s) {
    return LogVar::log_var(T(2) * s);
  }
  template <class T>
  static FASTVAE_HD T log_sigma(T s) {
    return math::max(-math::largest<T>(), s);
  }
  template <class T>
  static FASTVAE_HD T d_log_sigma(T) {
    return T(1);
  }
  template <class T>
  static FASTVAE_HD T inverse_sigma(T s) {
    return math::min(math::largest<T>(), any_inverse_sigma(s));
  }
  template <class T>
  static FASTVAE_HD T any_inverse_sigma(T s) {
    return math::exp(-s);
  }
  template <class T>
  static FASTVAE_HD T kl(T s) {
    return LogVar::kl(T(2) * s);
  }
  template <class T>
  static FASTVAE_HD T d_kl(T s) {
    return T(2) * LogVar::d_kl(T(2) * s);
  }
  template <class T>
  static FASTVAE_HD ScaleTerms<T> terms(T s) {
    const ScaleTerms<T> t = LogVar::terms(T(2) * s);
    return {t.sigma, t.sigma, t.kl, T(2) * t.d_kl};
  }
  template <class T>
  static FASTVAE_HD RelativeScale<T> relative(T q, T p) {
    return LogVar::relative(T(2) * q, T(2) * p);
  }
  template <class T>
  static FASTVAE_HD bool surely_recovers(T mu, T s) {
    return LogVar::surely_recovers(mu, T(2) * s);
  }
};

// (q^2 - 1) / 2 - log q >= 0 for q = 1 + f: of second order in f.
template <class T>
FASTVAE_HD T scale_excess(T f, T log_q) {
  const T near = f * f * (T(1) - f * math::log1p_quotient(f));
  const T far = (T(0.5) * f * f + f) - math::min(math::largest<T>(), log_q);  // not inf - inf
  return (f > T(-0.29)) & (f < T(0.41)) ? near : far;
}

// sigma_q / sigma_p - 1 >= -1, also where sigma_p is infinite.
template <class T>
FASTVAE_HD T relative_rise(T rise, T sigma_p) {
  const T limit = math::largest<T>();
  return math::max(T(-1), math::max(-limit, rise) / math::min(limit, sigma_p));
}

struct Scale {
  static constexpr const char* kName = "scale";
  static constexpr ScaleMap kMap = ScaleMap::kScale;
  static constexpr bool kManyRegisters = false;

  template <class T>
  static FASTVAE_HD T sigma(T s) {
    return s;
  }
  template <class T>
  static FASTVAE_HD T d_sigma(T) {
    return T(1);
  }
  template <class T>
  static FASTVAE_HD T log_sigma(T s) {
    return math::max(-math::largest<T>(), math::log(s));
  }
  template <class T>
  static FASTVAE_HD T log_var(T s) {
    return math::max(-math::largest<T>(), T(2) * math::log(s));
  }
  template <class T>
  static FASTVAE_HD T d_log_sigma(T s) {
    return T(1) / s;
  }
  template <class T>
  static FASTVAE_HD T inverse_sigma(T s) {
    return math::min(math::largest<T>(), any_inverse_sigma(s));
  }
  template <class T>
  static FASTVAE_HD T any_inverse_sigma(T s) {
    return T(1) / (s + T(0));  // of -0 as of 0
  }
  template <class T>
  static FASTVAE_HD T kl(T s) {
    return scale_excess(s - T(1), math::log(s));
  }
  template <class T>
  static FASTVAE_HD T d_kl(T s) {
    const T f = s - T(1);
    return f + f / s;
  }
  template <class T>
  static FASTVAE_HD ScaleTerms<T> terms(T s) {
    return {s, T(1), kl(s), d_kl(s)};
  }
  template <class T>
  static FASTVAE_HD RelativeScale<T> relative(T q, T p) {
    const T f = relative_rise(q - p, p), log_r = math::log(q) - math::log(p);
    const T kl = scale_excess(f, log_r);
    return {log_r == log_r ? kl : log_r, f * (T(0.5) * f + T(1))};
  }
  template <class T>
  static FASTVAE_HD bool surely_recovers(T mu, T s) {
    return math::abs(mu) < T(64) * s && s <= math::largest<T>();
  }
};

struct Softplus {
  static constexpr const char* kName = "softplus";
  static constexpr ScaleMap kMap = ScaleMap::kSoftplus;
  static constexpr bool kManyRegisters = true;  // on a GPU, in a KL

  template <class T>
  static FASTVAE_HD T sigma(T s) {
    return math::max(T(0), s) + math::log1p_unit(math::exp_nonpositive(-math::abs(s)));
  }
  template <class T>
  static FASTVAE_HD T d_sigma(T s) {
    return math::sigmoid(s, math::exp_nonpositive(-math::abs(s)));
  }
  template <class T>
  static FASTVAE_HD T log_sigma(T s) {
    return math::max(-math::largest<T>(), any_log_sigma(s));
  }
  template <class T>
  static FASTVAE_HD T log_var(T s) {
    return math::max(-math::largest<T>(), T(2) * any_log_sigma(s));
  }
  template <class T>
  static FASTVAE_HD T d_log_sigma(T s) {
    return is_exponential(s) ? T(1) : d_sigma(s) / sigma(s);
  }
  template <class T>
  static FASTVAE_HD T inverse_sigma(T s) {
    return math::min(math::largest<T>(), any_inverse_sigma(s));
  }
  template <class T>
  static FASTVAE_HD T any_inverse_sigma(T s) {
    return T(1) / sigma(s);
  }
  template <class T>
  static FASTVAE_HD T kl(T s) {
    return scale_excess(sigma_minus_one(s), any_log_sigma(s));
  }
  template <class T>
  static FASTVAE_HD T d_kl(T s) {
    return sigma_minus_one(s) * (sigma(s) + T(1)) * d_log_sigma(s);
  }
  template <class T>
  static FASTVAE_HD ScaleTerms<T> terms(T s) {
    return {sigma(s), d_sigma(s), kl(s), d_kl(s)};
  }
  template <class T>
  static FASTVAE_HD RelativeScale<T> relative(T q, T p) {
    const T f = relative_rise(difference(q, p, q - p), sigma(p));
    return {scale_excess(f, any_log_sigma(q) - any_log_sigma(p)), f * (T(0.5) * f + T(1))};
  }
  // sigma >= e^s log 2 for s <= 0, and more beyond.
  template <class T>
  static FASTVAE_HD bool surely_recovers(T mu, T s) {
    return LogVar::surely_recovers(mu, T(2) * math::min(T(0), s) - T(0.74)) && s < T(40);
  }

 private:
  // So far down that sigma is e^s to the last digit: log sigma is s, though sigma may underflow.
  template <class T>
  static FASTVAE_HD bool is_exponential(T s) {
    return s < T(-0.7) * T(math::Real<T>::kMantissa + 1);
  }
  template <class T>
  static FASTVAE_HD T any_log_sigma(T s) {
    return is_exponential(s) ? s : math::log(sigma(s));
  }
  // sigma(a) - sigma(b) = log(1 + sigmoid(b) (e^{a - b} - 1)), which keeps its digits at a = b.
  template <class T>
  static FASTVAE_HD T difference(T a, T b, T a_minus_b) {
    const T inside = math::min(T(1), math::max(T(-1), a_minus_b));
    const T g = d_sigma(b) * (T(2) * math::half_expm1(inside));
    const T near = math::log_near(T(1) + g, g);
    return math::abs(a_minus_b) < T(1) ? near : sigma(a) - sigma(b);
  }
  // sigma is 1 at log(e - 1).
  template <class T>
  static FASTVAE_HD T sigma_minus_one(T s) {
    constexpr double kOne = 0.5413248546129181, kMore = -1.8138570925507326e-17;
    constexpr T kHigh = T(kOne), kLow = T((kOne - double(kHigh)) + kMore);
    return difference(s, kHigh, (s - kHigh) - kLow);
  }
};

// Calls f with the map of that number: f(LogVar{}).
template <class F>
FASTVAE_HD auto with_map(ScaleMap map, const F& f) {
  switch (map) {
    case ScaleMap::kLogVar:
      return f(LogVar{});
    case ScaleMap::kLogScale:
      return f(LogScale{});
    case ScaleMap::kScale:
      return f(Scale{});
    default:
      return f(Softplus{});
  }
}

}  // namespace fastvae
