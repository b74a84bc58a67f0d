// The CUDA engine of pairs: a warp owns a row (or a component) and meets all others, 32 at a time.
//
// Of each pair the lanes share the dimensions; the pair's sum of squares is added up by shuffles,
// in double, and kept by one lane: so 32 pairs take one exponential a lane. What belongs to one
// dimension, the marginals and the gradients, stays with the lane of that dimension, in registers.
// Rows of more than kSpan dimensions are done a span at a time, each forming the sums again.
//
// All loads of a warp are neighbours, and all warps of a block walk the same others at about the
// same time, from the first-level cache. Nothing is atomic and every sum has one order: the results
// are the same to the bit for any grid.
#pragma once

#include "pairing.h"
#include "rows.cuh"

namespace fastvae::cuda {

inline constexpr int kHeld = 4;              // dimensions that a lane holds at once
inline constexpr int kSpan = kHeld * kWarp;  // and a warp
inline constexpr int kResident = 5;          // blocks of a multiprocessor, at 96 registers a thread

// A pairing and what prepare_kernel adds to it.
template <class T>
struct PairPlan {
  Pairing p;
  const double* offset;      // [components]: log-weight, and the sum over dimensions of `offsets`
  const T *scale, *offsets;  // [components, dims]

  explicit PairPlan(const Pairing& pairing) : p(pairing) {
    offset = static_cast<const double*>(p.scratch);
    scale = reinterpret_cast<const T*>(offset + p.components);
    offsets = scale + p.components * p.dims;
  }
};

__device__ __forceinline__ int warp_lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int64_t first_warp() {
  return blockIdx.x * static_cast<int64_t>(blockDim.x / kWarp) +
         static_cast<int>(threadIdx.x) / kWarp;
}
__device__ __forceinline__ int64_t warps_in_grid() {
  return gridDim.x * static_cast<int64_t>(blockDim.x / kWarp);
}

__device__ __forceinline__ double warp_max(double x) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    x = math::max(__shfl_xor_sync(0xffffffffu, x, step), x);
  }
  return x;
}

// A warp to a component.
template <class T>
__global__ void __launch_bounds__(kBlock, kResident) prepare_kernel(const PairPlan<T> plan) {
  const Pairing& p = plan.p;
  for (int64_t k = first_warp(); k < p.components; k += warps_in_grid()) {
    double sum = 0;
    for (int64_t d = warp_lane(); d < p.dims; d += kWarp) {
      const int64_t at = k * p.dims + d;
      const PairwiseGaussian::Spread<T> spread =
          PairwiseGaussian::spread(p.scale_map, static_cast<const T*>(p.log_var)[at]);
      const_cast<T*>(plan.scale)[at] = spread.scale;
      const_cast<T*>(plan.offsets)[at] = spread.offset;
      sum += static_cast<double>(spread.offset);
    }
    // Of scales of 0 it may overflow: finite, so that no row is inf - inf.
    sum = math::min(math::largest<double>(), warp_sum(sum, kWarp));
    if (p.log_weights != nullptr) {
      sum += static_cast<double>(static_cast<const T*>(p.log_weights)[k]);
    }
    if (warp_lane() == 0) const_cast<double*>(plan.offset)[k] = sum;
  }
}

// The log-densities of 32 pairs, with their weights: lane j has that of the owner and other
// first + j, or -inf beyond the last.
template <Owner kOwner, class T>
__device__ __forceinline__ double log_densities(const PairPlan<T>& plan, int64_t owner,
                                                int64_t first, int count) {
  const Pairing& p = plan.p;
  double mine = -math::kInfinity<double>;
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    const int64_t row = kOwner == Owner::kRows ? owner : first + j;
    const int64_t component = kOwner == Owner::kRows ? first + j : owner;
    const T* z = static_cast<const T*>(p.z) + row * p.dims;
    const T* mu = static_cast<const T*>(p.mu) + component * p.dims;
    const T* scale = plan.scale + component * p.dims;
    T sum = 0;
    for (int64_t d = warp_lane(); d < p.dims; d += kWarp) {
      sum = PairwiseGaussian::log_density(sum, PairwiseGaussian::score(z[d], mu[d], scale[d]));
    }
    const double total = warp_sum(static_cast<double>(sum), kWarp);
    if (warp_lane() == j) {
      mine = total + plan.offset[component] + p.weights.of(row, component, p.rows);
    }
  }
  return mine;
}

