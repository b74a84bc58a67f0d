// The CPU engine of pixels: sixteen in the lanes, channels and components in the loops.
//
// Components come sixteen at a time, in tiles of [component][lane]. A tile is read where it lies if
// its pixels are neighbours in memory (channels first), and else transposed into a buffer (channels
// last). What a tile makes of the channels is a sum of logarithms, whose arguments are multiplied
// instead: one logarithm a pixel and component, not one a channel.
//
// Backward forms the terms again, with their slopes, which stay in the cache until the weight of
// the component is known. Every pixel passes through the same loops, whatever its lane, so results
// are bitwise the same for any number of threads and any split of the batch. Threads are the
// caller's business: a call works on [begin, end) of the blocks of sixteen pixels.
#pragma once

#include <algorithm>
#include <vector>

#include "channels.h"
#include "transpose.h"

namespace fastvae::cpu {

inline constexpr int kTileRows = 16;  // components

template <class T>
struct alignas(64) PixelTile {
  T at[kTileRows][kLanes];  // [component][pixel]
};

// A tile, in a buffer or where it lies.
template <class T>
struct TileView {
  const T* at;
  int64_t stride;  // of the components
};

template <class T>
FASTVAE_CLONES void raise_logits(TileView<T> logits, int n, T* most) {
  for (int k = 0; k < n; ++k) {
    const T* l = logits.at + k * logits.stride;
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) most[i] = l[i] > most[i] || l[i] != l[i] ? l[i] : most[i];
  }
}

// The log-weights, relative to the largest, begin the terms; and their own sum.
template <class T>
FASTVAE_CLONES void begin_terms(TileView<T> logits, int n, const T* most, PixelTile<T>& linear,
                                PixelTile<T>& ratio, T* weights) {
  for (int k = 0; k < n; ++k) {
    const T* l = logits.at + k * logits.stride;
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const T relative = l[i] - most[i];
      linear.at[k][i] = relative;
      ratio.at[k][i] = T(1);
      weights[i] += math::exp_weight(relative);
    }
  }
}

// What a channel before this one adds to its mean.
template <class T, bool kGradient>
FASTVAE_CLONES void lean(TileView<T> coeffs, int n, const T* x, PixelTile<T>& shift,
                         PixelTile<T>* value, PixelTile<T>* slope) {
  for (int k = 0; k < n; ++k) {
    const T* c = coeffs.at + k * coeffs.stride;
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const math::Tanh<T> squashed = math::tanh(c[i]);
      shift.at[k][i] += squashed.value * x[i];
      if constexpr (kGradient) {
        value->at[k][i] = squashed.value;
        slope->at[k][i] = squashed.slope * x[i];
      }
    }
  }
}

// Scales as the bins take them, by whatever map: the loops below know of none.
template <class T>
struct ScaleTiles {
  PixelTile<T> inverse, log, slope;
};
template <class S, class T, bool kGradient>
FASTVAE_CLONES void find_scales(TileView<T> scales, int n, ScaleTiles<T>& to) {
  for (int k = 0; k < n; ++k) {
    const T* s = scales.at + k * scales.stride;
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const LogisticScale<T> scale = logistic_scale<S>(s[i]);
      to.inverse.at[k][i] = scale.inverse;
      to.log.at[k][i] = scale.log;
      if constexpr (kGradient) to.slope.at[k][i] = scale.slope;
    }
  }
}

template <class T, bool kGradient>
FASTVAE_CLONES void add_channel(const Bins<T>& all_bins, const T* x, TileView<T> mu,
                                const ScaleTiles<T>& scales, int n, const PixelTile<T>& shift,
                                PixelTile<T>& linear, PixelTile<T>& ratio, PixelTile<T>* d_mean,
                                PixelTile<T>* d_log_scale) {
  const Bins<T> bins = all_bins;  // in registers: nothing written below may change them
  for (int k = 0; k < n; ++k) {
    const T *m = mu.at + k * mu.stride, *inverse = scales.inverse.at[k], *log = scales.log.at[k];
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const Bin<T> bin(x[i], m[i], shift.at[k][i], inverse[i], bins);
      const auto score = bin.score(log[i], bins);
      linear.at[k][i] += score.linear;
      ratio.at[k][i] *= score.ratio;
      if constexpr (kGradient) {
        const auto gradient = bin.gradient();
        d_mean->at[k][i] = gradient.mean;
        d_log_scale->at[k][i] = math::weighed(gradient.log_scale, scales.slope.at[k][i]);
      }
    }
  }
}

template <class T>
FASTVAE_CLONES void fold(PixelTile<T>& linear, PixelTile<T>& ratio, int n) {
  for (int k = 0; k < n; ++k) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      linear.at[k][i] += math::log_normal(ratio.at[k][i]);
      ratio.at[k][i] = T(1);
    }
  }
}

