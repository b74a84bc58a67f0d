// Rows whose elements know each other, on CUDA: as in rows.cuh a team of threads to a row and a
// pack of elements to a thread, but with reductions on the way, whose results all of the team gets.
//
// As long as a team has a thread for every pack, up to 1536 floats, a row is read and its noise
// drawn once, and stays in registers between the passes. Of longer rows each pass does both anew:
// from the second on the row comes from the cache.
//
// Every sum has an order of its own, that of the team: results are bitwise the same for any grid.
#include "categorical.h"

#include "rows.cuh"

namespace fastvae::cuda {

enum class Reduce { kSum, kLargest };

// Over the team, to all of it. Of a team larger than a warp, which is a block, all must come.
__device__ inline double team_reduce(double x, int team, Reduce how) {
  double* const partial = block_memory();
  const auto combine = [how](double a, double b) {
    return how == Reduce::kSum ? a + b : GumbelOneHot::larger(a, b);
  };
  for (int step = (team < kWarp ? team : kWarp) / 2; step > 0; step /= 2) {
    x = combine(x, __shfl_xor_sync(0xffffffffu, x, step));
  }
  if (team <= kWarp) return x;
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = partial[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
    x = combine(x, partial[warp]);
  }
  __syncthreads();  // the next exchange must not overwrite what others still read
  return x;
}

// The row of a team, and the packs of it that fall to one thread.
template <Shape S, class Stored>
struct TeamRow {
  static constexpr int P = kPack<Stored>;
  const Plan& plan;
  const Stored* from[S.inputs];
  int64_t row, begin, first,
      last;  // begin: of the row, in the output; columns first, ..., last - 1
  int lane;
  bool held;  // one pack at most falls to each thread

  __device__ TeamRow(const Plan& plan, int64_t unit) : plan(plan) {
    const Sweep& s = plan.sweep;
    lane = static_cast<int>(threadIdx.x) % plan.team;
    row = unit < s.rows() ? unit : 0;
    begin = row * s.columns;
    first = -(begin % P);
    last = unit < s.rows() ? s.columns : first;  // beyond the rows: nothing, but all reductions
    held = s.columns - first <= int64_t{plan.team} * P;
    const int64_t outer = s.outer == 1 ? 0 : row / s.inner, inner = row - outer * s.inner;
#pragma unroll
    for (int k = 0; k < S.inputs; ++k) {
      const Operand& x = s.inputs[k];
      from[k] =
          static_cast<const Stored*>(x.data) + outer * x.outer_stride + inner * x.inner_stride;
    }
  }

  template <class Visit>
  __device__ __forceinline__ void each_pack(const Visit& visit) const {
    for (int64_t column = first + lane * P; column < last; column += plan.team * P) {
      visit(Slot<Stored>(column, plan.sweep.columns));
    }
  }

  template <class T>
  __device__ __forceinline__ void read(int k, const Slot<Stored>& slot, T (&x)[P]) const {
    const Pack<Stored> pack =
        (plan.packed_inputs >> k & 1) && slot.whole()
            ? Pack<Stored>::read(from[k] + slot.column)
            : read_elements(from[k], plan.sweep.inputs[k].column_stride, slot);
#pragma unroll
    for (int j = 0; j < P; ++j) x[j] = load(pack.get(j));
  }

  template <class T>
  __device__ __forceinline__ void write(int k, const Slot<Stored>& slot, const T (&x)[P]) const {
    Pack<Stored> pack = {};
#pragma unroll
    for (int j = 0; j < P; ++j) {
      Stored stored;
      store(stored, x[j]);
      pack.set(j, stored);
    }
    Stored* to = static_cast<Stored*>(plan.sweep.outputs[k]) + begin;
    if ((plan.packed_outputs >> k & 1) && slot.whole()) {
      pack.write(to + slot.column);
    } else {
      write_elements(to, slot, pack);
    }
  }
};

// ---- Gumbel-softmax ---------------------------------------------------------------------------

// The logits of a pack and their noise; what lies outside of the row is never the largest.
template <class T, class Row, class Stored>
__device__ __forceinline__ void draw_scores(const Row& row, int input, const Slot<Stored>& slot,
                                            T (&score)[kPack<Stored>]) {
  row.read(input, slot, score);
  const int64_t* key = row.plan.sweep.key;
#pragma unroll
  for (int quad = 0; quad < kPack<Stored>; quad += 4) {
    const philox::Words w =
        philox::block({static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1])},
                      static_cast<uint64_t>(row.begin + slot.column + quad) / 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = quad + i;
      const T s = GumbelSoftmax::Score::eval<T>(score[j], philox::gumbel<T>(w.x[i])).v[0];
      score[j] = slot.has(j) ? s : -math::kInfinity<T>;
    }
  }
}

