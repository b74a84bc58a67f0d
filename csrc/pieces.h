// The CPU engine of splines (spline.h): sixteen elements in the lanes, the pieces in the loops.
//
// The numbers of sixteen elements are transposed to [piece][lane]. Two passes over the pieces make
// the softmax; a third walks the knots and keeps, in each lane, the piece that its element lies on.
// All else is done once an element. Backward does the same again, and hands its gradients back
// through the pieces and the transposes; nothing is stored between the two.
//
// Every element passes through the same loops, whatever its lane, and a row's log-determinant is
// summed in a fixed tree: results are bitwise the same for any number of threads and any split of
// the batch. Threads are the caller's business: a call works on rows [begin, end).
#pragma once

#include <algorithm>
#include <vector>

#include "rows.h"
#include "spline.h"
#include "transpose.h"

namespace fastvae::cpu {

// Sixteen pieces and what is known of them.
template <class T>
struct alignas(64) Pieces {
  T share_width[kLanes], share_height[kLanes];             // of a softmax's terms
  T x[kLanes], y[kLanes], x_rest[kLanes], y_rest[kLanes];  // the next knot
  T left_rest[kLanes], bottom_rest[kLanes];
  T left[kLanes], width[kLanes], bottom[kLanes], height[kLanes];
  T number0[kLanes], number1[kLanes];  // what the slopes at its ends are made of
  T index[kLanes];
};

template <class T>
FASTVAE_HD Piece<T> piece_of(const SplineScale<T>& scale, T left, T width, T bottom, T height,
                             T number0, T number1, T index, T left_rest, T bottom_rest) {
  return {left,
          width,
          bottom,
          height,
          index == scale.first ? T(1) : spline_slope(number0, scale.min_slope),
          index == scale.last ? T(1) : spline_slope(number1, scale.min_slope),
          left_rest,
          bottom_rest};
}

// e^(number - max) in place, and gain over their sum.
template <class T>
FASTVAE_CLONES void share_out(Lanes<T>* numbers, int64_t n, T gain, T* share) {
  alignas(64) T most[kLanes], sum[kLanes];
  std::copy_n(numbers[0].at, kLanes, most);
  for (int64_t k = 1; k < n; ++k) {
    const T* s = numbers[k].at;
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) most[i] = math::max(most[i], s[i]);
  }
  std::fill_n(sum, kLanes, T(0));
  for (int64_t k = 0; k < n; ++k) {
    T* s = numbers[k].at;
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      s[i] = math::exp_weight(s[i] - most[i]);
      sum[i] += s[i];
    }
  }
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) share[i] = gain / sum[i];
}

// Walks the knots: the piece that v lies on, by x or, of an inverse, by y.
template <class T, bool kInverse>
FASTVAE_CLONES void find_pieces(const SplineScale<T>& all, const T* v, const Lanes<T>* widths,
                                const Lanes<T>* heights, const Lanes<T>* numbers, int64_t n,
                                Pieces<T>& p) {
  alignas(64) T at[kLanes];
  const T *share_width = p.share_width, *share_height = p.share_height;
  T *x = p.x, *y = p.y, *left = p.left, *width = p.width, *bottom = p.bottom, *height = p.height;
  T *number0 = p.number0, *number1 = p.number1, *index = p.index;
  T *x_rest = p.x_rest, *y_rest = p.y_rest, *left_rest = p.left_rest, *bottom_rest = p.bottom_rest;
  const SplineScale<T> scale = all;  // in registers: nothing written below may change it
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) {
    at[i] = v[i] - scale.turns(v[i]);
    x[i] = y[i] = -scale.bound;
    x_rest[i] = y_rest[i] = T(0);
  }
  for (int64_t k = 0; k < n; ++k) {
    const T *w = widths[k].at, *h = heights[k].at;
    const T *before = numbers[k].at, *after = numbers[k + 1].at;
    const T k_th = static_cast<T>(k), lowest = k == 0 ? math::kInfinity<T> : T(0);
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const T w_k = scale.base_width + share_width[i] * w[i];
      const T h_k = scale.base_height + share_height[i] * h[i];
      const bool here = !(at[i] + lowest < (kInverse ? y[i] : x[i]));  // the first if none: NaN
      left[i] = here ? x[i] : left[i];
      bottom[i] = here ? y[i] : bottom[i];
      width[i] = here ? w_k : width[i];
      height[i] = here ? h_k : height[i];
      number0[i] = here ? before[i] : number0[i];
      number1[i] = here ? after[i] : number1[i];
      index[i] = here ? k_th : index[i];
      left_rest[i] = here ? x_rest[i] : left_rest[i];
      bottom_rest[i] = here ? y_rest[i] : bottom_rest[i];
      const T next_x = x[i] + w_k, next_y = y[i] + h_k;
      x_rest[i] += math::lost(x[i], w_k, next_x);
      y_rest[i] += math::lost(y[i], h_k, next_y);
      x[i] = next_x;
      y[i] = next_y;
    }
  }
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) {
    left_rest[i] = knot_rest(left[i], left_rest[i], x[i], x_rest[i], scale.bound, scale.base_width,
                             scale.gain_width, index[i]);
    bottom_rest[i] = knot_rest(bottom[i], bottom_rest[i], y[i], y_rest[i], scale.bound,
                               scale.base_height, scale.gain_height, index[i]);
  }
}

