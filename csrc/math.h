// Scalar maths for the formulas: branch-free, so that a loop over lanes becomes vector code, and
// the same source on host and device, so that CPU and GPU agree to a few ulp.
//
// The float overloads are polynomials (libm is not vectorised without -ffast-math); the double ones
// call the standard library. Accuracy is stated per function and held by tests/test_math.py.
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

inline constexpr float kLn2Hi = 0x1.62e4p-1f;  // 15 bits, so that n * kLn2Hi is exact
inline constexpr float kLn2Lo = 0x1.7f7d1cp-20f;

// A float whose low mantissa bits hold the nearest integer of what was added to it: rounding and
// conversion to int in one addition, defined for every input (a cast of NaN would not be).
inline constexpr float kRoundMagic = 0x1.8p23f;

FASTVAE_HD float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
FASTVAE_HD uint32_t to_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

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
  return sizeof(T) == 8 ? T(1.7976931348623157e308) : T(3.4028234663852886e38f);
}
FASTVAE_HD float abs(float x) { return from_bits(to_bits(x) & 0x7fffffffu); }
FASTVAE_HD double abs(double x) { return x < 0 ? -x : x; }

// The exponent of x: 2^exponent(x) <= |x| < 2^(exponent(x) + 1) for a normal x.
FASTVAE_HD int32_t exponent(float x) { return static_cast<int32_t>(to_bits(x) << 1 >> 24) - 127; }
FASTVAE_HD int32_t exponent(double x) {
  return static_cast<int32_t>(__builtin_bit_cast(uint64_t, x) << 1 >> 53) - 1023;
}

// x = n ln 2 + r with |r| <= ln(2)/2, and e^r - 1.
struct ExpReduction {
  int32_t n;
  float expm1_r;
};

FASTVAE_HD ExpReduction reduce_exp(float x) {
  const float shifted = x * 0x1.715476p0f + kRoundMagic;
  const float n = shifted - kRoundMagic;
  const float r = (x - n * kLn2Hi) - n * kLn2Lo;
  float p = 0x1.6c6a12p-10f;
  p = p * r + 0x1.120bb8p-7f;
  p = p * r + 0x1.5555bap-5f;
  p = p * r + 0x1.5554dcp-3f;
  p = p * r + 0.5f;
  return {static_cast<int32_t>(to_bits(shifted) - to_bits(kRoundMagic)), p * (r * r) + r};
}

FASTVAE_HD float power_of_two(int32_t n) {  // 2^n for -127 < n < 128
  return from_bits(static_cast<uint32_t>(n + 127) << 23);
}

// e^x, 1.5 ulp; +inf above 88.73, subnormal results kept, NaN passes.
FASTVAE_HD float exp(float x) {
  const ExpReduction e = reduce_exp(min(89.0f, max(-104.0f, x)));
  const int32_t half = e.n >> 1;  // two factors: 2^128 and 2^-149 do not fit in one
  return (e.expm1_r + 1.0f) * power_of_two(half) * power_of_two(e.n - half);
}
FASTVAE_HD double exp(double x) { return std::exp(x); }

// ---- what a KL divergence is made of ----
//
// e^x - 1 - x cancels near 0, where most posteriors live. With x = n ln 2 + r and
// t = e^r - 1 - r = r^2 (1/2 + r/6 + ...), which is computed as such,
//   e^x - 1 - x = 2^n t + (2^n - 1)(1 + r) - n ln 2:
// for n = 0 it is t. The worst is the smallest |x| with n != 0; hence n = 0 up to |x| = 0.52.
struct TailReduction {
  int32_t n;
  float n_float, r, t;
};

FASTVAE_HD TailReduction reduce_tail(float x) {
  const float shifted = x * 0x1.715476p0f + kRoundMagic;
  const bool near = abs(x) < 0.52f;
  const float n = near ? 0.0f : shifted - kRoundMagic;
  const float r = (x - n * kLn2Hi) - n * kLn2Lo;
  float p = 0x1.a0e16ap-13f;
  p = p * r + 0x1.6ebaa4p-10f;
  p = p * r + 0x1.11123cp-7f;
  p = p * r + 0x1.555332p-5f;
  p = p * r + 0x1.555554p-3f;
  p = p * r + 0.5f;
  const uint32_t rounded = to_bits(shifted) - to_bits(kRoundMagic);
  return {near ? 0 : static_cast<int32_t>(rounded), n, r, p * (r * r)};
}

