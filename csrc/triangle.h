// The CPU engine of triangles (covariance.h): line by line, columns in the lanes.
//
// Threads are the caller's business: forward works on rows [begin, end), backward on [begin, end)
// of the strips of kStrip lines that all triangles are cut into. A strip sums over the rows that
// share its triangle, in their order, so results are bitwise the same for any number of threads.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "covariance.h"
#include "rows.h"

namespace fastvae::cpu {

inline constexpr int64_t kStrip = 16;  // lines

// Lines first..last - 1 of one triangle times eps, added to z; and half their squares.
template <class T>
FASTVAE_CLONES T add_lines(const T* lines, int64_t stride, int64_t first, int64_t last,
                           const T* eps, T* z) {
  T kl[kLanes] = {};
  for (int64_t i = first; i < last; ++i, lines += stride) {
    T dot[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= i; j += kLanes) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        dot[l] = Triangle::sample(dot[l], lines[j + l], eps[j + l]);
        kl[l] = Triangle::kl(kl[l], lines[j + l]);
      }
    }
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const T c = j + l < i ? lines[j + l] : T(0);
      dot[l] = Triangle::sample(dot[l], c, eps[j + l]);
      kl[l] = Triangle::kl(kl[l], c);
    }
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int l = 0; l < width; ++l) dot[l] += dot[l + width];
    }
    z[i] += dot[0];
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) kl[l] += kl[l + width];
  }
  return kl[0];
}

// The gradient of lines first..last - 1 from one row: set by the first row that has the triangle,
// added by the others. Without grad_kl nobody reads C. Blocks of lanes are whole as far as the
// diagonal reaches; what lies above it in them is computed and dropped.
template <class T, bool kSets, bool kReads>
FASTVAE_CLONES void gradient_lines(const T* lines, int64_t stride, int64_t first, int64_t last,
                                   int64_t dims, const T* eps, const T* grad_z, T grad_kl,
                                   const T* d_diagonal, T* to) {
  for (int64_t i = first; i < last; ++i, lines += stride, to += dims) {
    const int diagonal = static_cast<int>(i), edge = static_cast<int>((i / kLanes + 1) * kLanes);
    const int columns = static_cast<int>(dims), whole = edge <= columns ? edge : diagonal + 1;
    const T slope = grad_z[i], on_diagonal = d_diagonal[i];
#pragma omp simd
    for (int j = 0; j < whole; ++j) {
      const T below = Triangle::gradient(kReads ? lines[j] : T(0), eps[j], slope, grad_kl);
      const T value = j < diagonal ? below : (j == diagonal ? on_diagonal : T(0));
      to[j] = kSets ? value : to[j] + value;
    }
    if (kSets) std::fill(to + whole, to + columns, T(0));
  }
}

template <class T, class Stored>
class TriangleTask {
 public:
  explicit TriangleTask(const TriangleSweep& s)
      : s_(s),
        noise_(static_cast<size_t>(s.dims + 4 + kNoiseGroup + kLanes)),
        zeros_(s.grad_z == nullptr ? noise_.size() : 0),
        buffer_(static_cast<size_t>(kStrip * s.dims)) {}

  void forward(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* eps = draw(row);
      T* z = static_cast<T*>(s_.z) + row * s_.dims;
      double kl = 0;
      for (int64_t i = 1; i < s_.dims; i += kStrip) {
        const int64_t last = std::min(i + kStrip, s_.dims);
        kl += add_lines(lines(row, i, last), stride(), i, last, eps, z);
      }
      T& sum = static_cast<T*>(s_.kl)[row];
      sum = static_cast<T>(sum + kl);
    }
  }

  static int64_t strips(const TriangleSweep& s) { return (s.dims + kStrip - 1) / kStrip; }

  void backward(int64_t begin, int64_t end) {
    const int64_t strips = TriangleTask::strips(s_), dims = s_.dims;
    std::vector<T> sums(static_cast<size_t>(kStrip * dims));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t triangle = unit / strips, first = unit % strips * kStrip;
      const int64_t last = std::min(first + kStrip, dims);
      Stored* out = static_cast<Stored*>(s_.d_scale_tril) + (triangle * dims + first) * dims;
      T* to = sums.data();
      if constexpr (std::is_same_v<T, Stored>) to = out;
      for (int64_t row = triangle; row < s_.rows; row += s_.triangles) {
        const T* eps = s_.grad_z == nullptr ? zeros_.data() : draw(row);
        const T* grad_z =
            s_.grad_z == nullptr ? zeros_.data() : static_cast<const T*>(s_.grad_z) + row * dims;
        const bool reads = s_.grad_kl != nullptr, sets = row == triangle;
        const T grad_kl = reads ? static_cast<const T*>(s_.grad_kl)[row] : T(0);
        const auto run =
            sets ? (reads ? gradient_lines<T, true, true> : gradient_lines<T, true, false>)
                 : (reads ? gradient_lines<T, false, true> : gradient_lines<T, false, false>);
        run(reads ? lines(row, first, last) : nullptr, reads ? stride() : 0, first, last, dims, eps,
            grad_z, grad_kl, static_cast<const T*>(s_.d_diagonal) + row * dims, to);
      }
      if constexpr (!std::is_same_v<T, Stored>) scatter(to, out, (last - first) * dims);
    }
  }

 private:
  bool is_direct() const { return std::is_same_v<T, Stored> && s_.column_stride == 1; }

  const T* draw(int64_t row) {
    const int64_t element = row * s_.dims;
    fill_normal({static_cast<uint64_t>(s_.key[0]), static_cast<uint64_t>(s_.key[1])},
                static_cast<uint64_t>(element) / 4, noise_.data(), s_.dims + element % 4);
    return noise_.data() + element % 4;
  }
  int64_t stride() const { return is_direct() ? s_.line_stride : s_.dims; }
  // Lines first..last - 1 of a row's triangle, stride() apart, below the diagonal.
  const T* lines(int64_t row, int64_t first, int64_t last) {
    const Stored* from = static_cast<const Stored*>(s_.scale_tril) +
                         row % s_.triangles * s_.triangle_stride + first * s_.line_stride;
    if constexpr (std::is_same_v<T, Stored>) {
      if (is_direct()) return from;
    }
    for (int64_t i = first; i < last; ++i, from += s_.line_stride) {
      gather(from, s_.column_stride, buffer_.data() + (i - first) * s_.dims, i);
    }
    return buffer_.data();
  }

  const TriangleSweep& s_;
  std::vector<T> noise_, zeros_, buffer_;
};

}  // namespace fastvae::cpu
