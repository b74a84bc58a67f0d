// Sylvester flows on CUDA (SylvesterSweep in residual_flow.h): a warp to a row, which lies in lent
// memory with the states that backward needs, [warps][K][D]. Its lanes share the columns that a
// product makes, and read all that the product is of. What the inverse solves element after element
// all lanes solve alike, and share what each takes off the others.
//
// The gradients of shared lines are summed over the rows of each warp, of which there are at most
// kSumWarps, in that order, then over the warps: results are reproducible to the bit.
#include "residual_flow.h"

#include "rows.cuh"

namespace fastvae::cuda {

namespace {

inline constexpr int kProductBlock = 128, kProductBlocks = 4;  // at once on a multiprocessor
inline constexpr int64_t kProductSumWarps = 128, kProductRowWarps = 8192;

// What is lent, in order.
template <class T>
struct ProductPlan {
  SylvesterSweep s;
  int64_t warps;
  double* sums;  // of shared lines, of each warp
  T *states, *bends, *grads, *slopes;
  int64_t bytes;

  ProductPlan(const SylvesterSweep& sweep, bool backward, void* lent)
      : s(sweep),
        warps(std::min(s.rows, backward && s.shared ? kProductSumWarps : kProductRowWarps)) {
    bytes = 0;
    const auto lend = [&](auto*& to, int64_t n) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(
          reinterpret_cast<uintptr_t>(lent) + static_cast<uintptr_t>(bytes));
      bytes += n * static_cast<int64_t>(sizeof *to);
    };
    lend(sums, backward && s.shared ? warps * s.steps * s.gradient_size() : 0);
    lend(states, warps * s.dims * (backward ? s.steps : 1));
    lend(bends, warps * s.rank * (backward ? s.steps : 1));
    lend(grads, backward ? warps * s.dims : 0);
    lend(slopes, backward ? warps * s.rank : 0);
  }
};

// Line n of a row.
template <class T>
struct ProductLine : SylvesterLine<const T> {
  __device__ __forceinline__ ProductLine(const SylvesterSweep& s, int64_t row, int64_t n)
      : SylvesterLine<const T>(s, static_cast<const T*>(s.lines) +
                                      ((s.shared ? 0 : row * s.steps) + n) * s.line_size()) {}
  __device__ __forceinline__ Planar::Step<T> step(T argument, int64_t m) const {
    return {argument, this->gain[m], this->w_v[m]};
  }
};
// The k-th of a walk.
template <bool kInverse>
__device__ __forceinline__ int64_t line_of_walk(const SylvesterSweep& s, int64_t k) {
  return kInverse ? s.steps - 1 - k : k;
}

// Column j of a row times a matrix whose rows are n apart.
template <class T>
__device__ __forceinline__ T column(const T* row, int64_t count, const T* matrix, int64_t n,
                                    int64_t j) {
  T sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += row[k] * matrix[k * n + j];
  return sum;
}

// Of A z makes the arguments of tanh before the step and, perhaps in their place, what takes the
// row back. Minus the log-determinant.
template <class T>
__device__ double solve_elements(const SylvesterSweep& s, const ProductLine<T>& line, T* x,
                                 T* back) {
  double log_det = 0;
  for (int64_t m = s.rank - 1; m >= 0; --m) {
    const T numbers[] = {line.b[m], line.gain[m]};
    const T argument = Planar::solve(x[m], numbers);
    const auto step = line.step(argument, m);
    log_det += step.log_det;
    __syncwarp();  // all have read x[m]
    for (int64_t i = lane_of_warp(); i < m; i += kWarp) {
      x[i] += line.t_t[m * s.rank_width + i] * step.back;
    }
    if (lane_of_warp() == 0) {
      x[m] = argument;
      back[m] = step.back;
    }
    __syncwarp();
  }
  return log_det;
}
// Of the arguments makes what took the row back, and of what is weighed the gradient of A z.
template <class T, class Put>
__device__ void unsolve_elements(const SylvesterSweep& s, const ProductLine<T>& line, T* x,
                                 T* slope, T grad_log_det, const Put& put) {
  const int64_t of_b = 2 * s.dims * s.rank_width;
  for (int64_t m = 0; m < s.rank; ++m) {
    const auto back =
        Planar::Back<T>::inverse(line.step(x[m], m), slope[m], grad_log_det, nullptr, T(0));
    __syncwarp();  // all have read x[m] and slope[m]
    for (int64_t i = m + 1 + lane_of_warp(); i < s.rank; i += kWarp) {
      slope[i] += line.t[m * s.rank_width + i] * back.slope;
    }
    if (lane_of_warp() == 0) {
      x[m] = back.shift;
      slope[m] = back.slope;
      put(of_b + m, back.slope);
      put(of_b + s.rank_width + m, back.numbers[1] + back.slope * back.shift);
    }
    __syncwarp();
  }
}

template <class T, bool kInverse>
__global__ void __launch_bounds__(kProductBlock, kProductBlocks)
    sylvester_forward_kernel(const ProductPlan<T> plan) {
  const SylvesterSweep& s = plan.s;
  for (int64_t row = warp_of_grid(); row < s.rows; row += warps_of_grid()) {
    T *z = plan.states + row % plan.warps * s.dims, *h = plan.bends + row % plan.warps * s.rank;
    __syncwarp();  // the other lanes may still read the row before
    for (int64_t c = lane_of_warp(); c < s.dims; c += kWarp) {
      z[c] = static_cast<const T*>(s.z)[row * s.dims + c];
    }
    double log_det = 0;
    for (int64_t k = 0; k < s.steps; ++k) {
      const ProductLine<T> line(s, row, line_of_walk<kInverse>(s, k));
      __syncwarp();
      for (int64_t m = lane_of_warp(); m < s.rank; m += kWarp) {
        h[m] = column(z, s.dims, line.in, s.rank_width, m);
        if (!kInverse) {
          const auto step = line.step(h[m] + line.b[m], m);
          h[m] = step.there;
          log_det += step.log_det;
        }
      }
      __syncwarp();
      if (kInverse) log_det -= solve_elements(s, line, h, h);
      for (int64_t c = lane_of_warp(); c < s.dims; c += kWarp) {
        z[c] += column(h, s.rank, line.out_t, s.width, c);
      }
    }
    for (int64_t c = lane_of_warp(); c < s.dims; c += kWarp) {
      static_cast<T*>(s.out)[row * s.dims + c] = z[c];
    }
    if (!kInverse) log_det = warp_sum(log_det, kWarp);
    if (lane_of_warp() == 0) static_cast<T*>(s.log_det)[row] = static_cast<T>(log_det);
  }
}

// Rows warp, warp + plan.warps, ..., one after the other.
template <class T, bool kInverse>
__device__ void walk_products_back(const ProductPlan<T>& plan, int64_t warp, int lane) {
  const SylvesterSweep& s = plan.s;
  T *states = plan.states + warp * s.steps * s.dims, *bends = plan.bends + warp * s.steps * s.rank;
  T *grad = plan.grads + warp * s.dims, *slope = plan.slopes + warp * s.rank;
  const int64_t tall = s.dims * s.rank_width, size = s.gradient_size();
  double* sums = plan.sums + warp * s.steps * size;
  for (int64_t i = lane; s.shared && i < s.steps * size; i += kWarp) sums[i] = 0;
  for (int64_t row = warp; row < s.rows; row += plan.warps) {
    __syncwarp();  // the other lanes may still read the row before
    for (int64_t c = lane; c < s.dims; c += kWarp) {
      const int64_t i = row * s.dims + c;
      states[c] = static_cast<const T*>(s.z)[i];
      grad[c] = s.grad_out == nullptr ? T(0) : static_cast<const T*>(s.grad_out)[i];
    }
    for (int64_t k = 0; k < s.steps; ++k) {  // the steps again, from state to state
      const ProductLine<T> line(s, row, line_of_walk<kInverse>(s, k));
      const T* z = states + k * s.dims;
      __syncwarp();
      for (int64_t m = lane; m < s.rank; m += kWarp) {
        const T x = column(z, s.dims, line.in, s.rank_width, m);
        bends[k * s.rank + m] = x;
        if (!kInverse) slope[m] = line.step(x + line.b[m], m).there;
      }
      __syncwarp();
      if (kInverse) solve_elements(s, line, bends + k * s.rank, slope);
      for (int64_t c = lane; k + 1 < s.steps && c < s.dims; c += kWarp) {
        states[(k + 1) * s.dims + c] = z[c] + column(slope, s.rank, line.out_t, s.width, c);
      }
    }
    const T grad_log_det =
        s.grad_log_det == nullptr ? T(0) : static_cast<const T*>(s.grad_log_det)[row];
    for (int64_t k = s.steps - 1; k >= 0; --k) {
      const int64_t n = line_of_walk<kInverse>(s, k);
      const ProductLine<T> line(s, row, n);
      const T* z = states + k * s.dims;
      T* h = bends + k * s.rank;
      const auto put = [&](int64_t at, T value) {
        if (s.shared) {
          sums[n * size + at] += value;
        } else {
          static_cast<T*>(s.d_lines)[(row * s.steps + n) * size + at] = value;
        }
      };
      __syncwarp();
      for (int64_t m = lane; m < s.rank; m += kWarp) {
        slope[m] = column(grad, s.dims, line.out, s.rank_width, m);
        if (!kInverse) {
          const auto step = line.step(h[m] + line.b[m], m);
          const Planar::Back<T> back(step, slope[m], grad_log_det, nullptr, T(0));
          h[m] = step.there;
          slope[m] = back.slope;
          put(2 * tall + m, back.numbers[0]);
          put(2 * tall + s.rank_width + m, back.numbers[1]);
        }
      }
      __syncwarp();
      if (kInverse) unsolve_elements(s, line, h, slope, grad_log_det, put);
      for (int64_t i = lane; kInverse && i < s.rank * s.rank_width; i += kWarp) {
        const int64_t to = i / s.rank_width, m = i % s.rank_width;
        if (m < s.rank) put(2 * (tall + s.rank_width) + i, slope[to] * h[m]);
      }
      for (int64_t i = lane; i < tall; i += kWarp) {
        const int64_t c = i / s.rank_width, m = i % s.rank_width;
        if (m >= s.rank) continue;
        put(i, z[c] * slope[m]);
        put(tall + i, grad[c] * h[m]);
      }
      __syncwarp();
      for (int64_t c = lane; c < s.dims; c += kWarp) {
        grad[c] += column(slope, s.rank, line.in_t, s.width, c);
      }
    }
    for (int64_t c = lane; s.d_z != nullptr && c < s.dims; c += kWarp) {
      static_cast<T*>(s.d_z)[row * s.dims + c] = grad[c];
    }
  }
}

// The inverse in double, solved and followed back, does not fit into as many registers.
template <class T, bool kInverse>
__global__ void __launch_bounds__(kProductBlock, kInverse && sizeof(T) > 4 ? 2 : kProductBlocks)
    sylvester_backward_kernel(const ProductPlan<T> plan) {
  for (int64_t warp = warp_of_grid(); warp < plan.warps; warp += warps_of_grid()) {
    walk_products_back<T, kInverse>(plan, warp, lane_of_warp());
  }
}

// The sums of the warps, of shared lines.
template <class T>
__global__ void __launch_bounds__(kProductBlock, kProductBlocks)
    sylvester_sum_kernel(const ProductPlan<T> plan) {
  const int64_t size = plan.s.steps * plan.s.gradient_size();
  const int64_t threads = gridDim.x * static_cast<int64_t>(blockDim.x);
  int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  for (; i < size; i += threads) {
    double sum = 0;
    for (int64_t warp = 0; warp < plan.warps; ++warp) sum += plan.sums[warp * size + i];
    static_cast<T*>(plan.s.d_lines)[i] = static_cast<T>(sum);
  }
}

template <class T>
const char* run_sylvester(const SylvesterSweep& s, bool backward, void* lent, cudaStream_t stream) {
  const ProductPlan<T> plan(s, backward, lent);
  const auto blocks = [](int64_t threads) {
    return std::min<int64_t>(kMaxBlocks, (threads + kProductBlock - 1) / kProductBlock);
  };
  if (!backward) {
    const auto forward =
        s.inverse ? sylvester_forward_kernel<T, true> : sylvester_forward_kernel<T, false>;
    FASTVAE_LAUNCH(forward, blocks(plan.warps * kWarp), kProductBlock, stream, plan);
    return launch_error();
  }
  const auto kernel =
      s.inverse ? sylvester_backward_kernel<T, true> : sylvester_backward_kernel<T, false>;
  FASTVAE_LAUNCH(kernel, blocks(plan.warps * kWarp), kProductBlock, stream, plan);
  if (s.shared) {
    const auto sum = sylvester_sum_kernel<T>;
    FASTVAE_LAUNCH(sum, blocks(s.steps * s.gradient_size()), kProductBlock, stream, plan);
  }
  return launch_error();
}

}  // namespace

int64_t sylvester_scratch(const SylvesterSweep& s, bool backward) {
  return s.in_double ? ProductPlan<double>(s, backward, nullptr).bytes
                     : ProductPlan<float>(s, backward, nullptr).bytes;
}

// Runs forward or backward on the stream, a cudaStream_t, without waiting for it. Null, or what
// CUDA says.
const char* sweep_sylvester(const SylvesterSweep& s, bool backward, void* lent, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return s.in_double ? run_sylvester<double>(s, backward, lent, cuda_stream)
                     : run_sylvester<float>(s, backward, lent, cuda_stream);
}

FASTVAE_INSTANTIATE(SylvesterDiagonal)

}  // namespace fastvae::cuda
