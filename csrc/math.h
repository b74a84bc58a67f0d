// Scalar maths for the formulas: branch-free, so that a loop over lanes becomes vector code, and
// the same source on host and device, so that CPU and GPU agree to a few ulp.
//
// All are polynomials, because libm is not vectorised without -ffast-math. float and double differ
// in their coefficients and in Real<T> only; each stated accuracy is that of both, and is held by
// tests/test_math.py. Integers are unsigned, as wide as T, and added and shifted only: AVX2 has
// no more for 64 bits.
// No header of torch or of a SIMD instruction set belongs here.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__) || defined(FASTVAE_SIMT)
#define FASTVAE_HD __host__ __device__ __forceinline__
#else
#define FASTVAE_HD inline __attribute__((always_inline))
#endif
#if defined(__CUDACC__)
#define FASTVAE_UNROLL _Pragma("unroll")
#else
#define FASTVAE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace fastvae::math {

// What there is to know of a type.
template <class T>
struct Real;
template <>
struct Real<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr Bits kBias = 127;
  static constexpr float kTiny = 0x1p-126f, kLargest = 0x1.fffffep127f;  // of the normal numbers
  static constexpr float kLn2Hi = 0x1.62e4p-1f;  // 15 bits, so that n * kLn2Hi is exact
  static constexpr float kLn2Lo = 0x1.7f7d1cp-20f;
  // Where exponentials end: e^x is 0 below the first. 2^n / 2, with n of e^x, is 0 at the second,
  // normal from the third on, and finite up to the last.
  static constexpr float kExpZero = -104, kExpTiny = -87.3f, kExpSmall = -87, kExpLarge = 89;
};
template <>
struct Real<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr Bits kBias = 1023;
  static constexpr double kTiny = 0x1p-1022, kLargest = 0x1.fffffffffffffp1023;
  static constexpr double kLn2Hi = 0x1.62e42fefa38p-1;  // 42 bits
  static constexpr double kLn2Lo = 0x1.ef35793c7673p-45;
  static constexpr double kExpZero = -746, kExpTiny = -708.3, kExpSmall = -708, kExpLarge = 710;
};
template <class T>
using Bits = typename Real<T>::Bits;

FASTVAE_HD constexpr float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
FASTVAE_HD constexpr double from_bits(uint64_t bits) { return __builtin_bit_cast(double, bits); }
FASTVAE_HD constexpr uint32_t to_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
FASTVAE_HD constexpr uint64_t to_bits(double x) { return __builtin_bit_cast(uint64_t, x); }

// A number whose low mantissa bits hold the nearest integer of what was added to it: rounding and
// conversion to int in one addition, defined for every input (a cast of NaN would not be).
template <class T>
inline constexpr T kRoundMagic = T(3) * T(Bits<T>(1) << (Real<T>::kMantissa - 1));

template <class T>
inline constexpr T kInfinity = T(__builtin_inf());

template <class T>
FASTVAE_HD T max(T a, T b) {
  return a > b ? a : b;  // max(NaN, b) is b, max(a, NaN) is NaN: keep the checked value second
}
template <class T>
FASTVAE_HD T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
FASTVAE_HD constexpr T largest() {
  return Real<T>::kLargest;
}
// A weight of 0 leaves out its term, also where that is infinite.
template <class T>
FASTVAE_HD T weighed(T weight, T term) {
  return weight == T(0) ? T(0) : weight * term;
}
template <class T>
FASTVAE_HD T abs(T x) {
  return from_bits(to_bits(x) & (~Bits<T>(0) >> 1));
}

// The exponent of x: 2^exponent(x) <= |x| < 2^(exponent(x) + 1) for a normal x.
template <class T>
FASTVAE_HD T exponent(T x) {
  constexpr T kOnes = T(Bits<T>(1) << Real<T>::kMantissa);  // whose lowest bits count ones
  return from_bits(to_bits(kOnes) + (to_bits(abs(x)) >> Real<T>::kMantissa)) -
         (kOnes + T(Real<T>::kBias));
}

FASTVAE_HD float sqrt(float x) { return ::sqrtf(x); }
FASTVAE_HD double sqrt(double x) { return ::sqrt(x); }
FASTVAE_HD float floor(float x) { return ::floorf(x); }
FASTVAE_HD double floor(double x) { return ::floor(x); }

