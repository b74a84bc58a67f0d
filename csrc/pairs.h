// The CPU engine of pairs: sixteen rows (or components) in the lanes meet sixteen others, one after
// another. What is summed belongs to the lanes, so no vector is ever summed across.
//
// Both kinds are first packed in blocks of sixteen, [dims][field][16], and a block serves either
// way: a field is one vector load where its sixteen are in the lanes, and sixteen broadcasts where
// they come one after another. Forward has rows in the lanes; so has the gradient of z; those of
// the components have components in the lanes. The last block is padded with what weighs nothing.
//
// Threads are the caller's business: a call works on [begin, end) of the blocks in the lanes, whose
// Owner is rows or components.
#pragma once

#include <algorithm>
#include <new>
#include <utility>

#include "noise.h"
#include "pairing.h"

namespace fastvae::cpu {

inline constexpr int kChunk = 8;     // dimensions of a pair that are summed in one register
inline constexpr int kAbreast = 2;   // others that one pass over the lanes meets for these sums,
inline constexpr int kTogether = 4;  // and for what is summed over others, dimension by dimension

inline int64_t blocks_of(int64_t n) { return (n + kLanes - 1) / kLanes; }

// The packed blocks. Of a row: z, and with marginals the L_id; of a component: mu, the scale of its
// scores, and with marginals the offset of its log-density.
template <class T, bool kMarginals>
class PackedPairs {
 public:
  static constexpr int kRowFields = kMarginals ? 2 : 1, kComponentFields = kMarginals ? 3 : 2;

  PackedPairs(const Pairing& p, T* scratch) : p_(p) {
    padded_dims_ = (p.dims + kChunk - 1) / kChunk * kChunk;
    const int64_t rows = blocks_of(p.rows) * kLanes, components = blocks_of(p.components) * kLanes;
    const auto take = [&scratch](int64_t n) { return std::exchange(scratch, scratch + n); };
    rows_ = take(rows * padded_dims_ * kRowFields);
    components_ = take(components * padded_dims_ * kComponentFields);
    for (T*& constant : row_constants_) constant = take(rows);
    for (T*& constant : component_constants_) constant = take(components);
  }
  static int64_t size(const Pairing& p) {
    const int64_t dims = (p.dims + kChunk - 1) / kChunk * kChunk;
    return kLanes * (blocks_of(p.rows) * (dims * kRowFields + 4) +
                     blocks_of(p.components) * (dims * kComponentFields + 2));
  }

  int64_t padded_dims() const { return padded_dims_; }
  const T* rows(int64_t block) const { return rows_ + block * kLanes * padded_dims_ * kRowFields; }
  const T* components(int64_t block) const {
    return components_ + block * kLanes * padded_dims_ * kComponentFields;
  }
  // Of the rows' log_prob: its two parts; and the gradients.
  const T* high(int64_t block) const { return row_constants_[0] + block * kLanes; }
  const T* low(int64_t block) const { return row_constants_[1] + block * kLanes; }
  const T* grad(int64_t block) const { return row_constants_[2] + block * kLanes; }
  const T* grad_prod(int64_t block) const { return row_constants_[3] + block * kLanes; }
  // The sum of a component's offsets and log-weight, in two parts.
  const T* offset(int64_t block) const { return component_constants_[0] + block * kLanes; }
  const T* offset_low(int64_t block) const { return component_constants_[1] + block * kLanes; }

  void pack_rows(int64_t begin, int64_t end);
  void pack_components(int64_t begin, int64_t end);

