// Residual flows: stacks of K steps, each of which moves z along one direction and has a
// determinant in closed form (Rezende & Mohamed 2015, section 4.1). All in nats.
//
//   planar   z' = z + v tanh(w.z + b),        log|det| = log(1 + h' w.v),   h' = 1 - tanh^2
//   radial   z' = z + (g - a) h (z - c),      log|det| = (D - 1) log(1 + (g - a) h)
//              h = 1 / (a + |z - c|)                     + log(1 + (g - a) a h^2)
//   Householder  z' = z - 2 n (n.z),      log|det| = 0,   n = v / |v|
//
// A step's *line* of parameters is constrained so that the step is invertible whatever they are:
//
//   planar   v = u + (softplus(w.u) - 1 - w.u) w / |w|^2, so that w.v = softplus(w.u) - 1 > -1
//   radial   a = softplus(alpha), g = softplus(beta): (g - a) > -a
//
// A flow says how to constrain a line; what it measures of a row, for the step's argument; how the
// step moves an element; and the same backwards. Engines (steps.h, residual_flow.cu) sum what is
// measured.
//
// The inverse takes the steps back, the last one first. A flow solves for a step's argument from
// what is measured after the step; all else follows from that number. With
// x = f^-1(y), J = df/dx, and gradients g of x and m of the inverse's log-determinant, -log|det J|:
//
//   lambda = J^-T (g - m d log|det J| / dx)   is the gradient of y;
//   that of the parameters is minus that of the forward step at x, given lambda and m.
//
// So its backward takes the steps forward again, with the formulas of the forward's backward.
#pragma once

#include "scale.h"
#include "sweep.h"

namespace fastvae {

// log(1 + e^x), above 0 also where e^x is not: a step may come as close to singular as T knows.
template <class T>
FASTVAE_HD T positive(T x) {
  return math::max(math::Real<T>::kTiny, Softplus::sigma(x));
}

// What a step stretches by, 1 + f, which is also `other` without cancelling where f is near -1.
template <class T>
struct Stretch {
  T gain, log;
  FASTVAE_HD Stretch(T f, T other) {
    gain = f > T(-0.5) ? T(1) + f : f == f ? math::max(math::Real<T>::kTiny, other) : f;
    log = gain <= math::largest<T>() ? math::log_near(gain, f) : gain;
  }
};

struct Planar {
  static constexpr const char* kName = "planar_flow";
  static constexpr const char* kArguments[] = {"z", "u", "w", "b"};
  static constexpr int kVectors = 2, kGiven = 1;  // of a line: u, w; and numbers as given, b
  static constexpr int kInputs = 1 + kVectors + kGiven;

  // ---- a line -------------------------------------------------------------------------------
  template <class T>
  static FASTVAE_HD Values<T, 2> line_terms(const T* v) {  // of w.u, |w|^2
    return {{v[0] * v[1], v[1] * v[1]}};
  }
  template <class T>
  struct Line {
    T numbers[2];  // b, softplus(w.u)
    T pull;        // v = u + pull w
    T inverse_square, slope;

    FASTVAE_HD Line(Values<T, 2> sums, const T* given) {
      const T dot = sums.v[0];
      // Where w is 0, or its square is, the step is a translation, and any u will do.
      const bool is_flat = sums.v[1] < math::Real<T>::kTiny;
      inverse_square = is_flat ? T(0) : T(1) / sums.v[1];
      pull = (Softplus::sigma(-dot) - T(1)) * inverse_square;  // softplus(x) - x = softplus(-x)
      numbers[0] = given[0];
      numbers[1] = is_flat ? T(1) : positive(dot);
      slope = Softplus::d_sigma(dot);
    }
    FASTVAE_HD Values<T, kVectors> vectors(const T* v) const {
      return {{v[0] + pull * v[1], v[1]}};
    }
  };
  template <class T>
  static FASTVAE_HD T line_gradient_term(const T* d, const T* v) {  // of dv.w
    return d[0] * v[1];
  }
  template <class T>
  struct LineGradient {
    T pull, of_dot, of_square;
    T given[1];

