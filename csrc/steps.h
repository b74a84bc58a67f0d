// The CPU engine of residual flows (residual_flow.h): all K steps of a block of rows, which stay in
// the cache, columns in the lanes.
//
// Lines of parameters are constrained first: those that all rows share into a table, a row's own
// with those of its block, so that no more of them lie in memory than a thread works on. A pass
// over the rows moves them by one step and measures them for the next at once; what is a matter of
// a row, its tanh or its logarithm, is then done for all, a row in each lane. Backwards a pass
// takes the gradient through one step and weighs it for the one before. Backward walks the steps
// again and keeps the states of its rows, [K][D], no more.
//
// The inverse walks the steps from the last to the first, so that its backward walks from the first
// to the last; it keeps what lies before each step too, which is where the walk comes to.
//
// Threads are the caller's business: each function works on [begin, end) of its units. Sums over
// rows, which shared parameters want, are made of the sums of at most kMaxChunks runs of rows, in
// order: results are bitwise the same for any number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "residual_flow.h"
#include "transpose.h"

namespace fastvae::cpu {

inline constexpr int64_t kSumColumns = 32 * kLanes;    // summed in T, beyond in double
inline constexpr int64_t kMaxChunks = 64, kFold = 16;  // blocks added up before they join the sum
inline constexpr int kRows = 2 * kLanes;               // of a block
inline constexpr int kGroup = 4;                       // of them at once

// What is done with an element. Each is a function of numbers: variables of a loop over lanes whose
// address is taken keep it from being vectorised. A flow of one vector has it twice.
template <class F, class T>
FASTVAE_HD T moved(T z, T by, T v0, T v1) {
  const T v[] = {v0, v1};
  return F::move(z, by, v);
}
template <class F, class T>
FASTVAE_HD T measure(T z, T v0, T v1) {
  const T v[] = {v0, v1};
  return F::measure(z, v);
}
template <class F, class T>
FASTVAE_HD T weigh(T grad, T z, T v0, T v1) {
  const T v[] = {v0, v1};
  return F::weigh(grad, z, v);
}
template <class F, bool kInverse, class T>
FASTVAE_HD void pull(T& grad, T z, T shift, T slope, T v0, T v1, T& d0, T& d1) {
  const T v[] = {v0, v1};
  T d[] = {T(0), T(0)};
  grad = F::template pull<kInverse>(grad, z, shift, slope, v, d);
  d0 = d[0];
  d1 = d[1];
}

// Four rows at a time share what is loaded of a line, if all rows have it. Their lines, if they
// have their own, and how far those of neighbours lie apart:
template <class T, bool kShared>
struct LineOf {
  const T* first;
  int64_t apart;

  FASTVAE_HD const T* row(int r) const { return kShared ? first : first + r * apart; }
};

// Sixteen columns of a line's vectors; of one vector, twice.
template <class T>
struct VectorLanes {
  Lanes<T> first, second;

  FASTVAE_HD void load(const T* line, int64_t apart) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      first.at[l] = line[l];
      second.at[l] = line[apart + l];
    }
  }
};

// The sums of a block of rows: of all their columns at once, or piece by piece in double.
template <class T>
class RowSums {
 public:
  explicit FASTVAE_HD RowSums(int64_t width) : in_pieces_(width > kSumColumns) {
    if (in_pieces_) std::fill_n(total_, kRows, 0.0);
  }
  // Of rows r..r + 3, each row's lanes.
  FASTVAE_HD void add(int r, const Lanes<T>* sums) {
    const Four<T> sum = sum_lanes(sums);
    __builtin_memcpy(sum_ + r, &sum, sizeof sum);
    for (int j = r; in_pieces_ && j < r + kGroup; ++j) total_[j] += double(sum_[j]);
  }
  FASTVAE_HD void write(T* to) const {
    std::copy_n(sum_, kRows, to);
    for (int r = 0; in_pieces_ && r < kRows; ++r) to[r] = static_cast<T>(total_[r]);
  }

 private:
  const bool in_pieces_;
  alignas(64) T sum_[kRows];
  alignas(64) double total_[kRows];
};

