// Pixels by logistic distributions, discretised to the bins that a screen shows. All in nats.
//
// x in [-1, 1] is the centre of one of n bins, of half-width d = 1/(n - 1). With r = 1 / scale a
// bin's probability is the difference of two sigmoids, at p = (x - mean + d) r and
// m = (x - mean - d) r; the first bin is open to -inf, the last to +inf. A difference of numbers
// near 0, or near 1, has no digits left; but it is a product,
//   sigmoid(p) - sigmoid(m) = (1 - e^-w) sigmoid(p) sigmoid(-m),   w = p - m = 2 d r,
// and so is that of the slopes, with 1 - e^-2v in the place of 1 - e^-w, v = |x - mean| r. Hence
// no mid-bin approximation, and no clamp of the scale: all of it holds for any scale and distance.
#pragma once

#include "scale.h"
#include "sweep.h"

namespace fastvae {

// The bins, from their number less one.
template <class T>
struct Bins {
  T half, half_low;  // d, in two parts: an edge may lie where x - mean and d all but cancel
  T log_width;       // log 2d

  explicit FASTVAE_HD Bins(T levels) : half(T(1) / levels) {
    // 1 - half * levels without rounding, of up to 2^16 bins.
    const T high = math::from_bits(math::to_bits(half) >> 16 << 16);
    half_low = ((T(1) - high * levels) - (half - high) * levels) * half;
    log_width = math::log_normal(half + half);
  }
};

// The scale of a logistic distribution by what its bins ask of it: r, of a point +inf; the scale's
// logarithm; and the slope of that in s. The first two are NaN where s is no scale.
template <class T>
struct LogisticScale {
  T inverse, log, slope;
};
template <class S, class T>
FASTVAE_HD LogisticScale<T> logistic_scale(T s) {
  const T log = S::log_sigma(s);
  // Never 0: x - mu may overflow, and no x - mu that does not tells it from 0.
  const T inverse = math::max(math::from_bits(math::Bits<T>(1)), S::any_inverse_sigma(s));
  return {log == log ? inverse : log, log, S::d_log_sigma(s)};
}

// One value in its bin. A sign is taken out, so that the nearer of the bin's two edges (the only
// one, of an open bin) is always m: miss = m >= -d r.
template <class T>
struct Bin {
  bool flipped;            // x lies below the mean, or in the first bin
  bool open;               // the first bin or the last
  T inverse_scale;         // r
  T miss, reach, width;    // m, p, w
  T miss_decay, p_decay;   // e^-|m|; e^-p, 0 of an open bin, which has no such edge
  T w_decay, mass, slope;  // e^-w, 1 - e^-w, 1 - e^-2v; 0, 1, 1 of an open bin

  // log of the probability = linear + log(ratio); near 1, ratio = 1 + excess to all digits.
  struct Score {
    T linear, ratio, excess;
  };
  struct Gradient {
    T mean, log_scale;
  };

  // shift is what the mean has beyond mu.
  FASTVAE_HD Bin(T x, T mu, T shift, T inverse, const Bins<T>& bins) : inverse_scale(inverse) {
    const T edge = T(1) - bins.half;
    const bool first = x<-edge, last = x> edge;
    open = first | last;
    // x - mean and the rounding error of x - mu, which log_scale = -12 makes large.
    const T difference = x - mu, back = difference - x;
    const T lost = (x - (difference - back)) - (mu + back);
    T offset = difference - shift;
    T error = math::abs(lost) < math::largest<T>() ? lost : T(0);
    flipped = first | (!last & (offset < T(0)));
    offset = flipped ? -offset : offset;
    error = flipped ? -error : error;

    miss = scaled((offset - bins.half) + (error - bins.half_low));
    reach = scaled(math::max(T(0), offset) + bins.half);
    width = (bins.half + bins.half) * inverse_scale;
    // Of v and d r the lesser, twice, and their distance |m| make all: e^-p = e^-2min e^-|m|.
    const bool inside = offset < bins.half;
    const T lesser = math::min(bins.half, offset);
    const math::Decay<T> twice = math::decay(open ? math::kInfinity<T> : scaled(lesser + lesser));
    const math::Decay<T> rest = math::decay(math::abs(miss));
    const T both = twice.value * rest.value;  // twice the larger: e^-2min e^-2|m|
    const T larger = twice.loss + twice.value * (rest.loss * (T(2) - rest.loss));
    miss_decay = rest.value;
    p_decay = both;
    w_decay = inside ? both * rest.value : twice.value;
    mass = inside ? larger : twice.loss;
    slope = inside ? twice.loss : larger;
  }