template <class F, class T, class Stored>
__global__ void __launch_bounds__(kBlock, 3) gumbel_kernel(const Plan plan) {
  constexpr int P = kPack<Stored>;
  constexpr bool kHard = std::is_same_v<F, GumbelOneHot::Forward>;
  constexpr bool kBackward = F::shape.inputs == 2;
  constexpr int kLogits = kBackward ? 1 : 0;  // after grad
  const T inverse_temperature = GumbelSoftmax::inverse<T>(plan.sweep.parameters[0]);
  const int team = plan.team;
  const int64_t teams = static_cast<int>(blockDim.x) / team;

  for (int64_t base = blockIdx.x * teams; base < plan.sweep.rows(); base += gridDim.x * teams) {
    const TeamRow<F::shape, Stored> row(plan, base + static_cast<int>(threadIdx.x) / team);
    T x[P], grad[P];  // of the pack at hand: scores, then weights, then y

    double largest = -math::kInfinity<double>;
    row.each_pack([&](const Slot<Stored>& slot) {
      draw_scores<T>(row, kLogits, slot, x);
#pragma unroll
      for (int j = 0; j < P; ++j) {
        largest = GumbelOneHot::larger(largest, static_cast<double>(x[j]));
      }
    });
    largest = team_reduce(largest, team, Reduce::kLargest);
    const T max = static_cast<T>(largest);

    if constexpr (kHard) {
      double at = -math::kInfinity<double>;  // minus the first column that has it
      row.each_pack([&](const Slot<Stored>& slot) {
        if (!row.held) draw_scores<T>(row, kLogits, slot, x);
#pragma unroll
        for (int j = 0; j < P; ++j) {
          const double here = -static_cast<double>(slot.column + j);
          if (slot.has(j) && x[j] == max && here > at) at = here;
        }
      });
      at = team_reduce(at, team, Reduce::kLargest);
      const T other = GumbelOneHot::has_largest(max) ? T(0) : not_a_number<T>();
      row.each_pack([&](const Slot<Stored>& slot) {
#pragma unroll
        for (int j = 0; j < P; ++j) {
          x[j] = other == T(0) && -static_cast<double>(slot.column + j) == at ? T(1) : other;
        }
        row.write(0, slot, x);
      });
      continue;
    }

    const auto weigh = [&](T(&w)[P]) {
#pragma unroll
      for (int j = 0; j < P; ++j)
        w[j] = SoftmaxWeight::eval<T>(w[j], max, inverse_temperature).v[0];
    };
    double sum = 0;
    row.each_pack([&](const Slot<Stored>& slot) {
      if (!row.held) draw_scores<T>(row, kLogits, slot, x);
      weigh(x);
      T part = 0;
#pragma unroll
      for (int j = 0; j < P; ++j) part += slot.has(j) ? x[j] : T(0);
      sum += part;
    });
    const T inverse = T(1) / static_cast<T>(team_reduce(sum, team, Reduce::kSum));
    const auto normalise = [&](const Slot<Stored>& slot) {
      if (!row.held) {
        draw_scores<T>(row, kLogits, slot, x);
        weigh(x);
      }
#pragma unroll
      for (int j = 0; j < P; ++j) x[j] = Product::eval<T>(x[j], inverse).v[0];
    };
    if constexpr (!kBackward) {
      row.each_pack([&](const Slot<Stored>& slot) {
        normalise(slot);
        row.write(0, slot, x);
      });
    } else {
      double dot = 0;
      row.each_pack([&](const Slot<Stored>& slot) {
        normalise(slot);
        row.read(0, slot, grad);
        T part = 0;
#pragma unroll
        for (int j = 0; j < P; ++j) {
          part += slot.has(j) ? Product::eval<T>(x[j], grad[j]).v[0] : T(0);
        }
        dot += part;
      });
      const T all = static_cast<T>(team_reduce(dot, team, Reduce::kSum));
      row.each_pack([&](const Slot<Stored>& slot) {
        if (!row.held) {
          normalise(slot);
          row.read(0, slot, grad);
        }
#pragma unroll
        for (int j = 0; j < P; ++j) {
          x[j] = GumbelSoftmax::Gradient::eval<T>(x[j], grad[j], all, inverse_temperature).v[0];
        }
        row.write(0, slot, x);
      });
    }
  }
}

