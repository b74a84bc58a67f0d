// The contract between the pairwise formulas (mixture.h) and their engines: every row meets every
// component, and what they make of each other is summed as it comes. Nothing of the size of
// rows x components is ever stored, forward or backward.
//
//   log_prob_i = log sum_k exp(l_ik),  l_ik = log w_ik + sum_d l_ikd
//   log_prod_i = sum_d L_id,           L_id = log sum_k exp(log w_ik + l_ikd)   (if marginals)
//
// Backward knows from forward the normaliser of each row, and of each row and dimension: then the
// weight of a pair, exp(l_ik - log_prob_i), is had from the pair alone. A sum over rows and one
// over components each form the pair again. So every sum has one owner and one order, whatever the
// number of threads, and no sum is kept twice.
#pragma once

#include "mixture.h"

namespace fastvae {

struct Pairing {
  DType dtype = DType::kFloat32;  // float or double, of everything below
  bool marginals = false;
  int64_t rows = 0, components = 0, dims = 0;
  const void* z = nullptr;                        // [rows, dims], contiguous as all the others
  const void *mu = nullptr, *log_var = nullptr;   // [components, dims]
  ScaleMap scale_map = ScaleMap::kLogVar;         // what log_var holds
  const void* log_weights = nullptr;              // [components], or null: weights alone
  LogWeights weights;                             // and what the two numbers of a pair add
  void *log_prob = nullptr, *log_prod = nullptr;  // [rows]; null: not wanted
  void* kept = nullptr;                           // [rows, kept_columns()]; null: not wanted

  const void *grad = nullptr, *grad_prod = nullptr;  // [rows]; null: zero
  void *d_z = nullptr, *d_mu = nullptr, *d_log_var = nullptr, *d_log_weights = nullptr;

  void* scratch = nullptr;  // of the engine, which says how much: 16-byte aligned, its content lost

  // What forward keeps of a row: log_prob in two parts, that carry more digits than one, and each
  // L_id. Of those that are -inf it keeps 0, which makes all their weights exp(-inf - 0) = 0.
  FASTVAE_HD int64_t kept_columns() const { return 2 + (marginals ? dims : 0); }
};

enum class Owner { kRows, kComponents };  // whose sums are formed, each from all of the others

// A sum that loses nothing: hi + lo, hi the rounded sum. The exponential of a log-density takes its
// absolute error for a relative one, and in a hundred dimensions a float is good to 1e-5 only.
template <class T>
struct TwoSum {
  T hi, lo;

  FASTVAE_HD void add(T x) {
    const T sum = hi + x, back = sum - hi;
    lo += (hi - (sum - back)) + (x - back);
    hi = sum;
  }
  // Of infinities lo is NaN, which says no more than hi does.
  FASTVAE_HD T low() const { return math::abs(hi) <= math::largest<T>() ? lo : T(0); }
};

// log(e^top sum), in two parts; of no terms at all, -inf.
template <class T>
FASTVAE_HD TwoSum<T> add_log(T top, T sum) {
  const bool finite = sum > T(0) && sum <= math::largest<T>();
  TwoSum<T> result{top, T(0)};
  result.add(finite ? math::log_normal(sum) : sum == T(0) ? -math::kInfinity<T> : sum);
  result.lo = result.low();
  return result;
}

namespace cuda {
inline int64_t scratch_bytes(const Pairing& p) {
  const int64_t item = p.dtype == DType::kFloat64 ? 8 : 4;
  return p.components * (8 + 2 * p.dims * item);
}
}  // namespace cuda

}  // namespace fastvae