    FASTVAE_HD LineGradient(const Line<T>& line, T sum, const T* d_numbers) {
      pull = line.pull;
      const T relative = line.inverse_square * sum;  // first: the square of the inverse overflows
      of_dot = (line.slope - T(1)) * relative;
      of_dot += line.inverse_square == T(0) ? T(0) : line.slope * d_numbers[1];
      of_square = T(-2) * pull * relative;
      given[0] = d_numbers[0];
    }
    FASTVAE_HD Values<T, kVectors> vectors(const T* d, const T* v) const {
      return {{d[0] + of_dot * v[1], d[1] + pull * d[0] + of_dot * v[0] + of_square * v[1]}};
    }
  };

  // ---- a row's step, of v, w and the numbers of its line ---------------------------------------
  template <class T>
  static FASTVAE_HD T measure(T z, const T* v) {
    return v[1] * z;
  }
  template <class T>
  static FASTVAE_HD T argument(T measured, const T* numbers) {
    return measured + numbers[0];
  }
  template <class T>
  struct Step {
    T there, back;  // what moves a row by the step, and takes it back
    T log_det;
    T shift, slope, excess, inverse_gain;

    FASTVAE_HD Step(T argument, const T* numbers, T)
        : Step(argument, numbers[1], numbers[1] - T(1)) {}
    // Of 1 + w.v and w.v, either of which may have lost the other's digits.
    FASTVAE_HD Step(T argument, T gain, T w_v) {
      const math::Tanh<T> h = math::tanh(argument);
      shift = there = h.value;
      back = -shift;
      slope = h.slope;
      excess = w_v;
      const T f = slope * excess;
      const Stretch<T> along(f, shift * shift + slope * gain);
      log_det = along.log;
      inverse_gain = T(1) / along.gain;
    }
  };
  template <class T>
  static FASTVAE_HD T move(T z, T by, const T* v) {
    return z + v[0] * by;
  }

  // The root of a + e tanh(a) = c, e > -1, c = w.y + b, which is odd in c and increasing. From the
  // start below, iterations of Halley's leave 3e-2 of it, 5e-6, 5e-13: measured over all e and c,
  // but for e > 1e7, where c has not the digits to know a.
  template <class T>
  static FASTVAE_HD T solve(T measured, const T* numbers) {
    const T signed_c = argument(measured, numbers), c = math::abs(signed_c);
    const T n = numbers[1], e = n - T(1);
    T a = start<T>(c, e, n);
    // It lies between the start and c: at a fold, where all is rounding, nothing else would hold.
    const T low = T(0.99) * math::min(c, a), high = T(1.01) * math::max(c, a);
    FASTVAE_UNROLL
    for (int i = 0; i < (sizeof(T) > 4 ? 4 : 3); ++i) {
      const math::Tanh<T> h = math::tanh(a);
      const T f = h.slope * e, other = h.value * h.value + h.slope * n;
      const T inverse = T(1) / (f > T(-0.5) ? T(1) + f : math::max(math::Real<T>::kTiny, other));
      const T newton = ((a - c) + e * h.value) * inverse;
      const T next = a - newton / math::max(T(0.5), T(1) + newton * (f * inverse) * h.value);
      a = math::min(high, math::max(low, next));
    }
    a = c <= math::largest<T>() ? a : c;  // where all that tanh does is lost, and of NaN
    return signed_c < T(0) ? -a : a;
  }
  // Of the bounds on the root one is near. Where e < 0 it lies below c - e, c / n and, as a -
  // tanh(a) >= a^3 / 4.2 up to 1, below the root of -e a^3 / 4.2 = c. Where e > 0 it lies above c -
  // e, c / n and atanh((c - u) / e) with any u above it, such as c, or max(0, c - e) + log(4e) / 2.
  template <class T>
  static FASTVAE_HD T start(T c, T e, T n) {
    const T far = math::max(T(0.5), T(0.5) * math::log_normal(math::max(T(1), e) * T(4)));
    const T s = math::min(e, math::max(T(0), e - c) + far);  // e + u - c
    const T cube = T(4.2) * (c / math::max(T(0.5), -e));
    const T log =
        math::log_normal(math::max(math::Real<T>::kTiny, e < T(0) ? cube : (e - s + e) / s));
    const T root = cube <= T(1) ? math::exp_weight(log * T(1.0 / 3)) : c - e;
    const T below = math::max(T(0.5) * log, math::max(c / n, c - e));
    return e < T(0) ? math::min(root, c / n) : below;
  }

