// Residual flows on CUDA (residual_flow.h): a warp to a row, whose lanes share the columns.
//
// Lines are constrained first, into a table in lent memory, a warp to a line. A warp then walks all
// K steps of its row: in one pass over the columns it moves the row and measures it for the next
// step. Each lane reads no columns but those it wrote, so the row may lie in lent memory, which the
// caches hold, whatever its length. Backward walks the steps again and keeps the states of the rows
// under way, [warps][K][D]. The inverse walks the steps from the last to the first.
//
// The gradients of shared lines are summed over the rows of each warp, of which there are at most
// kSumWarps, in that order, then over the warps: results are reproducible to the bit.
#include "residual_flow.h"

#include "rows.cuh"

namespace fastvae::cuda {

inline constexpr int kFlowBlock = 128, kFlowBlocks = 4;  // at once on a multiprocessor
inline constexpr int64_t kSumWarps = 512, kRowWarps = 8192;

// What is lent, in order.
template <class F, class T>
struct FlowPlan {
  FlowSweep s;
  int64_t stride, lines, warps;  // a line in the table; how many; warps at work
  double* sums;                  // of shared lines, of each warp
  T *table, *states, *arguments, *grads, *d_table;
  int64_t bytes;

  FlowPlan(const FlowSweep& sweep, bool backward, void* lent)
      : s(sweep),
        stride(F::kVectors * s.dims + 2),
        lines(s.line_count()),
        warps(std::min(s.rows, backward && s.shared ? kSumWarps : kRowWarps)) {
    bytes = 0;
    const auto lend = [&](auto*& to, int64_t n) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(
          reinterpret_cast<uintptr_t>(lent) + static_cast<uintptr_t>(bytes));
      bytes += n * static_cast<int64_t>(sizeof *to);
    };
    lend(sums, backward && s.shared ? warps * s.steps * stride : 0);
    lend(table, lines * stride);
    lend(states, warps * s.dims * (backward ? s.steps : 1));
    lend(arguments, backward ? warps * s.steps : 0);
    lend(grads, backward ? warps * s.dims : 0);
    lend(d_table, backward && !s.shared ? lines * stride : 0);
  }
};

// A line as it was given.
template <class F, class T, class Stored>
struct GivenLine {
  const FlowSweep& s;
  int64_t n;

  __device__ __forceinline__ void vectors(int64_t c, T (&v)[F::kVectors]) const {
#pragma unroll
    for (int i = 0; i < F::kVectors; ++i) {
      v[i] = load(static_cast<const Stored*>(s.vectors[i])[n * s.dims + c]);
    }
  }
  __device__ __forceinline__ typename F::template Line<T> constrained() const {
    double sums[2] = {};
    for (int64_t c = lane_of_warp(); c < s.dims; c += kWarp) {
      T v[F::kVectors];
      vectors(c, v);
      const Values<T, 2> terms = F::line_terms(v);
      for (int i = 0; i < 2; ++i) sums[i] += terms.v[i];
    }
    T given[2] = {};
#pragma unroll
    for (int i = 0; i < F::kGiven; ++i) given[i] = load(static_cast<const Stored*>(s.given[i])[n]);
    return {Values<T, 2>{{static_cast<T>(warp_sum(sums[0], kWarp)),
                          static_cast<T>(warp_sum(sums[1], kWarp))}},
            given};
  }
};

template <class F, class T, class Stored>
__global__ void __launch_bounds__(kFlowBlock, kFlowBlocks)
    constrain_kernel(const FlowPlan<F, T> plan) {
  const FlowSweep& s = plan.s;
  for (int64_t n = warp_of_grid(); n < plan.lines; n += warps_of_grid()) {
    const GivenLine<F, T, Stored> given{s, n};
    const typename F::template Line<T> line = given.constrained();
    T* to = plan.table + n * plan.stride;
    for (int64_t c = lane_of_warp(); c < s.dims; c += kWarp) {
      T v[F::kVectors];
      given.vectors(c, v);
      const auto vectors = line.vectors(v);
#pragma unroll
      for (int i = 0; i < F::kVectors; ++i) to[i * s.dims + c] = vectors.v[i];
    }
    if (lane_of_warp() == 0) to[F::kVectors * s.dims] = line.numbers[0];
    if (lane_of_warp() == 1) to[F::kVectors * s.dims + 1] = line.numbers[1];
  }
}

template <class F, class T>
__device__ __forceinline__ void read_vectors(const T* line, int64_t dims, int64_t c,
                                             T (&v)[F::kVectors]) {
#pragma unroll
  for (int i = 0; i < F::kVectors; ++i) v[i] = line[i * dims + c];
}

