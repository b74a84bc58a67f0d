// The CPU engine of flows by products of matrices (SylvesterSweep in residual_flow.h): all K steps
// of a block of rows, which stay in the cache.
//
// There is one product, of rows by a matrix whose columns are in the lanes, four rows by two
// vectors of columns at a time in registers; given other strides it also sums the gradient of a
// matrix over the rows of a block. Rows with lines of their own are taken one by one. What the
// inverse solves element after element it solves for all rows of a block at once, which are then
// in the lanes.
//
// Threads are the caller's business: each function works on [begin, end) of its units. Sums over
// rows are made of the sums of at most kMaxChunks runs of rows, in order, as in steps.h.
#pragma once

#include <vector>

#include "steps.h"

namespace fastvae::cpu {

// out[i][j] += sum_k a[i row + k inner] b[k][j] of kCount rows and kVectors vectors of columns.
template <class T, int kBytes, int kCount, int kVectors>
FASTVAE_HD void multiply_tile(const T* a, int64_t row, int64_t inner, const T* b, T* out,
                              int64_t count, int64_t n) {
  typedef T Vector __attribute__((vector_size(kBytes)));
  constexpr int kWidth = kBytes / sizeof(T);
  Vector sum[kCount][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      __builtin_memcpy(&sum[i][v], out + i * n + v * kWidth, sizeof(Vector));
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    Vector columns[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      __builtin_memcpy(&columns[v], b + k * n + v * kWidth, sizeof(Vector));
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] += a[i * row + k * inner] * columns[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      __builtin_memcpy(out + i * n + v * kWidth, &sum[i][v], sizeof(Vector));
    }
  }
}
// kMost rows at a time, half as many of the rest, and so on.
template <class T, int kBytes, int kMost, int kVectors>
FASTVAE_HD void multiply_rows(const T* a, int64_t row, int64_t inner, const T* b, T* out,
                              int64_t rows, int64_t count, int64_t n) {
  for (; rows >= kMost; rows -= kMost, a += kMost * row, out += kMost * n) {
    multiply_tile<T, kBytes, kMost, kVectors>(a, row, inner, b, out, count, n);
  }
  if constexpr (kMost > 1) {
    multiply_rows<T, kBytes, kMost / 2, kVectors>(a, row, inner, b, out, rows, count, n);
  }
}
// All n columns, a multiple of kLanes. An addition waits for the one before, so that eight sums
// have to be under way: those of four rows by two vectors, where there is a second.
template <class T, int kBytes>
FASTVAE_HD void multiply_columns(const T* a, int64_t row, int64_t inner, const T* b, T* out,
                                 int64_t rows, int64_t count, int64_t n) {
  constexpr int64_t kPair = 2 * kBytes / sizeof(T);
  int64_t j = 0;
  for (; j + kPair <= n; j += kPair) {
    multiply_rows<T, kBytes, 4, 2>(a, row, inner, b + j, out + j, rows, count, n);
  }
  if constexpr (kPair > kLanes) {
    if (j < n) multiply_rows<T, kBytes, 8, 1>(a, row, inner, b + j, out + j, rows, count, n);
  }
}

// gcc makes twenty times slower code of vectors that the registers do not hold: each instruction
// set has those of its own.
#ifdef FASTVAE_MULTIVERSION
template <class T>
FASTVAE_TARGET("arch=x86-64-v4")
void multiply_v4(const T* a, int64_t row, int64_t inner, const T* b, T* out, int64_t rows,
                 int64_t count, int64_t n) {
  multiply_columns<T, 64>(a, row, inner, b, out, rows, count, n);
}
template <class T>
FASTVAE_TARGET("arch=x86-64-v3")
void multiply_v3(const T* a, int64_t row, int64_t inner, const T* b, T* out, int64_t rows,
                 int64_t count, int64_t n) {
  multiply_columns<T, 32>(a, row, inner, b, out, rows, count, n);
}
#endif
#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif
template <class T>
void multiply(const T* a, int64_t row, int64_t inner, const T* b, T* out, int64_t rows,
              int64_t count, int64_t n) {
#ifdef FASTVAE_MULTIVERSION
  static const int level = __builtin_cpu_supports("x86-64-v4")   ? 4
                           : __builtin_cpu_supports("x86-64-v3") ? 3
                                                                 : 1;
  if (level == 4) return multiply_v4(a, row, inner, b, out, rows, count, n);
  if (level == 3) return multiply_v3(a, row, inner, b, out, rows, count, n);
#endif
  multiply_columns<T, kVectorBytes>(a, row, inner, b, out, rows, count, n);
}

template <class T>
FASTVAE_HD void bend(T x, T b, T gain, T w_v, T& bent, T& log_det) {
  const Planar::Step<T> step(x + b, gain, w_v);
  bent = step.there;
  log_det = step.log_det;
}
// Of `rows` rows of w numbers, A z, makes tanh(A z + b) and log(1 + h' d).
template <class T>
FASTVAE_CLONES void bend_rows(const T* x, const T* b, const T* gain, const T* w_v, T* bent,
                              T* log_det, int64_t rows, int64_t w) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x + r * w;
    T *to = bent + r * w, *log = log_det + r * w;
#pragma omp simd
    for (int64_t m = 0; m < w; ++m) bend(from[m], b[m], gain[m], w_v[m], to[m], log[m]);
  }
}
// The first alone, to walk the steps again.
template <class T>
FASTVAE_CLONES void bend_again(const T* x, const T* b, T* bent, int64_t rows, int64_t w) {
  for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
    for (int64_t m = 0; m < w; ++m) bent[r * w + m] = math::tanh(x[r * w + m] + b[m]).value;
  }
}