// A block of rows of `width`, z, move along `line`, each as its `by` says; what `next` measures of
// them then goes to `measured`. Before the first step nothing moves.
template <class F, class T, bool kShared, bool kMoves>
FASTVAE_CLONES void advance(const T* z, T* to, int64_t width, LineOf<T, kShared> line,
                            LineOf<T, kShared> next, const T* by_row, T* measured) {
  RowSums<T> totals(width);
  const int64_t second = (F::kVectors - 1) * width;
  for (int64_t first = 0; first < width; first += kSumColumns) {
    const int64_t last = std::min(width, first + kSumColumns);
    for (int r = 0; r < kRows; r += kGroup) {
      const T* x = z + r * width;
      T *y = to + r * width, by[kGroup];
      for (int j = 0; j < kGroup; ++j) by[j] = kMoves ? by_row[r + j] : T(0);
      Lanes<T> sums[kGroup] = {};
      for (int64_t c = first; c < last; c += kLanes) {
        VectorLanes<T> v, n;
#pragma GCC unroll 4
        for (int j = 0; j < kGroup; ++j) {
          if (j == 0 || !kShared) {
            v.load(line.row(r + j) + c, second);
            n.load(next.row(r + j) + c, second);
          }
          const int64_t at = j * width + c;
#pragma omp simd
          for (int l = 0; l < kLanes; ++l) {
            T value = x[at + l];
            if (kMoves) y[at + l] = value = moved<F>(value, by[j], v.first.at[l], v.second.at[l]);
            sums[j].at[l] += measure<F>(value, n.first.at[l], n.second.at[l]);
          }
        }
      }
      totals.add(r, sums);
    }
  }
  totals.write(measured);
}

// The gradient goes back through a step from z along `line`; what the one next, from `z_before`
// along `before`, weighs of it goes to `weighed`. The gradient of the vectors of row r goes to
// d_line, r line.apart further; or that of all rows is added to d_line, if they share it.
template <class F, class T, bool kShared, bool kPulls, bool kInverse>
FASTVAE_CLONES void retreat(T* grad, const T* z, const T* z_before, int64_t width,
                            LineOf<T, kShared> line, LineOf<T, kShared> before, const T* shift,
                            const T* slope, T* weighed, T* d_line) {
  RowSums<T> totals(width);
  const int64_t second = (F::kVectors - 1) * width;
  for (int64_t first = 0; first < width; first += kSumColumns) {
    const int64_t last = std::min(width, first + kSumColumns);
    for (int r = 0; r < kRows; r += kGroup) {
      const T *x = z + r * width, *b = z_before + r * width;
      T *g = grad + r * width, by[kGroup], tilt[kGroup];
      for (int j = 0; j < kGroup; ++j) {
        by[j] = kPulls ? shift[r + j] : T(0);
        tilt[j] = kPulls ? slope[r + j] : T(0);
      }
      Lanes<T> sums[kGroup] = {};
      for (int64_t c = first; c < last; c += kLanes) {
        VectorLanes<T> v, n;
        Lanes<T> d0 = {}, d1 = {};
#pragma GCC unroll 4
        for (int j = 0; j < kGroup; ++j) {
          if (j == 0 || !kShared) {
            v.load(line.row(r + j) + c, second);
            n.load(before.row(r + j) + c, second);
          }
          const int64_t at = j * width + c;
          T* d = d_line + (kShared ? 0 : (r + j) * line.apart) + c;
#pragma omp simd
          for (int l = 0; l < kLanes; ++l) {
            T grad_z = g[at + l], of0, of1;
            if (kPulls) {
              pull<F, kInverse>(grad_z, x[at + l], by[j], tilt[j], v.first.at[l], v.second.at[l],
                                of0, of1);
              g[at + l] = grad_z;
              if (kShared) {
                d0.at[l] += of0;
                d1.at[l] += of1;
              } else {
                d[l] = of0;
                if (F::kVectors > 1) d[second + l] = of1;
              }
            }
            sums[j].at[l] += weigh<F>(grad_z, b[at + l], n.first.at[l], n.second.at[l]);
          }
        }
        if (!kShared || !kPulls) continue;
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) d_line[c + l] += d0.at[l];
        if (F::kVectors == 1) continue;
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) d_line[second + c + l] += d1.at[l];
      }
      totals.add(r, sums);
    }
  }
  totals.write(weighed);
}