// The row, `z` of one step, moves along `line` to `to`, as `by` says; what `next` measures of it.
// Either may be null.
template <class F, class T>
__device__ __forceinline__ T advance(const T* z, T* to, int64_t dims, const T* line, T by,
                                     const T* next) {
  double sum = 0;
  for (int64_t c = lane_of_warp(); c < dims; c += kWarp) {
    T x = z[c], v[F::kVectors];
    if (line != nullptr) {
      read_vectors<F>(line, dims, c, v);
      x = F::move(x, by, v);
      to[c] = x;
    }
    if (next != nullptr) {
      read_vectors<F>(next, dims, c, v);
      sum += F::measure(x, v);
    }
  }
  return static_cast<T>(warp_sum(sum, kWarp));
}

// A step of a row that has been measured, whose place its argument takes.
template <class F, bool kInverse, class T>
__device__ __forceinline__ typename F::template Step<T> step_of(T& measured, const T* numbers,
                                                                T dims) {
  measured = kInverse ? F::solve(measured, numbers) : F::argument(measured, numbers);
  return {measured, numbers, dims};
}

// A row's lines, in the order of its walk.
template <bool kInverse, class F, class T>
struct Walk {
  const T* first;
  int64_t steps, stride;

  __device__ __forceinline__ Walk(const FlowPlan<F, T>& plan, int64_t row)
      : first(plan.table + (plan.s.shared ? 0 : row * plan.s.steps) * plan.stride),
        steps(plan.s.steps),
        stride(plan.stride) {}
  __device__ __forceinline__ int64_t step(int64_t k) const { return kInverse ? steps - 1 - k : k; }
  __device__ __forceinline__ const T* line(int64_t k) const { return first + step(k) * stride; }
  __device__ __forceinline__ const T* next(int64_t k) const {  // of the last there is none
    return k + 1 < steps ? line(k + 1) : nullptr;
  }
};

template <class F, class T, class Stored, bool kInverse>
__global__ void __launch_bounds__(kFlowBlock, kFlowBlocks)
    flow_forward_kernel(const FlowPlan<F, T> plan) {
  const FlowSweep& s = plan.s;
  for (int64_t row = warp_of_grid(); row < s.rows; row += warps_of_grid()) {
    T* z = plan.states + row % plan.warps * s.dims;
    const Walk<kInverse, F, T> walk(plan, row);
    for (int64_t c = lane_of_warp(); c < s.dims; c += kWarp) {
      z[c] = load(static_cast<const Stored*>(s.z)[row * s.dims + c]);
    }
    double log_det = 0;
    T measured = advance<F, T>(z, z, s.dims, nullptr, T(0), walk.line(0));
    for (int64_t k = 0; k < s.steps; ++k) {
      const T* line = walk.line(k);
      const auto step =
          step_of<F, kInverse>(measured, line + F::kVectors * s.dims, static_cast<T>(s.dims));
      log_det += kInverse ? -step.log_det : step.log_det;
      measured = advance<F, T>(z, z, s.dims, line, kInverse ? step.back : step.there, walk.next(k));
    }
    for (int64_t c = lane_of_warp(); c < s.dims; c += kWarp) {
      store(static_cast<Stored*>(s.out)[row * s.dims + c], z[c]);
    }
    if (lane_of_warp() == 0) static_cast<T*>(s.log_det)[row] = static_cast<T>(log_det);
  }
}

