// Splines on CUDA (spline.h): a thread to an element, a group of threads to a row.
//
// A thread reads its element's numbers three times, which the caches hold: for the maximum and the
// sum of each softmax, and to walk the knots. Exponentials are cheaper here than memory, so nothing
// is kept. Backward does the same, and writes the gradient of every number.
//
// A row's log-determinant is summed over its group by shuffles, in one order: reproducible to the
// bit.
#include "spline.h"

#include "rows.cuh"

namespace fastvae::cuda {

inline constexpr int kSplineBlock = 128, kSplineBlocks = 4;  // at once on a multiprocessor

// The numbers of one element.
template <class T, class Stored>
struct Numbers {
  const Stored* data;
  int64_t stride;

  __device__ __forceinline__ Numbers(const SplineOperand& x, int64_t row, int64_t column)
      : data(static_cast<const Stored*>(x.data) + row * x.row + column * x.column), stride(x.bin) {}
  __device__ __forceinline__ T operator[](int64_t k) const { return load(data[k * stride]); }
};

// A softmax over the bins, stretched: number k is worth base + term(k).
template <class T, class Stored>
struct Shares {
  Numbers<T, Stored> numbers;
  T most, share;

  __device__ __forceinline__ Shares(const Numbers<T, Stored>& given, int64_t bins, T gain)
      : numbers(given), most(given[0]) {
    T sum = T(0);
    for (int64_t k = 1; k < bins; ++k) most = math::max(most, numbers[k]);
    for (int64_t k = 0; k < bins; ++k) sum += math::exp_weight(numbers[k] - most);
    share = gain / sum;
  }
  __device__ __forceinline__ T term(int64_t k) const {
    return share * math::exp_weight(numbers[k] - most);
  }
};

// An element on its way: where it is, and the piece that it lies on.
template <class T, class Stored>
struct Traveller {
  T v, turns;
  bool outside;
  Shares<T, Stored> widths, heights;
  Piece<T> piece;
  T number0, number1;  // what the slopes are made of
  int64_t index;

