// The CPU engine: sweeps the rows of one formula with vector code, on a range of rows.
//
// A sweep goes tile by tile. A tile is a run of elements small enough for the first-level cache:
// several short rows, or a piece of a long one. Per tile, three plain loops:
//   1. inputs that are not contiguous floats (half types, strides, broadcasts) are gathered into a
//      buffer, the noise is drawn, row inputs are spread over their row;
//   2. the formula runs over the tile, kLanes elements at a time;
//   3. half outputs are rounded into place, and terms are summed per row.
// Every element passes through the same vector loop, whatever its position: a tail shorter than
// kLanes is padded in a buffer. So a value depends on the inputs alone, never on the thread count
// or the split of the batch, and the sums use one fixed tree: results are bitwise reproducible.
//
// The hot loops are compiled for several instruction sets and chosen at load time (FASTVAE_CLONES).
// Threads are the caller's business: sweep_rows works on [begin, end) of the units it is given.
#pragma once

#include <algorithm>
#include <utility>

#include "noise.h"
#include "sweep.h"

namespace fastvae::cpu {

inline constexpr int kTile = 512;               // elements; at most 9 live buffers of 2 KB
inline constexpr int64_t kSegment = 64 * 1024;  // longest piece of one row given to one thread

// A unit of work: a whole row, or a segment of a long one.
inline int64_t segments_per_row(int64_t columns) {
  return std::max<int64_t>(1, (columns + kSegment - 1) / kSegment);
}

// (2) values[k][i] = formula(arguments[0][i], ...) for all i; n is a multiple of kLanes.
template <class F, class T, size_t... A, size_t... V>
FASTVAE_HD void evaluate_lanes(const T* const* arguments, T* const* values, int64_t n,
                               std::index_sequence<A...>, std::index_sequence<V...>) {
  const T* const in[] = {arguments[A]...};
  T* const out[] = {values[V]...};
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Values<T, F::kValues> result = F::template eval<T>(in[A][i]...);
    ((out[V][i] = result.v[V]), ...);
  }
}

template <class F, class T>
FASTVAE_CLONES void evaluate(const T* const* arguments, T* const* values, int64_t n) {
  evaluate_lanes<F, T>(arguments, values, n, std::make_index_sequence<F::kArguments>{},
                       std::make_index_sequence<F::kValues>{});
}

// Whether any element wants noise, of a formula that does not always.
template <class F, class T>
concept DrawsOnDemand = requires { &F::template needs_noise<T>; };

template <class F, class T, size_t... A>
FASTVAE_HD bool any_needs_noise_lanes(const T* const* arguments, int64_t n,
                                      std::index_sequence<A...>) {
  const T* const in[] = {arguments[A]...};
  int any = 0;
#pragma omp simd reduction(| : any)
  for (int64_t i = 0; i < n; ++i) any |= F::template needs_noise<T>(in[A][i]...);
  return any != 0;
}

template <class F, class T>
FASTVAE_CLONES bool any_needs_noise(const T* const* arguments, int64_t n) {
  return any_needs_noise_lanes<F, T>(arguments, n, std::make_index_sequence<F::kArguments - 1>{});
}

// (1) Reads n elements of any stride, (3) writes them, converting half types.
template <class Stored, class T>
FASTVAE_CLONES void gather(const Stored* from, int64_t stride, T* to, int64_t n) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = load(from[i * stride]);
  }
}

template <class Stored, class T>
FASTVAE_CLONES void scatter(const T* from, Stored* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(to[i], from[i]);
}

// (3) The sum of one row's piece: kLanes running sums, then a binary tree over the lanes.
template <class T>
FASTVAE_CLONES double sum(const T* terms, int64_t n) {
  T lanes[kLanes] = {};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) lanes[l] += terms[i + l];
  }
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] += terms[i];
  for (int width = kLanes / 2; width > 0; width /= 2) {
#pragma omp simd
    for (int l = 0; l < kLanes / 2; ++l) {
      if (l < width) lanes[l] += lanes[l + width];
    }
  }
  return lanes[0];
}