template <class T>
FASTVAE_HD void unbend(T& x, T b, T gain, T w_v, T& weighed, T grad_log_det, T& d_b, T& d_gain) {
  const Planar::Step<T> step(x + b, gain, w_v);
  const Planar::Back<T> back(step, weighed, grad_log_det, nullptr, T(0));
  x = step.there;
  weighed = back.slope;
  d_b += back.numbers[0];
  d_gain += back.numbers[1];
}
// Of A z and C^T grad makes tanh and the gradient of A z.
template <class T>
FASTVAE_CLONES void unbend_rows(T* x, const T* b, const T* gain, const T* w_v, T* weighed,
                                const T* grad_log_det, T* d_b, T* d_gain, int64_t rows, int64_t w) {
  for (int64_t r = 0; r < rows; ++r) {
    T *at = x + r * w, *slope = weighed + r * w;
    const T grad = grad_log_det[r];
#pragma omp simd
    for (int64_t m = 0; m < w; ++m) {
      unbend(at[m], b[m], gain[m], w_v[m], slope[m], grad, d_b[m], d_gain[m]);
    }
  }
}

// Lines of a block's rows: how far those of neighbours lie apart, 0 where all rows have the same.
// Rows beyond the last repeat it.
template <class Line>
struct LinesOf {
  Line first;
  int64_t apart, rows;

  FASTVAE_HD int64_t at(int64_t r) const { return std::min(r, rows - 1) * apart; }
};