// Rows warp, warp + plan.warps, ..., one after the other.
template <class F, class T, class Stored, bool kInverse>
__device__ void walk_back(const FlowPlan<F, T>& plan, int64_t warp) {
  const FlowSweep& s = plan.s;
  const int64_t numbers = F::kVectors * s.dims;
  const T dims = static_cast<T>(s.dims);
  T *states = plan.states + warp * s.steps * s.dims, *grad = plan.grads + warp * s.dims;
  T* arguments = plan.arguments + warp * s.steps;
  double* sums = plan.sums + warp * s.steps * plan.stride;
  if (s.shared) {  // each lane clears what it adds to: its columns, and of lanes 0 and 1 a number
    for (int64_t k = 0; k < s.steps; ++k) {
      for (int64_t c = lane_of_warp(); c < s.dims; c += kWarp) {
#pragma unroll
        for (int i = 0; i < F::kVectors; ++i) sums[k * plan.stride + i * s.dims + c] = 0;
      }
      if (lane_of_warp() < 2) sums[k * plan.stride + numbers + lane_of_warp()] = 0;
    }
  }
  for (int64_t row = warp; row < s.rows; row += plan.warps) {
    const Walk<kInverse, F, T> walk(plan, row);
    for (int64_t c = lane_of_warp(); c < s.dims; c += kWarp) {
      states[c] = load(static_cast<const Stored*>(s.z)[row * s.dims + c]);
    }
    // The steps again, from state to state; of the inverse, what is kept lies after each.
    T at = advance<F, T>(states, states, s.dims, nullptr, T(0), walk.line(0));
    for (int64_t k = 0; k < s.steps; ++k) {
      const T* line = walk.line(k);
      const auto step = step_of<F, kInverse>(at, line + numbers, dims);
      if (lane_of_warp() == 0) arguments[k] = at;
      if (!kInverse && k + 1 == s.steps) break;
      const T* from = states + (kInverse && k > 0 ? k - 1 : k) * s.dims;
      at = advance<F, T>(from, states + (kInverse ? k : k + 1) * s.dims, s.dims, line,
                         kInverse ? step.back : step.there, walk.next(k));
    }
    __syncwarp();  // the other lanes read what lane 0 has kept
    // and back
    const T *line = walk.line(s.steps - 1), *z = states + (s.steps - 1) * s.dims;
    double sum = 0;
    for (int64_t c = lane_of_warp(); c < s.dims; c += kWarp) {
      T g = 0, v[F::kVectors];
      if (s.grad_out != nullptr) {
        g = load(static_cast<const Stored*>(s.grad_out)[row * s.dims + c]);
      }
      grad[c] = g;
      read_vectors<F>(line, s.dims, c, v);
      sum += F::weigh(g, z[c], v);
    }
    T weighed = static_cast<T>(warp_sum(sum, kWarp));
    const T grad_log_det =
        s.grad_log_det == nullptr ? T(0) : static_cast<const T*>(s.grad_log_det)[row];
    for (int64_t k = s.steps - 1; k >= 0; --k) {
      using Back = typename F::template Back<T>;
      line = walk.line(k);
      z = states + k * s.dims;
      const typename F::template Step<T> step(arguments[k], line + numbers, dims);
      const Back back = kInverse ? Back::inverse(step, weighed, grad_log_det, line + numbers, dims)
                                 : Back(step, weighed, grad_log_det, line + numbers, dims);
      const int64_t n = walk.step(k);
      const auto put = [&](int64_t at, T value) {
        if (s.shared) {
          sums[n * plan.stride + at] += value;
        } else {
          plan.d_table[(row * s.steps + n) * plan.stride + at] = value;
        }
      };
      sum = 0;
      for (int64_t c = lane_of_warp(); c < s.dims; c += kWarp) {
        T v[F::kVectors], d[F::kVectors];
        read_vectors<F>(line, s.dims, c, v);
        const T g = F::template pull<kInverse>(grad[c], z[c], back.shift, back.slope, v, d);
        grad[c] = g;
#pragma unroll
        for (int i = 0; i < F::kVectors; ++i) put(i * s.dims + c, d[i]);
        if (k == 0) continue;
        read_vectors<F>(walk.line(k - 1), s.dims, c, v);
        sum += F::weigh(g, z[c - s.dims], v);
      }
      if (lane_of_warp() == 0) put(numbers, back.numbers[0]);
      if (lane_of_warp() == 1) put(numbers + 1, back.numbers[1]);
      weighed = static_cast<T>(warp_sum(sum, kWarp));
    }
    for (int64_t c = lane_of_warp(); s.d_z != nullptr && c < s.dims; c += kWarp) {
      store(static_cast<Stored*>(s.d_z)[row * s.dims + c], grad[c]);
    }
    __syncwarp();  // before lane 0 measures the next row
  }
}

template <class F, class T, class Stored, bool kInverse>
__global__ void __launch_bounds__(kFlowBlock, kFlowBlocks)
    flow_backward_kernel(const FlowPlan<F, T> plan) {
  for (int64_t warp = warp_of_grid(); warp < plan.warps; warp += warps_of_grid()) {
    walk_back<F, T, Stored, kInverse>(plan, warp);
  }
}