 private:
  const Pairing& p_;
  int64_t padded_dims_;
  T *rows_, *components_, *row_constants_[4], *component_constants_[2];
};

template <class T, bool kMarginals>
void PackedPairs<T, kMarginals>::pack_rows(int64_t begin, int64_t end) {
  const T* z = static_cast<const T*>(p_.z);
  const T* kept = static_cast<const T*>(p_.grad != nullptr || p_.grad_prod ? p_.kept : nullptr);
  const int64_t columns = p_.kept_columns();
  for (int64_t row = begin * kLanes; row < end * kLanes; ++row) {
    const bool real = row < p_.rows;
    T* to = rows_ + row / kLanes * kLanes * padded_dims_ * kRowFields + row % kLanes;
    for (int64_t d = 0; d < padded_dims_; ++d) {
      const bool inside = real && d < p_.dims;
      to[(d * kRowFields) * kLanes] = inside ? z[row * p_.dims + d] : T(0);
      if constexpr (kMarginals) {
        to[(d * kRowFields + 1) * kLanes] =
            inside && kept != nullptr ? kept[row * columns + 2 + d] : T(0);
      }
    }
    const auto value = [&](const void* from) {
      return real && from != nullptr ? static_cast<const T*>(from)[row] : T(0);
    };
    // A row that is not there: e^{x - inf} = 0.
    row_constants_[0][row] = real && kept != nullptr ? kept[row * columns] : math::kInfinity<T>;
    row_constants_[1][row] = real && kept != nullptr ? kept[row * columns + 1] : T(0);
    row_constants_[2][row] = value(p_.grad);
    row_constants_[3][row] = value(p_.grad_prod);
  }
}

template <class S, class T>
FASTVAE_CLONES void prepare_components(const T* mu, const T* s, T* to, T* offsets) {
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    const PairwiseGaussian::Spread<T> spread = PairwiseGaussian::spread<S>(s[l]);
    to[l] = mu[l];
    to[kLanes + l] = spread.scale;
    offsets[l] = spread.offset;
  }
}

template <class T, bool kMarginals>
void PackedPairs<T, kMarginals>::pack_components(int64_t begin, int64_t end) {
  const T *all_mu = static_cast<const T*>(p_.mu), *all_s = static_cast<const T*>(p_.log_var);
  const T* log_weights = static_cast<const T*>(p_.log_weights);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kLanes, count = std::min<int64_t>(kLanes, p_.components - first);
    T* to = components_ + block * kLanes * padded_dims_ * kComponentFields;
    double sums[kLanes] = {};
    std::fill(sums + count, sums + kLanes, -math::kInfinity<T>);  // components that are not there
    for (int64_t d = 0; d < p_.dims; ++d, to += kComponentFields * kLanes) {
      T mu[kLanes], s[kLanes], offsets[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        mu[l] = l < count ? all_mu[(first + l) * p_.dims + d] : T(0);
        s[l] = l < count ? all_s[(first + l) * p_.dims + d] : T(1);
      }
      with_map(p_.scale_map, [&]<class S>(S) { prepare_components<S>(mu, s, to, offsets); });
      std::fill(offsets + count, offsets + kLanes, -math::kInfinity<T>);
      if constexpr (kMarginals) std::copy_n(offsets, kLanes, to + 2 * kLanes);
      for (int64_t l = 0; l < count; ++l) sums[l] += static_cast<double>(offsets[l]);
    }
    std::fill_n(to, (padded_dims_ - p_.dims) * kComponentFields * kLanes, T(0));
    for (int64_t l = 0; l < kLanes; ++l) {
      // Of scales of 0, in many dimensions, it may overflow: finite, so that no row is inf - inf.
      double sum = math::min(static_cast<double>(math::largest<T>()), sums[l]);
      if (log_weights != nullptr && l < count) sum += static_cast<double>(log_weights[first + l]);
      const T high = static_cast<T>(sum);
      const double low = sum - static_cast<double>(high);
      component_constants_[0][first + l] = high;
      component_constants_[1][first + l] = low == low ? static_cast<T>(low) : T(0);
    }
  }
}

// ---- 16 x 16 pairs ------------------------------------------------------------------------------

template <class T>
struct alignas(64) Square {
  T at[kLanes][kLanes];  // [other][lane]
};