  // Of an infinite miss linear is -inf; ratio lies between 1/7 and 1.
  FASTVAE_HD Score score(T log_scale, const Bins<T>& bins) const {
    // A wide bin is all there is of it, a narrow one has the mass w: its logarithm is taken as
    // such, and what is left, (1 - e^-w) / w, is near 1.
    const bool wide = (width >= T(1)) | open, tiny = !(width > kTiny);
    const T denominator = (T(1) + p_decay) * (T(1) + miss_decay);
    const T over = wide | tiny ? denominator : denominator * width;
    const T ratio = (tiny & !wide ? T(1) : mass) / over;
    const T decays = p_decay + miss_decay * (T(1) + p_decay);
    return {(wide ? T(0) : bins.log_width - log_scale) - math::max(T(0), miss), ratio,
            wide ? -(w_decay + decays) / denominator : T(-1)};
  }

  // Of the logarithm.
  FASTVAE_HD Gradient gradient() const {
    const T denominator = (T(1) + p_decay) * (T(1) + miss_decay);
    const bool tiny = !(width > kTiny);
    const T divisor = tiny ? T(1) : mass, inverse = T(1) / (denominator * divisor);
    const T unit = divisor * inverse;                                            // 1 / denominator
    const T at_m = (miss > T(0) ? T(1) : miss_decay) * (T(1) + p_decay) * unit;  // sigmoid(m)
    const T at_p = (T(1) + miss_decay) * unit;                                   // sigmoid(p)
    // w / (e^w - 1), 1 where w is all but 0
    const T of_mass = (tiny ? T(1) : finite(width)) * w_decay * (denominator * inverse);
    const T d_mean = scaled(slope * (at_m * at_p));
    return {flipped ? -d_mean : d_mean,
            finite(miss) * at_m - finite(reach) * (p_decay * at_p) - of_mass};
  }

 private:
  static constexpr T kTiny = T(0x1p-100f);

  // Where r is infinite, an edge met exactly still is.
  FASTVAE_HD T scaled(T x) const { return x == T(0) ? T(0) : x * inverse_scale; }
  // For a product with what may be 0. +inf only stays where it is meant to: of a miss.
  static FASTVAE_HD T finite(T x) {
    return math::max(-math::largest<T>(), math::min(math::largest<T>(), x));
  }
};

template <class S>
struct DiscretizedLogistic {
  static constexpr const char* kName = "discretized_logistic_log_prob";

  struct Forward : Formula<Shape{.inputs = 3, .row_sums = 1, .parameters = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 1> eval(T x, T mu, T s, T levels) {
      const Bins<T> bins(levels);
      const auto scale = logistic_scale<S>(s);
      const auto score = Bin<T>(x, mu, T(0), scale.inverse, bins).score(scale.log, bins);
      return {{score.linear + math::log_near(score.ratio, score.excess)}};
    }
  };
  struct Backward : Formula<Shape{.inputs = 3, .row_inputs = 1, .outputs = 3, .parameters = 1}> {
    template <class T>
    static FASTVAE_HD Values<T, 3> eval(T x, T mu, T s, T grad, T levels) {
      const auto scale = logistic_scale<S>(s);
      const auto d = Bin<T>(x, mu, T(0), scale.inverse, Bins<T>(levels)).gradient();
      return {{-(grad * d.mean), grad * d.mean, grad * math::weighed(d.log_scale, scale.slope)}};
    }
  };
};

// ---- mixtures ----

// What a pixel's sums come to, of its terms e^(log-weight + log-probability) and of its weights
// alone, both relative to the largest log-weight; and what backward needs to know of them. A pixel
// of no probability keeps what makes every weight 0: it has no gradient.
template <class T>
struct Normaliser {
  T log_prob, kept, kept_weights;

  FASTVAE_HD Normaliser(T top, T sum, T weights) {
    const T log_weights = math::log_normal(weights);
    const T log_sum = top + math::log_normal(sum);
    const bool none = sum == T(0);
    log_prob = none ? (weights != weights ? weights : -math::kInfinity<T>)
                    : (sum != sum ? sum : log_sum) - (weights != weights ? weights : log_weights);
    kept = none ? T(0) : (sum != sum ? sum : log_sum);
    kept_weights = none ? math::kInfinity<T> : log_weights;
  }
};

}  // namespace fastvae