template <class T>
__device__ __forceinline__ T finite_or_zero(T x) {
  return x == -math::kInfinity<T> ? T(0) : x;
}

// A warp to a row.
template <class T, bool kMarginals>
__global__ void __launch_bounds__(kBlock, kResident) pairs_forward_kernel(const PairPlan<T> plan) {
  const Pairing& p = plan.p;
  const int lane = warp_lane();
  for (int64_t row = first_warp(); row < p.rows; row += warps_in_grid()) {
    T* kept = p.kept == nullptr ? nullptr : static_cast<T*>(p.kept) + row * p.kept_columns();
    double top = -math::largest<double>();
    T sum = 0;
    for (int64_t first = 0; first < p.components; first += kWarp) {
      const int count = static_cast<int>(math::min<int64_t>(kWarp, p.components - first));
      const double value = log_densities<Owner::kRows>(plan, row, first, count);
      const double to = math::raised_top(top, value);
      sum =
          sum * math::exp_weight(static_cast<T>(top - to)) + math::exp(static_cast<T>(value - to));
      top = to;
    }
    const double highest = warp_max(top);
    const double total =
        warp_sum(static_cast<double>(sum * math::exp_weight(static_cast<T>(top - highest))), kWarp);
    const double log_prob = highest + std::log(total);
    if (lane == 0) {
      const T high = static_cast<T>(log_prob);
      static_cast<T*>(p.log_prob)[row] = high;
      if (kept != nullptr) {
        kept[0] = finite_or_zero(high);
        const double low = log_prob - static_cast<double>(high);
        kept[1] = low == low ? static_cast<T>(low) : T(0);
      }
    }

    if constexpr (kMarginals) {
      const T* z = static_cast<const T*>(p.z) + row * p.dims;
      double product = 0;
      for (int64_t d = lane; d < p.dims; d += kWarp) {
        T most = -math::largest<T>(), weight = 0;
        const T at = z[d];
        for (int64_t k = 0; k < p.components; ++k) {
          const int64_t i = k * p.dims + d;
          const T score =
              PairwiseGaussian::score(at, static_cast<const T*>(p.mu)[i], plan.scale[i]);
          const T log_weight = static_cast<T>(p.weights.of(row, k, p.rows));
          const T value = PairwiseGaussian::log_density(plan.offsets[i] + log_weight, score);
          const T to = math::raised_top(most, value);
          if (to != most) {
            weight *= math::exp_weight(most - to);
            most = to;
          }
          weight += math::exp_weight(value - most);
        }
        const TwoSum<T> one = add_log(most, weight);
        product += static_cast<double>(one.hi) + static_cast<double>(one.lo);
        if (kept != nullptr) kept[2 + d] = finite_or_zero(one.hi);
      }
      product = warp_sum(product, kWarp);
      if (lane == 0) static_cast<T*>(p.log_prod)[row] = static_cast<T>(product);
    }
  }
}