  // ---- and backwards ----------------------------------------------------------------------------
  template <class T>
  static FASTVAE_HD T weigh(T grad, T, const T* v) {
    return grad * v[0];
  }
  template <class T>
  struct Back {
    T shift, slope;
    T numbers[2];

    FASTVAE_HD Back(const Step<T>& s, T weighed, T grad_log_det, const T*, T) {
      const T grad_f = grad_log_det * s.inverse_gain;
      shift = s.shift;
      slope = s.slope * (weighed - T(2) * s.shift * s.excess * grad_f);
      numbers[0] = slope;
      numbers[1] = grad_f * s.slope;
    }
    // Of the inverse, where `weighed` is of the gradient before the step.
    static FASTVAE_HD Back inverse(const Step<T>& s, T weighed, T grad_log_det, const T* line,
                                   T dims) {
      Back b(s, weighed, grad_log_det, line, dims);
      b.shift = -b.shift;
      b.slope = b.numbers[0] = -b.slope * s.inverse_gain;
      b.numbers[1] = -b.numbers[1];
      return b;
    }
  };
  // The gradient of z, of z', or the other way round; and of the vectors. That of v is the gradient
  // after the step times the shift.
  static constexpr bool kPullsOneWay = false;
  template <bool kInverse, class T>
  static FASTVAE_HD T pull(T grad, T z, T shift, T slope, const T* v, T* d) {
    const T pulled = grad + slope * v[1];
    d[0] = shift * (kInverse ? pulled : grad);
    d[1] = slope * z;
    return pulled;
  }
};

struct Radial {
  static constexpr const char* kName = "radial_flow";
  static constexpr const char* kArguments[] = {"z", "center", "alpha", "beta"};
  static constexpr int kVectors = 1, kGiven = 2, kInputs = 1 + kVectors + kGiven;

  template <class T>
  static FASTVAE_HD Values<T, 2> line_terms(const T*) {
    return {};
  }
  template <class T>
  struct Line {
    T numbers[2];  // a, g
    T slopes[2];

    FASTVAE_HD Line(Values<T, 2>, const T* given) {
      for (int i = 0; i < 2; ++i) {
        numbers[i] = positive(given[i]);
        slopes[i] = Softplus::d_sigma(given[i]);
      }
      if (numbers[0] < T(1e-12)) {  // h^2 is finite even in the centre
        numbers[0] = T(1e-12);
        slopes[0] = T(0);
      }
    }
    FASTVAE_HD Values<T, kVectors> vectors(const T* v) const { return {{v[0]}}; }
  };
  template <class T>
  static FASTVAE_HD T line_gradient_term(const T*, const T*) {
    return T(0);
  }
  template <class T>
  struct LineGradient {
    T given[2];

    FASTVAE_HD LineGradient(const Line<T>& line, T, const T* d_numbers) {
      for (int i = 0; i < 2; ++i) given[i] = line.slopes[i] * d_numbers[i];
    }
    FASTVAE_HD Values<T, kVectors> vectors(const T* d, const T*) const { return {{d[0]}}; }
  };

  template <class T>
  static FASTVAE_HD T measure(T z, const T* v) {
    return (z - v[0]) * (z - v[0]);
  }
  template <class T>
  static FASTVAE_HD T argument(T measured, const T*) {
    return math::sqrt(measured);
  }
  template <class T>
  struct Step {
    T there, back, log_det;
    T r, h, shift, gain, f, gain_along;