// What a + b lost when it was rounded to sum, exactly (Knuth's two-sum).
template <class T>
FASTVAE_HD T lost(T a, T b, T sum) {
  const T back = sum - a;
  return (a - (sum - back)) + (b - back);
}

// 2^n for -bias < n <= bias, 0 for n = -bias.
template <class T>
FASTVAE_HD T power_of_two(Bits<T> n) {
  return from_bits((n + Real<T>::kBias) << Real<T>::kMantissa);
}

// The polynomial with these coefficients, that of the highest power first.
template <class T, class... Rest>
FASTVAE_HD T horner(T x, T p, Rest... rest) {
  ((p = p * x + rest), ...);
  return p;
}

// ---- e^x ----

// (e^r - 1 - r) / r^2 for |r| <= ln(2)/2
FASTVAE_HD float exp_quotient(float r) {
  return horner(r, 0x1.6c6a12p-10f, 0x1.120bb8p-7f, 0x1.5555bap-5f, 0x1.5554dcp-3f, 0.5f);
}
FASTVAE_HD double exp_quotient(double r) {
  return horner(r, 0x1.1ef56e79e8098p-29, 0x1.af5e1ab056f6p-26, 0x1.27e52b6acee93p-22,
                0x1.71ddf8d17037cp-19, 0x1.a01a0182b84dcp-16, 0x1.a01a01afa3a7fp-13,
                0x1.6c16c16c1ce5dp-10, 0x1.111111110f788p-7, 0x1.5555555555548p-5,
                0x1.5555555555559p-3, 0.5);
}

// x = n ln 2 + r with |r| <= ln(2)/2, and e^r - 1. n is in two's complement.
template <class T>
struct ExpReduction {
  Bits<T> n;
  T expm1_r;
};

template <class T>
FASTVAE_HD ExpReduction<T> reduce_exp(T x) {
  const T shifted = x * T(0x1.71547652b82fep0) + kRoundMagic<T>;
  const T n = shifted - kRoundMagic<T>;
  const T r = (x - n * Real<T>::kLn2Hi) - n * Real<T>::kLn2Lo;
  return {to_bits(shifted) - to_bits(kRoundMagic<T>), exp_quotient(r) * (r * r) + r};
}

// e^x, 1.5 ulp; +inf past the range, subnormal results kept, NaN passes.
template <class T>
FASTVAE_HD T exp(T x) {
  using R = Real<T>;
  const ExpReduction<T> e = reduce_exp(min(R::kExpLarge, max(R::kExpZero, x)));
  // Two factors: 2^128 and 2^-149 do not fit in one. Their biased exponents add up to this.
  const Bits<T> n = e.n + 2 * R::kBias, half = n >> 1;
  return (e.expm1_r + T(1)) * from_bits(half << R::kMantissa) *
         from_bits((n - half) << R::kMantissa);
}

// The same for x <= 0, where 2^64 in the first factor lets one clamp and one constant do.
template <class T>
FASTVAE_HD T exp_nonpositive(T x) {
  const ExpReduction<T> e = reduce_exp(max(Real<T>::kExpZero, x));
  return (e.expm1_r + T(1)) * power_of_two<T>(e.n + 64) * T(0x1p-64);
}

// e^x, 1.5 ulp, for x within the range of e^x; exactly 0 below -87 (double: -708), NaN passes. For
// the weights of a softmax, which need no more range: one factor 2^n is enough.
template <class T>
FASTVAE_HD T exp_weight(T x) {
  const ExpReduction<T> e = reduce_exp(x);
  return x < Real<T>::kExpSmall ? T(0) : (e.expm1_r + T(1)) * power_of_two<T>(e.n);
}

// e^-x, and what it has lost of 1, for x >= 0; NaN passes in both.
template <class T>
struct Decay {
  T value;  // e^-x, 1.5 ulp; exactly 0 beyond 87 (double: 708)
  T loss;   // 1 - e^-x, 2 ulp, also at x << 1
};
template <class T>
FASTVAE_HD Decay<T> decay(T x) {
  const ExpReduction<T> e = reduce_exp(-min(-Real<T>::kExpSmall, x));
  const T s = power_of_two<T>(e.n);
  return {x > -Real<T>::kExpSmall ? T(0) : s * e.expm1_r + s, (T(1) - s) - s * e.expm1_r};
}

