// Bounds on log p(x) from K log-weights log p(x, z_k) - log q(z_k | x), in nats.
#pragma once

#include "sweep.h"

namespace fastvae {

// log (1/K) sum_k e^{l_k}   (Burda et al. 2016, eq. 8); a row is one datapoint, its columns the K
// samples. Its gradient are the normalised weights w_k = e^{l_k} / sum_j e^{l_j}: they are taken
// relative to the largest l, not to the bound, whose rounding at |l| = 1e4 would cost them 1e-3.
//
// No sum of terms that know nothing of each other, hence no formula for the row engines: lanes.h
// and bound.cu reduce with what follows, in the order of the columns.
struct LogMeanExp {
  struct Forward : Formula<Shape{.inputs = 1, .row_sums = 1}> {
    using Reduction = LogMeanExp;
  };
  struct Backward : Formula<Shape{.inputs = 1, .row_inputs = 1, .outputs = 1}> {
    using Reduction = LogMeanExp;
  };

  // As many terms are added in T, everything beyond in double: a million samples cost no digits.
  static constexpr int kChunk = 32;

  // First: the largest l, or NaN if there is one.
  template <class T>
  static FASTVAE_HD constexpr T lowest() {
    return -math::kInfinity<T>;
  }
  template <class T>
  static FASTVAE_HD T larger(T max, T l) {
    return l > max || l != l ? l : max;
  }

  // Then the terms, relative to it; where it is infinite, as they are.
  template <class T>
  static FASTVAE_HD T shift(T max) {
    return math::abs(max) > math::largest<T>() ? T(0) : max;
  }
  template <class T>
  static FASTVAE_HD T term(T l, T shift) {
    return math::exp(l - shift);
  }

  template <class T>
  static FASTVAE_HD T value(T max, double sum, int64_t count) {
    if (math::abs(max) > math::largest<T>()) return max;
    return max + math::log_normal(static_cast<T>(sum / static_cast<double>(count)));
  }

  // d loss / d l_k is this times the term. Where all weights are 0, none of them has a gradient.
  template <class T>
  static FASTVAE_HD T slope(double sum, T grad) {
    return sum == 0 ? T(0) : static_cast<T>(static_cast<double>(grad) / sum);
  }
};

// Where Backward writes: like an input at strides of its own, so that the gradient lies in memory
// as log_w does; contiguous if the sweep does not say.
FASTVAE_HD Operand gradient_of(const Sweep& s) {
  if (s.inputs[1].data != nullptr) return s.inputs[1];
  return {s.outputs[0], s.inner * s.columns, s.columns, 1};
}

}  // namespace fastvae