template <class T>
FASTVAE_HD void solve(T& x, T b, T gain, T w_v, T& back, T& log_det) {
  const T numbers[] = {b, gain};
  x = Planar::solve(x, numbers);
  const Planar::Step<T> step(x, gain, w_v);
  back = step.back;
  log_det = -step.log_det;
}
// Of rows of w numbers, A z, makes the arguments of tanh before the step, what takes the rows back,
// and the logarithms, if they are wanted.
template <class T>
FASTVAE_CLONES void solve_rows(T* x, LinesOf<SylvesterLine<const T>> lines, T* back, T* log_det,
                               int64_t rank, int64_t w) {
  alignas(64) T at[kRows], b[kRows], gain[kRows], w_v[kRows], by[kRows], log[kRows];
  for (int64_t m = rank - 1; m >= 0; --m) {
    for (int r = 0; r < kRows; ++r) {
      const int64_t line = lines.at(r) + m;
      at[r] = x[r * w + m];
      b[r] = lines.first.b[line];
      gain[r] = lines.first.gain[line];
      w_v[r] = lines.first.w_v[line];
    }
#pragma omp simd
    for (int r = 0; r < kRows; ++r) solve(at[r], b[r], gain[r], w_v[r], by[r], log[r]);
    const int64_t before = (m + kLanes - 1) / kLanes * kLanes;
    for (int64_t r = 0; r < lines.rows; ++r) {
      const T *column = lines.first.t_t + lines.at(r) + m * w, known = by[r];
      T* row = x + r * w;
#pragma omp simd
      for (int64_t i = 0; i < before; ++i) row[i] += column[i] * known;
      row[m] = at[r];
      back[r * w + m] = by[r];
      if (log_det != nullptr) log_det[r * w + m] = log[r];
    }
  }
}

template <class T>
FASTVAE_HD void unsolve(T& x, T gain, T w_v, T& weighed, T grad_log_det, T& d_gain) {
  const Planar::Step<T> step(x, gain, w_v);
  const Planar::Back<T> back = Planar::Back<T>::inverse(step, weighed, grad_log_det, nullptr, T(0));
  x = back.shift;
  weighed = back.slope;
  d_gain = back.numbers[1] + back.slope * back.shift;
}
// Of the arguments and C^T grad makes what took the rows back, and the gradient of A z.
template <class T>
FASTVAE_CLONES void unsolve_rows(T* x, LinesOf<SylvesterLine<const T>> lines, T* weighed,
                                 const T* grad_log_det, LinesOf<SylvesterGradient<T>> d,
                                 int64_t rank, int64_t w) {
  alignas(64) T at[kRows], gain[kRows], w_v[kRows], slope[kRows], d_gain[kRows], grad[kRows];
  std::copy_n(grad_log_det, kRows, grad);
  for (int64_t m = 0; m < rank; ++m) {
    for (int r = 0; r < kRows; ++r) {
      const int64_t line = lines.at(r) + m;
      at[r] = x[r * w + m];
      gain[r] = lines.first.gain[line];
      w_v[r] = lines.first.w_v[line];
      slope[r] = weighed[r * w + m];
    }
#pragma omp simd
    for (int r = 0; r < kRows; ++r) {
      unsolve(at[r], gain[r], w_v[r], slope[r], grad[r], d_gain[r]);
    }
    const int64_t after = m / kLanes * kLanes;
    for (int64_t r = 0; r < lines.rows; ++r) {
      const T *line = lines.first.t + lines.at(r) + m * w, known = slope[r];
      T* row = weighed + r * w;
#pragma omp simd
      for (int64_t i = after; i < w; ++i) row[i] += line[i] * known;
      row[m] = slope[r];
      x[r * w + m] = at[r];
      d.first.b[d.at(r) + m] += slope[r];
      d.first.gain[d.at(r) + m] += d_gain[r];
    }
  }
}

// Of diagonals of R and S as given, those that the steps have, w_v and the gain; and backwards.
template <class T>
FASTVAE_CLONES void constrain_diagonals(const T* r, const T* s, T* to_r, T* to_s, T* w_v, T* gain,
                                        int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Values<T, 4> values = SylvesterDiagonal::Forward::eval(r[i], s[i]);
    to_r[i] = values.v[0];
    to_s[i] = values.v[1];
    w_v[i] = values.v[2];
    gain[i] = values.v[3];
  }
}
template <class T>
FASTVAE_CLONES void pull_diagonals(const T* r, const T* s, T* d_r, T* d_s, const T* d_gain,
                                   int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Values<T, 2> d = SylvesterDiagonal::Backward::eval(r[i], s[i], d_r[i], d_s[i], d_gain[i]);
    d_r[i] = d.v[0];
    d_s[i] = d.v[1];
  }
}