    FASTVAE_HD Step(T argument, const T* numbers, T dims) {
      const T a = numbers[0], g = numbers[1];
      r = argument;
      h = T(1) / (a + r);
      shift = (g - a) * h;
      f = shift * (a * h);
      const Stretch<T> across(shift, (r + g) * h);
      const Stretch<T> along(f, r * h * ((a + a + r) * h) + g * h * (a * h));
      gain = there = across.gain;
      back = T(1) / gain;
      gain_along = along.gain;
      log_det = (dims - T(1)) * across.log + along.log;
    }
  };
  // From the side on which less is lost; and the centre stays, though the stretch may be infinite.
  template <class T>
  static FASTVAE_HD T move(T z, T stretch, const T* v) {
    const T d = z - v[0];
    const T moved = stretch > T(0.5) ? z + (stretch - T(1)) * d : v[0] + stretch * d;
    return d == T(0) ? z : moved;
  }

  // The radius before the step, r (g + r) / (a + r) = R after it: r^2 + (g - R) r = a R.
  template <class T>
  static FASTVAE_HD T solve(T measured, const T* numbers) {
    const T a = numbers[0], g = numbers[1], after = argument(measured, numbers), p = after - g;
    // p^2 + 4 a R overflows where its root does not.
    const T q = T(2) * math::sqrt(a) * math::sqrt(after), size = math::abs(p);
    const T high = math::max(math::Real<T>::kTiny, math::max(q, size)), low = math::min(q, size);
    const T ratio = low / high, sum = high * math::sqrt(T(1) + ratio * ratio) + size;
    const T before = p > T(0) ? T(0.5) * sum : T(2) * a * (after / sum);
    return after <= math::largest<T>() ? before : after;
  }

  template <class T>
  static FASTVAE_HD T weigh(T grad, T z, const T* v) {
    return grad * (z - v[0]);
  }
  template <class T>
  struct Back {
    T shift, slope;
    T numbers[2];

    FASTVAE_HD Back(const Step<T>& s, T weighed, T grad_log_det, const T* line, T dims) {
      // In terms of a and g, not of their difference: where that is -a the digits of g are gone.
      const T grad_shift = weighed + grad_log_det * (dims - T(1)) / s.gain;
      const T grad_f = grad_log_det / s.gain_along, g = line[1];
      const T of_r = -s.h * (s.shift * grad_shift + T(2) * s.f * grad_f);
      const T of_a = -s.h * (s.gain * grad_shift) +
                     s.h * (grad_f * ((s.r + s.r + g) * s.h - T(2) * s.gain_along));
      const T of_g = s.h * (grad_shift + line[0] * s.h * grad_f);
      shift = s.shift;
      slope = s.r == T(0) ? T(0) : of_r / s.r;
      numbers[0] = of_a;
      numbers[1] = of_g;
    }
    // What lambda weighs is had of what g does by the step's stretch along the ray.
    static FASTVAE_HD Back inverse(const Step<T>& s, T weighed, T grad_log_det, const T* line,
                                   T dims) {
      const T of_log_det =
          (s.h * s.r) * (s.shift * (dims - T(1)) / s.gain + T(2) * s.f / s.gain_along);
      const T after = (weighed + grad_log_det * of_log_det) / s.gain_along;
      Back b(s, after, grad_log_det, line, dims);
      b.shift = -b.shift * s.back;
      b.slope = -b.slope * s.back;
      for (int i = 0; i < 2; ++i) b.numbers[i] = -b.numbers[i];
      return b;
    }
  };
  static constexpr bool kPullsOneWay = true;  // both ways are along the ray
  template <bool, class T>
  static FASTVAE_HD T pull(T grad, T z, T shift, T slope, const T* v, T* d) {
    const T along = shift * grad + slope * (z - v[0]);
    d[0] = -along;
    return grad + along;
  }
};

// Reflections (Tomczak & Welling 2016), each of which is its own inverse.
struct Householder {
  static constexpr const char* kName = "householder_flow";
  static constexpr const char* kArguments[] = {"z", "v"};
  static constexpr int kVectors = 1, kGiven = 0, kInputs = 1 + kVectors + kGiven;

  template <class T>
  static FASTVAE_HD Values<T, 2> line_terms(const T* v) {
    return {{v[0] * v[0]}};
  }
  template <class T>
  struct Line {
    T numbers[2] = {};
    T inverse_norm;