// tanh and its derivative, 1 - tanh^2, which keeps its digits where tanh is all but 1: until
// e^-2|x| is 0, from 43.5 on (double: 354).
template <class T>
struct Tanh {
  T value;  // 3.2 ulp
  T slope;  // 5 ulp
};
template <class T>
FASTVAE_HD Tanh<T> tanh(T x) {
  const Decay<T> d = decay(abs(x) + abs(x));
  const T inverse = T(1) / (T(1) + d.value), size = d.loss * inverse;
  return {x < T(0) ? -size : size, T(4) * d.value * (inverse * inverse)};
}

// ---- what a KL divergence is made of ----
//
// e^x - 1 - x cancels near 0, where most posteriors live. With x = n ln 2 + r and
// t = e^r - 1 - r = r^2 (1/2 + r/6 + ...), which is computed as such,
//   e^x - 1 - x = 2^n t + (2^n - 1)(1 + r) - n ln 2:
// for n = 0 it is t. The worst is the smallest |x| with n != 0; hence n = 0 up to |x| = 0.52.

// (e^r - 1 - r) / r^2 for |r| <= 0.52
FASTVAE_HD float exp_quotient_wide(float r) {
  return horner(r, 0x1.a0e16ap-13f, 0x1.6ebaa4p-10f, 0x1.11123cp-7f, 0x1.555332p-5f, 0x1.555554p-3f,
                0.5f);
}
FASTVAE_HD double exp_quotient_wide(double r) {
  return horner(r, 0x1.618eadc447035p-33, 0x1.202fb12a2517ap-29, 0x1.ae64e69628a6cp-26,
                0x1.27e43c7c5544fp-22, 0x1.71de39d40fb7ep-19, 0x1.a01a0206d329cp-16,
                0x1.a01a01a061684p-13, 0x1.6c16c16bfea86p-10, 0x1.111111111102cp-7,
                0x1.555555555559p-5, 0x1.5555555555556p-3, 0.5);
}

template <class T>
struct TailReduction {
  Bits<T> n;
  T n_value, r, t;
};

template <class T>
FASTVAE_HD TailReduction<T> reduce_tail(T x) {
  const T shifted = x * T(0x1.71547652b82fep0) + kRoundMagic<T>;
  const bool near = abs(x) < T(0.52f);
  const T n = near ? T(0) : shifted - kRoundMagic<T>;
  const T r = (x - n * Real<T>::kLn2Hi) - n * Real<T>::kLn2Lo;
  return {near ? Bits<T>(0) : to_bits(shifted) - to_bits(kRoundMagic<T>), n, r,
          exp_quotient_wide(r) * (r * r)};
}

// (e^x - 1) / 2, 2 ulp, also at |x| << 1. Half of it, because that is the gradient of a KL, and
// because 2^n / 2 still fits where 2^n does not.
template <class T>
FASTVAE_HD T half_expm1(T x) {
  using R = Real<T>;
  const ExpReduction<T> e = reduce_exp(min(R::kExpLarge, max(R::kExpSmall, x)));
  const T s = power_of_two<T>(e.n - 1);
  const T y = s * e.expm1_r + (s - T(0.5));
  return x > R::kExpLarge ? kInfinity<T> : y;
}

// (e^x - 1 - x) / 2 >= 0, 3.2 ulp, also at |x| << 1.
template <class T>
FASTVAE_HD T half_expm1_minus(T x) {
  using R = Real<T>;
  const T inside = min(R::kExpLarge, max(R::kExpSmall, x));
  const TailReduction<T> e = reduce_tail(inside);
  const T s = power_of_two<T>(e.n - 1), m = s - T(0.5);
  const T c = (m - e.n_value * (T(0.5) * R::kLn2Hi)) - e.n_value * (T(0.5) * R::kLn2Lo);
  const T y = s * e.t + (m * e.r + c) + T(0.5) * (inside - x);  // linear where e^x is nothing
  return x > R::kExpLarge ? kInfinity<T> : y;
}

