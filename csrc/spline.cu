// Splines on CUDA (spline.h): a thread to an element, a group of threads to a row.
//
// A thread reads its element's numbers three times: for the maximum and the sum of each softmax,
// and to walk the knots. Exponentials are cheaper here than memory, so no more than the numbers is
// kept: where those of an element lie side by side and are not many, a warp fetches all of its
// elements' together into shared memory, and brings their gradients back the same way, so that it
// meets each sector of memory once. Elsewhere a thread reads and writes its own, from the caches.
//
// A row's log-determinant is summed over its group by shuffles, in one order: reproducible to the
// bit.
#include "spline.h"

#include "rows.cuh"

namespace fastvae::cuda {

template <class T>
inline constexpr int kSplineBlocks = sizeof(T) == 8 ? 3 : 4;  // at once on a multiprocessor
inline constexpr int kMostStaged = 16;      // numbers of an element, in shared memory
inline constexpr int kTileRow = kWarp + 1;  // so that k's and elements alike lie in all banks
inline constexpr int kTile = kMostStaged * kTileRow;

// Some numbers of one element, to read or to write.
template <class T, class Stored>
struct Numbers {
  Stored* data;
  int64_t stride;

  __device__ __forceinline__ T operator[](int64_t k) const { return load(data[k * stride]); }
  __device__ __forceinline__ void set(int64_t k, T x) const { store(data[k * stride], x); }
};
template <class T, class Stored>
__device__ __forceinline__ Numbers<T, const Stored> numbers_of(const SplineOperand& x, int64_t row,
                                                               int64_t column) {
  return {static_cast<const Stored*>(x.data) + row * x.row + column * x.column, x.bin};
}

// What a warp has of its elements' numbers: element e's number k at [k][e].
template <class T, class Stored>
struct Tile {
  T* numbers;

  __device__ __forceinline__ Numbers<T, T> own() const {
    return {numbers + lane_of_warp(), kTileRow};
  }
  // Each element's `count` numbers from where its lane says, which is nowhere if there is none.
  // The whole warp calls it, after all have done with what was here.
  __device__ __forceinline__ void fetch(const Stored* from, int64_t count) const {
    each(reinterpret_cast<int64_t>(from), count, [&](int64_t base, int64_t k, T& number) {
      number = load(reinterpret_cast<const Stored*>(base)[k]);
    });
  }
  // And back, after all have set their own.
  __device__ __forceinline__ void bring(Stored* to, int64_t count) const {
    each(reinterpret_cast<int64_t>(to), count, [&](int64_t base, int64_t k, T& number) {
      store(reinterpret_cast<Stored*>(base)[k], number);
    });
  }

 private:
  template <class Move>
  __device__ __forceinline__ void each(int64_t mine, int64_t count, const Move& move) const {
    const int n = static_cast<int>(count);
    __syncwarp();
    for (int i = lane_of_warp(); i < n * kWarp; i += kWarp) {
      const int e = i / n, k = i - e * n;
      const int64_t base = __shfl_sync(0xffffffffu, mine, e);
      if (base != 0) move(base, k, numbers[k * kTileRow + e]);
    }
    __syncwarp();
  }
};

// A softmax over the bins, stretched: number k is worth base + term(k).
template <class T, class From>
struct Shares {
  Numbers<T, From> numbers;
  T most, share;

  __device__ __forceinline__ Shares(const Numbers<T, From>& given, int64_t bins, T gain)
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
template <class T, class From>
struct Traveller {
  T v, turns;
  bool outside;
  Shares<T, From> widths, heights;
  Piece<T> piece;
  T number0, number1;  // what the slopes are made of
  int64_t index;