    // Where |v|^2 is 0, or no normal number, the step is the identity.
    FASTVAE_HD Line(Values<T, 2> sums, const T*)
        : inverse_norm(sums.v[0] < math::Real<T>::kTiny ? T(0) : T(1) / math::sqrt(sums.v[0])) {}
    FASTVAE_HD Values<T, kVectors> vectors(const T* v) const { return {{v[0] * inverse_norm}}; }
  };
  template <class T>
  static FASTVAE_HD T line_gradient_term(const T* d, const T* v) {  // of dn.v
    return d[0] * v[0];
  }
  template <class T>
  struct LineGradient {
    T inverse_norm, along;
    T given[1] = {};

    FASTVAE_HD LineGradient(const Line<T>& line, T sum, const T*)
        : inverse_norm(line.inverse_norm), along(sum * inverse_norm * inverse_norm) {}
    FASTVAE_HD Values<T, kVectors> vectors(const T* d, const T* v) const {
      return {{(d[0] - v[0] * along) * inverse_norm}};
    }
  };

  template <class T>
  static FASTVAE_HD T measure(T z, const T* v) {
    return v[0] * z;
  }
  template <class T>
  static FASTVAE_HD T argument(T measured, const T*) {
    return measured;
  }
  template <class T>
  struct Step {
    T there, back, log_det;

    FASTVAE_HD Step(T argument, const T*, T)
        : there(T(-2) * argument), back(-there), log_det(T(0) * argument) {}  // NaN passes
  };
  template <class T>
  static FASTVAE_HD T move(T z, T by, const T* v) {
    return z + v[0] * by;
  }
  template <class T>
  static FASTVAE_HD T solve(T measured, const T*) {  // n.z' = -n.z
    return -measured;
  }

  template <class T>
  static FASTVAE_HD T weigh(T grad, T, const T* v) {
    return grad * v[0];
  }
  template <class T>
  struct Back {
    T shift, slope;
    T numbers[2] = {};

    FASTVAE_HD Back(const Step<T>& s, T weighed, T, const T*, T)
        : shift(s.there), slope(T(-2) * weighed) {}
    static FASTVAE_HD Back inverse(const Step<T>& s, T weighed, T grad_log_det, const T* line,
                                   T dims) {
      Back b(s, weighed, grad_log_det, line, dims);
      b.shift = -b.shift;
      return b;
    }
  };
  static constexpr bool kPullsOneWay = false;
  template <bool kInverse, class T>
  static FASTVAE_HD T pull(T grad, T z, T shift, T slope, const T* v, T* d) {
    const T pulled = grad + slope * v[0];
    d[0] = shift * (kInverse ? pulled : grad) + slope * z;
    return pulled;
  }
};

// Rows meet the lines of their steps: the K of all rows, or K of their own, [rows, K].
struct FlowSweep {
  DType dtype = DType::kFloat32;  // of all but log_det and its gradient: float, or double
  int64_t rows = 0, dims = 0, steps = 0;
  bool shared = true, inverse = false;
  const void* z = nullptr;      // [rows, dims]; all is contiguous
  const void* vectors[2] = {};  // [lines, dims]
  const void* given[2] = {};    // [lines]
  void *out = nullptr, *log_det = nullptr;

  const void *grad_out = nullptr, *grad_log_det = nullptr;  // null: zero
  void* d_z = nullptr;
  void *d_vectors[2] = {}, *d_given[2] = {};  // null: not wanted