template <class T, bool kInverse>
FASTVAE_CLONES void follow_pieces(const SplineScale<T>& all, const T* v, const Pieces<T>& p, T* to,
                                  T* log_slope) {
  const SplineScale<T> scale = all;
  const T *left = p.left, *width = p.width, *bottom = p.bottom, *height = p.height;
  const T *number0 = p.number0, *number1 = p.number1, *index = p.index;
  const T *left_rest = p.left_rest, *bottom_rest = p.bottom_rest;
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) {
    const Piece<T> piece = piece_of(scale, left[i], width[i], bottom[i], height[i], number0[i],
                                    number1[i], index[i], left_rest[i], bottom_rest[i]);
    const Values<T, 2> result =
        follow(piece, v[i], scale.turns(v[i]), scale.outside(v[i]), kInverse);
    to[i] = result.v[0];
    log_slope[i] = result.v[1];
  }
}

// Gradients of sixteen pieces: of the softmax's terms, less their mean, and of the slopes' numbers.
template <class T>
struct alignas(64) PieceGradients {
  T in[kLanes];
  T before[2][kLanes], here[2][kLanes], after[2][kLanes];  // of the pieces left of it, it, right
  T number0[kLanes], number1[kLanes];
};

template <class T, bool kInverse>
FASTVAE_CLONES void differentiate_pieces(const SplineScale<T>& all, const T* v, const T* grad,
                                         const T* grad_log, const Pieces<T>& p,
                                         PieceGradients<T>& d) {
  const SplineScale<T> scale = all;
  const T *left = p.left, *width = p.width, *bottom = p.bottom, *height = p.height;
  const T *number0 = p.number0, *number1 = p.number1, *index = p.index;
  const T *left_rest = p.left_rest, *bottom_rest = p.bottom_rest;
  const T *share_width = p.share_width, *share_height = p.share_height;
  T *in = d.in, *to_number0 = d.number0, *to_number1 = d.number1;
  T *x_before = d.before[0], *x_here = d.here[0], *x_after = d.after[0];
  T *y_before = d.before[1], *y_here = d.here[1], *y_after = d.after[1];
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) {
    const Piece<T> piece = piece_of(scale, left[i], width[i], bottom[i], height[i], number0[i],
                                    number1[i], index[i], left_rest[i], bottom_rest[i]);
    const T at = v[i] - scale.turns(v[i]);
    const bool outside = scale.outside(v[i]);
    const PiecePoint<T> point =
        kInverse ? PiecePoint<T>::from(piece, at) : PiecePoint<T>::at(piece, at);
    const PieceGradient<T> g = point.template gradient<kInverse>(piece, grad[i], grad_log[i]);
    const Values<T, 3> x = of_terms(g.left, g.width, left[i] + scale.bound, width[i], index[i],
                                    scale.base_width, scale.gain_width);
    const Values<T, 3> y = of_terms(g.bottom, g.height, bottom[i] + scale.bound, height[i],
                                    index[i], scale.base_height, scale.gain_height);
    in[i] = outside ? grad[i] : g.in;
    x_before[i] = outside ? T(0) : x.v[0] * share_width[i];
    x_here[i] = outside ? T(0) : x.v[1] * share_width[i];
    x_after[i] = outside ? T(0) : x.v[2] * share_width[i];
    y_before[i] = outside ? T(0) : y.v[0] * share_height[i];
    y_here[i] = outside ? T(0) : y.v[1] * share_height[i];
    y_after[i] = outside ? T(0) : y.v[2] * share_height[i];
    const T d_number0 = g.slope0 * d_spline_slope(number0[i], scale.min_slope);
    const T d_number1 = g.slope1 * d_spline_slope(number1[i], scale.min_slope);
    to_number0[i] = outside || index[i] == scale.first ? T(0) : d_number0;
    to_number1[i] = outside || index[i] == scale.last ? T(0) : d_number1;
  }
}