// Both, and e^{x/2}, from one reduction: x/2 = n ln 2 + r and m = e^r - 1 = r + t, so that
// e^{x/2} = 2^n (1 + m), e^x = 2^{2n} (1 + m)^2 and (1 + m)^2 - 1 - 2r = m^2 + 2t.
template <class T>
struct HalfExp {
  T exp_half;          // e^{x/2}, 2 ulp; 0 below twice the smallest normal number
  T half_expm1;        // (e^x - 1) / 2, 3 ulp
  T half_expm1_minus;  // (e^x - 1 - x) / 2, 4 ulp
};
template <class T>
FASTVAE_HD HalfExp<T> half_exp(T x) {
  using R = Real<T>;
  const T y = min(R::kExpLarge, max(R::kExpTiny, T(0.5) * x));
  const TailReduction<T> e = reduce_tail(y);
  const T m = e.r + e.t;
  const T half = power_of_two<T>(e.n - 1);
  const T s = (half + half) * half, s_minus = s - T(0.5);  // s = 2^{2n} / 2
  const T c = (s_minus - e.n_value * R::kLn2Hi) - e.n_value * R::kLn2Lo;
  const T expm1 = s * (m * m + T(2) * m) + s_minus;
  const T minus = s * (m * m + T(2) * e.t) + (s_minus * (T(2) * e.r) + c) + (y - T(0.5) * x);
  return {(T(2) * m + T(2)) * half, x > R::kExpLarge ? kInfinity<T> : expm1,
          x > R::kExpLarge ? kInfinity<T> : minus};
}

// ---- log ----

// (log(1 + f) - f + f^2/2) / f^3 for sqrt(1/2) - 1 <= f <= sqrt(2) - 1
FASTVAE_HD float log1p_quotient(float f) {
  return horner(f, -0x1.469e42p-4f, 0x1.032ffcp-3f, -0x1.0a0552p-3f, 0x1.230516p-3f,
                -0x1.54d1d0p-3f, 0x1.999fe6p-3f, -0x1.0000ccp-2f, 0x1.555554p-2f);
}
FASTVAE_HD double log1p_quotient(double f) {
  return horner(
      f, 0x1.ac7545075b307p-6, -0x1.ea05c6d03b1f7p-5, 0x1.0a622916b137ap-4, -0x1.d11fb5d091a79p-5,
      0x1.d05a69e37c77cp-5, -0x1.fba1c2a93446cp-5, 0x1.11cd00b70b8edp-4, -0x1.24d74ec35a24ap-4,
      0x1.3b0b89098ebfap-4, -0x1.5550ee713fee7p-4, 0x1.745d3f1da8d78p-4, -0x1.9999c26b7a5b7p-4,
      0x1.c71c71e00f2aap-4, -0x1.ffffff2bf4b34p-4, 0x1.24924922a3ed8p-3, -0x1.555555566b3abp-3,
      0x1.999999999f756p-3, -0x1.fffffffffef14p-3, 0x1.5555555555533p-2);
}

// log(1 + f) for sqrt(1/2) - 1 <= f <= sqrt(2) - 1, 1 ulp, also at |f| << 1.
template <class T>
FASTVAE_HD T log1p_near_one(T f) {
  return f + f * f * (f * log1p_quotient(f) - T(0.5));
}

// x = 2^n (1 + f), a normal number > 0, with f as above.
template <class T>
struct LogReduction {
  T n, f;
};
template <class T>
FASTVAE_HD LogReduction<T> reduce_log(T x) {
  using R = Real<T>;
  constexpr Bits<T> kRoot = to_bits(T(0x1.6a09e6p-1));  // sqrt(1/2), where exponents begin
  constexpr Bits<T> kOne = to_bits(T(1)), kTop = Bits<T>(1) << R::kMantissa;
  const Bits<T> offset = to_bits(x) + (kOne - kRoot);
  return {from_bits((offset >> R::kMantissa) + to_bits(T(kTop))) - T(kTop + R::kBias),
          from_bits((offset & (kTop - 1)) + kRoot) - T(1)};
}

// log(x) for a normal x > 0, 2 ulp, also at x -> 1.
template <class T>
FASTVAE_HD T log_normal(T x) {
  const LogReduction<T> l = reduce_log(x);
  return l.n * T(0x1.62e42fefa39efp-1) + log1p_near_one(l.f);
}