// The log-densities of pairs and their weights, high + low.
template <class T, Owner kOwner, bool kMarginals>
FASTVAE_CLONES void score_pairs(const T* lanes, const T* others, int64_t padded_dims,
                                const T* offset, const T* offset_low, const Square<T>& log_weight,
                                Square<T>& high, Square<T>& low) {
  using Packed = PackedPairs<T, kMarginals>;
  constexpr bool kRowsOwn = kOwner == Owner::kRows;
  constexpr int kRow = Packed::kRowFields * kLanes, kComponent = Packed::kComponentFields * kLanes;
  constexpr int kLane = kRowsOwn ? kRow : kComponent, kOther = kRowsOwn ? kComponent : kRow;
  for (int j = 0; j < kLanes; ++j) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      TwoSum<T> sum{offset[kRowsOwn ? j : l], offset_low[kRowsOwn ? j : l]};
      sum.add(log_weight.at[j][l]);
      high.at[j][l] = sum.hi;
      low.at[j][l] = sum.lo;
    }
  }
  for (int64_t d = 0; d < padded_dims; d += kChunk) {
    const T *mine = lanes + d * kLane, *theirs = others + d * kOther;
    for (int j = 0; j < kLanes; j += kAbreast) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        T sums[kAbreast] = {};
#pragma GCC unroll 8
        for (int k = 0; k < kChunk; ++k) {
#pragma GCC unroll 2
          for (int i = 0; i < kAbreast; ++i) {
            const T* row = kRowsOwn ? mine + k * kLane + l : theirs + k * kOther + j + i;
            const T* component = kRowsOwn ? theirs + k * kOther + j + i : mine + k * kLane + l;
            const T score = PairwiseGaussian::score(row[0], component[0], component[kLanes]);
            sums[i] = PairwiseGaussian::log_density(sums[i], score);
          }
        }
#pragma GCC unroll 2
        for (int i = 0; i < kAbreast; ++i) {
          TwoSum<T> total{high.at[j + i][l], low.at[j + i][l]};
          total.add(sums[i]);
          high.at[j + i][l] = total.hi;
          low.at[j + i][l] = total.lo;
        }
      }
    }
  }
}

template <class T>
FASTVAE_CLONES void absorb(const Square<T>& high, const Square<T>& low, T* top, T* sum) {
  alignas(64) T highest[kLanes], added[kLanes];
  std::copy_n(high.at[0], kLanes, highest);
  for (int j = 1; j < kLanes; ++j) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) highest[l] = math::max(highest[l], high.at[j][l]);
  }
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    const T to = math::raised_top(top[l], highest[l]);
    added[l] = sum[l] * math::exp(top[l] - to);
    top[l] = to;
  }
  for (int j = 0; j < kLanes; ++j) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const TwoSum<T> x{high.at[j][l], low.at[j][l]};
      added[l] += math::exp((x.hi - top[l]) + x.low());
    }
  }
  std::copy_n(added, kLanes, sum);
}

// The same for each dimension by itself; top and sum are [dims][16].
template <class T>
FASTVAE_CLONES void absorb_marginals(const T* rows, const T* components,
                                     const Square<T>& log_weight, int64_t dims, T* top, T* sum) {
  using Packed = PackedPairs<T, true>;
  Square<T> x;
  for (int64_t d = 0; d < dims; ++d, top += kLanes, sum += kLanes) {
    const T *z = rows + d * Packed::kRowFields * kLanes,
            *component = components + d * Packed::kComponentFields * kLanes;
    alignas(64) T highest[kLanes];
    std::fill_n(highest, kLanes, -math::largest<T>());
    for (int j = 0; j < kLanes; j += kTogether) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        T most = highest[l];
#pragma GCC unroll 4
        for (int k = j; k < j + kTogether; ++k) {
          const T score = PairwiseGaussian::score(z[l], component[k], component[kLanes + k]);
          const T value =
              PairwiseGaussian::log_density(component[2 * kLanes + k] + log_weight.at[k][l], score);
          x.at[k][l] = value;
          most = math::max(most, value);
        }
        highest[l] = most;
      }
    }
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const T to = math::raised_top(top[l], highest[l]);
      sum[l] *= math::exp_weight(top[l] - to);
      top[l] = to;
    }
    for (int j = 0; j < kLanes; j += kTogether) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        T added = 0;
#pragma GCC unroll 4
        for (int k = j; k < j + kTogether; ++k) added += math::exp_weight(x.at[k][l] - top[l]);
        sum[l] += added;
      }
    }
  }
}

// ---- backward -----------------------------------------------------------------------------------

// high becomes the weight of each pair in the loss through log_prob: grad e^{l - log_prob}. Returns
// whether a score may be infinite.
template <class T, Owner kOwner>
FASTVAE_CLONES bool weigh(Square<T>& high, const Square<T>& low, const T* row_high,
                          const T* row_low, const T* grad) {
  int infinite = 0;
  for (int j = 0; j < kLanes; ++j) {
#pragma omp simd reduction(| : infinite)
    for (int l = 0; l < kLanes; ++l) {
      const int row = kOwner == Owner::kRows ? l : j;
      const TwoSum<T> x{high.at[j][l], low.at[j][l]};
      infinite |= x.hi < -math::largest<T>();
      high.at[j][l] =
          grad[row] * math::exp_weight((x.hi - row_high[row]) + (x.low() - row_low[row]));
    }
  }
  return infinite != 0;
}