// The same of lines: vectors of `width`, one after the other, in place.
template <class F, class T>
FASTVAE_HD Values<T, 2> line_terms(T v0, T v1) {
  const T v[] = {v0, v1};
  return F::line_terms(v);
}
template <class F, class T>
FASTVAE_CLONES Values<T, 2> sum_line(const T* line, int64_t width) {
  const int64_t second = (F::kVectors - 1) * width;
  double sum0 = 0, sum1 = 0;
#pragma omp simd reduction(+ : sum0, sum1)
  for (int64_t d = 0; d < width; ++d) {
    const Values<T, 2> terms = line_terms<F>(line[d], line[second + d]);
    sum0 += double(terms.v[0]);
    sum1 += double(terms.v[1]);
  }
  return {{static_cast<T>(sum0), static_cast<T>(sum1)}};
}

template <class F, class T, class Way>
FASTVAE_HD void write_line(const Way& way, T v0, T v1, T& to0, T& to1) {
  const T v[] = {v0, v1};
  const auto result = way.vectors(v);
  to0 = result.v[0];
  if constexpr (F::kVectors > 1) to1 = result.v[1];
}
template <class F, class T>
FASTVAE_CLONES void constrain_line(const typename F::template Line<T>& line, T* to, int64_t width) {
  T* second = to + (F::kVectors - 1) * width;
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) write_line<F>(line, to[d], second[d], to[d], second[d]);
}

template <class F, class T>
FASTVAE_HD T line_gradient_term(T d0, T d1, T v0, T v1) {
  const T d[] = {d0, d1}, v[] = {v0, v1};
  return F::line_gradient_term(d, v);
}
template <class F, class T>
FASTVAE_CLONES T sum_line_gradient(const T* gradient, const T* line, int64_t width) {
  const int64_t second = (F::kVectors - 1) * width;
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t d = 0; d < width; ++d) {
    total +=
        double(line_gradient_term<F>(gradient[d], gradient[second + d], line[d], line[second + d]));
  }
  return static_cast<T>(total);
}
template <class F, class T>
FASTVAE_HD void finish_number(const typename F::template LineGradient<T>& way, T d0, T d1, T v0,
                              T v1, T& to0, T& to1) {
  const T d[] = {d0, d1}, v[] = {v0, v1};
  const auto result = way.vectors(d, v);
  to0 = result.v[0];
  if constexpr (F::kVectors > 1) to1 = result.v[1];
}
template <class F, class T>
FASTVAE_CLONES void finish_line(const typename F::template LineGradient<T>& way, T* gradient,
                                const T* line, int64_t width) {
  const int64_t second = (F::kVectors - 1) * width;
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) {
    finish_number<F>(way, gradient[d], gradient[second + d], line[d], line[second + d], gradient[d],
                     gradient[second + d]);
  }
}

template <class T>
FASTVAE_CLONES void add_to(const T* x, int64_t n, T* sum) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += x[i];
}

// The step of each lane, and its way back. Its argument takes the place of what was measured.
template <class F, bool kInverse, class T>
FASTVAE_HD void take_step(T& measured, T n0, T n1, T dims, T& by, T& log_det) {
  const T numbers[] = {n0, n1};
  measured = kInverse ? F::solve(measured, numbers) : F::argument(measured, numbers);
  const typename F::template Step<T> step(measured, numbers, dims);
  by = kInverse ? step.back : step.there;
  log_det = kInverse ? -step.log_det : step.log_det;
}
template <class F, class T, bool kInverse, bool kLogDet>
FASTVAE_CLONES void take_steps(T* measured, const T (*numbers)[kRows], T dims, T* by,
                               double* total) {
  alignas(64) T log_det[kRows];
#pragma omp simd
  for (int l = 0; l < kRows; ++l) {
    take_step<F, kInverse>(measured[l], numbers[0][l], numbers[1][l], dims, by[l], log_det[l]);
  }
  for (int l = 0; kLogDet && l < kRows; ++l) total[l] += double(log_det[l]);
}