// A warp to a row, whose d_z it sums, or to a component.
template <Owner kOwner, class T, bool kMarginals>
__global__ void __launch_bounds__(kBlock, kResident) pairs_backward_kernel(const PairPlan<T> plan) {
  constexpr bool kRowsOwn = kOwner == Owner::kRows;
  const Pairing& p = plan.p;
  const int lane = warp_lane();
  const int64_t owners = kRowsOwn ? p.rows : p.components;
  const int64_t others = kRowsOwn ? p.components : p.rows;
  const T* kept = static_cast<const T*>(p.kept);
  const T *grad = static_cast<const T*>(p.grad), *grad_prod = static_cast<const T*>(p.grad_prod);

  for (int64_t owner = first_warp(); owner < owners; owner += warps_in_grid()) {
    // Once at least, for the weights, if there are no dimensions.
    for (int64_t span = 0; span == 0 || span < p.dims; span += kSpan) {
      T means[kHeld] = {}, spreads[kHeld] = {}, weights = 0;
      for (int64_t first = 0; first < others; first += kWarp) {
        const int count = static_cast<int>(math::min<int64_t>(kWarp, others - first));
        T mine = 0;  // the weight of this lane's pair in the loss, through log_prob
        if (grad != nullptr) {
          const double value = log_densities<kOwner>(plan, owner, first, count);
          if (lane < count) {
            const int64_t row = kRowsOwn ? owner : first + lane;
            const T* normaliser = kept + row * p.kept_columns();
            const double log_prob =
                static_cast<double>(normaliser[0]) + static_cast<double>(normaliser[1]);
            mine = grad[row] * math::exp_weight(static_cast<T>(value - log_prob));
          }
        }
        weights += mine;
#pragma unroll 1
        for (int j = 0; j < count; ++j) {
          const int64_t row = kRowsOwn ? owner : first + j;
          const int64_t component = kRowsOwn ? first + j : owner;
          const T joint = __shfl_sync(0xffffffffu, mine, j);
          T log_weight = 0, through_prod = 0;
          if constexpr (kMarginals) {
            log_weight = static_cast<T>(p.weights.of(row, component, p.rows));
            through_prod = grad_prod == nullptr ? T(0) : grad_prod[row];
          }
#pragma unroll
          for (int h = 0; h < kHeld; ++h) {
            const int64_t d = span + h * kWarp + lane;
            if (d >= p.dims) continue;
            const int64_t i = component * p.dims + d;
            const T scale = plan.scale[i];
            const T score = PairwiseGaussian::score(static_cast<const T*>(p.z)[row * p.dims + d],
                                                    static_cast<const T*>(p.mu)[i], scale);
            T w = joint;
            if constexpr (kMarginals) {
              if (grad_prod != nullptr) {
                const T value = PairwiseGaussian::log_density(plan.offsets[i] + log_weight, score);
                const T normaliser = kept[row * p.kept_columns() + 2 + d];
                w += through_prod * math::exp_weight(value - normaliser);
              }
            }
            const T seen = PairwiseGaussian::weighed_score(w, score);
            means[h] += PairwiseGaussian::grad_mean(w, seen) * (kRowsOwn ? -scale : T(1));
            if constexpr (!kRowsOwn) spreads[h] += PairwiseGaussian::grad_log_var(w, seen);
          }
        }
      }
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        const int64_t d = span + h * kWarp + lane;
        if (d >= p.dims) continue;
        const int64_t i = owner * p.dims + d;
        if constexpr (kRowsOwn) {
          static_cast<T*>(p.d_z)[i] = T(2) * means[h];
        } else {
          if (p.d_mu != nullptr) static_cast<T*>(p.d_mu)[i] = T(2) * means[h] * plan.scale[i];
          if (p.d_log_var != nullptr) {
            static_cast<T*>(p.d_log_var)[i] = PairwiseGaussian::chain(
                p.scale_map, spreads[h], static_cast<const T*>(p.log_var)[i]);
          }
        }
      }
      if (!kRowsOwn && span == 0) {
        const double total = warp_sum(static_cast<double>(weights), kWarp);
        if (lane == 0 && p.d_log_weights != nullptr) {
          static_cast<T*>(p.d_log_weights)[owner] = static_cast<T>(total);
        }
      }
    }
  }
}

// ---- the launch -------------------------------------------------------------------------------

inline int64_t blocks_for_warps(int64_t warps) {
  constexpr int64_t kWarps = kBlock / kWarp;
  return std::min<int64_t>(kMaxBlocks, (warps + kWarps - 1) / kWarps);
}

template <class T, bool kMarginals>
const char* run_pairs(const Pairing& p, bool backward, cudaStream_t stream) {
  const PairPlan<T> plan(p);
  if (p.components > 0) {
    const auto prepare = prepare_kernel<T>;
    FASTVAE_LAUNCH(prepare, blocks_for_warps(p.components), kBlock, stream, plan);
  }
  if (!backward) {
    const auto kernel = pairs_forward_kernel<T, kMarginals>;
    if (p.rows > 0) FASTVAE_LAUNCH(kernel, blocks_for_warps(p.rows), kBlock, stream, plan);
    return launch_error();
  }
  if (p.d_z != nullptr && p.rows > 0) {
    const auto kernel = pairs_backward_kernel<Owner::kRows, T, kMarginals>;
    FASTVAE_LAUNCH(kernel, blocks_for_warps(p.rows), kBlock, stream, plan);
  }
  const bool wanted = p.d_mu != nullptr || p.d_log_var != nullptr || p.d_log_weights != nullptr;
  if (wanted && p.components > 0) {
    const auto kernel = pairs_backward_kernel<Owner::kComponents, T, kMarginals>;
    FASTVAE_LAUNCH(kernel, blocks_for_warps(p.components), kBlock, stream, plan);
  }
  return launch_error();
}

}  // namespace fastvae::cuda