// What 16 x 16 pairs add to the gradients of the lanes: [dims][16]; d_log_var for components only.
template <class T, Owner kOwner, bool kMarginals, bool kInfinite>
FASTVAE_CLONES void add_gradients(const T* lanes, const T* others, int64_t dims,
                                  const Square<T>& weight, const Square<T>& log_weight,
                                  const T* grad_prod, T* d_mean, T* d_log_var) {
  using Packed = PackedPairs<T, kMarginals>;
  constexpr bool kRowsOwn = kOwner == Owner::kRows;
  constexpr int kRow = Packed::kRowFields * kLanes, kComponent = Packed::kComponentFields * kLanes;
  constexpr int kLane = kRowsOwn ? kRow : kComponent, kOther = kRowsOwn ? kComponent : kRow;
  for (int64_t d = 0; d < dims; ++d) {
    const T *mine = lanes + d * kLane, *theirs = others + d * kOther;
    T *mean = d_mean + d * kLanes, *spread = kRowsOwn ? mean : d_log_var + d * kLanes;
    for (int j = 0; j < kLanes; j += kTogether) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        T mean_sum = 0, spread_sum = 0;
#pragma GCC unroll 4
        for (int k = j; k < j + kTogether; ++k) {
          const T* row = kRowsOwn ? mine + l : theirs + k;
          const T* component = kRowsOwn ? theirs + k : mine + l;
          const T scale = component[kLanes];
          T score = PairwiseGaussian::score(row[0], component[0], scale);
          T w = weight.at[k][l];
          if constexpr (kMarginals) {
            const T value =
                PairwiseGaussian::log_density(component[2 * kLanes] + log_weight.at[k][l], score);
            w += grad_prod[kRowsOwn ? l : k] * math::exp_weight(value - row[kLanes]);
          }
          if constexpr (kInfinite) score = PairwiseGaussian::weighed_score(w, score);
          if constexpr (kRowsOwn) {
            mean_sum -= PairwiseGaussian::grad_mean(w, score) * scale;
          } else {
            mean_sum += PairwiseGaussian::grad_mean(w, score);
            spread_sum += PairwiseGaussian::grad_log_var(w, score);
          }
        }
        mean[l] += mean_sum;
        if constexpr (!kRowsOwn) spread[l] += spread_sum;
      }
    }
  }
}

// From gradients by log sigma^2, [dims][16], to those by what gave the scales of as many
// components, [count][dims].
template <class S, class T>
FASTVAE_CLONES void chain_scales(const T* all_s, int64_t count, int64_t dims, T* grad) {
  for (int64_t d = 0; d < dims; ++d, grad += kLanes) {
    alignas(64) T s[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) s[l] = all_s[std::min(l, count - 1) * dims + d];
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) grad[l] = PairwiseGaussian::chain<S>(grad[l], s[l]);
  }
}

template <class T>
FASTVAE_CLONES void add_weights(const Square<T>& weight, T* sums) {
  for (int j = 0; j < kLanes; ++j) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) sums[l] += weight.at[j][l];
  }
}

// ---- the walk -----------------------------------------------------------------------------------

template <class T, bool kMarginals>
class PairSweep {
 public:
  using Packed = PackedPairs<T, kMarginals>;

  PairSweep(const Pairing& p, const Packed& packed) : p_(p), packed_(packed) {
    fill(log_weight_, static_cast<T>(p.weights.rest));
  }

  // Blocks of rows begin..end. `state` is [2][dims][16], a thread's own.
  void forward(int64_t begin, int64_t end, T* state) {
    T *tops = state, *sums = state + p_.dims * kLanes;
    for (int64_t block = begin; block < end; ++block) {
      alignas(64) T top[kLanes], sum[kLanes] = {};
      std::fill_n(top, kLanes, -math::largest<T>());
      if constexpr (kMarginals) {
        std::fill_n(tops, p_.dims * kLanes, -math::largest<T>());
        std::fill_n(sums, p_.dims * kLanes, T(0));
      }
      for (int64_t other = 0; other < blocks_of(p_.components); ++other) {
        score<Owner::kRows>(block, other);
        absorb(high_, low_, top, sum);
        if constexpr (kMarginals) {
          absorb_marginals(packed_.rows(block), packed_.components(other), log_weight_, p_.dims,
                           tops, sums);
        }
      }
      finish(block, top, sum, tops, sums);
    }
  }