template <class T>
FASTVAE_CLONES void add_terms(const PixelTile<T>& terms, int n, T* top, T* sum) {
  alignas(64) T highest[kLanes], added[kLanes];
  std::copy_n(terms.at[0], kLanes, highest);
  for (int k = 1; k < n; ++k) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) highest[i] = math::max(highest[i], terms.at[k][i]);
  }
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) {
    const T to = math::raised_top(top[i], highest[i]);
    added[i] = sum[i] * math::exp(top[i] - to);
    top[i] = to;
  }
  for (int k = 0; k < n; ++k) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) added[i] += math::exp(terms.at[k][i] - top[i]);
  }
  std::copy_n(added, kLanes, sum);
}

template <class T>
FASTVAE_CLONES void normalise(const T* top, const T* sum, const T* weights, T* log_prob, T* kept,
                              T* kept_weights) {
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) {
    const Normaliser<T> n(top[i], sum[i], weights[i]);
    log_prob[i] = n.log_prob;
    kept[i] = n.kept;
    kept_weights[i] = n.kept_weights;
  }
}

// The components' weights in the loss take the place of their terms, and make d_logits.
template <class T>
FASTVAE_CLONES void weigh_terms(PixelTile<T>& terms, TileView<T> logits, int n, const T* most,
                                const T* kept, const T* kept_weights, const T* grad,
                                PixelTile<T>& d_logits) {
  for (int k = 0; k < n; ++k) {
    const T* l = logits.at + k * logits.stride;
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const T weight = math::exp_weight(terms.at[k][i] - kept[i]);
      const T prior = math::exp_weight((l[i] - most[i]) - kept_weights[i]);
      terms.at[k][i] = grad[i] * weight;
      d_logits.at[k][i] = grad[i] * (weight - prior);
    }
  }
}

template <class T>
FASTVAE_CLONES void weigh_slopes(const PixelTile<T>& weight, const PixelTile<T>& slope, int n,
                                 T* to, int64_t stride) {
  for (int k = 0; k < n; ++k) {
    T* out = to + k * stride;
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) out[i] = math::weighed(weight.at[k][i], slope.at[k][i]);
  }
}

// sums += factor * the sum over components of a b
template <class T>
FASTVAE_CLONES void add_products(const PixelTile<T>& a, const PixelTile<T>* b, int n, T factor,
                                 T* sums) {
  for (int k = 0; k < n; ++k) {
    const T* other = b == nullptr ? nullptr : b->at[k];
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      sums[i] += factor * (other == nullptr ? a.at[k][i] : a.at[k][i] * other[i]);
    }
  }
}

template <class T, class Stored>
class PixelSweep {
 public:
  explicit PixelSweep(const PixelMixture& p) : p_(p), bins_(static_cast<T>(p.levels)) {
    x_.resize(static_cast<size_t>(p.channels));
    if (p_.grad != nullptr) {
      d_mean_.resize(x_.size());
      d_log_scale_.resize(x_.size());
      const auto pairs = static_cast<size_t>(pair_of(p.channels, 0));
      if (p_.coeffs.data != nullptr) {
        squashed_.resize(pairs);
        lean_.resize(pairs);
      }
      d_x_.resize(p.d_x.data != nullptr ? x_.size() : 0);
    }
  }

  // The block of sixteen pixels from `first` on.
  template <bool kBackward>
  void run(int64_t first) {
    count_ = static_cast<int>(std::min<int64_t>(kLanes, p_.pixels() - first));
    find_pixels(first);
    for (int64_t c = 0; c < p_.channels; ++c) {
      for (int i = 0; i < kLanes; ++i) {
        const Stored* x = static_cast<const Stored*>(p_.x.data) + places_[kX].offset[i];
        x_[c].at[i] = load(x[c * p_.x.channel]);
      }
    }
    std::fill_n(most_, kLanes, -math::kInfinity<T>);
    for_tiles([&](int64_t k, int n) { raise_logits(read(kLogits, 0, k, n, logits_), n, most_); });
    kBackward ? backward(first) : forward(first);
  }

 private:
  enum { kX, kLogits, kMu, kLogScale, kCoeffs, kDX, kDLogits, kDMu, kDLogScale, kDCoeffs, kAll };

  void forward(int64_t first) {
    alignas(64) T top[kLanes], sum[kLanes] = {}, weights[kLanes] = {};
    std::fill_n(top, kLanes, -math::largest<T>());
    for_tiles([&](int64_t k, int n) {
      score<false>(k, n, weights);
      add_terms(linear_, n, top, sum);
    });
    alignas(64) T values[3][kLanes];
    normalise(top, sum, weights, values[0], values[1], values[2]);
    T *log_prob = static_cast<T*>(p_.log_prob), *kept = static_cast<T*>(p_.kept);
    for (int i = 0; i < count_; ++i) {
      if (log_prob != nullptr) log_prob[first + i] = values[0][i];
      if (kept != nullptr) {
        kept[2 * (first + i)] = values[1][i];
        kept[2 * (first + i) + 1] = values[2][i];
      }
    }
  }

