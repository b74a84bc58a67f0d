// Importance-weighted bounds on CUDA. The row engine sums terms that know nothing of each other; a
// log-mean-exp wants the largest first, and its rows are short and few. So it has a kernel of its
// own: a thread to a row. The samples' dimension leads, so a warp reads neighbours, and what the
// second and third pass read again is in the first-level cache.
#include "bound.h"

#include "rows.cuh"

namespace fastvae::cuda {

template <class F, class T, class Stored>
__global__ void __launch_bounds__(kBlock, 1) reduce_kernel(const Sweep s) {
  using R = typename F::Reduction;
  const int64_t stride = s.inputs[0].column_stride;
  for (int64_t row = blockIdx.x * int64_t{kBlock} + threadIdx.x; row < s.rows();
       row += gridDim.x * int64_t{kBlock}) {
    const int64_t outer = row / s.inner, inner = row - outer * s.inner;
    const auto at = [&](const Operand& x) {
      return outer * x.outer_stride + inner * x.inner_stride;
    };
    const Stored* from = static_cast<const Stored*>(s.inputs[0].data) + at(s.inputs[0]);

    T max = R::template lowest<T>();
#pragma unroll 4
    for (int64_t c = 0; c < s.columns; ++c)
      max = R::template larger<T>(max, load(from[c * stride]));
    const T shift = R::template shift<T>(max);
    double sum = 0;
    for (int64_t first = 0; first < s.columns; first += R::kChunk) {
      const int64_t last = s.columns - first < R::kChunk ? s.columns : first + R::kChunk;
      T part = 0;
#pragma unroll 4
      for (int64_t c = first; c < last; ++c) {
        part += R::template term<T>(load(from[c * stride]), shift);
      }
      sum += part;
    }
    if constexpr (F::shape.outputs == 0) {
      static_cast<T*>(s.row_sum)[row] = R::template value<T>(max, sum, s.columns);
    } else {
      const Operand gradient = gradient_of(s);
      Stored* to = static_cast<Stored*>(const_cast<void*>(gradient.data)) + at(gradient);
      const T slope = R::template slope<T>(sum, static_cast<const T*>(s.row_inputs[0])[row]);
#pragma unroll 4
      for (int64_t c = 0; c < s.columns; ++c) {
        store(to[c * gradient.column_stride],
              slope * R::template term<T>(load(from[c * stride]), shift));
      }
    }
  }
}

template <class F, class T, class Stored>
const char* reduce_rows(const Sweep& sweep, cudaStream_t stream) {
  if (sweep.rows() == 0) return nullptr;
  if (F::shape.outputs > 0 && gradient_of(sweep).data == nullptr) return nullptr;  // not wanted
  const int64_t blocks = std::min<int64_t>(kMaxBlocks, (sweep.rows() + kBlock - 1) / kBlock);
  const auto kernel = reduce_kernel<F, T, Stored>;
  FASTVAE_LAUNCH(kernel, blocks, kBlock, stream, sweep);
  return launch_error();
}

template <class F>
const char* reduce_rows(const Sweep& sweep, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const char* error = "unknown dtype";
  with_types(sweep.dtype, [&]<class T, class Stored>(Types<T, Stored>) {
    error = reduce_rows<F, T, Stored>(sweep, cuda_stream);
  });
  return error;
}

template <>
const char* sweep_rows<LogMeanExp::Forward>(const Sweep& sweep, void* stream) {
  return reduce_rows<LogMeanExp::Forward>(sweep, stream);
}
template <>
const char* sweep_rows<LogMeanExp::Backward>(const Sweep& sweep, void* stream) {
  return reduce_rows<LogMeanExp::Backward>(sweep, stream);
}
FASTVAE_INSTANTIATE(LogMeanExp)

}  // namespace fastvae::cuda