  template <class Stored>
  __device__ __forceinline__ Traveller(const SplineSweep& s, const SplineScale<T>& scale, T at,
                                       const Numbers<T, From>& width_numbers,
                                       const Numbers<T, From>& height_numbers,
                                       const Numbers<T, Stored>& slopes)
      : v(at),
        turns(scale.turns(v)),
        outside(scale.outside(v)),
        widths(width_numbers, s.bins, scale.gain_width),
        heights(height_numbers, s.bins, scale.gain_height),
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
    const bool circular = s.circular;
    if (circular || index > 0) number0 = slopes[circular ? index : index - 1];
    if (circular || index + 1 < s.bins) number1 = slopes[circular ? (index + 1) % s.bins : index];
    piece.slope0 = circular || index > 0 ? spline_slope(number0, scale.min_slope) : T(1);
    piece.slope1 = circular || index + 1 < s.bins ? spline_slope(number1, scale.min_slope) : T(1);
  }
};

// visit(row, column, whether it is this thread's) of elements; whole warps call it together, and
// finish(row) after the columns of a row. Threads without an element see the last one.
template <class Visit, class Finish>
__device__ __forceinline__ void for_elements(const SplineSweep& s, int threads, const Visit& visit,
                                             const Finish& finish) {
  const int64_t thread = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t groups = gridDim.x * static_cast<int64_t>(blockDim.x) / threads;
  const int64_t of_warp = thread / kWarp * (kWarp / threads);  // its first group
  const auto last = [](int64_t i, int64_t n) { return i < n ? i : n - 1; };
  for (int64_t first = of_warp; first < s.rows; first += groups) {
    const int64_t row = first + thread % kWarp / threads;
    for (int64_t begin = 0; begin < s.columns; begin += threads) {
      const int64_t column = begin + thread % threads;
      visit(last(row, s.rows), last(column, s.columns), row < s.rows && column < s.columns);
    }
    finish(row);
  }
}

// What a warp works on: tiles of the numbers of widths and of heights, if those are staged.
template <class T, class Stored, bool kStaged>
struct Desk {
  using From = std::conditional_t<kStaged, T, const Stored>;
  using To = std::conditional_t<kStaged, T, Stored>;
  static constexpr int kNumbers = kStaged ? 2 * kTile * (kBlock / kWarp) : 1;

  T* memory;  // of the block, kNumbers