// ---- KL divergences ---------------------------------------------------------------------------

template <class F, class T, class Stored>
__global__ void __launch_bounds__(kBlock, 3) kl_kernel(const Plan plan) {
  constexpr int P = kPack<Stored>;
  constexpr bool kPrior = F::shape.inputs == 2, kBackward = F::shape.outputs > 0;
  const int team = plan.team;
  const int64_t teams = static_cast<int>(blockDim.x) / team;
  const Sweep& s = plan.sweep;

  for (int64_t base = blockIdx.x * teams; base < s.rows(); base += gridDim.x * teams) {
    const int64_t unit = base + static_cast<int>(threadIdx.x) / team;
    const TeamRow<F::shape, Stored> row(plan, unit);
    T q[P], p[P];  // logits of the pack at hand
    const auto read = [&](const Slot<Stored>& slot) {
      row.read(0, slot, q);
      if constexpr (kPrior) {
        row.read(1, slot, p);
      } else {
#pragma unroll
        for (int j = 0; j < P; ++j) p[j] = T(0);
      }
#pragma unroll
      for (int j = 0; j < P; ++j) {
        if (!slot.has(j)) q[j] = p[j] = -math::kInfinity<T>;
      }
    };

    double largest_q = -math::kInfinity<double>, largest_p = largest_q;
    row.each_pack([&](const Slot<Stored>& slot) {
      read(slot);
#pragma unroll
      for (int j = 0; j < P; ++j) {
        largest_q = GumbelOneHot::larger(largest_q, static_cast<double>(q[j]));
        if (kPrior) largest_p = GumbelOneHot::larger(largest_p, static_cast<double>(p[j]));
      }
    });
    const T max_q = static_cast<T>(team_reduce(largest_q, team, Reduce::kLargest));
    const T max_p = kPrior ? static_cast<T>(team_reduce(largest_p, team, Reduce::kLargest)) : T(0);

    double added_q = 0, added_p = 0;
    row.each_pack([&](const Slot<Stored>& slot) {
      if (!row.held) read(slot);
      T part_q = 0, part_p = 0;
#pragma unroll
      for (int j = 0; j < P; ++j) {
        part_q += slot.has(j) ? SoftmaxWeight::eval<T>(q[j], max_q, T(1)).v[0] : T(0);
        if (kPrior) part_p += slot.has(j) ? SoftmaxWeight::eval<T>(p[j], max_p, T(1)).v[0] : T(0);
      }
      added_q += part_q;
      added_p += part_p;
    });
    const T sum_q = static_cast<T>(team_reduce(added_q, team, Reduce::kSum));
    const T sum_p =
        static_cast<T>(kPrior ? team_reduce(added_p, team, Reduce::kSum) : double(s.columns));
    const T shift = ClassKl::Shift::eval<T>(sum_q, sum_p).v[0];
    const T inverse_q = T(1) / sum_q, inverse_p = T(1) / sum_p;
    const auto weight = [](T logit, T max) {
      return SoftmaxWeight::eval<T>(logit, max, T(1)).v[0];
    };

    double kl = 0;
    row.each_pack([&](const Slot<Stored>& slot) {
      if (!row.held) read(slot);
      T part = 0;
#pragma unroll
      for (int j = 0; j < P; ++j) {
        const T ratio = ClassKl::LogRatio::eval<T>(q[j], p[j], max_q, max_p).v[0];
        const T term = ClassKl::Term::eval<T>(weight(q[j], max_q), weight(p[j], max_p), inverse_q,
                                              inverse_p, ratio, shift)
                           .v[0];
        part += slot.has(j) ? term : T(0);
      }
      kl += part;
    });
    kl = team_reduce(kl, team, Reduce::kSum);
    if constexpr (!kBackward) {
      if (row.lane == 0 && unit < s.rows()) static_cast<T*>(s.row_sum)[unit] = static_cast<T>(kl);
    } else {
      const T grad = static_cast<const T*>(s.row_inputs[0])[row.row];
      row.each_pack([&](const Slot<Stored>& slot) {
        if (!row.held) read(slot);
#pragma unroll
        for (int j = 0; j < P; ++j) {
          const T ratio = ClassKl::LogRatio::eval<T>(q[j], p[j], max_q, max_p).v[0];
          const Values<T, 2> gradient =
              ClassKl::Gradient::eval<T>(weight(q[j], max_q), weight(p[j], max_p), inverse_q,
                                         inverse_p, ratio, shift, static_cast<T>(kl), grad);
          q[j] = gradient.v[0], p[j] = gradient.v[1];
        }
        if (s.outputs[0] != nullptr) row.write(0, slot, q);
        if constexpr (kPrior) {
          if (s.outputs[1] != nullptr) row.write(1, slot, p);
        }
      });
    }
  }
}