// The numbers of a buffer; of one of no lanes there are none.
template <class T>
T* at(std::vector<Lanes<T>>& x) {
  return reinterpret_cast<T*>(x.data());
}

// What is made of a step's parameters before any row, and of a line's gradient after all.
template <class T>
class LineTask {
 public:
  explicit LineTask(const SylvesterSweep& s)
      : s_(s),
        r_(square()),
        s_full_(square()),
        turned_(square()),
        d_r_(square()),
        d_s_(square()),
        d_q_(static_cast<size_t>(s.dims * s.rank_width / kLanes)),
        diagonals_(static_cast<size_t>(6 * s.rank_width / kLanes)) {}

  // Lines begin..end of the table.
  void lay_out(int64_t begin, int64_t end, T* table) {
    const int64_t w = s_.rank_width;
    for (int64_t n = begin; n < end; ++n) {
      T* to = table + n * s_.line_size();
      std::fill_n(to, s_.line_size(), T(0));
      const SylvesterLine<T> line(s_, to);
      const T *q = given(0, n, s_.dims), *b = given(3, n, 1);
      read(n, line.w_v, line.gain);
      std::copy_n(b, s_.rank, line.b);
      turn(at(s_full_), s_.rank, w, at(turned_), w);
      multiply(q, s_.rank, 1, at(turned_), line.in, s_.dims, s_.rank, w);
      multiply(q, s_.rank, 1, at(r_), line.out, s_.dims, s_.rank, w);
      turn(line.in, s_.dims, w, line.in_t, s_.width);
      turn(line.out, s_.dims, w, line.out_t, s_.width);
      if (!s_.inverse) continue;
      multiply(at(s_full_), w, 1, at(r_), line.t, s_.rank, s_.rank, w);
      keep_above(line.t);
      turn(line.t, s_.rank, w, line.t_t, w);
    }
  }

  // Of the gradients of lines begin..end, which may be those of `parts` runs of rows, apart by all
  // of the lines, makes those of what was given.
  void pull(int64_t begin, int64_t end, T* gradients, int64_t parts) {
    const int64_t w = s_.rank_width, size = s_.gradient_size();
    for (int64_t n = begin; n < end; ++n) {
      T* sum = gradients + n * size;
      for (int64_t p = 1; p < parts; ++p) add_to(sum + p * s_.steps * size, size, sum);
      const SylvesterGradient<T> d(s_, sum);
      const T* q = given(0, n, s_.dims);
      read(n, diagonal(4), diagonal(5));
      for (auto* x : {&d_q_, &d_r_, &d_s_}) std::fill(x->begin(), x->end(), Lanes<T>{});
      if (s_.d_given[0] != nullptr) {
        turn(at(r_), s_.rank, w, at(turned_), w);
        multiply(d.out, w, 1, at(turned_), at(d_q_), s_.dims, s_.rank, w);
        multiply(d.in, w, 1, at(s_full_), at(d_q_), s_.dims, s_.rank, w);
        write(0, n, s_.dims, at(d_q_));
      }
      // Of R, and of the transpose of S.
      multiply(q, 1, s_.rank, d.out, at(d_r_), s_.rank, s_.dims, w);
      multiply(q, 1, s_.rank, d.in, at(d_s_), s_.rank, s_.dims, w);
      if (s_.inverse) {
        keep_above(d.t);
        turn(d.t, s_.rank, w, at(turned_), w);
        multiply(at(s_full_), 1, w, d.t, at(d_r_), s_.rank, s_.rank, w);
        multiply(at(r_), w, 1, at(turned_), at(d_s_), s_.rank, s_.rank, w);
      }
      turn(at(d_s_), s_.rank, w, at(turned_), w);
      for (int64_t i = 0; i < s_.rank; ++i) {
        diagonal(2)[i] = at(d_r_)[i * (w + 1)];
        diagonal(3)[i] = at(turned_)[i * (w + 1)];
      }
      pull_diagonals(diagonal(0), diagonal(1), diagonal(2), diagonal(3), d.gain, s_.rank);
      write_triangle(1, n, at(d_r_), diagonal(2));
      write_triangle(2, n, at(turned_), diagonal(3));
      write(3, n, 1, d.b);
    }
  }