// log(u) for a normal 0 < u <= 1 whose distance from 1 is known better than u itself, f = u - 1
// wherever u > 1/2: 2 ulp, also where u rounds to 1.
template <class T>
FASTVAE_HD T log_unit(T u, T f) {
  using R = Real<T>;
  constexpr Bits<T> kRoot = to_bits(T(0x1.6a09e6p-1));
  constexpr Bits<T> kOne = to_bits(T(1)), kTop = Bits<T>(1) << R::kMantissa;
  const Bits<T> offset = to_bits(u) + (kOne - kRoot);
  const T n = from_bits((offset >> R::kMantissa) + to_bits(T(kTop))) - T(kTop + R::kBias);
  const T reduced = from_bits((offset & (kTop - 1)) + kRoot) - T(1);
  return n * T(0x1.62e42fefa39efp-1) + log1p_near_one(n == T(0) ? f : reduced);
}

// log(x) for any x, 2 ulp, also of subnormals; -inf at 0, NaN below.
template <class T>
FASTVAE_HD T log(T x) {
  using R = Real<T>;
  constexpr T kUp = T(Bits<T>(1) << R::kMantissa);
  const bool tiny = x < R::kTiny;
  const T y = log_normal(max(R::kTiny, tiny ? x * kUp : x));
  const T finite = tiny ? y - T(R::kMantissa) * T(0x1.62e42fefa39efp-1) : y;
  return x > T(0) ? (x <= largest<T>() ? finite : x)
                  : (x == T(0) ? -kInfinity<T> : T(__builtin_nan("")));
}

// log(1 + t) for 0 <= t <= 1, 2 ulp, also at t << 1.
template <class T>
FASTVAE_HD T log1p_unit(T t) {
  const bool far = t > T(0x1.a8279ap-2);  // sqrt(2) - 1: halve 1 + t, and add log 2 back
  const T f = far ? T(0.5) * t - T(0.5) : t;
  const T y = log1p_near_one(f);
  return far ? Real<T>::kLn2Hi + (y + Real<T>::kLn2Lo) : y;
}

// ---- sin and cos ----

template <class T>
struct SinCos {
  T sin, cos;
};

// sin(2 pi f) / f and (1 - cos(2 pi f)) / f^2 for |f| <= 1/8, of s = f^2
FASTVAE_HD float sin_quotient(float s) {
  return horner(s, -0x1.2d92fep6f, 0x1.465e92p6f, -0x1.4abbb8p5f, 0x1.921fb6p2f);
}
FASTVAE_HD double sin_quotient(double s) {
  return horner(s, 0x1.e3ff060f65d59p1, -0x1.e300983b66db4p3, 0x1.5078300be541bp5,
                -0x1.32d2cce323bedp6, 0x1.466bc67758caep6, -0x1.4abbce625be46p5,
                0x1.921fb54442d18p2);
}
FASTVAE_HD float cos_quotient(float s) {
  return horner(s, -0x1.db5fa8p5f, 0x1.55cb88p6f, -0x1.03c1eap6f, 0x1.3bd3ccp4f);
}
FASTVAE_HD double cos_quotient(double s) {
  return horner(s, 0x1.b263a5f1319f1p0, -0x1.f9cc404d35cfdp2, 0x1.a6d1ec7d928e7p4,
                -0x1.e1f50683671bdp5, 0x1.55d3c7e3c927ap6, -0x1.03c1f081b5aaep6,
                0x1.3bd3cc9be45dep4);
}

// sin and cos of 2 pi u for 0 <= u <= 1, 2 ulp up to an eighth of a turn: the reduction to an
// eighth of a turn is exact.
template <class T>
FASTVAE_HD SinCos<T> sincos_turn(T u) {
  constexpr int kSign = 8 * sizeof(T) - 1;
  const T shifted = T(4) * u + kRoundMagic<T>;
  const Bits<T> quadrant = to_bits(shifted);
  const T f = u - T(0.25) * (shifted - kRoundMagic<T>);
  const T s = f * f;
  const T sin_f = f * sin_quotient(s), cos_f = T(1) - s * cos_quotient(s);
  const bool swap = quadrant & 1;
  const Bits<T> sin_sign = (quadrant & 2) << (kSign - 1);
  const Bits<T> cos_sign = ((quadrant + 1) & 2) << (kSign - 1);
  return {from_bits(to_bits(swap ? cos_f : sin_f) ^ sin_sign),
          from_bits(to_bits(swap ? sin_f : cos_f) ^ cos_sign)};
}