// ---- log-probabilities ------------------------------------------------------------------------

template <class F, class T, class Stored>
__global__ void __launch_bounds__(kBlock, 3) log_prob_kernel(const Plan plan) {
  constexpr int P = kPack<Stored>;
  constexpr bool kBackward = F::shape.outputs > 0;
  const int team = plan.team;
  const int64_t teams = static_cast<int>(blockDim.x) / team;
  const Sweep& s = plan.sweep;

  for (int64_t base = blockIdx.x * teams; base < s.rows(); base += gridDim.x * teams) {
    const int64_t unit = base + static_cast<int>(threadIdx.x) / team;
    const TeamRow<F::shape, Stored> row(plan, unit);
    const int64_t outer = s.outer == 1 ? 0 : row.row / s.inner, inner = row.row - outer * s.inner;
    const int64_t at = static_cast<const int64_t*>(
        s.inputs[1].data)[outer * s.inputs[1].outer_stride + inner * s.inputs[1].inner_stride];
    const bool exists = CategoricalLogProb::exists(at, s.columns);
    T x[P];

    double largest = -math::kInfinity<double>;
    row.each_pack([&](const Slot<Stored>& slot) {
      row.read(0, slot, x);
#pragma unroll
      for (int j = 0; j < P; ++j) {
        if (slot.has(j)) largest = GumbelOneHot::larger(largest, static_cast<double>(x[j]));
      }
    });
    const T max = static_cast<T>(team_reduce(largest, team, Reduce::kLargest));
    double added = 0;
    row.each_pack([&](const Slot<Stored>& slot) {
      if (!row.held) row.read(0, slot, x);
      T part = 0;
#pragma unroll
      for (int j = 0; j < P; ++j) {
        part += slot.has(j) ? SoftmaxWeight::eval<T>(x[j], max, T(1)).v[0] : T(0);
      }
      added += part;
    });
    const T sum = static_cast<T>(team_reduce(added, team, Reduce::kSum));
    if constexpr (!kBackward) {
      if (row.lane == 0 && unit < s.rows()) {
        static_cast<T*>(s.row_sum)[unit] =
            exists
                ? CategoricalLogProb::value(
                      static_cast<T>(load(row.from[0][at * s.inputs[0].column_stride])), max, sum)
                : not_a_number<T>();
      }
    } else {
      const T grad = static_cast<const T*>(s.row_inputs[0])[row.row];
      const T slope = exists ? -grad / sum : not_a_number<T>();
      row.each_pack([&](const Slot<Stored>& slot) {
        if (!row.held) row.read(0, slot, x);
#pragma unroll
        for (int j = 0; j < P; ++j) {
          x[j] = Product::eval<T>(SoftmaxWeight::eval<T>(x[j], max, T(1)).v[0], slope).v[0];
          if (slot.column + j == at) x[j] += grad;
        }
        row.write(0, slot, x);
      });
    }
  }
}

// ---- the launch -------------------------------------------------------------------------------