 private:
  using Buffer = std::vector<Lanes<T>>;
  size_t square() const { return static_cast<size_t>(s_.rank * s_.rank_width / kLanes); }
  T* diagonal(int i) { return at(diagonals_) + i * s_.rank_width; }
  const T* given(int i, int64_t n, int64_t rows) const {
    return static_cast<const T*>(s_.given[i]) + n * rows * s_.rank;
  }

  // The triangles of line n, of which is zero what is not above the diagonals.
  void read(int64_t n, T* w_v, T* gain) {
    const int64_t w = s_.rank_width;
    for (int i = 0; i < 2; ++i) {
      const T* from = given(1 + i, n, s_.rank);
      T* to = at(i == 0 ? r_ : s_full_);
      for (int64_t j = 0; j < s_.rank; ++j) {
        diagonal(i)[j] = from[j * (s_.rank + 1)];
        std::copy(from + j * s_.rank + j + 1, from + (j + 1) * s_.rank, to + j * w + j + 1);
      }
    }
    constrain_diagonals(diagonal(0), diagonal(1), diagonal(2), diagonal(3), w_v, gain, s_.rank);
    for (int64_t j = 0; j < s_.rank; ++j) {
      at(r_)[j * (w + 1)] = diagonal(2)[j];
      at(s_full_)[j * (w + 1)] = diagonal(3)[j];
    }
  }
  // The transpose of `rows` rows of the rank.
  void turn(const T* from, int64_t rows, int64_t w, T* to, int64_t to_w) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t m = 0; m < s_.rank; ++m) to[m * to_w + i] = from[i * w + m];
    }
  }
  void keep_above(T* t) const {
    for (int64_t i = 0; i < s_.rank; ++i) std::fill_n(t + i * s_.rank_width, i + 1, T(0));
  }
  void write(int i, int64_t n, int64_t rows, const T* from) const {
    for (int64_t j = 0; s_.d_given[i] != nullptr && j < rows; ++j) {
      T* to = static_cast<T*>(s_.d_given[i]) + (n * rows + j) * s_.rank;
      std::copy_n(from + j * s_.rank_width, s_.rank, to);
    }
  }
  void write_triangle(int i, int64_t n, T* from, const T* diagonal) const {
    keep_above(from);
    for (int64_t j = 0; j < s_.rank; ++j) from[j * (s_.rank_width + 1)] = diagonal[j];
    write(i, n, s_.rank, from);
  }

  const SylvesterSweep& s_;
  Buffer r_, s_full_, turned_, d_r_, d_s_, d_q_, diagonals_;
};

template <class T>
class ProductTask {
 public:
  static int64_t blocks(const SylvesterSweep& s) { return (s.rows + kRows - 1) / kRows; }
  static int64_t chunks(const SylvesterSweep& s) {
    return s.shared ? std::min(kMaxChunks, blocks(s)) : blocks(s);
  }

  explicit ProductTask(const SylvesterSweep& s)
      : s_(s), tile_(kRows * s.width), bends_(kRows * s.rank_width) {}

  // Blocks begin..end.
  void forward(int64_t begin, int64_t end) {
    Buffer tile(lanes(tile_)), arguments(lanes(bends_)), bends(lanes(bends_)), logs(lanes(bends_));
    T *z = at(tile), *x = at(arguments), *bent = at(bends), *log = at(logs);
    for (int64_t block = begin; block < end; ++block) {
      start(block);
      double log_det[kRows] = {};
      read_rows(s_.z, z);
      for (int64_t k = 0; k < s_.steps; ++k) {
        std::fill_n(x, bends_, T(0));
        measure(k, z, x);
        bend(k, x, bent, log);
        move(k, bent, z);
        for (int r = 0; r < count_; ++r) {
          for (int64_t m = 0; m < s_.rank; ++m) log_det[r] += double(log[r * s_.rank_width + m]);
        }
      }
      write_rows(z, s_.out);
      for (int r = 0; r < count_; ++r) {
        static_cast<T*>(s_.log_det)[first_ + r] = static_cast<T>(log_det[r]);
      }
    }
  }

