// Monotonic rational-quadratic splines (Durkan et al. 2019): each element of x goes through a
// spline of its own, made of K pieces between knots.
//
// Widths and heights of the pieces are softmaxes of unconstrained numbers, stretched to [-B, B] and
// no smaller than their minimum; slopes at the knots are a softplus and a minimum. On a piece from
// (left, bottom), with theta = (x - left) / width, rest = 1 - theta and the slopes a and b at its
// ends in units of height / width,
//
//   low = theta^2 + a theta rest,  high = rest^2 + b theta rest,
//   y = bottom + height low / (low + high)
//   dy/dx = height / width (b theta^2 + 2 theta rest + a rest^2) / (low + high)^2
//
// The paper's denominator, s + (d1 + d0 - 2s) theta rest, is s (low + high): a sum of what is
// positive, that cannot cancel. Nor does the inverse. With xi = (y - bottom) / height it is the
// root of a quadratic whose discriminant is
//
//   (a (1 - xi) - b xi)^2 + 4 xi (1 - xi),
//
// which no rounding makes negative. Outside [-B, B] the spline is the identity, or, if it is
// circular, goes on periodically.
#pragma once

#include "scale.h"
#include "sweep.h"

namespace fastvae {

// A slope beyond this is this: its square and those of its ratios are then numbers, also of
// float32.
inline constexpr double kSteepest = 1e9;

// The piece that an element lies on.
template <class T>
struct Piece {
  T left, width, bottom, height;
  T slope0, slope1;          // at its ends
  T left_rest, bottom_rest;  // what left and bottom lost when they were rounded
};

// d loss / d of a piece, and of what went into it.
template <class T>
struct PieceGradient {
  T in, left, width, bottom, height, slope0, slope1;
};

template <class T>
struct PiecePoint {
  T theta, rest;         // of the way along the piece: 1 together
  T low, high, inverse;  // inverse of their sum
  T bend;                // dy/dx (low + high)^2, in units of the piece
  T a, b;                // slopes at its ends, likewise

  static FASTVAE_HD T within(T x) { return math::min(T(1), math::max(T(0), x)); }

  // At x; or, of the inverse, where y comes from.
  static FASTVAE_HD PiecePoint at(const Piece<T>& p, T x) {
    const T theta = within(((x - p.left) - p.left_rest) / p.width);
    return PiecePoint(p, theta, T(1) - theta);
  }
  static FASTVAE_HD PiecePoint from(const Piece<T>& p, T y) {
    const T xi = within(((y - p.bottom) - p.bottom_rest) / p.height), eta = T(1) - xi;
    const T steep = p.width / p.height, a = p.slope0 * steep, b = p.slope1 * steep;
    const T tilt = a * eta - b * xi;
    const T root = T(0.5) * (math::abs(tilt) + math::sqrt(tilt * tilt + T(4) * xi * eta));
    // theta : rest, of which the smaller root needs no difference
    const T ahead = tilt < T(0) ? root : xi, behind = tilt < T(0) ? eta : root;
    const T whole = T(1) / (ahead + behind);
    return PiecePoint(p, ahead * whole, behind * whole);
  }

  FASTVAE_HD PiecePoint(const Piece<T>& p, T at, T before) : theta(at), rest(before) {
    const T steep = p.width / p.height, mixed = theta * rest;
    a = p.slope0 * steep, b = p.slope1 * steep;
    low = theta * theta + a * mixed;
    high = rest * rest + b * mixed;
    inverse = T(1) / (low + high);
    bend = b * (theta * theta) + T(2) * mixed + a * (rest * rest);
  }

  FASTVAE_HD T x(const Piece<T>& p) const { return p.left + (p.width * theta + p.left_rest); }
  FASTVAE_HD T y(const Piece<T>& p) const {
    return p.bottom + (p.height * (low * inverse) + p.bottom_rest);
  }
  FASTVAE_HD T log_slope(const Piece<T>& p) const {
    return math::log(p.height / p.width * ((bend * inverse) * inverse));
  }

