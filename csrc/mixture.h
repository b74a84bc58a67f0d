// Mixtures of diagonal Gaussians: what one row, one component and one dimension make of each other.
// The engines (pairs.h, pairs.cuh) know how the pairs are walked and summed. All in nats.
#pragma once

#include "gaussian.h"

namespace fastvae {

// log N(z; mu, sigma^2) = offset - score^2, of one dimension,
//   score = (z - mu) scale,  scale = 1 / (sqrt 2 sigma),  offset = -log(2 pi) / 2 - log sigma.
// The square of a difference, never the difference of squares: components may be far away.
struct PairwiseGaussian {
  // What a component's scale, given by s, is to all its pairs.
  template <class T>
  struct Spread {
    T scale, offset;
  };
  template <class S, class T>
  static FASTVAE_HD Spread<T> spread(T s) {
    return {T(0.70710678118654752) * S::inverse_sigma(s), Gaussian<S>::term(T(0), T(0), s)};
  }
  // The gradient by s of one that is by log sigma^2.
  template <class S, class T>
  static FASTVAE_HD T chain(T grad, T s) {
    return math::weighed(grad, T(2) * S::d_log_sigma(s));
  }
  // By the map of a number.
  template <class T>
  static FASTVAE_HD Spread<T> spread(ScaleMap map, T s) {
    return with_map(map, [&]<class S>(S) { return spread<S>(s); });
  }
  template <class T>
  static FASTVAE_HD T chain(ScaleMap map, T grad, T s) {
    return with_map(map, [&]<class S>(S) { return chain<S>(grad, s); });
  }

  template <class T>
  static FASTVAE_HD T score(T z, T mu, T scale) {
    return (z - mu) * scale;
  }
  template <class T>
  static FASTVAE_HD T log_density(T offset, T score) {
    return offset - score * score;
  }

  // What a pair of weight w = d loss / d log-density adds to its gradients: d mu = -d z but for a
  // factor of 2 scale, and d log_var.
  template <class T>
  static FASTVAE_HD T grad_mean(T weight, T score) {
    return weight * score;
  }
  template <class T>
  static FASTVAE_HD T grad_log_var(T weight, T score) {
    return weight * (score * score - T(0.5));
  }
  // A pair of no weight adds nothing, also where its score is infinite.
  template <class T>
  static FASTVAE_HD T weighed_score(T weight, T score) {
    return weight == T(0) ? T(0) : score;
  }
};

// How much component `column` weighs in row `row`, if that follows from the two numbers alone: of
// the posteriors of a batch, as estimates of q(z) = 1/N sum_n q(z | x_n) over a data set of N
// (Chen et al. 2018, appendix C). At most three values a row.
enum class Weighting : int {
  kEqual,       // all alike
  kStratified,  // M = rows - 1: 1/N for the row's own posterior, (N - M) / (N M) for the next one,
                // 1/M for the others; together 1
  kLegacy,      // the same three, put where rtqichen/beta-tcvae and its descendants put them
};

struct LogWeights {
  Weighting weighting = Weighting::kEqual;
  double rest = 0, own = 0, next = 0;

  FASTVAE_HD double of(int64_t row, int64_t column, int64_t rows) const {
    if (weighting == Weighting::kStratified) {
      const int64_t after = row + 1 == rows ? 0 : row + 1;
      return column == row ? own : column == after ? next : rest;
    }
    if (weighting == Weighting::kLegacy) {
      const double first = row == rows - 2 ? next : own;
      return column == 0 ? first : column == 1 ? next : rest;
    }
    return rest;
  }
};

}  // namespace fastvae