  __device__ __forceinline__ Traveller(const SplineSweep& s, const SplineScale<T>& scale,
                                       int64_t row, int64_t column)
      : v(Numbers<T, Stored>(s.x, row, column)[0]),
        turns(scale.turns(v)),
        outside(scale.outside(v)),
        widths({s.widths, row, column}, s.bins, scale.gain_width),
        heights({s.heights, row, column}, s.bins, scale.gain_height),
        number0(0),
        number1(0),
        index(0) {
    T x = -scale.bound, y = -scale.bound, x_rest = T(0), y_rest = T(0);
    for (int64_t k = 0; k < s.bins; ++k) {
      const T width = scale.base_width + widths.term(k);
      const T height = scale.base_height + heights.term(k);
      if (k == 0 || !(v - turns < (s.inverse ? y : x))) {
        index = k;
        piece.left = x, piece.width = width, piece.bottom = y, piece.height = height;
        piece.left_rest = x_rest, piece.bottom_rest = y_rest;
      }
      const T next_x = x + width, next_y = y + height;
      x_rest += math::lost(x, width, next_x);
      y_rest += math::lost(y, height, next_y);
      x = next_x;
      y = next_y;
    }
    piece.left_rest = knot_rest(piece.left, piece.left_rest, x, x_rest, scale.bound,
                                scale.base_width, scale.gain_width, static_cast<T>(index));
    piece.bottom_rest = knot_rest(piece.bottom, piece.bottom_rest, y, y_rest, scale.bound,
                                  scale.base_height, scale.gain_height, static_cast<T>(index));
    const Numbers<T, Stored> slopes(s.slopes, row, column);
    const bool circular = s.circular;
    if (circular || index > 0) number0 = slopes[circular ? index : index - 1];
    if (circular || index + 1 < s.bins) number1 = slopes[circular ? (index + 1) % s.bins : index];
    piece.slope0 = circular || index > 0 ? spline_slope(number0, scale.min_slope) : T(1);
    piece.slope1 = circular || index + 1 < s.bins ? spline_slope(number1, scale.min_slope) : T(1);
  }
};

// visit(row, column, whether there is such an element) for those of this thread; whole warps call
// it together, and finish(row) after the columns of a row.
template <class Visit, class Finish>
__device__ __forceinline__ void for_elements(const SplineSweep& s, int threads, const Visit& visit,
                                             const Finish& finish) {
  const int64_t thread = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t groups = gridDim.x * static_cast<int64_t>(blockDim.x) / threads;
  const int64_t of_warp = thread / kWarp * (kWarp / threads);  // its first group
  for (int64_t first = of_warp; first < s.rows; first += groups) {
    const int64_t row = first + thread % kWarp / threads;
    for (int64_t c = thread % threads; row < s.rows && c < s.columns; c += threads) visit(row, c);
    finish(row);
  }
}

template <class T, class Stored>
__global__ void __launch_bounds__(kSplineBlock, kSplineBlocks)
    spline_forward_kernel(const SplineSweep s, int threads) {
  const SplineScale<T> scale(s);
  double sum = 0;
  for_elements(
      s, threads,
      [&](int64_t row, int64_t column) {
        const Traveller<T, Stored> at(s, scale, row, column);
        const Values<T, 2> to = follow(at.piece, at.v, at.turns, at.outside, s.inverse);
        store(static_cast<Stored*>(s.y)[row * s.columns + column], to.v[0]);
        sum += to.v[1];
      },
      [&](int64_t row) {
        const double total = warp_sum(sum, threads);
        if (row < s.rows && static_cast<int>(threadIdx.x) % threads == 0) {
          static_cast<T*>(s.log_det)[row] = static_cast<T>(total);
        }
        sum = 0;
      });
}

// The gradients of a softmax's numbers, of those of the knot where the piece begins and its size.
template <class T, class Stored>
__device__ __forceinline__ void spread(const Shares<T, Stored>& shares, bool outside, int64_t index,
                                       int64_t bins, T d_start, T d_size, T start, T size, T base,
                                       T gain, Stored* to) {
  const Values<T, 3> d = of_terms(d_start, d_size, start, size, static_cast<T>(index), base, gain);
  for (int64_t k = 0; k < bins; ++k) {
    const T own = k < index ? d.v[0] : (k == index ? d.v[1] : d.v[2]);
    store(to[k], outside ? T(0) : shares.term(k) * own);
  }
}

template <class T, class Stored>
__global__ void __launch_bounds__(kSplineBlock, kSplineBlocks)
    spline_backward_kernel(const SplineSweep s, int threads) {
  const SplineScale<T> scale(s);
  for_elements(
      s, threads,
      [&](int64_t row, int64_t column) {
        const int64_t element = row * s.columns + column;
        const Traveller<T, Stored> at(s, scale, row, column);
        const T grad = s.grad == nullptr ? T(0) : load(static_cast<const Stored*>(s.grad)[element]);
        const T grad_log =
            s.grad_log_det == nullptr ? T(0) : static_cast<const T*>(s.grad_log_det)[row];
        const T v = at.v - at.turns;
        const PieceGradient<T> d =
            s.inverse
                ? PiecePoint<T>::from(at.piece, v).template gradient<true>(at.piece, grad, grad_log)
                : PiecePoint<T>::at(at.piece, v).template gradient<false>(at.piece, grad, grad_log);
        if (s.d_x != nullptr) {
          store(static_cast<Stored*>(s.d_x)[element], at.outside ? grad : d.in);
        }
        if (s.d_widths != nullptr) {
          spread(at.widths, at.outside, at.index, s.bins, d.left, d.width,
                 at.piece.left + scale.bound, at.piece.width, scale.base_width, scale.gain_width,
                 static_cast<Stored*>(s.d_widths) + element * s.bins);
        }
        if (s.d_heights != nullptr) {
          spread(at.heights, at.outside, at.index, s.bins, d.bottom, d.height,
                 at.piece.bottom + scale.bound, at.piece.height, scale.base_height,
                 scale.gain_height, static_cast<Stored*>(s.d_heights) + element * s.bins);
        }
        if (s.d_slopes == nullptr) return;
        Stored* to = static_cast<Stored*>(s.d_slopes) + element * s.slope_count();
        const int64_t after = s.circular ? (at.index + 1) % s.bins : at.index;
        const int64_t before = s.circular ? at.index : at.index - 1;  // -1: none
        for (int64_t k = 0; k < s.slope_count(); ++k) {
          T sum = T(0);
          if (k == before) sum += d.slope0 * d_spline_slope(at.number0, scale.min_slope);
          if (k == after) sum += d.slope1 * d_spline_slope(at.number1, scale.min_slope);
          store(to[k], at.outside ? T(0) : sum);
        }
      },
      [](int64_t) {});
}

template <class T, class Stored>
const char* run_spline(const SplineSweep& s, cudaStream_t stream) {
  int threads = 1;  // to a row
  while (threads < kWarp && threads < s.columns) threads *= 2;
  const int64_t rows = kSplineBlock / threads;  // of a block
  const int64_t blocks = std::min<int64_t>(kMaxBlocks, (s.rows + rows - 1) / rows);
  const auto kernel =
      s.y != nullptr ? spline_forward_kernel<T, Stored> : spline_backward_kernel<T, Stored>;
  FASTVAE_LAUNCH(kernel, blocks, kSplineBlock, stream, s, threads);
  return launch_error();
}

// Runs forward, or backward if there is no y, on the stream, a cudaStream_t, without waiting for
// it. Null, or what CUDA says.
const char* sweep_spline(const SplineSweep& s, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const char* error = "unknown dtype";
  with_types(s.dtype, [&]<class T, class Stored>(Types<T, Stored>) {
    error = run_spline<T, Stored>(s, cuda_stream);
  });
  return error;
}

}  // namespace fastvae::cuda
