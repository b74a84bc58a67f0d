// The CPU engine of a reduction that takes several passes over a row: a row in each SIMD lane.
//
// The columns are walked in order, kBlock rows at a time, so that the loops over lanes are vector
// code whatever the number of columns, and nothing is added across lanes. Samples come with their
// dimension leading, so neighbouring rows mostly are neighbours in memory, and the lanes are read
// where they lie; of half types, and at other strides, a chunk of columns is gathered first.
// Every row passes through the same loops, whatever its lane: results are bitwise the same for any
// number of threads and any split of the batch.
#pragma once

#include <algorithm>

#include "rows.h"

namespace fastvae::cpu {

inline constexpr int kBlock = 4 * kLanes;  // rows

// One pass each over columns x n lanes, column c at lanes + c * stride; n is a multiple of kLanes.
template <class R, class T>
FASTVAE_CLONES void raise_lanes(const T* lanes, int64_t stride, int64_t columns, T* max, int n) {
  for (int64_t c = 0; c < columns; ++c) {
    const T* l = lanes + c * stride;
#pragma omp simd
    for (int i = 0; i < n; ++i) max[i] = R::template larger<T>(max[i], l[i]);
  }
}

template <class R, class T>
FASTVAE_CLONES void add_lanes(const T* lanes, int64_t stride, int64_t columns, const T* shift,
                              double* sum, int n) {
  T part[kBlock] = {};
  for (int64_t c = 0; c < columns; ++c) {
    const T* l = lanes + c * stride;
#pragma omp simd
    for (int i = 0; i < n; ++i) part[i] += R::template term<T>(l[i], shift[i]);
  }
#pragma omp simd
  for (int i = 0; i < n; ++i) sum[i] += part[i];
}

template <class R, class T>
FASTVAE_CLONES void scale_lanes(const T* lanes, int64_t stride, int64_t columns, const T* shift,
                                const T* slope, T* to, int64_t to_stride, int n) {
  for (int64_t c = 0; c < columns; ++c) {
    const T* l = lanes + c * stride;
    T* out = to + c * to_stride;
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = slope[i] * R::template term<T>(l[i], shift[i]);
  }
}

template <class F, class T, class Stored>
class LaneSweep {
 public:
  explicit LaneSweep(const Sweep& sweep) : s_(sweep) {}

  // Rows row..row + rows - 1, at most kBlock.
  void run(int64_t row, int rows) {
    row_ = row, rows_ = rows, n_ = (rows + kLanes - 1) / kLanes * kLanes;
    from_ = place(s_.inputs[0]);
    T max[kBlock], shift[kBlock];
    double sum[kBlock] = {};
    std::fill_n(max, n_, R::template lowest<T>());
    each_chunk([&](const T* lanes, int64_t stride, int64_t, int64_t columns) {
      raise_lanes<R, T>(lanes, stride, columns, max, n_);
    });
    for (int i = 0; i < n_; ++i) shift[i] = R::template shift<T>(max[i]);
    each_chunk([&](const T* lanes, int64_t stride, int64_t, int64_t columns) {
      add_lanes<R, T>(lanes, stride, columns, shift, sum, n_);
    });
    if constexpr (F::shape.outputs == 0) {
      T* value = static_cast<T*>(s_.row_sum) + row;
      for (int i = 0; i < rows; ++i) {
        value[i] = R::template value<T>(max[i], sum[i], s_.columns);
      }
    } else {
      const T* grad = static_cast<const T*>(s_.row_inputs[0]) + row;
      T slope[kBlock] = {};
      for (int i = 0; i < rows; ++i) slope[i] = R::template slope<T>(sum[i], grad[i]);
      write(shift, slope);
    }
  }

 private:
  using R = typename F::Reduction;
  static constexpr int kBuffered = 4 * R::kChunk;  // columns

  // Where the rows of the block lie in an operand; the padding repeats the last one.
  struct Place {
    const Stored* base;
    int64_t offset[kBlock];
    int64_t column_stride;
    bool adjacent;  // row i at offset[0] + i, the padding, which is not there, aside
  };
  Place place(const Operand& x) const {
    Place p = {static_cast<const Stored*>(x.data), {}, x.column_stride, true};
    for (int i = 0; i < n_; ++i) {
      const int64_t row = row_ + std::min(i, rows_ - 1);
      p.offset[i] = row / s_.inner * x.outer_stride + row % s_.inner * x.inner_stride;
      p.adjacent = p.adjacent && (i >= rows_ || p.offset[i] == p.offset[0] + i);
    }
    return p;
  }