template <class F, class T, class Stored>
class RowSweep {
 public:
  explicit RowSweep(const Sweep& sweep) : s_(sweep) {
    if constexpr (F::shape.noise) {
      key_ = {static_cast<uint64_t>(s_.key[0]), static_cast<uint64_t>(s_.key[1])};
    }
  }

  // Rows begin..end, columns first..last of each. Sums go to sums[row - begin].
  void run(int64_t begin, int64_t end, int64_t first, int64_t last, double* sums) {
    const int64_t width = last - first;
    for (int64_t row = begin; row < end;) {
      if (width > kTile || width == 0) {
        double total = 0;
        for (int64_t c = first; c < last; c += kTile) {
          const int64_t n = std::min<int64_t>(kTile, last - c);
          tile(row, 1, c, n);
          if constexpr (F::shape.row_sums > 0) total += sum(terms_, n);
        }
        if constexpr (F::shape.row_sums > 0) sums[row - begin] = total;
        ++row;
      } else {  // as many whole rows as fit, all within one outer index
        const int64_t rows = std::min({kTile / width, end - row, s_.inner - row % s_.inner});
        tile(row, rows, first, width);
        if constexpr (F::shape.row_sums > 0) {
          for (int64_t r = 0; r < rows; ++r) sums[row - begin + r] = sum(terms_ + r * width, width);
        }
        row += rows;
      }
    }
  }

 private:
  static constexpr int kNoiseAt = F::shape.inputs + F::shape.row_inputs;

  // Evaluates rows x width elements from (row, column): afterwards terms_ holds the row terms.
  void tile(int64_t row, int64_t rows, int64_t column, int64_t width) {
    const int64_t n = rows * width;
    const T* arguments[F::kArguments];
    T* values[F::kValues];

    for (int k = 0; k < F::shape.inputs; ++k) {
      arguments[k] = input(s_.inputs[k], row, rows, column, width, buffers_[k]);
    }
    for (int k = 0; k < F::shape.row_inputs; ++k) {
      T* spread = buffers_[F::shape.inputs + k];
      const T* row_input = static_cast<const T*>(s_.row_inputs[k]) + row;
      for (int64_t r = 0; r < rows; ++r) std::fill_n(spread + r * width, width, row_input[r]);
      arguments[F::shape.inputs + k] = spread;
    }
    if constexpr (F::shape.noise) {
      const int64_t element = row * s_.columns + column;
      bool draw = true;
      if constexpr (DrawsOnDemand<F, T>) draw = any_needs_noise<F, T>(arguments, n);
      if (draw) fill_normal(key_, static_cast<uint64_t>(element) / 4, noise_, n + element % 4);
      arguments[kNoiseAt] = noise_ + element % 4;
    }
    for (int k = 0; k < F::shape.outputs; ++k) {
      T* direct = nullptr;
      if constexpr (std::is_same_v<T, Stored>) direct = output(k, row, column);
      values[k] = direct != nullptr ? direct : results_[k];
    }
    if constexpr (F::shape.row_sums > 0) values[F::shape.outputs] = terms_;

    evaluate_padded(arguments, values, n);

    if constexpr (!std::is_same_v<T, Stored>) {
      for (int k = 0; k < F::shape.outputs; ++k) {
        if (Stored* to = output(k, row, column)) scatter(results_[k], to, n);
      }
    }
  }

  Stored* output(int k, int64_t row, int64_t column) const {
    Stored* base = static_cast<Stored*>(s_.outputs[k]);
    return base == nullptr ? nullptr : base + row * s_.columns + column;
  }

