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

// What one row adds to the gradient of line i, columns 0..i - 1. Without grad_kl nobody reads C.
template <class T>
FASTVAE_CLONES void add_gradient(const T* line, int64_t i, const T* eps, T grad_z, T grad_kl,
                                 T* to) {
  if (line == nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < i; ++j) to[j] += Triangle::gradient(T(0), eps[j], grad_z, T(0));
  } else {
#pragma omp simd
    for (int64_t j = 0; j < i; ++j) to[j] += Triangle::gradient(line[j], eps[j], grad_z, grad_kl);
  }
}

template <class T, class Stored>
class TriangleTask {
 public:
  explicit TriangleTask(const TriangleSweep& s)
      : s_(s),
        noise_(static_cast<size_t>(s.dims + 4 + kNoiseGroup + kLanes)),
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
      std::fill_n(to, (last - first) * dims, T(0));
      for (int64_t row = triangle; row < s_.rows; row += s_.triangles) {
        const T* eps = s_.grad_z == nullptr ? noise_.data() : draw(row);  // zeros, if unused
        const T grad_kl = s_.grad_kl == nullptr ? T(0) : static_cast<const T*>(s_.grad_kl)[row];
        for (int64_t i = first; i < last; ++i) {
          const int64_t at = row * dims + i;
          const T grad_z = s_.grad_z == nullptr ? T(0) : static_cast<const T*>(s_.grad_z)[at];
          T* d_line = to + (i - first) * dims;
          const T* c = s_.grad_kl == nullptr ? nullptr : lines(row, i, i + 1);
          add_gradient(c, i, eps, grad_z, grad_kl, d_line);
          d_line[i] += static_cast<const T*>(s_.d_diagonal)[at];
        }
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
  std::vector<T> noise_, buffer_;
};

}  // namespace fastvae::cpu