  // `state` is [dims][16].
  void backward_rows(int64_t begin, int64_t end, T* state) {
    for (int64_t block = begin; block < end; ++block) {
      std::fill_n(state, p_.dims * kLanes, T(0));
      for (int64_t other = 0; other < blocks_of(p_.components); ++other) {
        backward<Owner::kRows>(block, other, state, nullptr);
      }
      for (int64_t i = 0; i < p_.dims * kLanes; ++i) state[i] *= T(2);
      unpack(state, block, p_.rows, p_.d_z);
    }
  }

  // `state` is [2][dims][16].
  void backward_components(int64_t begin, int64_t end, T* state) {
    T *d_mu = state, *d_log_var = state + p_.dims * kLanes;
    for (int64_t block = begin; block < end; ++block) {
      std::fill_n(state, 2 * p_.dims * kLanes, T(0));
      alignas(64) T weights[kLanes] = {};
      for (int64_t other = 0; other < blocks_of(p_.rows); ++other) {
        backward<Owner::kComponents>(block, other, d_mu, d_log_var);
        if (p_.d_log_weights != nullptr) add_weights(high_, weights);
      }
      const T* component = packed_.components(block);
      for (int64_t d = 0; d < p_.dims; ++d) {
        const T* scale = component + (d * Packed::kComponentFields + 1) * kLanes;
        for (int l = 0; l < kLanes; ++l)
          d_mu[d * kLanes + l] = T(2) * d_mu[d * kLanes + l] * scale[l];
      }
      unpack(d_mu, block, p_.components, p_.d_mu);
      if (p_.d_log_var != nullptr) {
        const int64_t first = block * kLanes,
                      count = std::min<int64_t>(kLanes, p_.components - first);
        const T* s = static_cast<const T*>(p_.log_var) + first * p_.dims;
        with_map(p_.scale_map, [&]<class S>(S) { chain_scales<S>(s, count, p_.dims, d_log_var); });
      }
      unpack(d_log_var, block, p_.components, p_.d_log_var);
      if (T* to = static_cast<T*>(p_.d_log_weights)) {
        const int64_t first = block * kLanes;
        std::copy_n(weights, std::min<int64_t>(kLanes, p_.components - first), to + first);
      }
    }
  }

 private:
  static void fill(Square<T>& square, T value) {
    std::fill_n(&square.at[0][0], kLanes * kLanes, value);
  }

  // The log-densities of a block of pairs, with their weights: high_ + low_.
  template <Owner kOwner>
  void score(int64_t block, int64_t other) {
    constexpr bool kRowsOwn = kOwner == Owner::kRows;
    const int64_t rows = kRowsOwn ? block : other, components = kRowsOwn ? other : block;
    find_weights<kRowsOwn>(rows * kLanes, components * kLanes);
    const T *lanes = packed_.rows(rows), *others = packed_.components(components);
    if constexpr (!kRowsOwn) std::swap(lanes, others);
    score_pairs<T, kOwner, kMarginals>(lanes, others, packed_.padded_dims(),
                                       packed_.offset(components), packed_.offset_low(components),
                                       log_weight_, high_, low_);
  }

  template <Owner kOwner>
  void backward(int64_t block, int64_t other, T* d_mean, T* d_log_var) {
    constexpr bool kRowsOwn = kOwner == Owner::kRows;
    const int64_t rows = kRowsOwn ? block : other, components = kRowsOwn ? other : block;
    score<kOwner>(block, other);
    const bool infinite =
        weigh<T, kOwner>(high_, low_, packed_.high(rows), packed_.low(rows), packed_.grad(rows));
    const T *lanes = packed_.rows(rows), *others = packed_.components(components);
    if constexpr (!kRowsOwn) std::swap(lanes, others);
    const auto add = infinite ? add_gradients<T, kOwner, kMarginals, true>
                              : add_gradients<T, kOwner, kMarginals, false>;
    add(lanes, others, p_.dims, high_, log_weight_, packed_.grad_prod(rows), d_mean, d_log_var);
  }

