// The CPU engine of flows by products of matrices (SylvesterSweep in residual_flow.h): all K steps
// of a block of rows, which stay in the cache.
//
// There is one product, of rows by a matrix whose columns are in the lanes, four rows by two
// vectors of columns at a time in registers; given other strides it also sums the gradient of a
// matrix over the rows of a block. Rows with lines of their own are taken one by one.
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
FASTVAE_HD void bend(T& x, T b, T gain, T w_v, T& log_det) {
  const Planar::Step<T> step(x + b, gain, w_v);
  x = step.there;
  log_det = step.log_det;
}
// Of `rows` rows of w numbers, A z, makes tanh(A z + b) and log(1 + h' d).
template <class T>
FASTVAE_CLONES void bend_rows(T* x, const T* b, const T* gain, const T* w_v, T* log_det,
                              int64_t rows, int64_t w) {
  for (int64_t r = 0; r < rows; ++r) {
    T *at = x + r * w, *log = log_det + r * w;
#pragma omp simd
    for (int64_t m = 0; m < w; ++m) bend(at[m], b[m], gain[m], w_v[m], log[m]);
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
    Buffer tile(lanes(tile_)), bends(lanes(bends_)), logs(lanes(bends_));
    T *z = tile.data()->at, *x = bends.data()->at, *log = logs.data()->at;
    for (int64_t block = begin; block < end; ++block) {
      start(block);
      double log_det[kRows] = {};
      read_rows(s_.z, z);
      for (int64_t k = 0; k < s_.steps; ++k) {
        std::fill_n(x, bends_, T(0));
        each_line(k, [&](const Lines& line, int64_t r, int64_t n) {
          T *row = z + r * s_.width, *bent = x + r * s_.rank_width;
          multiply(row, s_.width, 1, line.in, bent, n, s_.dims, s_.rank_width);
          bend_rows(bent, line.b, line.gain, line.w_v, log + r * s_.rank_width, n, s_.rank_width);
          multiply(bent, s_.rank_width, 1, line.out_t, row, n, s_.rank, s_.width);
        });
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

  // Chunks begin..end of the blocks. The gradients of lines are added to s.d_lines, [chunks, K] of
  // those that rows share, or [rows, K].
  void backward(int64_t begin, int64_t end) {
    Buffer states(lanes(s_.steps * tile_)), bends(lanes(s_.steps * bends_)), grads(lanes(tile_)),
        weights(lanes(bends_)), folded(lanes(s_.steps * s_.d_stride));
    T *grad = grads.data()->at, *weighed = weights.data()->at, *sums = folded.data()->at;
    const auto z = [&](int64_t k) { return states.data()->at + k * tile_; };  // before step k
    const auto x = [&](int64_t k) { return bends.data()->at + k * bends_; };
    T grad_log_det[kRows];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t all = blocks(s_), parts = chunks(s_), size = s_.steps * s_.d_stride;
      const int64_t first = chunk * all / parts, last = (chunk + 1) * all / parts;
      T* total = static_cast<T*>(s_.d_lines) + (s_.shared ? chunk * size : 0);
      for (int64_t block = first; block < last; ++block) {
        start(block);
        read_rows(s_.z, z(0));
        for (int64_t k = 0; k < s_.steps; ++k) {
          std::fill_n(x(k), bends_, T(0));
          const bool is_last = k + 1 == s_.steps;
          if (!is_last) std::copy_n(z(k), tile_, z(k + 1));
          each_line(k, [&](const Lines& line, int64_t r, int64_t n) {
            T* at = x(k) + r * s_.rank_width;
            multiply(z(k) + r * s_.width, s_.width, 1, line.in, at, n, s_.dims, s_.rank_width);
            if (is_last) return;
            T* bent = weighed + r * s_.rank_width;
            bend_again(at, line.b, bent, n, s_.rank_width);
            multiply(bent, s_.rank_width, 1, line.out_t, z(k + 1) + r * s_.width, n, s_.rank,
                     s_.width);
          });
        }
        read_rows(s_.grad_out, grad);
        std::fill_n(grad_log_det, kRows, T(0));
        if (s_.grad_log_det != nullptr) {
          std::copy_n(static_cast<const T*>(s_.grad_log_det) + first_, count_, grad_log_det);
        }
        for (int64_t k = s_.steps - 1; k >= 0; --k) {
          std::fill_n(weighed, bends_, T(0));
          each_line(k, [&](const Lines& line, int64_t r, int64_t n) {
            T* d = s_.shared ? sums + k * s_.d_stride
                             : total + ((first_ + r) * s_.steps + k) * s_.d_stride;
            T *d_in = d, *d_out = d_in + s_.dims * s_.rank_width,
              *d_b = d_out + s_.dims * s_.rank_width, *d_gain = d_b + s_.rank_width;
            T *g = grad + r * s_.width, *w = weighed + r * s_.rank_width;
            T* at = x(k) + r * s_.rank_width;
            multiply(g, s_.width, 1, line.out, w, n, s_.dims, s_.rank_width);
            unbend_rows(at, line.b, line.gain, line.w_v, w, grad_log_det + r, d_b, d_gain, n,
                        s_.rank_width);
            multiply(g, 1, s_.width, at, d_out, s_.dims, n, s_.rank_width);
            multiply(z(k) + r * s_.width, 1, s_.width, w, d_in, s_.dims, n, s_.rank_width);
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

  struct Lines {
    const T *in, *in_t, *out, *out_t, *b, *gain, *w_v;
  };
  Lines lines(int64_t n) const {
    const T* in = static_cast<const T*>(s_.lines) + n * s_.stride;
    const int64_t tall = s_.dims * s_.rank_width, wide = s_.rank * s_.width;
    const T *in_t = in + tall, *out = in_t + wide, *out_t = out + tall, *b = out_t + wide;
    return {in, in_t, out, out_t, b, b + s_.rank_width, b + 2 * s_.rank_width};
  }
  // Calls work(lines of step k, first row of the block, how many rows).
  template <class Work>
  void each_line(int64_t k, const Work& work) const {
    if (s_.shared) return work(lines(k), 0, kRows);
    for (int64_t r = 0; r < count_; ++r) work(lines((first_ + r) * s_.steps + k), r, 1);
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