// As the row engine lays a sweep out, but whole rows: a thread to each pack, as far as they go.
// The operands are the inputs, and what else goes by the rows' strides.
template <Shape S, class Stored, int kOperands>
Plan plan_rows(Sweep sweep) {
  constexpr int64_t P = kPack<Stored>;
  constexpr Shape kRows{.inputs = kOperands, .outputs = S.outputs, .row_sums = 1};
  sweep.partial_sums = nullptr;
  Plan plan = cuda::plan<kRows, float, Stored>(sweep);  // any type: few registers are wanted
  const int64_t touched = sweep.columns + (sweep.columns % P == 0 ? 0 : P - 1);
  const int64_t packs = (touched + P - 1) / P;
  if (packs > kWarp) {
    plan.team = plan.threads =
        static_cast<int>(std::min<int64_t>(kBlock, (packs + kWarp - 1) / kWarp * kWarp));
  }
  return plan;
}

inline int64_t blocks_of(const Plan& plan) {
  const int64_t teams = plan.threads / plan.team;
  return std::min<int64_t>(kMaxBlocks, (plan.sweep.rows() + teams - 1) / teams);
}

struct Gumbel {
  static constexpr int kClasses = 0;
  template <class F, class T, class Stored>
  static constexpr auto kernel = gumbel_kernel<F, T, Stored>;
};
struct Kl {
  static constexpr int kClasses = 0;
  template <class F, class T, class Stored>
  static constexpr auto kernel = kl_kernel<F, T, Stored>;
};
struct LogProb {
  static constexpr int kClasses = 1;  // the operand x
  template <class F, class T, class Stored>
  static constexpr auto kernel = log_prob_kernel<F, T, Stored>;
};

template <class Family, class F, class T, class Stored>
const char* sweep_categories(const Sweep& sweep, cudaStream_t stream) {
  const bool writes = F::shape.outputs > 0;
  if (sweep.rows() == 0 || (writes && sweep.columns == 0)) return nullptr;
  const auto is_null = [](const void* output) { return output == nullptr; };
  if (writes && std::all_of(sweep.outputs, sweep.outputs + F::shape.outputs, is_null)) {
    return nullptr;
  }
  const Plan plan = plan_rows<F::shape, Stored, F::shape.inputs + Family::kClasses>(sweep);
  const auto kernel = Family::template kernel<F, T, Stored>;
  FASTVAE_LAUNCH(kernel, blocks_of(plan), plan.threads, stream, plan);
  return launch_error();
}

template <class Family, class F>
const char* sweep_categories(const Sweep& sweep, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const char* error = "unknown dtype";
  with_types(sweep.dtype, [&]<class T, class Stored>(Types<T, Stored>) {
    error = sweep_categories<Family, F, T, Stored>(sweep, cuda_stream);
  });
  return error;
}

#define FASTVAE_SWEEP_CATEGORIES(Family, F)                     \
  template <>                                                   \
  const char* sweep_rows<F>(const Sweep& sweep, void* stream) { \
    return sweep_categories<Family, F>(sweep, stream);          \
  }
FASTVAE_SWEEP_CATEGORIES(Gumbel, GumbelSoftmax::Forward)
FASTVAE_SWEEP_CATEGORIES(Gumbel, GumbelSoftmax::Backward)
FASTVAE_SWEEP_CATEGORIES(Gumbel, GumbelOneHot::Forward)
FASTVAE_SWEEP_CATEGORIES(Kl, CategoricalKl<false>::Forward)
FASTVAE_SWEEP_CATEGORIES(Kl, CategoricalKl<false>::Backward)
FASTVAE_SWEEP_CATEGORIES(Kl, CategoricalKl<true>::Forward)
FASTVAE_SWEEP_CATEGORIES(Kl, CategoricalKl<true>::Backward)
FASTVAE_SWEEP_CATEGORIES(LogProb, CategoricalLogProb::Forward)
FASTVAE_SWEEP_CATEGORIES(LogProb, CategoricalLogProb::Backward)
template <>
const char* sweep_rows<GumbelOneHot::Backward>(const Sweep& sweep, void* stream) {
  return sweep_rows<GumbelSoftmax::Backward>(sweep, stream);  // straight through
}

FASTVAE_INSTANTIATE(GumbelSoftmax)
FASTVAE_INSTANTIATE(GumbelOneHot)
FASTVAE_INSTANTIATE(CategoricalKl<false>)
FASTVAE_INSTANTIATE(CategoricalKl<true>)
FASTVAE_INSTANTIATE(CategoricalLogProb)
template const char* sweep_rows<Total>(const Sweep&, void*);

}  // namespace fastvae::cuda