  void backward(int64_t first) {
    alignas(64) T kept[kLanes] = {}, kept_weights[kLanes] = {}, grad[kLanes] = {}, unused[kLanes];
    for (int i = 0; i < count_; ++i) {
      grad[i] = static_cast<const T*>(p_.grad)[first + i];
      kept[i] = static_cast<const T*>(p_.kept)[2 * (first + i)];
      kept_weights[i] = static_cast<const T*>(p_.kept)[2 * (first + i) + 1];
    }
    for (Lanes<T>& d : d_x_) d = {};
    for_tiles([&](int64_t k, int n) {
      std::fill_n(unused, kLanes, T(0));
      score<true>(k, n, unused);
      weigh_terms(linear_, view_, n, most_, kept, kept_weights, grad, result_);
      write(kDLogits, 0, k, n);
      for (int64_t c = 0; c < p_.channels; ++c) gradients_of(c, k, n);
    });
    for (size_t c = 0; c < d_x_.size(); ++c) {
      for (int i = 0; i < count_; ++i) {
        Stored* to = output(kDX) + places_[kDX].offset[i];
        store(to[static_cast<int64_t>(c) * p_.d_x.channel], d_x_[c].at[i]);
      }
    }
  }

  // The terms of components k..k + n - 1 to linear_, with the slopes of their channels.
  template <bool kGradient>
  void score(int64_t k, int n, T* weights) {
    view_ = read(kLogits, 0, k, n, logits_);
    begin_terms(view_, n, most_, linear_, ratio_, weights);
    std::fill_n(&shift_.at[0][0], n * kLanes, T(0));
    for (int64_t c = 0; c < p_.channels; ++c) {
      if (p_.coeffs.data != nullptr && c > 0) {
        std::fill_n(&shift_.at[0][0], n * kLanes, T(0));
        for (int64_t j = 0; j < c; ++j) {
          const auto pair = static_cast<size_t>(pair_of(c, j));
          lean<T, kGradient>(read(kCoeffs, pair_of(c, j), k, n, buffers_[0]), n, x_[j].at, shift_,
                             kGradient ? &squashed_[pair] : nullptr,
                             kGradient ? &lean_[pair] : nullptr);
        }
      }
      with_map(p_.scale_map, [&]<class S>(S) {
        find_scales<S, T, kGradient>(read(kLogScale, c, k, n, buffers_[1]), n, scales_);
      });
      add_channel<T, kGradient>(bins_, x_[c].at, read(kMu, c, k, n, buffers_[0]), scales_, n,
                                shift_, linear_, ratio_, kGradient ? &d_mean_[c] : nullptr,
                                kGradient ? &d_log_scale_[c] : nullptr);
      // A product of sixteen ratios is still a normal number.
      if (c % 16 == 15 || c + 1 == p_.channels) fold(linear_, ratio_, n);
    }
  }

  void gradients_of(int64_t c, int64_t k, int n) {
    if (p_.d_log_scale.data != nullptr) write_slopes(kDLogScale, c, k, n, d_log_scale_[c]);
    const bool leans = p_.coeffs.data != nullptr;
    write_slopes(kDMu, c, k, n, d_mean_[c]);
    if (p_.d_x.data != nullptr) {
      weigh_slopes(linear_, d_mean_[c], n, &result_.at[0][0], kLanes);
      add_products<T>(result_, nullptr, n, T(-1), d_x_[c].at);
      for (int64_t j = 0; leans && j < c; ++j) {
        add_products<T>(result_, &squashed_[pair_of(c, j)], n, T(1), d_x_[j].at);
      }
    }
    if (p_.d_coeffs.data != nullptr && c > 0) {
      weigh_slopes(linear_, d_mean_[c], n, &d_mean_[c].at[0][0], kLanes);
      for (int64_t j = 0; j < c; ++j) {
        write_slopes(kDCoeffs, pair_of(c, j), k, n, lean_[pair_of(c, j)], &d_mean_[c]);
      }
    }
  }

  // ---- memory ----

  // Where the pixels of the block lie in an operand; the padding repeats the last one.
  struct Place {
    int64_t offset[kLanes];
    bool adjacent;  // one after the other, and no padding
  };

  const PixelOperand& operand(int which) const {
    const PixelOperand* all[] = {&p_.x,   &p_.logits,   &p_.mu,   &p_.log_scale,   &p_.coeffs,
                                 &p_.d_x, &p_.d_logits, &p_.d_mu, &p_.d_log_scale, &p_.d_coeffs};
    return *all[which];
  }
  Stored* output(int which) const {
    return static_cast<Stored*>(const_cast<void*>(operand(which).data));
  }