  __device__ __forceinline__ Tile<T, Stored> tile(int i) const {
    return {memory + (threadIdx.x / kWarp * 2 + i) * kTile};
  }
  __device__ __forceinline__ Numbers<T, From> take(int i, const SplineOperand& x, int64_t row,
                                                   int64_t column, int64_t count) const {
    const Numbers<T, const Stored> numbers = numbers_of<T, Stored>(x, row, column);
    if constexpr (kStaged) {
      tile(i).fetch(numbers.data, count);
      return tile(i).own();
    } else {
      return numbers;
    }
  }
  // set(numbers) sets those of this thread's element; `is`: whether it has one.
  template <class Set>
  __device__ __forceinline__ void give(int i, void* to, int64_t element, bool is, int64_t count,
                                       const Set& set) const {
    if (to == nullptr) return;
    Stored* const data = static_cast<Stored*>(to) + element * count;
    if constexpr (kStaged) {
      set(tile(i).own());
      tile(i).bring(is ? data : nullptr, count);
    } else {
      if (is) set(Numbers<T, To>{data, 1});
    }
  }
};

template <class T, class Stored, bool kStaged>
__global__ void __launch_bounds__(kBlock, kSplineBlocks<T>)
    spline_forward_kernel(const SplineSweep s, int threads) {
  using OnDesk = Desk<T, Stored, kStaged>;
  __shared__ T memory[OnDesk::kNumbers];
  const OnDesk desk{memory};
  const SplineScale<T> scale(s);
  double sum = 0;
  for_elements(
      s, threads,
      [&](int64_t row, int64_t column, bool is) {
        const auto widths = desk.take(0, s.widths, row, column, s.bins);
        const auto heights = desk.take(1, s.heights, row, column, s.bins);
        if (!is) return;
        const Traveller<T, typename OnDesk::From> at(
            s, scale, numbers_of<T, Stored>(s.x, row, column)[0], widths, heights,
            numbers_of<T, Stored>(s.slopes, row, column));
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
// They may take the place of the numbers.
template <class T, class From, class To>
__device__ __forceinline__ void spread(const Shares<T, From>& shares, bool outside, int64_t index,
                                       int64_t bins, T d_start, T d_size, T start, T size, T base,
                                       T gain, const Numbers<T, To>& to) {
  const Values<T, 3> d = of_terms(d_start, d_size, start, size, static_cast<T>(index), base, gain);
  for (int64_t k = 0; k < bins; ++k) {
    const T own = k < index ? d.v[0] : (k == index ? d.v[1] : d.v[2]);
    to.set(k, outside ? T(0) : shares.term(k) * own);
  }
}

template <class T, class Stored, bool kStaged>
__global__ void __launch_bounds__(kBlock, kSplineBlocks<T>)
    spline_backward_kernel(const SplineSweep s, int threads) {
  using OnDesk = Desk<T, Stored, kStaged>;
  using To = Numbers<T, typename OnDesk::To>;
  __shared__ T memory[OnDesk::kNumbers];
  const OnDesk desk{memory};
  const SplineScale<T> scale(s);
  for_elements(
      s, threads,
      [&](int64_t row, int64_t column, bool is) {
        const int64_t element = row * s.columns + column;
        const auto widths = desk.take(0, s.widths, row, column, s.bins);
        const auto heights = desk.take(1, s.heights, row, column, s.bins);
        const Traveller<T, typename OnDesk::From> at(
            s, scale, numbers_of<T, Stored>(s.x, row, column)[0], widths, heights,
            numbers_of<T, Stored>(s.slopes, row, column));
        const T grad = s.grad == nullptr ? T(0) : load(static_cast<const Stored*>(s.grad)[element]);
        const T grad_log =
            s.grad_log_det == nullptr ? T(0) : static_cast<const T*>(s.grad_log_det)[row];
        const T v = at.v - at.turns;
        const PieceGradient<T> d =
            s.inverse
                ? PiecePoint<T>::from(at.piece, v).template gradient<true>(at.piece, grad, grad_log)
                : PiecePoint<T>::at(at.piece, v).template gradient<false>(at.piece, grad, grad_log);
        if (s.d_x != nullptr && is) {
          store(static_cast<Stored*>(s.d_x)[element], at.outside ? grad : d.in);
        }
        desk.give(0, s.d_widths, element, is, s.bins, [&](const To& to) {
          spread(at.widths, at.outside, at.index, s.bins, d.left, d.width,
                 at.piece.left + scale.bound, at.piece.width, scale.base_width, scale.gain_width,
                 to);
        });
        desk.give(1, s.d_heights, element, is, s.bins, [&](const To& to) {
          spread(at.heights, at.outside, at.index, s.bins, d.bottom, d.height,
                 at.piece.bottom + scale.bound, at.piece.height, scale.base_height,
                 scale.gain_height, to);
        });
        desk.give(0, s.d_slopes, element, is, s.slope_count(), [&](const To& to) {
          const int64_t after = s.circular ? (at.index + 1) % s.bins : at.index;
          const int64_t before = s.circular ? at.index : at.index - 1;  // -1: none
          for (int64_t k = 0; k < s.slope_count(); ++k) {
            T sum = T(0);
            if (k == before) sum += d.slope0 * d_spline_slope(at.number0, scale.min_slope);
            if (k == after) sum += d.slope1 * d_spline_slope(at.number1, scale.min_slope);
            to.set(k, at.outside ? T(0) : sum);
          }
        });
      },
      [](int64_t) {});
}

template <class T, class Stored, bool kStaged>
const char* run_spline(const SplineSweep& s, cudaStream_t stream) {
  int threads = 1;  // to a row
  while (threads < kWarp && threads < s.columns) threads *= 2;
  const int64_t rows = kBlock / threads;  // of a block
  const int64_t blocks = std::min<int64_t>(kMaxBlocks, (s.rows + rows - 1) / rows);
  const auto kernel = s.y != nullptr ? spline_forward_kernel<T, Stored, kStaged>
                                     : spline_backward_kernel<T, Stored, kStaged>;
  FASTVAE_LAUNCH(kernel, blocks, kBlock, stream, s, threads);
  return launch_error();
}

// Runs forward, or backward if there is no y, on the stream, a cudaStream_t, without waiting for
// it. Null, or what CUDA says.
const char* sweep_spline(const SplineSweep& s, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const char* error = "unknown dtype";
  const bool staged = s.bins <= kMostStaged && s.widths.bin == 1 && s.heights.bin == 1;
  with_types(s.dtype, [&]<class T, class Stored>(Types<T, Stored>) {
    error = staged ? run_spline<T, Stored, true>(s, cuda_stream)
                   : run_spline<T, Stored, false>(s, cuda_stream);
  });
  return error;
}

}  // namespace fastvae::cuda