  // log_weight_ of the pairs from (row, component); most blocks have nothing but `rest`.
  template <bool kRowsOwn>
  void find_weights(int64_t row, int64_t component) {
    if (p_.weights.weighting == Weighting::kEqual) return;
    const bool near = component < 2 || (component <= row + kLanes && row < component + kLanes);
    if (!near && plain_) return;
    plain_ = !near;
    for (int j = 0; j < kLanes; ++j) {
      for (int l = 0; l < kLanes; ++l) {
        const int64_t i = row + (kRowsOwn ? l : j), k = component + (kRowsOwn ? j : l);
        log_weight_.at[j][l] = static_cast<T>(p_.weights.of(i, k, p_.rows));
      }
    }
  }

  void finish(int64_t block, const T* top, const T* sum, const T* tops, const T* sums) const {
    const int64_t first = block * kLanes, columns = p_.kept_columns();
    for (int64_t row = first; row < std::min(p_.rows, first + kLanes); ++row) {
      const int64_t l = row - first;
      const auto store = [&](void* to, T value) {
        if (to != nullptr) static_cast<T*>(to)[row] = value;
      };
      T* kept = p_.kept == nullptr ? nullptr : static_cast<T*>(p_.kept) + row * columns;
      const TwoSum<T> joint = add_log(top[l], sum[l]);
      store(p_.log_prob, joint.hi + joint.lo);
      if (kept != nullptr) {
        kept[0] = joint.hi == -math::kInfinity<T> ? T(0) : joint.hi;
        kept[1] = joint.lo;
      }
      if constexpr (kMarginals) {
        double product = 0;
        for (int64_t d = 0; d < p_.dims; ++d) {
          const TwoSum<T> one = add_log(tops[d * kLanes + l], sums[d * kLanes + l]);
          product += static_cast<double>(one.hi) + static_cast<double>(one.lo);
          if (kept != nullptr) kept[2 + d] = one.hi == -math::kInfinity<T> ? T(0) : one.hi;
        }
        store(p_.log_prod, static_cast<T>(product));
      }
    }
  }

  void unpack(const T* state, int64_t block, int64_t count, void* to) const {
    if (to == nullptr) return;
    const int64_t first = block * kLanes;
    for (int64_t i = first; i < std::min(count, first + kLanes); ++i) {
      for (int64_t d = 0; d < p_.dims; ++d) {
        static_cast<T*>(to)[i * p_.dims + d] = state[d * kLanes + (i - first)];
      }
    }
  }

  const Pairing& p_;
  const Packed& packed_;
  Square<T> high_, low_, log_weight_;
  bool plain_ = true;  // log_weight_ holds nothing but `rest`
};

// ---- what the caller's threads run --------------------------------------------------------------

template <class T, bool kMarginals>
struct PairTask {
  const Pairing& p;
  PackedPairs<T, kMarginals> packed{p, static_cast<T*>(p.scratch)};

  // Each on blocks begin..end of rows or components; nothing may run before both are packed.
  void pack_rows(int64_t begin, int64_t end) { packed.pack_rows(begin, end); }
  void pack_components(int64_t begin, int64_t end) { packed.pack_components(begin, end); }
  void forward(int64_t begin, int64_t end) const {
    PairSweep<T, kMarginals>(p, packed).forward(begin, end, State(p).data());
  }
  void backward_rows(int64_t begin, int64_t end) const {
    PairSweep<T, kMarginals>(p, packed).backward_rows(begin, end, State(p).data());
  }
  void backward_components(int64_t begin, int64_t end) const {
    PairSweep<T, kMarginals>(p, packed).backward_components(begin, end, State(p).data());
  }

 private:
  // [2][dims][16], a thread's own.
  class State {
   public:
    explicit State(const Pairing& p)
        : data_(::operator new(sizeof(T) * 2 * kLanes * static_cast<size_t>(p.dims), kAlignment)) {}
    ~State() { ::operator delete(data_, kAlignment); }
    State(const State&) = delete;
    State& operator=(const State&) = delete;
    T* data() const { return static_cast<T*>(data_); }

   private:
    static constexpr std::align_val_t kAlignment{64};
    void* data_;
  };
};

}  // namespace fastvae::cpu