  // Chunks begin..end of the blocks. The gradients of lines go to s.d_lines, [chunks, K] of those
  // that rows share, or [rows, K].
  void backward(int64_t begin, int64_t end) {
    Buffer states(lanes(s_.steps * tile_)), bends(lanes(s_.steps * bends_)), grads(lanes(tile_)),
        weights(lanes(bends_)), folded(lanes(s_.steps * s_.gradient_size()));
    T *grad = at(grads), *weighed = at(weights), *sums = at(folded);
    const auto z = [&](int64_t k) { return at(states) + k * tile_; };  // before the k-th
    const auto x = [&](int64_t k) { return at(bends) + k * bends_; };
    T grad_log_det[kRows];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t all = blocks(s_), parts = chunks(s_), size = s_.steps * s_.gradient_size();
      const int64_t first = chunk * all / parts, last = (chunk + 1) * all / parts;
      T* total = static_cast<T*>(s_.d_lines) + (s_.shared ? chunk * size : 0);
      if (s_.shared) std::fill_n(total, size, T(0));
      for (int64_t block = first; block < last; ++block) {
        start(block);
        if (!s_.shared) std::fill_n(total + first_ * size, count_ * size, T(0));
        read_rows(s_.z, z(0));
        for (int64_t k = 0; k < s_.steps; ++k) {
          std::fill_n(x(k), bends_, T(0));
          measure(k, z(k), x(k));
          const bool is_last = k + 1 == s_.steps;
          if (!is_last || s_.inverse) bend(k, x(k), weighed, nullptr);
          if (is_last) break;
          std::copy_n(z(k), tile_, z(k + 1));
          move(k, weighed, z(k + 1));
        }
        read_rows(s_.grad_out, grad);
        std::fill_n(grad_log_det, kRows, T(0));
        if (s_.grad_log_det != nullptr) {
          std::copy_n(static_cast<const T*>(s_.grad_log_det) + first_, count_, grad_log_det);
        }
        for (int64_t k = s_.steps - 1; k >= 0; --k) {
          std::fill_n(weighed, bends_, T(0));
          each_line(k, [&](const Line& line, int64_t r, int64_t n) {
            multiply(grad + r * s_.width, s_.width, 1, line.out, weighed + r * s_.rank_width, n,
                     s_.dims, s_.rank_width);
          });
          T* d_step = (s_.shared ? sums : total + first_ * size) + step(k) * s_.gradient_size();
          const LinesOf<Gradient> d{{s_, d_step}, s_.shared ? 0 : size, count_};
          unbend(k, x(k), weighed, grad_log_det, d);
          each_line(k, [&](const Line& line, int64_t r, int64_t n) {
            const Gradient of(s_, d_step + d.at(r));
            T *g = grad + r * s_.width, *w = weighed + r * s_.rank_width;
            const T* at = x(k) + r * s_.rank_width;
            multiply(g, 1, s_.width, at, of.out, s_.dims, n, s_.rank_width);
            multiply(z(k) + r * s_.width, 1, s_.width, w, of.in, s_.dims, n, s_.rank_width);
            if (s_.inverse) multiply(w, 1, s_.rank_width, at, of.t, s_.rank, n, s_.rank_width);
            multiply(w, s_.rank_width, 1, line.in_t, g, n, s_.rank, s_.width);
          });
        }
        write_rows(grad, s_.d_z);
        if (s_.shared && ((block - first) % kFold == kFold - 1 || block + 1 == last)) {
          add_to(sums, size, total);
          std::fill_n(sums, size, T(0));
        }
      }
    }
  }

 private:
  using Buffer = std::vector<Lanes<T>>;
  static size_t lanes(int64_t n) { return static_cast<size_t>((n + kLanes - 1) / kLanes); }

  using Line = SylvesterLine<const T>;
  using Gradient = SylvesterGradient<T>;

  // The k-th step of a walk.
  int64_t step(int64_t k) const { return s_.inverse ? s_.steps - 1 - k : k; }
  Line line(int64_t n) const { return {s_, static_cast<const T*>(s_.lines) + n * s_.line_size()}; }
  // Calls work(line, first row of the block, how many rows).
  template <class Work>
  void each_line(int64_t k, const Work& work) const {
    if (s_.shared) return work(line(step(k)), 0, kRows);
    for (int64_t r = 0; r < count_; ++r) work(line((first_ + r) * s_.steps + step(k)), r, 1);
  }
  LinesOf<Line> all_lines(int64_t k) const {
    if (s_.shared) return {line(step(k)), 0, kRows};
    return {line(first_ * s_.steps + step(k)), s_.steps * s_.line_size(), count_};
  }

  // A step of all rows of a block: A z, zero at first; what is made of it; and the move by that.
  void measure(int64_t k, const T* z, T* x) const {
    each_line(k, [&](const Line& line, int64_t r, int64_t n) {
      multiply(z + r * s_.width, s_.width, 1, line.in, x + r * s_.rank_width, n, s_.dims,
               s_.rank_width);
    });
  }
  void bend(int64_t k, T* x, T* bent, T* log) const {
    if (s_.inverse) return solve_rows(x, all_lines(k), bent, log, s_.rank, s_.rank_width);
    each_line(k, [&](const Line& line, int64_t r, int64_t n) {
      const int64_t at = r * s_.rank_width;
      if (log == nullptr) return bend_again(x + at, line.b, bent + at, n, s_.rank_width);
      bend_rows(x + at, line.b, line.gain, line.w_v, bent + at, log + at, n, s_.rank_width);
    });
  }
  void move(int64_t k, const T* bent, T* z) const {
    each_line(k, [&](const Line& line, int64_t r, int64_t n) {
      multiply(bent + r * s_.rank_width, s_.rank_width, 1, line.out_t, z + r * s_.width, n, s_.rank,
               s_.width);
    });
  }
  void unbend(int64_t k, T* x, T* weighed, const T* grad_log_det,
              const LinesOf<Gradient>& d) const {
    if (s_.inverse) {
      return unsolve_rows(x, all_lines(k), weighed, grad_log_det, d, s_.rank, s_.rank_width);
    }
    each_line(k, [&](const Line& line, int64_t r, int64_t n) {
      const int64_t at = r * s_.rank_width;
      unbend_rows(x + at, line.b, line.gain, line.w_v, weighed + at, grad_log_det + r,
                  d.first.b + d.at(r), d.first.gain + d.at(r), n, s_.rank_width);
    });
  }

  void start(int64_t block) {
    first_ = block * kRows;
    count_ = static_cast<int>(std::min<int64_t>(kRows, s_.rows - first_));
  }
  // Zero where there is none, and of the padding.
  void read_rows(const void* from, T* to) const {
    std::fill_n(to, tile_, T(0));
    for (int r = 0; from != nullptr && r < count_; ++r) {
      std::copy_n(static_cast<const T*>(from) + (first_ + r) * s_.dims, s_.dims, to + r * s_.width);
    }
  }
  void write_rows(const T* from, void* to) const {
    for (int r = 0; to != nullptr && r < count_; ++r) {
      std::copy_n(from + r * s_.width, s_.dims, static_cast<T*>(to) + (first_ + r) * s_.dims);
    }
  }

  const SylvesterSweep& s_;
  const int64_t tile_, bends_;
  int64_t first_ = 0;
  int count_ = 0;
};

}  // namespace fastvae::cpu
