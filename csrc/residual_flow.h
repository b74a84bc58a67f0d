// Residual flows: stacks of K steps, each of which moves z along one direction and has a
// determinant in closed form (Rezende & Mohamed 2015, section 4.1). All in nats.
//
//   planar   z' = z + v tanh(w.z + b),        log|det| = log(1 + h' w.v),   h' = 1 - tanh^2
//   radial   z' = z + (g - a) h (z - c),      log|det| = (D - 1) log(1 + (g - a) h)
//              h = 1 / (a + |z - c|)                     + log(1 + (g - a) a h^2)
//
// A step's *line* of parameters is constrained so that the step is invertible whatever they are:
//
//   planar   v = u + (softplus(w.u) - 1 - w.u) w / |w|^2, so that w.v = softplus(w.u) - 1 > -1
//   radial   a = softplus(alpha), g = softplus(beta): (g - a) > -a
//
// A flow says how to constrain a line; what it measures of a row before a step; how the step moves
// an element; and the same backwards. Engines (steps.h, residual_flow.cu) sum what is measured.
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
    gain = f > T(-0.5) ? T(1) + f : math::max(math::Real<T>::kTiny, other);
    log = gain <= math::largest<T>() && f == f ? math::log_near(gain, f) : gain + f;
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
  struct Step {
    T shift, log_det;
    T slope, excess, inverse_gain;

    FASTVAE_HD Step(T measured, const T* numbers, T) {
      const math::Tanh<T> h = math::tanh(measured + numbers[0]);
      shift = h.value;
      slope = h.slope;
      excess = numbers[1] - T(1);
      const T f = slope * excess;
      const Stretch<T> along(f, shift * shift + slope * numbers[1]);
      log_det = along.log;
      inverse_gain = T(1) / along.gain;
    }
  };
  template <class T>
  static FASTVAE_HD T move(T z, T shift, const T* v) {
    return z + v[0] * shift;
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
  };
  // The gradient of z, of z'; and of the vectors.
  template <class T>
  static FASTVAE_HD T pull(T grad, T z, T shift, T slope, const T* v, T* d) {
    d[0] = shift * grad;
    d[1] = slope * z;
    return grad + slope * v[1];
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
  struct Step {
    T shift, log_det;
    T r, h, gain, f, gain_along;

    FASTVAE_HD Step(T measured, const T* numbers, T dims) {
      const T a = numbers[0], g = numbers[1];
      r = math::sqrt(measured);
      h = T(1) / (a + r);
      shift = (g - a) * h;
      f = shift * (a * h);
      const Stretch<T> across(shift, (r + g) * h);
      const Stretch<T> along(f, r * h * ((a + a + r) * h) + g * h * (a * h));
      gain = across.gain;
      gain_along = along.gain;
      log_det = (dims - T(1)) * across.log + along.log;
    }
  };
  template <class T>
  static FASTVAE_HD T move(T z, T shift, const T* v) {
    const T d = z - v[0];
    return d == T(0) ? z : z + shift * d;  // the centre stays, though the shift may be infinite
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
  };
  template <class T>
  static FASTVAE_HD T pull(T grad, T z, T shift, T slope, const T* v, T* d) {
    const T along = shift * grad + slope * (z - v[0]);
    d[0] = -along;
    return grad + along;
  }
};

// Rows meet the lines of their steps: the K of all rows, or K of their own, [rows, K].
struct FlowSweep {
  DType dtype = DType::kFloat32;  // of all but log_det and its gradient: float, or double
  int64_t rows = 0, dims = 0, steps = 0;
  bool shared = true;
  const void* z = nullptr;      // [rows, dims]; all is contiguous
  const void* vectors[2] = {};  // [lines, dims]
  const void* given[2] = {};    // [lines]
  void *out = nullptr, *log_det = nullptr;

  const void *grad_out = nullptr, *grad_log_det = nullptr;  // null: zero
  void* d_z = nullptr;
  void *d_vectors[2] = {}, *d_given[2] = {};  // null: not wanted

  int64_t line_count() const { return shared ? steps : rows * steps; }
};

}  // namespace fastvae
