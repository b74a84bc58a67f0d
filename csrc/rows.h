// The CPU engine: sweeps the rows of one formula with vector code, on a range of rows.
//
// A formula comes as a Kernel: its shape and its two loops over lanes, for float and for double,
// each compiled for several instruction sets and chosen at load time (FASTVAE_CLONES). Everything
// else, rows.cpp, knows formulas by that alone and is compiled once, not once a formula: a formula
// more costs the build its arithmetic only.
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
// Threads are the caller's business: sweep_units works on [begin, end) of the units it is given.
#pragma once

#include <algorithm>
#include <utility>

#include "noise.h"
#include "sweep.h"

namespace fastvae::cpu {

inline constexpr int64_t kSegment = 64 * 1024;  // longest piece of one row given to one thread

// A unit of work: a whole row, or a segment of a long one.
inline int64_t segments_per_row(int64_t columns) {
  return std::max<int64_t>(1, (columns + kSegment - 1) / kSegment);
}

// ---- loops over lanes -----------------------------------------------------------------------

// (1) Reads n elements of any stride, (3) writes them, converting half types.
template <class Stored, class T>
FASTVAE_CLONES void gather(const Stored* from, int64_t stride, T* to, int64_t n) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
  } else if (stride == 0) {
    std::fill_n(to, n, T(load(*from)));
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

// (2) values[k][i] = formula(arguments[0][i], ..., parameters) for all i; n is a multiple of
// kLanes.
template <class F, class T, size_t... A, size_t... P, size_t... V>
FASTVAE_HD void evaluate_lanes(const T* const* arguments, const T* parameters, T* const* values,
                               int64_t n, std::index_sequence<A...>, std::index_sequence<P...>,
                               std::index_sequence<V...>) {
  const T* const in[] = {arguments[A]...};
  const T constant[] = {parameters[P]..., T(0)};
  T* const out[] = {values[V]...};
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Values<T, F::kValues> result = F::template eval<T>(in[A][i]..., constant[P]...);
    ((out[V][i] = result.v[V]), ...);
  }
}

template <class F, class T>
FASTVAE_CLONES void evaluate(const T* const* arguments, const T* parameters, T* const* values,
                             int64_t n) {
  evaluate_lanes<F, T>(arguments, parameters, values, n, std::make_index_sequence<F::kArguments>{},
                       std::make_index_sequence<F::shape.parameters>{},
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

// ---- the engine ---------------------------------------------------------------------------

// The loops of a formula for one type; any_needs_noise is null where every element does.
template <class T>
struct Loops {
  void (*evaluate)(const T* const* arguments, const T* parameters, T* const* values, int64_t n);
  bool (*any_needs_noise)(const T* const* arguments, int64_t n);

  template <class F>
  static Loops of() {
    if constexpr (DrawsOnDemand<F, T>) return {&cpu::evaluate<F, T>, &cpu::any_needs_noise<F, T>};
    return {&cpu::evaluate<F, T>, nullptr};
  }
};

// All that the engine knows of a formula.
struct Kernel {
  Shape shape;
  Loops<float> in_float;
  Loops<double> in_double;
};

template <class F>
const Kernel& kernel_of() {
  static const Kernel kernel{F::shape, Loops<float>::of<F>(), Loops<double>::of<F>()};
  return kernel;
}

// Sweeps units begin..end. The sums of segments go to s.partial_sums, [rows, segments].
void sweep_units(const Kernel& kernel, const Sweep& s, int64_t begin, int64_t end);

// row_sum[r] = the sum of partial_sums[r, :], in order.
void add_segments(const Sweep& s);

}  // namespace fastvae::cpu