template <class F, bool kInverse, class T>
FASTVAE_HD void take_back(T argument, T n0, T n1, T dims, T weighed, T grad_log_det, T& shift,
                          T& slope, T& d_n0, T& d_n1) {
  using Back = typename F::template Back<T>;
  const T numbers[] = {n0, n1};
  const typename F::template Step<T> step(argument, numbers, dims);
  const Back back = kInverse ? Back::inverse(step, weighed, grad_log_det, numbers, dims)
                             : Back(step, weighed, grad_log_det, numbers, dims);
  shift = back.shift;
  slope = back.slope;
  d_n0 = back.numbers[0];
  d_n1 = back.numbers[1];
}
template <class F, class T, bool kInverse>
FASTVAE_CLONES void take_steps_back(const T* arguments, const T (*numbers)[kRows], T dims,
                                    const T* weighed, const T* grad_log_det, T* shift, T* slope,
                                    T (*d_numbers)[kRows]) {
#pragma omp simd
  for (int l = 0; l < kRows; ++l) {
    take_back<F, kInverse>(arguments[l], numbers[0][l], numbers[1][l], dims, weighed[l],
                           grad_log_det[l], shift[l], slope[l], d_numbers[0][l], d_numbers[1][l]);
  }
}

template <class F, class T, class Stored>
class FlowTask {
 public:
  static int64_t width_of(const FlowSweep& s) {  // of a vector: whole lanes, padded with zeros
    return (s.dims + kLanes - 1) / kLanes * kLanes;
  }
  // A line in the table, or its gradient: vectors, then two numbers.
  static int64_t stride_of(const FlowSweep& s) { return F::kVectors * width_of(s) + kLanes; }
  static int64_t blocks(const FlowSweep& s) { return (s.rows + kRows - 1) / kRows; }
  static int64_t chunks(const FlowSweep& s) {
    return s.shared ? std::min(kMaxChunks, blocks(s)) : blocks(s);
  }

  FlowTask(const FlowSweep& s, T* table)
      : s_(s), table_(table), width_(width_of(s)), stride_(stride_of(s)) {}