  void find_pixels(int64_t first) {
    int64_t at[kMaxGroups], rest = first;
    for (int g = 0; g < kMaxGroups; ++g) {
      at[g] = rest % p_.sizes[g];
      rest /= p_.sizes[g];
    }
    const bool one_run = at[0] + count_ <= p_.sizes[0];
    for (int which = 0; which < kAll; ++which) {
      const PixelOperand& x = operand(which);
      if (x.data == nullptr) continue;
      int64_t index[kMaxGroups], offset = 0;
      for (int g = 0; g < kMaxGroups; ++g) {
        index[g] = at[g];
        offset += at[g] * x.pixel[g];
      }
      Place& place = places_[which];
      place.adjacent = one_run && count_ == kLanes && x.pixel[0] == 1;
      for (int i = 0; i < kLanes; ++i) {
        place.offset[i] = offset;
        if (i + 1 >= count_) continue;
        offset += x.pixel[0];
        if (one_run) continue;
        for (int g = 0; ++index[g] == p_.sizes[g] && g + 1 < kMaxGroups; ++g) {
          index[g] = 0;
          offset += x.pixel[g + 1] - p_.sizes[g] * x.pixel[g];
        }
      }
    }
  }

  template <class Visit>
  void for_tiles(const Visit& visit) const {
    for (int64_t k = 0; k < p_.components; k += kTileRows) {
      visit(k, static_cast<int>(std::min<int64_t>(kTileRows, p_.components - k)));
    }
  }

  TileView<T> read(int which, int64_t channel, int64_t k, int n, PixelTile<T>& buffer) const {
    const PixelOperand& x = operand(which);
    const Place& place = places_[which];
    const Stored* from = static_cast<const Stored*>(x.data) + channel * x.channel + k * x.component;
    if constexpr (std::is_same_v<T, Stored>) {
      if (place.adjacent) return {from + place.offset[0], x.component};
    }
    const Stored* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = from + place.offset[i];
    transpose_in<T, Stored>(rows, x.component, n, &buffer.at[0][0]);
    return {&buffer.at[0][0], kLanes};
  }

  // A tile of results, from result_.
  void write(int which, int64_t channel, int64_t k, int n) {
    const PixelOperand& x = operand(which);
    if (x.data == nullptr) return;
    const Place& place = places_[which];
    Stored* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = output(which) + channel * x.channel + k * x.component + place.offset[i];
    }
    transpose_out<T, Stored>(&result_.at[0][0], count_, x.component, n, rows);
  }

  // Slopes times weights, those of the components unless others are given.
  void write_slopes(int which, int64_t channel, int64_t k, int n, const PixelTile<T>& slope,
                    const PixelTile<T>* weight = nullptr) {
    const PixelOperand& x = operand(which);
    if (x.data == nullptr) return;
    if (weight == nullptr) weight = &linear_;
    if constexpr (std::is_same_v<T, Stored>) {
      if (places_[which].adjacent) {
        T* to = output(which) + channel * x.channel + k * x.component + places_[which].offset[0];
        return weigh_slopes(*weight, slope, n, to, x.component);
      }
    }
    weigh_slopes(*weight, slope, n, &result_.at[0][0], kLanes);
    write(which, channel, k, n);
  }

  const PixelMixture& p_;
  const Bins<T> bins_;
  int count_ = 0;  // pixels in this block
  Place places_[kAll];
  TileView<T> view_{};  // of the logits
  alignas(64) T most_[kLanes];
  PixelTile<T> logits_, buffers_[2], linear_, ratio_, shift_, result_;
  ScaleTiles<T> scales_;
  std::vector<Lanes<T>> x_, d_x_;                   // of each channel
  std::vector<PixelTile<T>> d_mean_, d_log_scale_;  // likewise: their slopes
  std::vector<PixelTile<T>> squashed_, lean_;       // of each pair of channels
};

template <class T, class Stored>
void sweep_pixels(const PixelMixture& p, int64_t begin, int64_t end) {
  PixelSweep<T, Stored> sweep(p);
  for (int64_t block = begin; block < end; ++block) {
    p.grad == nullptr ? sweep.template run<false>(block * kLanes)
                      : sweep.template run<true>(block * kLanes);
  }
}

// Blocks begin..end of sixteen pixels: forward, or backward if there is a gradient.
inline void sweep_pixels(const PixelMixture& p, int64_t begin, int64_t end) {
  with_types(p.dtype, [&]<class T, class Stored>(Types<T, Stored>) {
    sweep_pixels<T, Stored>(p, begin, end);
  });
}

}  // namespace fastvae::cpu