  // visit(lanes, stride, first column, columns) for the columns in order, a chunk at a time.
  template <class Visit>
  void each_chunk(const Visit& visit) {
    for (int64_t first = 0; first < s_.columns; first += R::kChunk) {
      const int64_t columns = std::min<int64_t>(R::kChunk, s_.columns - first);
      if constexpr (std::is_same_v<T, Stored>) {
        if (from_.adjacent && rows_ == n_) {
          const T* lanes = from_.base + from_.offset[0] + first * from_.column_stride;
          visit(lanes, from_.column_stride, first, columns);
          continue;
        }
      }
      const int64_t at = first % kBuffered;
      if (first - at != filled_ || row_ != filled_row_) fill(first - at);
      visit(buffer_[at], kBlock, first, columns);
    }
  }

  // Columns into the buffer, where they stay for the next pass if there are no more of them.
  void fill(int64_t first) {
    const int64_t columns = std::min<int64_t>(kBuffered, s_.columns - first);
    const Stored* from = from_.base + first * from_.column_stride;
    if (from_.adjacent) {
      for (int64_t c = 0; c < columns; ++c) {
        gather(from + from_.offset[0] + c * from_.column_stride, 1, buffer_[c], rows_);
        std::fill(buffer_[c] + rows_, buffer_[c] + n_, buffer_[c][rows_ - 1]);
      }
    } else {  // along the rows, as their elements mostly follow one another
      for (int i = 0; i < n_; ++i) {
        const Stored* row = from + from_.offset[i];
        for (int64_t c = 0; c < columns; ++c) buffer_[c][i] = load(row[c * from_.column_stride]);
      }
    }
    filled_ = first, filled_row_ = row_;
  }

  void write(const T* shift, const T* slope) {
    const Place to = place(gradient_of(s_));
    each_chunk([&](const T* lanes, int64_t stride, int64_t first, int64_t columns) {
      Stored* out = const_cast<Stored*>(to.base) + first * to.column_stride;
      if constexpr (std::is_same_v<T, Stored>) {
        if (to.adjacent && rows_ == n_) {
          scale_lanes<R, T>(lanes, stride, columns, shift, slope, out + to.offset[0],
                            to.column_stride, n_);
          return;
        }
      }
      scale_lanes<R, T>(lanes, stride, columns, shift, slope, &results_[0][0], kBlock, n_);
      if (to.adjacent) {
        for (int64_t c = 0; c < columns; ++c) {
          scatter(results_[c], out + c * to.column_stride + to.offset[0], rows_);
        }
      } else {
        for (int i = 0; i < rows_; ++i) {
          Stored* row = out + to.offset[i];
          for (int64_t c = 0; c < columns; ++c) store(row[c * to.column_stride], results_[c][i]);
        }
      }
    });
  }

  const Sweep& s_;
  int64_t row_ = 0;
  int rows_ = 0, n_ = 0;
  Place from_{};
  int64_t filled_ = -1, filled_row_ = -1;  // first column and row in the buffer
  alignas(64) T buffer_[kBuffered][kBlock];
  alignas(64) T results_[F::shape.outputs > 0 ? R::kChunk : 1][kBlock];
};

// Reduces rows begin..end.
template <class F, class T, class Stored>
void reduce_rows(const Sweep& s, int64_t begin, int64_t end) {
  LaneSweep<F, T, Stored> sweep(s);
  while (begin < end) {
    int rows = static_cast<int>(std::min<int64_t>(kBlock, end - begin));
    if (rows > kLanes) rows = rows / kLanes * kLanes;  // only the last few rows need padding
    sweep.run(begin, rows);
    begin += rows;
  }
}

template <class F>
void reduce_rows(const Sweep& s, int64_t begin, int64_t end) {
  with_types(s.dtype, [&]<class T, class Stored>(Types<T, Stored>) {
    reduce_rows<F, T, Stored>(s, begin, end);
  });
}

}  // namespace fastvae::cpu