// The gradients of lines as they were given.
template <class F, class T, class Stored>
__global__ void __launch_bounds__(kFlowBlock, kFlowBlocks)
    finish_kernel(const FlowPlan<F, T> plan) {
  const FlowSweep& s = plan.s;
  const int64_t part = s.steps * plan.stride;
  for (int64_t n = warp_of_grid(); n < plan.lines; n += warps_of_grid()) {
    const GivenLine<F, T, Stored> given{s, n};
    double* sums = plan.sums + n * plan.stride;
    T* own = plan.d_table + n * plan.stride;
    double total = 0;
    const auto add_parts = [&](int64_t at) {
      if (!s.shared) return own[at];
      double sum = 0;
      for (int64_t p = 0; p < plan.warps; ++p) sum += sums[p * part + at];
      return static_cast<T>(sum);
    };
    for (int64_t c = lane_of_warp(); c < s.dims; c += kWarp) {
      T v[F::kVectors], d[F::kVectors];
      given.vectors(c, v);
#pragma unroll
      for (int i = 0; i < F::kVectors; ++i) {
        d[i] = add_parts(i * s.dims + c);
        if (s.shared) sums[i * s.dims + c] = d[i];  // the first part becomes the sum
      }
      total += F::line_gradient_term(d, v);
    }
    const T d_numbers[] = {add_parts(F::kVectors * s.dims), add_parts(F::kVectors * s.dims + 1)};
    const typename F::template Line<T> line = given.constrained();
    const typename F::template LineGradient<T> gradient(
        line, static_cast<T>(warp_sum(total, kWarp)), d_numbers);
    for (int64_t c = lane_of_warp(); c < s.dims; c += kWarp) {
      T v[F::kVectors], d[F::kVectors];
      given.vectors(c, v);
#pragma unroll
      for (int i = 0; i < F::kVectors; ++i) {
        d[i] = s.shared ? static_cast<T>(sums[i * s.dims + c]) : own[i * s.dims + c];
      }
      const auto vectors = gradient.vectors(d, v);
#pragma unroll
      for (int i = 0; i < F::kVectors; ++i) {
        if (s.d_vectors[i] == nullptr) continue;
        store(static_cast<Stored*>(s.d_vectors[i])[n * s.dims + c], vectors.v[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < F::kGiven; ++i) {
      if (lane_of_warp() != 0 || s.d_given[i] == nullptr) continue;
      store(static_cast<Stored*>(s.d_given[i])[n], gradient.given[i]);
    }
  }
}

template <class F, class T, class Stored>
const char* run_flow(const FlowSweep& s, bool backward, void* lent, cudaStream_t stream) {
  const FlowPlan<F, T> plan(s, backward, lent);
  const auto blocks = [](int64_t warps) {
    constexpr int64_t kWarps = kFlowBlock / kWarp;
    return std::min<int64_t>(kMaxBlocks, (warps + kWarps - 1) / kWarps);
  };
  const auto constrain = constrain_kernel<F, T, Stored>;
  FASTVAE_LAUNCH(constrain, blocks(plan.lines), kFlowBlock, stream, plan);
  if (!backward) {
    const auto forward = s.inverse ? flow_forward_kernel<F, T, Stored, true>
                                   : flow_forward_kernel<F, T, Stored, false>;
    FASTVAE_LAUNCH(forward, blocks(plan.warps), kFlowBlock, stream, plan);
    return launch_error();
  }
  const auto kernel = s.inverse ? flow_backward_kernel<F, T, Stored, true>
                                : flow_backward_kernel<F, T, Stored, false>;
  FASTVAE_LAUNCH(kernel, blocks(plan.warps), kFlowBlock, stream, plan);
  const auto finish = finish_kernel<F, T, Stored>;
  FASTVAE_LAUNCH(finish, blocks(plan.lines), kFlowBlock, stream, plan);
  return launch_error();
}

template <class F>
int64_t flow_scratch(const FlowSweep& s, bool backward) {
  if (s.dtype != DType::kFloat64) return FlowPlan<F, float>(s, backward, nullptr).bytes;
  return FlowPlan<F, double>(s, backward, nullptr).bytes;
}

// Runs forward or backward on the stream, a cudaStream_t, without waiting for it. Null, or what
// CUDA says.
template <class F>
const char* sweep_flow(const FlowSweep& s, bool backward, void* lent, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const char* error = "unknown dtype";
  with_types(s.dtype, [&]<class T, class Stored>(Types<T, Stored>) {
    error = run_flow<F, T, Stored>(s, backward, lent, cuda_stream);
  });
  return error;
}

#define FASTVAE_INSTANTIATE_FLOW(F)                         \
  template int64_t flow_scratch<F>(const FlowSweep&, bool); \
  template const char* sweep_flow<F>(const FlowSweep&, bool, void*, void*);
FASTVAE_INSTANTIATE_FLOW(Planar)
FASTVAE_INSTANTIATE_FLOW(Radial)
FASTVAE_INSTANTIATE_FLOW(Householder)

}  // namespace fastvae::cuda