inline constexpr float kInfinity = __builtin_inff();

// (e^x - 1) / 2, 2 ulp, also at |x| << 1. Half of it, because that is the gradient of a KL, and
// because 2^n / 2 still fits where 2^n does not.
FASTVAE_HD float half_expm1(float x) {
  const ExpReduction e = reduce_exp(min(89.0f, max(-87.0f, x)));
  const float s = power_of_two(e.n - 1);
  const float y = s * e.expm1_r + (s - 0.5f);
  return x > 89.0f ? kInfinity : y;
}
FASTVAE_HD double half_expm1(double x) { return 0.5 * std::expm1(x); }

// (e^x - 1 - x) / 2 >= 0, 3 ulp, also at |x| << 1.
FASTVAE_HD float half_expm1_minus(float x) {
  const float inside = min(89.0f, max(-87.0f, x));
  const TailReduction e = reduce_tail(inside);
  const float s = power_of_two(e.n - 1), m = s - 0.5f;
  const float c = (m - e.n_float * (0.5f * kLn2Hi)) - e.n_float * (0.5f * kLn2Lo);
  const float y = s * e.t + (m * e.r + c) + 0.5f * (inside - x);  // linear where e^x is nothing
  return x > 89.0f ? kInfinity : y;
}
FASTVAE_HD double half_expm1_minus(double x) {
  if (!(abs(x) < 0.5)) return 0.5 * (std::expm1(x) - min(1.7976931348623157e308, x));
  double q = 0;  // sum of x^k / (k + 2)!, Horner: 1/2 (1 + x/3 (1 + x/4 (...)))
  for (int k = 17; k >= 3; --k) q = (1.0 + q) * x / k;
  return 0.25 * x * x * (1.0 + q);
}

// Both, and e^{x/2}, from one reduction: x/2 = n ln 2 + r and m = e^r - 1 = r + t, so that
// e^{x/2} = 2^n (1 + m), e^x = 2^{2n} (1 + m)^2 and (1 + m)^2 - 1 - 2r = m^2 + 2t.
template <class T>
struct HalfExp {
  T exp_half;          // e^{x/2}, 2 ulp; 0 below 2^-125
  T half_expm1;        // (e^x - 1) / 2, 3 ulp
  T half_expm1_minus;  // (e^x - 1 - x) / 2, 4 ulp
};
FASTVAE_HD HalfExp<float> half_exp(float x) {
  const float y = min(89.0f, max(-87.3f, 0.5f * x));
  const TailReduction e = reduce_tail(y);
  const float m = e.r + e.t;
  const float s = power_of_two(max(2 * e.n - 1, -127)), s_minus = s - 0.5f;  // s = 2^{2n} / 2
  const float c = (s_minus - e.n_float * kLn2Hi) - e.n_float * kLn2Lo;
  const float expm1 = s * (m * m + 2.0f * m) + s_minus;
  const float minus = s * (m * m + 2.0f * e.t) + (s_minus * (2.0f * e.r) + c) + (y - 0.5f * x);
  return {(2.0f * m + 2.0f) * power_of_two(e.n - 1), x > 89.0f ? kInfinity : expm1,
          x > 89.0f ? kInfinity : minus};
}
FASTVAE_HD HalfExp<double> half_exp(double x) {
  return {std::exp(0.5 * x), half_expm1(x), half_expm1_minus(x)};
}

