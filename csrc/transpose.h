// Sixteen lanes of rows: to have a row in each lane where columns are adjacent in memory, and the
// sums over the lanes of several rows at once.
#pragma once

#include <algorithm>
#include <type_traits>

#include "noise.h"

namespace fastvae::cpu {

template <class T>
struct alignas(64) Lanes {
  T at[kLanes];
};

// Runs of n elements, one of each row, to [element][row], and back. Where they follow one another,
// four by four: sixteen numbers by eight shuffles.
template <class T>
struct FourOf;
template <>
struct FourOf<float> {
  typedef float type __attribute__((vector_size(16)));
};
template <>
struct FourOf<double> {
  typedef double type __attribute__((vector_size(32)));
};
template <class T>
using Four = typename FourOf<T>::type;

template <class T>
FASTVAE_HD void transpose_four(const T* const (&from)[4], T* const (&to)[4]) {
  Four<T> a[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&a[i], from[i], sizeof a[i]);
  const Four<T> low01 = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5),
                high01 = __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7),
                low23 = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5),
                high23 = __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
  const Four<T> b[] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                       __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                       __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                       __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) __builtin_memcpy(to[i], &b[i], sizeof b[i]);
}

template <class T, class Stored>
FASTVAE_CLONES void transpose_in(const Stored* const* rows, int64_t stride, int n, T* to) {
  if constexpr (std::is_same_v<T, Stored>) {
    if (stride == 1 && n >= 4) {
      for (int i = 0; i < kLanes; i += 4) {
        for (int k = 0; k < n; k += 4) {
          const int at = std::min(k, n - 4);  // the last four may have been there before
          T* column = to + at * kLanes + i;
          transpose_four<T>({rows[i] + at, rows[i + 1] + at, rows[i + 2] + at, rows[i + 3] + at},
                            {column, column + kLanes, column + 2 * kLanes, column + 3 * kLanes});
        }
      }
      return;
    }
  }
  for (int i = 0; i < kLanes; ++i) {
    const Stored* row = rows[i];
    for (int k = 0; k < n; ++k) to[k * kLanes + i] = load(row[k * stride]);
  }
}

template <class T, class Stored>
FASTVAE_CLONES void transpose_out(const T* from, int count, int64_t stride, int n,
                                  Stored* const* rows) {
  int i = 0;
  if constexpr (std::is_same_v<T, Stored>) {
    for (; stride == 1 && n >= 4 && i + 4 <= count; i += 4) {
      for (int k = 0; k < n; k += 4) {
        const int at = std::min(k, n - 4);
        const T* column = from + at * kLanes + i;
        transpose_four<T>({column, column + kLanes, column + 2 * kLanes, column + 3 * kLanes},
                          {rows[i] + at, rows[i + 1] + at, rows[i + 2] + at, rows[i + 3] + at});
      }
    }
  }
  for (; i < count; ++i) {
    Stored* row = rows[i];
    for (int k = 0; k < n; ++k) store(row[k * stride], from[k * kLanes + i]);
  }
}

// The sums over the lanes of four of them.
template <class T>
FASTVAE_HD Four<T> sum_lanes(const Lanes<T>* x) {
  Four<T> s[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    Four<T> q[4];
    __builtin_memcpy(q, x[j].at, sizeof q);
    s[j] = (q[0] + q[1]) + (q[2] + q[3]);
  }
  const Four<T> low01 = __builtin_shufflevector(s[0], s[1], 0, 4, 1, 5),
                high01 = __builtin_shufflevector(s[0], s[1], 2, 6, 3, 7),
                low23 = __builtin_shufflevector(s[2], s[3], 0, 4, 1, 5),
                high23 = __builtin_shufflevector(s[2], s[3], 2, 6, 3, 7);
  return (__builtin_shufflevector(low01, low23, 0, 1, 4, 5) +
          __builtin_shufflevector(low01, low23, 2, 3, 6, 7)) +
         (__builtin_shufflevector(high01, high23, 0, 1, 4, 5) +
          __builtin_shufflevector(high01, high23, 2, 3, 6, 7));
}

}  // namespace fastvae::cpu