// 1 / (1 + e^-x), given t = e^-|x|.
template <class T>
FASTVAE_HD T sigmoid(T x, T t) {
  const T large = T(1) / (T(1) + t);
  return x < T(0) ? t * large : large;
}

// log(q) for a normal q > 0 whose distance from 1 is known better than q itself, f = q - 1: 2 ulp
// at any |f|.
template <class T>
FASTVAE_HD T log_near(T q, T f) {
  const LogReduction<T> l = reduce_log(q);
  const bool near = abs(f) < T(0.25);
  return (near ? T(0) : l.n) * T(0x1.62e42fefa39efp-1) + log1p_near_one(near ? f : l.f);
}

// log(q) - f, likewise: of second order near 1.
template <class T>
FASTVAE_HD T log_near_minus(T q, T f) {
  const T near = f * f * (f * log1p_quotient(f) - T(0.5));
  return abs(f) < T(0.25) ? near : log_normal(q) - f;
}

// ---- the gamma function, for counts: a >= 0 ----
//
// Up to 8, a is reduced to f in [0, 1] by Gamma(1 + a) = a (a - 1) ... (a - n + 1) Gamma(1 + f), a
// product of at most seven factors, whose logarithm is exact at integers. Beyond, Stirling's
// series.
template <class T>
struct GammaReduction {
  T f, product, derivative;  // of the product with respect to a
};
template <class T>
FASTVAE_HD GammaReduction<T> reduce_gamma(T a) {
  const T n = (a - T(0.5)) + kRoundMagic<T> - kRoundMagic<T>;  // at integers either neighbour does
  T product = T(1), derivative = T(0);
  FASTVAE_UNROLL
  for (int k = 0; k < 7; ++k) {
    const bool factor = T(k) < n;
    derivative = factor ? derivative * (a - T(k)) + product : derivative;
    product = factor ? product * (a - T(k)) : product;
  }
  return {a - n, product, derivative};
}

// log Gamma(1 + f) / (f (f - 1)) and the digamma function of 1 + f, u = f - 1/2 in [-1/2, 1/2]
FASTVAE_HD float log_gamma_quotient(float u) {
  return horner(u, -0x1.85ef62p-10f, 0x1.40b32p-9f, -0x1.9b44f6p-9f, 0x1.5d0b52p-8f,
                -0x1.3514cep-7f, 0x1.136246p-6f, -0x1.007a36p-5f, 0x1.01af06p-4f, -0x1.2aed06p-3f,
                0x1.eeb95cp-2f);
}
FASTVAE_HD double log_gamma_quotient(double u) {
  return horner(
      u, -0x1.0467902760469p-17, 0x1.9759e019683d0p-17, -0x1.18598e23bb974p-17,
      0x1.ba730a9784e07p-17, -0x1.c85e4bc95846cp-16, 0x1.68f13e0fbb796p-15, -0x1.156abea920aefp-14,
      0x1.b9e43433855c2p-14, -0x1.623f109df00eep-13, 0x1.1c7e3a261c9ebp-12, -0x1.cb44dee9fac00p-12,
      0x1.750a7900f071ep-11, -0x1.313e8a3ddad6fp-10, 0x1.f814bab49d011p-10, -0x1.a5035232a7d25p-9,
      0x1.64f0664c4f943p-8, -0x1.34dbda14971e2p-7, 0x1.133423527f1f2p-6, -0x1.007aa83cee1acp-5,
      0x1.01af62a2929c0p-4, -0x1.2aed059bd608ap-3, 0x1.eeb95b094c191p-2);
}
FASTVAE_HD float digamma_center(float u) {
  return horner(u, -0x1.05696ep-6f, 0x1.88ed0cp-6f, -0x1.9bbbc6p-6f, 0x1.373p-5f, -0x1.ef85e6p-5f,
                0x1.7c24f6p-4f, -0x1.28750cp-3f, 0x1.e0f39ap-3f, -0x1.a8580ep-2f, 0x1.de9e68p-1f,
                0x1.2aed06p-5f);
}
FASTVAE_HD double digamma_center(double u) {
  return horner(
      u, 0x1.095592a9c5f22p-12, -0x1.8e00f34fc325ep-12, 0x1.d05a7b8770454p-13,
      -0x1.5c46bf52019bbp-12, 0x1.71881a1ddf551p-11, -0x1.152ab7682bf97p-10, 0x1.8da00e2e893afp-10,
      -0x1.2a4696a915485p-9, 0x1.c172efb0d91bcp-9, -0x1.51441694a2d72p-8, 0x1.fa39518ed7df9p-8,
      -0x1.7c3d1c0d5d823p-7, 0x1.1de81d0211921p-6, -0x1.aeb6f79d2e6b7p-6, 0x1.456f1ac589ee4p-5,
      -0x1.ee74608c4f08fp-5, 0x1.7b57ab64219cbp-4, -0x1.28782542a882bp-3, 0x1.e0f840dad601cp-3,
      -0x1.a85808a40aa54p-2, 0x1.de9e64df22ef3p-1, 0x1.2aed059bd6087p-5);
}

