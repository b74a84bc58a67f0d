// Gaussians of full covariance on CUDA: what is below the diagonal (covariance.h).
//
// Forward: a block to a row, a warp to a line, whose lanes walk the columns. The noise is drawn
// once a block, a chunk of columns at a time, into shared memory. Backward: a thread to four
// columns of a strip of lines, whose noise, one Philox block, it draws once for each row that
// shares the triangle. Sums have a fixed order: results are reproducible to the bit.
#include "covariance.h"

#include "rows.cuh"

namespace fastvae::cuda {

inline constexpr int kTriangleBlock = 128;
inline constexpr int64_t kColumns = 1024;  // of noise in shared memory
inline constexpr int kStrip = 4;           // lines, whose sums are in registers

template <class T>
inline constexpr int kBlocks = sizeof(T) == 4 ? 4 : 3;  // at once on a multiprocessor

// The normals of elements element, ..., element + 3 of a key's stream, which lie in two blocks.
template <class T>
__device__ __forceinline__ void draw_any(const int64_t* key, int64_t element, T (&normals)[4]) {
  const int shift = static_cast<int>(element % 4);
  T low[4], high[4];
  draw(key, element, low);
  if (shift != 0) draw(key, element + 4, high);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    T x = low[j];
#pragma unroll
    for (int k = 1; k < 4; ++k) {
      if (k == shift) x = j + k < 4 ? low[(j + k) % 4] : high[(j + k) % 4];
    }
    normals[j] = x;
  }
}

template <class T, class Stored>
__global__ void __launch_bounds__(kTriangleBlock, kBlocks<T>)
    triangle_forward_kernel(const TriangleSweep s) {
  __shared__ T eps[kColumns];
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t row = blockIdx.x; row < s.rows; row += gridDim.x) {
    const Stored* triangle =
        static_cast<const Stored*>(s.scale_tril) + row % s.triangles * s.triangle_stride;
    T* z = static_cast<T*>(s.z) + row * s.dims;
    double kl = 0;
    for (int64_t from = 0; from < s.dims; from += kColumns) {
      const int64_t columns = s.dims - from < kColumns ? s.dims - from : kColumns;
      __syncthreads();  // nobody reads the last chunk any more
      for (int64_t j = 4 * static_cast<int64_t>(threadIdx.x); j < columns; j += 4 * blockDim.x) {
        T normals[4];
        draw_any(s.key, row * s.dims + from + j, normals);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (j + k < columns) eps[j + k] = normals[k];
        }
      }
      __syncthreads();
      for (int64_t i = from + 1 + warp; i < s.dims; i += warps) {
        const Stored* line = triangle + i * s.line_stride + from * s.column_stride;
        const int64_t end = i - from < columns ? i - from : columns;
        T part = 0, square = 0;
        for (int64_t j = lane; j < end; j += kWarp) {
          const T c = load(line[j * s.column_stride]);
          part = Triangle::sample(part, c, eps[j]);
          square = Triangle::kl(square, c);
        }
        const double sum = warp_sum(static_cast<double>(part), kWarp);
        if (lane == 0) z[i] = static_cast<T>(z[i] + sum);
        kl += square;
      }
    }
    kl = block_sum(kl);
    if (threadIdx.x == 0) {
      T& value = static_cast<T*>(s.kl)[row];
      value = static_cast<T>(value + kl);
    }
  }
}

template <class T, class Stored>
__global__ void __launch_bounds__(kTriangleBlock, kBlocks<T>)
    triangle_backward_kernel(const TriangleSweep s) {
  const int64_t strips = (s.dims + kStrip - 1) / kStrip;
  const int64_t tiles = (s.dims + 4 * kTriangleBlock - 1) / (4 * kTriangleBlock);
  for (int64_t unit = blockIdx.x; unit < s.triangles * strips * tiles; unit += gridDim.x) {
    const int64_t tile = unit % tiles, strip = unit / tiles % strips;
    const int64_t triangle = unit / tiles / strips, first = strip * kStrip;
    const int64_t j0 = 4 * (tile * kTriangleBlock + static_cast<int64_t>(threadIdx.x));
    if (j0 >= s.dims) continue;
    T sums[kStrip][4] = {};
    for (int64_t row = triangle; row < s.rows; row += s.triangles) {
      T eps[4] = {};
      if (s.grad_z != nullptr && j0 < first + kStrip) draw_any(s.key, row * s.dims + j0, eps);
      const T grad_kl = s.grad_kl == nullptr ? T(0) : static_cast<const T*>(s.grad_kl)[row];
#pragma unroll
      for (int l = 0; l < kStrip; ++l) {
        const int64_t i = first + l, at = row * s.dims + i;
        if (i >= s.dims || j0 > i) continue;
        const T grad_z = s.grad_z == nullptr ? T(0) : static_cast<const T*>(s.grad_z)[at];
        const Stored* line = static_cast<const Stored*>(s.scale_tril) +
                             triangle * s.triangle_stride + i * s.line_stride;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int64_t j = j0 + k;
          if (j < i) {
            const T c = s.grad_kl == nullptr ? T(0) : T(load(line[j * s.column_stride]));
            sums[l][k] += Triangle::gradient(c, eps[k], grad_z, grad_kl);
          } else if (j == i) {
            sums[l][k] += static_cast<const T*>(s.d_diagonal)[at];
          }
        }
      }
    }
    Stored* to = static_cast<Stored*>(s.d_scale_tril) + (triangle * s.dims + first) * s.dims;
#pragma unroll
    for (int l = 0; l < kStrip; ++l) {
      if (first + l >= s.dims) continue;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (j0 + k < s.dims) store(to[l * s.dims + j0 + k], sums[l][k]);
      }
    }
  }
}

template <class T, class Stored>
const char* run_triangles(const TriangleSweep& s, bool backward, cudaStream_t stream) {
  if (s.rows == 0 || s.dims == 0) return nullptr;
  if (backward) {
    const int64_t units = s.triangles * ((s.dims + kStrip - 1) / kStrip) *
                          ((s.dims + 4 * kTriangleBlock - 1) / (4 * kTriangleBlock));
    const auto kernel = triangle_backward_kernel<T, Stored>;
    FASTVAE_LAUNCH(kernel, std::min<int64_t>(kMaxBlocks, units), kTriangleBlock, stream, s);
  } else {
    const auto kernel = triangle_forward_kernel<T, Stored>;
    FASTVAE_LAUNCH(kernel, std::min<int64_t>(kMaxBlocks, s.rows), kTriangleBlock, stream, s);
  }
  return launch_error();
}

// Runs forward or backward on the stream, a cudaStream_t, without waiting for it. Null, or what
// CUDA says.
const char* sweep_triangles(const TriangleSweep& s, bool backward, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const char* error = "unknown dtype";
  with_types(s.dtype, [&]<class T, class Stored>(Types<T, Stored>) {
    error = run_triangles<T, Stored>(s, backward, cuda_stream);
  });
  return error;
}

}  // namespace fastvae::cuda
