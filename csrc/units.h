// The CPU engine of autoregressive networks (UnrollSweep in autoregressive.h): a row in each lane,
// [unit][row], all units of a block of rows in the cache.
//
// What a column makes known is a few units of each layer: products of few rows by all that is known
// before (products.h), for which two blocks of lanes go together where there are two. Each lane
// adds up the same terms in the same order whatever is beside it, so results are bitwise the same
// for any number of threads and any split of the batch. Rows that fill no block are padded: the
// time of 16.
//
// Threads are the caller's business: run works on blocks [begin, end).
#pragma once

#include <vector>

#include "autoregressive.h"
#include "products.h"

namespace fastvae::cpu {

template <class Activation, class T>
FASTVAE_CLONES void activate(T* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = Activation::eval(x[i]);
}

template <class T>
class UnitTask {
 public:
  static int64_t blocks(const UnrollSweep& s) { return (s.rows + kLanes - 1) / kLanes; }

  explicit UnitTask(const UnrollSweep& s)
      : s_(s),
        element_(element_of(s)),
        activate_(with_activation(s.activation, []<class A>(A) { return &activate<A, T>; })),
        units_(2 * static_cast<size_t>(s.begins[s.layers])),
        z_(2 * static_cast<size_t>(s.dims)),
        given_(s.sums == nullptr ? 0 : 2 * static_cast<size_t>(s.widths[1])),
        one_(std::max(z_.size(), given_.size()) / 2) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block += n_ / kLanes) {
      first_ = block * kLanes;
      n_ = block + 1 < end ? 2 * kLanes : kLanes;
      read(s_.z, s_.dims, z_.data()->at);
      if (s_.sums != nullptr) read(s_.sums, s_.widths[1], given_.data()->at);
      double log_det[2 * kLanes] = {};
      learn(-1);
      for (int64_t d = 0; d < s_.dims; ++d) {
        move(d, log_det);
        learn(d);
      }
      write();
      for (int i = 0; i < n_ && first_ + i < s_.rows; ++i) {
        static_cast<T*>(s_.log_det)[first_ + i] = static_cast<T>(log_det[i]);
      }
    }
  }

 private:
  using Buffer = std::vector<Lanes<T>>;

  static Loops<T> element_of(const UnrollSweep& s) {
    return with_kind(s.kind, [&]<class Kind>(Kind) {
      using L = Loops<T>;
      return s.inverse ? L::template of<typename AffineCoupling<Kind, true>::Forward>()
                       : L::template of<typename AffineCoupling<Kind, false>::Forward>();
    });
  }

  T* units(int layer) { return units_.data()->at + s_.begins[layer] * n_; }
  const T* weights(int layer) const { return static_cast<const T*>(s_.weights[layer - 1]); }

  // What a unit's sum begins with.
  void start(int layer, int64_t unit, T* to) const {
    if (layer == 1 && s_.sums != nullptr) {
      std::copy_n(given_.data()->at + unit * n_, n_, to);
    } else {
      std::fill_n(to, n_, static_cast<const T*>(s_.biases[layer - 1])[unit]);
    }
  }

  // x_d, of what is known of the columns before.
  void move(int64_t d, double* log_det) {
    T numbers[2][2 * kLanes] = {}, term[2 * kLanes];
    T* shift = numbers[0];
    for (int64_t p = 0; p < s_.parameters(); ++p) start(s_.layers, p * s_.dims + d, shift + p * n_);
    const int64_t before = s_.widths[s_.layers - 1];
    multiply(weights(s_.layers) + d * before, s_.dims * before, 1, units(s_.layers - 1), shift,
             s_.parameters(), s_.begin(s_.layers - 1, d), n_);
    const T* const arguments[] = {z_.data()->at + d * n_, shift, shift + n_};
    T* const values[] = {units(0) + d * n_, term};
    element_.evaluate(arguments, nullptr, values, n_);
    for (int i = 0; i < n_; ++i) log_det[i] += double(term[i]);
  }

  // The hidden units that become known with column d.
  void learn(int64_t d) {
    for (int layer = 1; layer < s_.layers; ++layer) {
      const int64_t from = s_.begin(layer, d), count = s_.begin(layer, d + 1) - from;
      const int64_t before = s_.widths[layer - 1];
      T* to = units(layer) + from * n_;
      for (int64_t u = 0; u < count; ++u) start(layer, from + u, to + u * n_);
      multiply(weights(layer) + from * before, before, 1, units(layer - 1), to, count,
               s_.begin(layer - 1, d + 1), n_);
      activate_(to, count * n_);
    }
  }

  // Rows of `width` numbers, to [width][n]; the padding repeats the last row.
  void read(const void* from, int64_t width, T* to) {
    for (int half = 0; half < n_; half += kLanes) {
      const T* rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t row = std::min(first_ + half + i, s_.rows - 1);
        rows[i] = static_cast<const T*>(from) + row * width;
      }
      transpose_in(rows, 1, static_cast<int>(width), one_.data()->at);
      for (int64_t c = 0; c < width; ++c) {
        std::copy_n(one_[static_cast<size_t>(c)].at, kLanes, to + c * n_ + half);
      }
    }
  }
  void write() {
    for (int half = 0; half < n_; half += kLanes) {
      T* rows[kLanes] = {};
      const int count = static_cast<int>(std::min<int64_t>(kLanes, s_.rows - first_ - half));
      for (int i = 0; i < count; ++i) {
        rows[i] = static_cast<T*>(s_.x) + (first_ + half + i) * s_.dims;
      }
      for (int64_t c = 0; c < s_.dims; ++c) {
        std::copy_n(units(0) + c * n_ + half, kLanes, one_[static_cast<size_t>(c)].at);
      }
      transpose_out(one_.data()->at, count, 1, static_cast<int>(s_.dims), rows);
    }
  }

  const UnrollSweep& s_;
  const Loops<T> element_;
  void (*const activate_)(T* x, int64_t n);
  Buffer units_, z_, given_;  // [unit][n]: of one block, or of two
  Buffer one_;                // [unit][kLanes]
  int64_t first_ = 0;
  int n_ = kLanes;
};

}  // namespace fastvae::cpu