// The gradients of the softmax's numbers, in place of its terms.
template <class T>
FASTVAE_CLONES void spread_terms(const T* index, const T* before, const T* here, const T* after,
                                 int64_t n, Lanes<T>* terms) {
  for (int64_t k = 0; k < n; ++k) {
    T* term = terms[k].at;
    const T at = static_cast<T>(k);
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      term[i] *= at < index[i] ? before[i] : (at > index[i] ? after[i] : here[i]);
    }
  }
}

// And those of the slopes' numbers, in their place.
template <class T>
FASTVAE_CLONES void spread_slopes(const Pieces<T>& p, const PieceGradients<T>& d, int64_t n,
                                  Lanes<T>* numbers) {
  const T *index = p.index, *number0 = d.number0, *number1 = d.number1;
  for (int64_t k = 0; k <= n; ++k) {
    T* number = numbers[k].at;
    const T at = static_cast<T>(k);
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      number[i] = index[i] == at ? number0[i] : (index[i] + T(1) == at ? number1[i] : T(0));
    }
  }
}

template <class T, class Stored>
class SplineTask {
 public:
  explicit SplineTask(const SplineSweep& sweep)
      : s_(sweep),
        scale_(sweep),
        widths_(static_cast<size_t>(s_.bins)),
        heights_(static_cast<size_t>(s_.bins)),
        numbers_(static_cast<size_t>(s_.bins + 1)) {
    if (s_.grad == nullptr && s_.grad_log_det == nullptr) {
      const int64_t rows = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, s_.columns));
      logs_.resize(static_cast<size_t>(rows * s_.columns + kLanes));
    }
  }

  void forward(int64_t begin, int64_t end) {
    const int64_t most = static_cast<int64_t>(logs_.size() - kLanes) / s_.columns;
    for (int64_t row = begin; row < end; row += most) {
      const int64_t rows = std::min(most, end - row), first = row * s_.columns;
      for_groups(row, rows, [&](int64_t element) {
        alignas(64) T to[kLanes];
        T* log = logs_.data() + (element - first);
        s_.inverse ? follow_pieces<T, true>(scale_, v_, p_, to, log)
                   : follow_pieces<T, false>(scale_, v_, p_, to, log);
        write(s_.y, element, to);
      });
      T* log_det = static_cast<T*>(s_.log_det) + row;
      for (int64_t r = 0; r < rows; ++r) {
        log_det[r] = static_cast<T>(sum(logs_.data() + r * s_.columns, s_.columns));
      }
    }
  }

  void backward(int64_t begin, int64_t end) {
    for_groups(begin, end - begin, [&](int64_t element) {
      alignas(64) T grad[kLanes] = {}, grad_log[kLanes] = {};
      if (s_.grad != nullptr) {
        gather(static_cast<const Stored*>(s_.grad) + element, 1, grad, count_);
      }
      for (int i = 0; s_.grad_log_det != nullptr && i < count_; ++i) {
        const int64_t row = one_row_ ? row_ : (element + i) / s_.columns;
        grad_log[i] = static_cast<const T*>(s_.grad_log_det)[row];
      }
      s_.inverse ? differentiate_pieces<T, true>(scale_, v_, grad, grad_log, p_, d_)
                 : differentiate_pieces<T, false>(scale_, v_, grad, grad_log, p_, d_);
      write(s_.d_x, element, d_.in);
      if (s_.d_widths != nullptr) {
        spread_terms(p_.index, d_.before[0], d_.here[0], d_.after[0], s_.bins, widths_.data());
        write_lines(s_.d_widths, element, s_.bins, widths_.data());
      }
      if (s_.d_heights != nullptr) {
        spread_terms(p_.index, d_.before[1], d_.here[1], d_.after[1], s_.bins, heights_.data());
        write_lines(s_.d_heights, element, s_.bins, heights_.data());
      }
      if (s_.d_slopes != nullptr) {
        spread_slopes(p_, d_, s_.bins, numbers_.data());
        if (s_.circular) {  // the last knot is the first
          for (int i = 0; i < kLanes; ++i) numbers_[0].at[i] += numbers_[s_.bins].at[i];
        }
        write_lines(s_.d_slopes, element, s_.slope_count(), numbers_.data() + !s_.circular);
      }
    });
  }

 private:
  static constexpr int64_t kChunk = 4096;  // elements whose logarithms wait to be summed

  // visit(first element) for the groups of sixteen elements of some rows, their pieces found.
  template <class Visit>
  void for_groups(int64_t row, int64_t rows, const Visit& visit) {
    const int64_t end = (row + rows) * s_.columns;
    for (int64_t element = row * s_.columns; element < end; element += kLanes) {
      count_ = static_cast<int>(std::min<int64_t>(kLanes, end - element));
      row_ = element / s_.columns, column_ = element % s_.columns;
      one_row_ = column_ + count_ <= s_.columns;
      read(s_.x, 1, reinterpret_cast<Lanes<T>*>(v_));
      read(s_.widths, s_.bins, widths_.data());
      read(s_.heights, s_.bins, heights_.data());
      read(s_.slopes, s_.slope_count(), numbers_.data() + !s_.circular);
      numbers_[s_.bins] = numbers_[0];  // circular; else of no account
      share_out(widths_.data(), s_.bins, scale_.gain_width, p_.share_width);
      share_out(heights_.data(), s_.bins, scale_.gain_height, p_.share_height);
      s_.inverse ? find_pieces<T, true>(scale_, v_, widths_.data(), heights_.data(),
                                        numbers_.data(), s_.bins, p_)
                 : find_pieces<T, false>(scale_, v_, widths_.data(), heights_.data(),
                                         numbers_.data(), s_.bins, p_);
      visit(element);
    }
  }

  void read(const SplineOperand& x, int64_t n, Lanes<T>* to) const {
    if (n == 0) return;
    const Stored* from[kLanes];
    from[0] = static_cast<const Stored*>(x.data) + row_ * x.row + column_ * x.column;
    if (n == 1 && one_row_ && count_ == kLanes) return gather(from[0], x.column, to->at, kLanes);
    int64_t column = column_;
    for (int i = 1; i < kLanes; ++i) {
      from[i] = from[i - 1];  // the padding repeats the last one
      if (i >= count_) continue;
      from[i] += x.column;
      if (++column == s_.columns) from[i] += x.row - s_.columns * x.column, column = 0;
    }
    transpose_in<T, Stored>(from, x.bin, static_cast<int>(n), to->at);
  }

  void write(void* to, int64_t element, const T* from) const {
    if (to != nullptr) scatter(from, static_cast<Stored*>(to) + element, count_);
  }

  void write_lines(void* to, int64_t element, int64_t n, const Lanes<T>* from) const {
    if (n == 0) return;
    Stored* lines[kLanes];
    for (int i = 0; i < count_; ++i) lines[i] = static_cast<Stored*>(to) + (element + i) * n;
    transpose_out<T, Stored>(from->at, count_, 1, static_cast<int>(n), lines);
  }

  const SplineSweep& s_;
  const SplineScale<T> scale_;
  int count_ = 0;                 // elements in the group
  int64_t row_ = 0, column_ = 0;  // of the first
  bool one_row_ = false;
  alignas(64) T v_[kLanes];
  Pieces<T> p_;
  PieceGradients<T> d_;
  std::vector<Lanes<T>> widths_, heights_, numbers_;
  std::vector<T> logs_;
};

}  // namespace fastvae::cpu
