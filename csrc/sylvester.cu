// Sylvester flows on CUDA (SylvesterSweep in residual_flow.h): a warp to a row, which lies in lent
// memory with the states that backward needs, [warps][K][D]. Its lanes share the columns that a
// product makes, and read all that the product is of.
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
    lend(sums, backward && s.shared ? warps * s.steps * s.d_stride : 0);
    lend(states, warps * s.dims * (backward ? s.steps : 1));
    lend(bends, warps * s.rank * (backward ? s.steps : 1));
    lend(grads, backward ? warps * s.dims : 0);
    lend(slopes, backward ? warps * s.rank : 0);
  }
};

// A line, and where its parts lie.
template <class T>
struct ProductLine {
  const T *in, *in_t, *out, *out_t, *b, *gain, *w_v;

  __device__ __forceinline__ ProductLine(const SylvesterSweep& s, int64_t row, int64_t k) {
    const int64_t tall = s.dims * s.rank_width, wide = s.rank * s.width;
    in = static_cast<const T*>(s.lines) + ((s.shared ? 0 : row * s.steps) + k) * s.stride;
    in_t = in + tall;
    out = in_t + wide;
    out_t = out + tall;
    b = out_t + wide;
    gain = b + s.rank_width;
    w_v = gain + s.rank_width;
  }
  __device__ __forceinline__ Planar::Step<T> step(T x, int64_t m) const {
    return {x + b[m], gain[m], w_v[m]};
  }
};

// Column j of a row times a matrix whose rows are n apart.
template <class T>
__device__ __forceinline__ T column(const T* row, int64_t count, const T* matrix, int64_t n,
                                    int64_t j) {
  T sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += row[k] * matrix[k * n + j];
  return sum;
}

template <class T>
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
      const ProductLine<T> line(s, row, k);
      __syncwarp();
      for (int64_t m = lane_of_warp(); m < s.rank; m += kWarp) {
        const auto step = line.step(column(z, s.dims, line.in, s.rank_width, m), m);
        h[m] = step.there;
        log_det += step.log_det;
      }
      __syncwarp();
      for (int64_t c = lane_of_warp(); c < s.dims; c += kWarp) {
        z[c] += column(h, s.rank, line.out_t, s.width, c);
      }
    }
    for (int64_t c = lane_of_warp(); c < s.dims; c += kWarp) {
      static_cast<T*>(s.out)[row * s.dims + c] = z[c];
    }
    log_det = warp_sum(log_det, kWarp);
    if (lane_of_warp() == 0) static_cast<T*>(s.log_det)[row] = static_cast<T>(log_det);
  }
}

// Rows warp, warp + plan.warps, ..., one after the other.
template <class T>
__device__ void walk_products_back(const ProductPlan<T>& plan, int64_t warp, int lane) {
  const SylvesterSweep& s = plan.s;
  T *states = plan.states + warp * s.steps * s.dims, *bends = plan.bends + warp * s.steps * s.rank;
  T *grad = plan.grads + warp * s.dims, *slope = plan.slopes + warp * s.rank;
  double* sums = plan.sums + warp * s.steps * s.d_stride;
  for (int64_t i = lane; s.shared && i < s.steps * s.d_stride; i += kWarp) sums[i] = 0;
  const int64_t tall = s.dims * s.rank_width;
  for (int64_t row = warp; row < s.rows; row += plan.warps) {
    __syncwarp();  // the other lanes may still read the row before
    for (int64_t c = lane; c < s.dims; c += kWarp) {
      const int64_t i = row * s.dims + c;
      states[c] = static_cast<const T*>(s.z)[i];
      grad[c] = s.grad_out == nullptr ? T(0) : static_cast<const T*>(s.grad_out)[i];
    }
    for (int64_t k = 0; k < s.steps; ++k) {  // the steps again, from state to state
      const ProductLine<T> line(s, row, k);
      const T* z = states + k * s.dims;
      __syncwarp();
      for (int64_t m = lane; m < s.rank; m += kWarp) {
        const T x = column(z, s.dims, line.in, s.rank_width, m);
        bends[k * s.rank + m] = x;
        slope[m] = line.step(x, m).there;
      }
      __syncwarp();
      for (int64_t c = lane; k + 1 < s.steps && c < s.dims; c += kWarp) {
        states[(k + 1) * s.dims + c] = z[c] + column(slope, s.rank, line.out_t, s.width, c);
      }
    }
    const T grad_log_det =
        s.grad_log_det == nullptr ? T(0) : static_cast<const T*>(s.grad_log_det)[row];
    for (int64_t k = s.steps - 1; k >= 0; --k) {
      const ProductLine<T> line(s, row, k);
      const T* z = states + k * s.dims;
      T* h = bends + k * s.rank;
      const auto put = [&](int64_t at, T value) {
        if (s.shared) {
          sums[k * s.d_stride + at] += value;
        } else {
          static_cast<T*>(s.d_lines)[(row * s.steps + k) * s.d_stride + at] = value;
        }
      };
      __syncwarp();
      for (int64_t m = lane; m < s.rank; m += kWarp) {
        const auto step = line.step(h[m], m);
        const Planar::Back<T> back(step, column(grad, s.dims, line.out, s.rank_width, m),
                                   grad_log_det, nullptr, T(0));
        h[m] = step.there;
        slope[m] = back.slope;
        put(2 * tall + m, back.numbers[0]);
        put(2 * tall + s.rank_width + m, back.numbers[1]);
      }
      __syncwarp();
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

template <class T>
__global__ void __launch_bounds__(kProductBlock, kProductBlocks)
    sylvester_backward_kernel(const ProductPlan<T> plan) {
  for (int64_t warp = warp_of_grid(); warp < plan.warps; warp += warps_of_grid()) {
    walk_products_back(plan, warp, lane_of_warp());
  }
}

// The sums of the warps, of shared lines.
template <class T>
__global__ void __launch_bounds__(kProductBlock, kProductBlocks)
    sylvester_sum_kernel(const ProductPlan<T> plan) {
  const int64_t size = plan.s.steps * plan.s.d_stride;
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
    const auto forward = sylvester_forward_kernel<T>;
    FASTVAE_LAUNCH(forward, blocks(plan.warps * kWarp), kProductBlock, stream, plan);
    return launch_error();
  }
  const auto kernel = sylvester_backward_kernel<T>;
  FASTVAE_LAUNCH(kernel, blocks(plan.warps * kWarp), kProductBlock, stream, plan);
  if (s.shared) {
    const auto sum = sylvester_sum_kernel<T>;
    FASTVAE_LAUNCH(sum, blocks(s.steps * s.d_stride), kProductBlock, stream, plan);
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