// log(1 + f) for sqrt(1/2) - 1 <= f <= sqrt(2) - 1, 1 ulp, also at |f| << 1.
FASTVAE_HD float log1p_near_one(float f) {
  float p = -0x1.469e42p-4f;
  p = p * f + 0x1.032ffcp-3f;
  p = p * f - 0x1.0a0552p-3f;
  p = p * f + 0x1.230516p-3f;
  p = p * f - 0x1.54d1d0p-3f;
  p = p * f + 0x1.999fe6p-3f;
  p = p * f - 0x1.0000ccp-2f;
  p = p * f + 0x1.555554p-2f;
  return f + f * f * (f * p - 0.5f);
}

// log(x) for a normal x > 0, 2 ulp, also at x -> 1.
FASTVAE_HD float log_normal(float x) {
  const uint32_t offset = to_bits(x) - 0x3f3504f3u;  // exponent counted from sqrt(1/2)
  const int32_t n = static_cast<int32_t>(offset) >> 23;
  const float f = from_bits((offset & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  return static_cast<float>(n) * 0x1.62e430p-1f + log1p_near_one(f);
}
FASTVAE_HD double log_normal(double x) { return std::log(x); }

// log(1 + t) for 0 <= t <= 1, 2 ulp, also at t << 1.
FASTVAE_HD float log1p_unit(float t) {
  const bool far = t > 0x1.a8279ap-2f;  // sqrt(2) - 1: halve 1 + t, and add log 2 back
  const float f = far ? 0.5f * t - 0.5f : t;
  const float y = log1p_near_one(f);
  return far ? kLn2Hi + (y + kLn2Lo) : y;
}
FASTVAE_HD double log1p_unit(double t) { return std::log1p(t); }

template <class T>
struct SinCos {
  T sin, cos;
};

// sin and cos of 2 pi u for 0 <= u <= 1, 2 ulp up to an eighth of a turn: the reduction to an
// eighth of a turn is exact.
FASTVAE_HD SinCos<float> sincos_turn(float u) {
  const float shifted = 4.0f * u + kRoundMagic;
  const uint32_t quadrant = to_bits(shifted);
  const float f = u - 0.25f * (shifted - kRoundMagic);
  const float s = f * f;
  float sin_f = -0x1.2d92fep6f;
  sin_f = sin_f * s + 0x1.465e92p6f;
  sin_f = sin_f * s - 0x1.4abbb8p5f;
  sin_f = f * (sin_f * s + 0x1.921fb6p2f);
  float cos_f = -0x1.db5fa8p5f;
  cos_f = cos_f * s + 0x1.55cb88p6f;
  cos_f = cos_f * s - 0x1.03c1eap6f;
  cos_f = cos_f * s + 0x1.3bd3ccp4f;
  cos_f = 1.0f - s * cos_f;
  const bool swap = quadrant & 1u;
  const uint32_t sin_sign = (quadrant & 2u) << 30, cos_sign = ((quadrant + 1u) & 2u) << 30;
  return {from_bits(to_bits(swap ? cos_f : sin_f) ^ sin_sign),
          from_bits(to_bits(swap ? sin_f : cos_f) ^ cos_sign)};
}
FASTVAE_HD SinCos<double> sincos_turn(double u) {
  const double n = std::floor(4.0 * u + 0.5);
#if defined(__CUDA_ARCH__)
  double s, c;
  ::sincospi(2.0 * (u - 0.25 * n), &s, &c);  // sin and cos keep a stack frame for huge arguments
#else
  const double angle = 6.283185307179586476925 * (u - 0.25 * n);
  const double s = std::sin(angle), c = std::cos(angle);
#endif
  const int quadrant = static_cast<int>(n) & 3;
  return {quadrant == 0   ? s
          : quadrant == 1 ? c
          : quadrant == 2 ? -s
                          : -c,
          quadrant == 0   ? c
          : quadrant == 1 ? -s
          : quadrant == 2 ? -c
                          : s};
}

FASTVAE_HD float sqrt(float x) { return ::sqrtf(x); }
FASTVAE_HD double sqrt(double x) { return ::sqrt(x); }

// 1 / (1 + e^-x), given t = e^-|x|.
template <class T>
FASTVAE_HD T sigmoid(T x, T t) {
  const T large = T(1) / (T(1) + t);
  return x < T(0) ? t * large : large;
}

}  // namespace fastvae::math