// Stirling's series in w = 1/a^2, a >= 8: sums of B_2n w^(n-1) / (2n (2n - 1)), and B_2n w^(n-1) /
// 2n
FASTVAE_HD float stirling_log_gamma(float w) {
  return horner(w, 0x1.a01a02p-11f, -0x1.6c16c2p-9f, 0x1.555556p-4f);
}
FASTVAE_HD double stirling_log_gamma(double w) {
  return horner(w, -1.3924322169059011, 0.17964437236883057, -0.02955065359477124,
                0.006410256410256410, -0.0019175269175269175, 8.417508417508418e-4,
                -5.952380952380953e-4, 7.936507936507937e-4, -0.002777777777777778,
                0.08333333333333333);
}
FASTVAE_HD float stirling_digamma(float w) {
  return horner(w, 0x1.041042p-8f, -0x1.111112p-7f, 0x1.555556p-4f);
}
FASTVAE_HD double stirling_digamma(double w) {
  return horner(w, -26.456212121212121, 3.0539543302701198, -0.44325980392156863,
                0.08333333333333333, -0.021092796092796093, 0.007575757575757576,
                -0.004166666666666667, 0.003968253968253968, -0.008333333333333333,
                0.08333333333333333);
}

// log Gamma(1 + a) - a log a + a, 0 at 0 and log(2 pi a) / 2 far out: what the logarithms of count
// probabilities are made of once their large terms, which cancel, are taken together (Loader 2000).
template <class T>
FASTVAE_HD T stirling_gap(T a) {
  const GammaReduction<T> g = reduce_gamma(min(a, T(8)));
  const T small = log_normal(g.product) + g.f * (g.f - T(1)) * log_gamma_quotient(g.f - T(0.5));
  const T log_a = log_normal(max(Real<T>::kTiny, a)), far = max(T(8), a), r = T(1) / far;
  const T large = T(0.918938533204672742) + T(0.5) * log_a + r * stirling_log_gamma(r * r);
  return a < T(8) ? small - (a * log_a - a) : large;
}

// digamma(a) - log a for a > 0; -1/(2a) far out.
template <class T>
FASTVAE_HD T digamma_gap(T a) {
  const GammaReduction<T> g = reduce_gamma(min(a, T(8)));
  const T tiny = max(Real<T>::kTiny, a);
  const T small = (g.derivative / g.product - T(1) / tiny) + digamma_center(g.f - T(0.5));
  const T far = max(T(8), a), r = T(1) / far, w = r * r;
  return a < T(8) ? small - log_normal(tiny) : -(T(0.5) * r + w * stirling_digamma(w));
}
// digamma_gap(a + x) - digamma_gap(a), also where a >> x >= 0.
template <class T>
FASTVAE_HD T digamma_gap_rise(T a, T x) {
  const T far = max(T(8), a), r = T(1) / far, s = T(1) / (far + x), w = r * r, v = s * s;
  const T large = T(0.5) * x * (r * s) + (w * stirling_digamma(w) - v * stirling_digamma(v));
  return a < T(8) ? digamma_gap(a + x) - digamma_gap(a) : large;
}

// A running sum of exponentials, e^top sum. top is raised only when the terms have left it behind
// by far, so that mostly nothing is rescaled; a term less than e^-57 of the largest may count as 0.
template <class T>
FASTVAE_HD T raised_top(T top, T highest) {
  const T finite = min(largest<T>(), highest);
  return finite > top + T(30) ? finite : top;
}

}  // namespace fastvae::math