  // Of y and log dy/dx, given the gradients of both; with kInverse of x and log dx/dy, where x is
  // F^-1(y): then dL/dy = (dL/dx + ...) / F', and what F would hand its parameters for -dL/dy.
  template <bool kInverse>
  FASTVAE_HD PieceGradient<T> gradient(const Piece<T>& p, T grad, T grad_log) const {
    const T mixed = theta * rest, tilt = rest - theta, inverse2 = inverse * inverse;
    const T run = T(1) / p.width, rise = T(1) / p.height, unbend = T(1) / bend;
    const T d_log = T(2) * ((b * theta + tilt - a * rest) * unbend -
                            (a + b - T(2)) * tilt * inverse);  // of log dy/dx, by theta
    const T log_weight = kInverse ? -grad_log : grad_log;
    PieceGradient<T> d;
    T weight = grad, along;  // the gradient of y, of theta
    if constexpr (kInverse) {
      along = -grad * p.width;
      d.in = (grad * p.width + log_weight * d_log) * rise * (unbend / inverse2);
      weight = -d.in;
    } else {
      along = grad * p.height * (bend * inverse2) + log_weight * d_log;
      d.in = along * run;
    }
    const T on_y = weight * p.height * inverse2 * mixed;
    const T d_a = on_y * high + log_weight * (rest * rest * unbend - T(2) * mixed * inverse);
    const T d_b = log_weight * (theta * theta * unbend - T(2) * mixed * inverse) - on_y * low;
    const T tight = d_a * a + d_b * b, steep = p.width * rise;
    d.left = -along * run;
    d.width = (tight - log_weight - along * theta) * run;
    d.bottom = weight;
    d.height = weight * (low * inverse) + (log_weight - tight) * rise;
    d.slope0 = d_a * steep;
    d.slope1 = d_b * steep;
    return d;
  }
};

// An element through its piece, and log dy/dx of that, or log dx/dy.
template <class T>
FASTVAE_HD Values<T, 2> follow(const Piece<T>& p, T v, T turns, bool outside, bool inverse) {
  const T at = v - turns;
  const PiecePoint<T> point = inverse ? PiecePoint<T>::from(p, at) : PiecePoint<T>::at(p, at);
  const T to = (inverse ? point.x(p) : point.y(p)) + turns, log = point.log_slope(p);
  return {{outside ? v : to, outside ? T(0) : (inverse ? -log : log)}};
}

// What a softmax's terms before the piece, at it and after it get, of [width, height]: a term is as
// good as another but for how it moves the piece, so their weighted mean is taken off.
template <class T>
FASTVAE_HD Values<T, 3> of_terms(T d_start, T d_size, T start, T size, T index, T base, T gain) {
  const T mean = (d_start * (start - index * base) + d_size * (size - base)) / gain;
  return {{d_start - mean, d_size - mean, -mean}};
}

// A slope, of its number; and the derivative.
template <class T>
FASTVAE_HD T spline_slope(T s, T min_slope) {
  return math::min(T(kSteepest), min_slope + Softplus::sigma(s));
}
template <class T>
FASTVAE_HD T d_spline_slope(T s, T min_slope) {
  return min_slope + Softplus::sigma(s) < T(kSteepest) ? Softplus::d_sigma(s) : T(0);
}

// Elements of [rows, columns], each with numbers of its own, [bins]; strides count elements.
struct SplineOperand {
  const void* data = nullptr;
  int64_t row = 0, column = 0, bin = 0;
};

struct SplineSweep {
  DType dtype = DType::kFloat32;
  int64_t rows = 0, columns = 0, bins = 0;
  bool inverse = false, circular = false;
  double bound = 1, min_width = 0, min_height = 0, min_slope = 0;
  SplineOperand x, widths, heights, slopes;  // slopes: bins - 1, of the inner knots; or bins
  void *y = nullptr, *log_det = nullptr;     // [rows, columns], [rows]; contiguous, as all below
  const void *grad = nullptr, *grad_log_det = nullptr;  // backward; null: not used
  void *d_x = nullptr, *d_widths = nullptr, *d_heights = nullptr, *d_slopes = nullptr;

  FASTVAE_HD int64_t slope_count() const { return circular ? bins : bins - 1; }
};

// A knot is a sum of sizes, which is as good as an ulp of the bound, and may be a thousand ulp of a
// narrow piece. So its rest is kept too: what the additions lost (math::lost), and what the sizes
// have of a common error, the sum's and the division's of their softmax. Together they make 2 B: by
// as much as they do not, less the part that is no softmax's, every knot is off.
template <class T>
FASTVAE_HD T knot_rest(T knot, T rest, T end, T end_rest, T bound, T base, T gain, T index) {
  const T excess = (end - bound) + end_rest;
  return rest - excess * ((knot + bound - index * base) / gain);
}

// The numbers of a sweep in its type. Piece k is base + share e^(w_k - max) wide, share = gain /
// sum.
template <class T>
struct SplineScale {
  T bound, base_width, base_height, gain_width, gain_height, min_slope;
  T limit, period;  // where the identity begins; 0 if it does
  T first, last;    // the pieces that join it: none of a circular spline

  explicit FASTVAE_HD SplineScale(const SplineSweep& s)
      : bound(static_cast<T>(s.bound)),
        base_width(static_cast<T>(2 * s.bound * s.min_width)),
        base_height(static_cast<T>(2 * s.bound * s.min_height)),
        gain_width(static_cast<T>(2 * s.bound * (1 - s.min_width * static_cast<double>(s.bins)))),
        gain_height(static_cast<T>(2 * s.bound * (1 - s.min_height * static_cast<double>(s.bins)))),
        min_slope(static_cast<T>(s.min_slope)),
        limit(s.circular ? math::kInfinity<T> : bound),
        period(s.circular ? T(2) * bound : T(0)),
        first(s.circular ? T(-1) : T(0)),
        last(s.circular ? T(-1) : static_cast<T>(s.bins - 1)) {}

  FASTVAE_HD bool outside(T x) const { return math::abs(x) > limit; }
  // What lies between x and [-B, B], of a circular spline.
  FASTVAE_HD T turns(T x) const { return period * math::floor((x + bound) / (T(2) * bound)); }
};

}  // namespace fastvae