  int64_t line_count() const { return shared ? steps : rows * steps; }
};

// Sylvester flows (van den Berg et al. 2018) are planar steps of rank M at once:
//
//   z' = z + Q R tanh(S Q^T z + b),   log|det| = sum_i log(1 + h'_i r_ii s_ii)
//
// with Q^T Q = 1, and R and S upper triangles. To the engines (products.h, sylvester.cu) a line is
// in = Q S^T and out = Q R, both [dims, rank], in which nothing of the triangles is left; b; and
// w_v = r_ii s_ii, with gain = 1 + w_v. An element of h is a planar step's, with these.
//
// The inverse needs of the triangles their product T = S R too, without its diagonal, which is w_v:
//
//   a + (T + w_v) tanh(a) = in^T z' + b,   z = z' - out tanh(a)
//
// is solved from the last element to the first, each a planar step's with what is known taken off
// the right. With gradients g of z and m of the inverse's log-determinant, and q its d/da,
//
//   slope + h' (T^T + w_v) slope = m q - h' out^T g
//
// is the gradient of b, solved from the first element to the last, again as planar steps are; those
// of z', in and out are g + in slope, z' slope^T and -g h^T, and that of T is -slope h^T.
//
// A line holds in, its transpose, out, its transpose, b, gain, w_v; a gradient in, out, b, gain; of
// the inverse a line T and its transpose besides, a gradient T, of which what is not above the
// diagonal means nothing. The last dimension of each is padded with zeros to whole lanes: dims to
// width, rank to rank_width.
//
// The tanh of the diagonals of R and S as given keeps their product above -1, whatever they are.
struct SylvesterDiagonal {
  struct Forward : Formula<Shape{.inputs = 2, .outputs = 4}> {  // both tanh, w_v and the gain
    template <class T>
    static FASTVAE_HD Values<T, 4> eval(T r, T s) {
      const math::Tanh<T> a = math::tanh(r), b = math::tanh(s);
      const T product = a.value * b.value;
      // Where 1 + x y cancels it is 1 - (1 - u) (1 - v).
      const T u = a.slope / (T(1) + math::abs(a.value)), v = b.slope / (T(1) + math::abs(b.value));
      const T small = math::max(math::Real<T>::kTiny, u + v - u * v);
      return {{a.value, b.value, product, product > T(-0.5) ? T(1) + product : small}};
    }
  };
  struct Backward : Formula<Shape{.inputs = 5, .outputs = 2}> {
    template <class T>
    static FASTVAE_HD Values<T, 2> eval(T r, T s, T d_r, T d_s, T d_gain) {
      const math::Tanh<T> a = math::tanh(r), b = math::tanh(s);
      return {{(d_r + d_gain * b.value) * a.slope, (d_s + d_gain * a.value) * b.slope}};
    }
  };
};

struct SylvesterSweep {
  bool in_double = false;  // all is float, or double
  int64_t rows = 0, dims = 0, width = 0, rank = 0, rank_width = 0, steps = 0;
  bool shared = true, inverse = false;
  const void* z = nullptr;    // [rows, dims]
  const void* given[4] = {};  // q, [lines, dims, rank]; r and s, [lines, rank, rank]; b
  const void* lines = nullptr;
  void *out = nullptr, *log_det = nullptr;

  const void *grad_out = nullptr, *grad_log_det = nullptr;  // null: zero
  void *d_z = nullptr, *d_lines = nullptr;                  // the first null: not wanted
  void* d_given[4] = {};                                    // null: not wanted

  // The numbers of a line, and of its gradient.
  FASTVAE_HD int64_t line_size() const {
    return 2 * (dims * rank_width + rank * width) + (3 + (inverse ? 2 * rank : 0)) * rank_width;
  }
  FASTVAE_HD int64_t gradient_size() const {
    return (2 * dims + 2 + (inverse ? rank : 0)) * rank_width;
  }
};

// Where the parts of a line lie, T const or not; the last two are the inverse's.
template <class T>
struct SylvesterLine {
  T *in, *in_t, *out, *out_t, *b, *gain, *w_v, *t, *t_t;

  FASTVAE_HD SylvesterLine(const SylvesterSweep& s, T* line)
      : in(line),
        in_t(in + s.dims * s.rank_width),
        out(in_t + s.rank * s.width),
        out_t(out + s.dims * s.rank_width),
        b(out_t + s.rank * s.width),
        gain(b + s.rank_width),
        w_v(gain + s.rank_width),
        t(w_v + s.rank_width),
        t_t(t + s.rank * s.rank_width) {}
};
template <class T>
struct SylvesterGradient {
  T *in, *out, *b, *gain, *t;

  FASTVAE_HD SylvesterGradient(const SylvesterSweep& s, T* gradient)
      : in(gradient),
        out(in + s.dims * s.rank_width),
        b(out + s.dims * s.rank_width),
        gain(b + s.rank_width),
        t(gain + s.rank_width) {}
};

}  // namespace fastvae