  // The tile of one input: in place where it lies as the formula wants it, else gathered.
  const T* input(const Operand& x, int64_t row, int64_t rows, int64_t column, int64_t width,
                 T* buffer) const {
    const Stored* from = static_cast<const Stored*>(x.data) + row / s_.inner * x.outer_stride +
                         row % s_.inner * x.inner_stride + column * x.column_stride;
    const bool dense = x.column_stride == 1 && (rows == 1 || x.inner_stride == width);
    if constexpr (std::is_same_v<T, Stored>) {
      if (dense) return from;
    }
    if (dense) {
      gather(from, 1, buffer, rows * width);
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        gather(from + r * x.inner_stride, x.column_stride, buffer + r * width, width);
      }
    }
    return buffer;
  }

  // The tail goes through a padded copy: reading or writing past a tensor's end is not ours to do.
  void evaluate_padded(const T* (&arguments)[F::kArguments], T* (&values)[F::kValues], int64_t n) {
    const int64_t whole = n / kLanes * kLanes;
    if (whole > 0) evaluate<F, T>(arguments, values, whole);
    if (whole == n) return;
    T in[F::kArguments][kLanes], out[F::kValues][kLanes];
    const T* tail_arguments[F::kArguments];
    T* tail_values[F::kValues];
    for (int k = 0; k < F::kArguments; ++k) {
      std::fill_n(std::copy(arguments[k] + whole, arguments[k] + n, in[k]), kLanes - (n - whole),
                  arguments[k][n - 1]);
      tail_arguments[k] = in[k];
    }
    for (int k = 0; k < F::kValues; ++k) tail_values[k] = out[k];
    evaluate<F, T>(tail_arguments, tail_values, kLanes);
    for (int k = 0; k < F::kValues; ++k) std::copy_n(out[k], n - whole, values[k] + whole);
  }

  const Sweep& s_;
  philox::Key key_{};
  alignas(64) T buffers_[std::max(1, F::shape.inputs + F::shape.row_inputs)][kTile];
  alignas(64) T noise_[F::shape.noise ? kTile + kNoiseGroup : 1] = {};
  alignas(64) T results_[std::max(1, F::shape.outputs)][kTile];
  alignas(64) T terms_[F::shape.row_sums > 0 ? kTile : 1];
};

// Sweeps units begin..end. The sums of segments go to s.partial_sums, [rows, segments].
template <class F, class T, class Stored>
void sweep_units(const Sweep& s, int64_t begin, int64_t end) {
  RowSweep<F, T, Stored> sweep(s);
  const int64_t segments = segments_per_row(s.columns);
  if (segments > 1) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / segments, first = unit % segments * kSegment;
      double* sum = F::shape.row_sums > 0 ? s.partial_sums + unit : nullptr;
      sweep.run(row, row + 1, first, std::min(s.columns, first + kSegment), sum);
    }
    return;
  }
  constexpr int64_t kChunk = 256;
  double sums[kChunk];
  for (int64_t row = begin; row < end; row += kChunk) {
    const int64_t rows = std::min(kChunk, end - row);
    sweep.run(row, row + rows, 0, s.columns, sums);
    if constexpr (F::shape.row_sums > 0) {
      T* row_sum = static_cast<T*>(s.row_sum) + row;
      for (int64_t r = 0; r < rows; ++r) row_sum[r] = static_cast<T>(sums[r]);
    }
  }
}

template <class F>
void sweep_units(const Sweep& s, int64_t begin, int64_t end) {
  switch (s.dtype) {
    case DType::kFloat32:
      return sweep_units<F, float, float>(s, begin, end);
    case DType::kFloat64:
      return sweep_units<F, double, double>(s, begin, end);
    case DType::kBFloat16:
      return sweep_units<F, float, BFloat16>(s, begin, end);
    case DType::kFloat16:
      return sweep_units<F, float, Float16>(s, begin, end);
  }
}

// row_sum[r] = the sum of partial_sums[r, :], in order.
inline void add_segments(const Sweep& s) {
  const int64_t segments = segments_per_row(s.columns);
  for (int64_t row = 0; row < s.rows(); ++row) {
    double sum = 0;
    for (int64_t k = 0; k < segments; ++k) sum += s.partial_sums[row * segments + k];
    if (s.dtype == DType::kFloat64) {
      static_cast<double*>(s.row_sum)[row] = sum;
    } else {
      static_cast<float*>(s.row_sum)[row] = static_cast<float>(sum);
    }
  }
}

}  // namespace fastvae::cpu