  // Lines begin..end, which all rows share, to the table.
  void constrain(int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) constrain_to(n, table_ + n * stride_);
  }

  // Blocks begin..end.
  void forward(int64_t begin, int64_t end) {
    s_.shared ? forward_as<true>(begin, end) : forward_as<false>(begin, end);
  }

  // Chunks begin..end of the blocks. The gradients of lines that all rows share go to `d_table`,
  // [chunks, K].
  void backward(int64_t begin, int64_t end, T* d_table) {
    s_.shared ? backward_as<true>(begin, end, d_table) : backward_as<false>(begin, end, nullptr);
  }

  // Which are then finished, lines begin..end.
  void finish(int64_t begin, int64_t end, T* d_table) {
    const int64_t part = s_.steps * stride_;
    for (int64_t n = begin; n < end; ++n) {
      T* sum = d_table + n * stride_;
      for (int64_t p = 1; p < chunks(s_); ++p) add_to(sum + p * part, stride_, sum);
      finish_one(n, sum);
    }
  }

 private:
  template <bool kShared>
  void forward_as(int64_t begin, int64_t end) {
    std::vector<Lanes<T>> tile(static_cast<size_t>(kRows * width_ / kLanes));
    T* z = tile.data()->at;
    const auto line = [&](int64_t k) { return this->line<kShared>(k); };
    const auto take = s_.inverse ? take_steps<F, T, true, true> : take_steps<F, T, false, true>;
    alignas(64) T measured[kRows], by[kRows];
    for (int64_t block = begin; block < end; ++block) {
      alignas(64) double log_det[kRows] = {};
      start(block);
      read_rows(s_.z, z);
      advance<F, T, kShared, false>(z, z, width_, line(0), line(0), nullptr, measured);
      for (int64_t k = 0; k < s_.steps; ++k) {
        read_numbers<kShared>(k);
        take(measured, numbers_, dims(), by, log_det);
        const int64_t next = std::min(k + 1, s_.steps - 1);  // of the last step nobody asks
        advance<F, T, kShared, true>(z, z, width_, line(k), line(next), by, measured);
      }
      write_rows(z, s_.out);
      for (int r = 0; r < count_; ++r) {
        static_cast<T*>(s_.log_det)[first_ + r] = static_cast<T>(log_det[r]);
      }
    }
  }

  template <bool kShared>
  void backward_as(int64_t begin, int64_t end, T* d_table) {
    const int64_t steps = s_.steps, all = blocks(s_), parts = chunks(s_), tile = kRows * width_;
    const auto lanes = [](int64_t n) { return static_cast<size_t>(n / kLanes); };
    std::vector<Lanes<T>> states(lanes(steps * tile)), gradients(lanes(tile)),
        measures(lanes(steps * kRows)), folded(lanes((kShared ? 1 : kRows) * apart()));
    T* grad = gradients.data()->at;
    const auto line = [&](int64_t k) { return this->line<kShared>(k); };
    const auto at = [&](int64_t k) { return measures.data()->at + k * kRows; };
    const auto z = [&](int64_t k) { return states.data()->at + k * tile; };
    alignas(64) T shift[kRows], slope[kRows], weighed[kRows], grad_log_det[kRows], last_one[kRows];
    // The walk comes from where a step begins or, in the inverse, where one has just been.
    const bool inverse = s_.inverse;
    const auto from = [&](int64_t k) { return z(inverse ? std::max<int64_t>(k - 1, 0) : k); };
    const auto to = [&](int64_t k) { return z(inverse ? k : k + 1); };
    const auto take = inverse ? take_steps<F, T, true, false> : take_steps<F, T, false, false>;
    const auto take_back = inverse ? take_steps_back<F, T, true> : take_steps_back<F, T, false>;
    const auto pull_back = inverse ? retreat<F, T, kShared, true, !F::kPullsOneWay>
                                   : retreat<F, T, kShared, true, false>;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      T *total = kShared ? d_table + chunk * apart() : nullptr, *sums = folded.data()->at;
      if (kShared) std::fill_n(total, apart(), T(0));
      if (kShared) std::fill_n(sums, apart(), T(0));
      const int64_t first = chunk * all / parts, last = (chunk + 1) * all / parts;
      for (int64_t block = first; block < last; ++block) {
        start(block);
        read_rows(s_.z, z(0));
        advance<F, T, kShared, false>(z(0), z(0), width_, line(0), line(0), nullptr, at(0));
        for (int64_t k = 0; k < steps; ++k) {
          const int64_t next = std::min(k + 1, steps - 1);
          read_numbers<kShared>(k);
          take(at(k), numbers_, dims(), shift, nullptr);
          if (next == k && !inverse) break;
          advance<F, T, kShared, true>(from(k), to(k), width_, line(k), line(next), shift,
                                       next > k ? at(next) : last_one);
        }
        read_grads(grad, grad_log_det);
        const int64_t end_step = steps - 1;
        retreat<F, T, kShared, false, false>(grad, z(end_step), z(end_step), width_, line(end_step),
                                             line(end_step), nullptr, nullptr, weighed, sums);
        for (int64_t k = end_step; k >= 0; --k) {
          read_numbers<kShared>(k);
          take_back(at(k), numbers_, dims(), weighed, grad_log_det, shift, slope, d_numbers_);
          T* d_line = sums + step(k) * stride_;
          const int64_t before = std::max<int64_t>(k - 1, 0);  // of the first step nobody asks
          pull_back(grad, z(k), z(before), width_, line(k), line(before), shift, slope, weighed,
                    d_line);
          for (int i = 0; i < 2; ++i) {
            for (int r = 0; r < count_; ++r) {
              T& to = d_line[(kShared ? 0 : r * apart()) + F::kVectors * width_ + i];
              to = (kShared ? to : T(0)) + d_numbers_[i][r];
            }
          }
        }
        if (!kShared) {
          for (int64_t n = 0; n < count_ * steps; ++n) {
            finish_one(first_ * steps + n, sums + n * stride_);
          }
        }
        if (s_.d_z != nullptr) write_rows(grad, s_.d_z);
        if (kShared && ((block - first) % kFold == kFold - 1 || block + 1 == last)) {
          add_to(sums, apart(), total);
          std::fill_n(sums, apart(), T(0));
        }
      }
    }
  }

  // ---- memory ----

  void start(int64_t block) {
    first_ = block * kRows;
    count_ = static_cast<int>(std::min<int64_t>(kRows, s_.rows - first_));
    if (s_.shared) return;
    lines_.resize(static_cast<size_t>(kRows * apart() / kLanes));
    T* own = lines_.data()->at;
    for (int64_t n = 0; n < count_ * s_.steps; ++n) {
      constrain_to(first_ * s_.steps + n, own + n * stride_);
    }
    for (int r = count_; r < kRows; ++r) {  // the padding repeats the last row
      std::copy_n(own + (count_ - 1) * apart(), apart(), own + r * apart());
    }
  }
  T dims() const { return static_cast<T>(s_.dims); }

  // The k-th step of a walk.
  int64_t step(int64_t k) const { return s_.inverse ? s_.steps - 1 - k : k; }

  template <bool kShared>
  LineOf<T, kShared> line(int64_t k) const {
    return {(kShared ? table_ : lines_.data()->at) + step(k) * stride_, apart()};
  }
  int64_t apart() const { return s_.steps * stride_; }
  int64_t row(int r) const { return first_ + std::min(r, count_ - 1); }
  template <bool kShared>
  void read_numbers(int64_t k) {
    const LineOf<T, kShared> lines = line<kShared>(k);
    for (int r = 0; r < kRows; ++r) {
      const T* from = lines.row(r) + F::kVectors * width_;
      for (int i = 0; i < 2; ++i) numbers_[i][r] = from[i];
    }
  }

  void constrain_to(int64_t n, T* to) const {
    const typename F::template Line<T> line = read_line(n, to);
    constrain_line<F>(line, to, width_);
    std::copy_n(line.numbers, 2, to + F::kVectors * width_);
  }
  // Of the gradient of a line makes that of the line as it was given.
  void finish_one(int64_t n, T* gradient) {
    given_.resize(static_cast<size_t>(stride_ / kLanes));
    T* given = given_.data()->at;
    const typename F::template Line<T> line = read_line(n, given);
    const T total = sum_line_gradient<F>(gradient, given, width_);
    const typename F::template LineGradient<T> way(line, total, gradient + F::kVectors * width_);
    finish_line<F>(way, gradient, given, width_);
    for (int k = 0; k < F::kVectors; ++k) {
      if (s_.d_vectors[k] == nullptr) continue;
      scatter(gradient + k * width_, static_cast<Stored*>(s_.d_vectors[k]) + n * s_.dims, s_.dims);
    }
    for (int k = 0; k < F::kGiven; ++k) {
      if (s_.d_given[k] == nullptr) continue;
      store(static_cast<Stored*>(s_.d_given[k])[n], way.given[k]);
    }
  }
  // A line as it was given, its vectors to `to`.
  typename F::template Line<T> read_line(int64_t n, T* to) const {
    for (int i = 0; i < F::kVectors; ++i) read(s_.vectors[i], n, to + i * width_);
    T given[2] = {};
    for (int i = 0; i < F::kGiven; ++i) given[i] = load(static_cast<const Stored*>(s_.given[i])[n]);
    return {sum_line<F>(to, width_), given};
  }
  void read(const void* from, int64_t row, T* to) const {
    gather(static_cast<const Stored*>(from) + row * s_.dims, 1, to, s_.dims);
    std::fill(to + s_.dims, to + width_, T(0));
  }
  void read_rows(const void* from, T* to) const {
    for (int r = 0; r < kRows; ++r) read(from, row(r), to + r * width_);
  }
  void write_rows(const T* from, void* to) const {
    for (int r = 0; r < count_; ++r) {
      scatter(from + r * width_, static_cast<Stored*>(to) + (first_ + r) * s_.dims, s_.dims);
    }
  }
  // Zero where there is none, and of the padding, which has no part in sums.
  void read_grads(T* grad, T* grad_log_det) const {
    std::fill_n(grad_log_det, kRows, T(0));
    if (s_.grad_log_det != nullptr) {
      std::copy_n(static_cast<const T*>(s_.grad_log_det) + first_, count_, grad_log_det);
    }
    const int given = s_.grad_out == nullptr ? 0 : count_;
    if (given > 0) read_rows(s_.grad_out, grad);
    std::fill(grad + given * width_, grad + kRows * width_, T(0));
  }

  const FlowSweep& s_;
  T* const table_;
  const int64_t width_, stride_;
  int64_t first_ = 0;
  int count_ = 0;
  std::vector<Lanes<T>> lines_, given_;  // a block's own, constrained; and one as it was given
  alignas(64) T numbers_[2][kRows], d_numbers_[2][kRows];
};

}  // namespace fastvae::cpu
