// The CPU engine of rows whose elements know each other, the classes of categorical.h.
//
// A tile of whole rows, or one long row, is gathered into buffers, row after row without a gap. So
// a step of a formula runs over all elements as over one array, kLanes at a time, whether a row has
// two classes or thousands; between the steps each row is reduced (its largest, its sum), and the
// results are spread over it. Buffers are padded to whole vectors: every element passes through the
// same vector loop, and a reduction depends on its row alone, so that results are bitwise the same
// for any number of threads and any split of the batch.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <new>

#include "categorical.h"
#include "rows.h"

namespace fastvae::cpu {

// ---- loops over lanes -------------------------------------------------------------------------

// Rows of fewer classes are reduced a row in each lane, those of more with the classes in lanes.
inline constexpr int64_t kShortRow = 64;

// Of each row of x, [rows, columns], the largest element by R::larger. Beyond the end of x there
// are kLanes elements that may be read.
template <class R, class T>
FASTVAE_CLONES void raise_rows(const T* x, int64_t rows, int64_t columns, T* max) {
  if (columns < kShortRow) {
    std::fill_n(max, rows, -math::kInfinity<T>);
    for (int64_t c = 0; c < columns; ++c) {
#pragma omp simd
      for (int64_t r = 0; r < rows; ++r) max[r] = R::larger(max[r], x[r * columns + c]);
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r, x += columns) {
    T lanes[kLanes];
    std::fill_n(lanes, kLanes, -math::kInfinity<T>);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int rest = static_cast<int>(std::min<int64_t>(kLanes, columns - c));
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        const T larger = R::larger(lanes[l], x[c + l]);
        lanes[l] = l < rest ? larger : lanes[l];
      }
    }
    for (int l = 1; l < kLanes; ++l) lanes[0] = R::larger(lanes[0], lanes[l]);
    max[r] = lanes[0];
  }
}

// The sum of term(c, c < columns) over a long row: kLanes running sums of up to kSumPiece elements,
// then a tree over the lanes; the pieces in double. Whole vectors are asked for, so that a term may
// write what it makes of its column.
inline constexpr int64_t kSumPiece = 32 * kLanes;
template <class T, class Term>
inline __attribute__((always_inline)) T add_long_row(int64_t columns, const Term& term) {
  double total = 0;
  for (int64_t first = 0; first < columns; first += kSumPiece) {
    const int64_t last = std::min(columns, first + kSumPiece);
    T lanes[kLanes] = {};
    for (int64_t c = first; c < last; c += kLanes) {
      const int rest = static_cast<int>(std::min<int64_t>(kLanes, last - c));
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) lanes[l] += term(c + l, l < rest);
    }
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
    }
    total += lanes[0];
  }
  return static_cast<T>(total);
}

template <class T>
FASTVAE_CLONES void add_rows(const T* x, int64_t rows, int64_t columns, T* sum) {
  if (columns < kShortRow) {
    std::fill_n(sum, rows, T(0));
    for (int64_t c = 0; c < columns; ++c) {
#pragma omp simd
      for (int64_t r = 0; r < rows; ++r) sum[r] += x[r * columns + c];
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r, x += columns) {
    sum[r] = add_long_row<T>(columns, [&](int64_t c, bool inside) __attribute__((always_inline)) {
      return inside ? x[c] : T(0);
    });
  }
}

// Each value over its row. Whole vectors are written, up to kLanes elements beyond the end.
template <class T>
FASTVAE_CLONES void spread_rows(const T* values, int64_t rows, int64_t columns, T* to) {
  for (int64_t r = 0; r < rows; ++r, to += columns) {
    for (int64_t c = 0; c < columns; c += kLanes) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) to[c + l] = values[r];
    }
  }
}

// ---- long rows ----------------------------------------------------------------------------------
//
// What short rows do in steps over the tile, a loop over one long row does in one: what the row
// shares stays in registers, and a sum needs no pass of its own. Columns beyond the last one belong
// to the next row: they are left as they are.

// visit(c, c < columns) for all columns, whole vectors of them.
template <class Visit>
inline __attribute__((always_inline)) void over_long_row(int64_t columns, const Visit& visit) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int rest = static_cast<int>(std::min<int64_t>(kLanes, columns - c));
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) visit(c + l, l < rest);
  }
}

// The weights of a softmax, and their sum.
template <class T>
FASTVAE_CLONES void weigh_rows(const T* scores, int64_t rows, int64_t columns, const T* max,
                               T inverse_temperature, T* weights, T* sum) {
  for (int64_t r = 0; r < rows; ++r, scores += columns, weights += columns) {
    const T most = max[r];
    sum[r] = add_long_row<T>(columns, [&](int64_t c, bool inside) __attribute__((always_inline)) {
      const T weight = SoftmaxWeight::eval<T>(scores[c], most, inverse_temperature).v[0];
      weights[c] = inside ? weight : weights[c];
      return inside ? weight : T(0);
    });
  }
}

template <class T>
FASTVAE_CLONES void scale_rows(T* x, int64_t rows, int64_t columns, const T* values) {
  for (int64_t r = 0; r < rows; ++r, x += columns) {
    const T value = values[r];
    over_long_row(columns, [&](int64_t c, bool inside) __attribute__((always_inline)) {
      x[c] = inside ? Product::eval<T>(x[c], value).v[0] : x[c];
    });
  }
}

// What ClassKl asks of a row.
template <class T>
struct KlRow {
  T max_q, max_p, inverse_q, inverse_p, shift;
};
// The classes of rows: logits, and weights. Without a prior those of p are not looked at.
template <class T>
struct KlTile {
  const T *q, *p, *weight_q, *weight_p;
  const KlRow<T>* rows;
  int64_t count, columns;
};
template <bool kPrior, class T>
FASTVAE_HD T log_ratio(const KlTile<T>& x, const KlRow<T>& row, int64_t i) {
  if constexpr (kPrior) {
    return ClassKl::LogRatio::eval<T>(x.q[i], x.p[i], row.max_q, row.max_p).v[0];
  } else {
    return -ClassKl::Below::eval<T>(x.q[i], row.max_q).v[0];
  }
}

template <bool kPrior, class T>
FASTVAE_CLONES void add_kl_rows(const KlTile<T>& tile, T* kl) {
  const KlTile<T> x = tile;
  const T uniform = T(1) / static_cast<T>(x.columns);
  for (int64_t r = 0; r < x.count; ++r) {
    const KlRow<T> row = x.rows[r];
    const int64_t first = r * x.columns;
    kl[r] = add_long_row<T>(x.columns, [&](int64_t c, bool inside) __attribute__((always_inline)) {
      const int64_t i = first + c;
      const T term =
          ClassKl::Term::eval<T>(x.weight_q[i], kPrior ? x.weight_p[i] : uniform, row.inverse_q,
                                 row.inverse_p, log_ratio<kPrior>(x, row, i), row.shift)
              .v[0];
      return inside ? term : T(0);
    });
  }
}

template <bool kPrior, class T>
FASTVAE_CLONES void kl_gradient_rows(const KlTile<T>& tile, const T* kl, const T* grad, T* d_q,
                                     T* d_p) {
  const KlTile<T> x = tile;
  const T uniform = T(1) / static_cast<T>(x.columns);
  for (int64_t r = 0; r < x.count; ++r) {
    const KlRow<T> row = x.rows[r];
    const T row_kl = kl[r], row_grad = grad[r];
    const int64_t first = r * x.columns;
    over_long_row(x.columns, [&](int64_t c, bool inside) __attribute__((always_inline)) {
      const int64_t i = first + c;
      const Values<T, 2> d = ClassKl::Gradient::eval<T>(
          x.weight_q[i], kPrior ? x.weight_p[i] : uniform, row.inverse_q, row.inverse_p,
          log_ratio<kPrior>(x, row, i), row.shift, row_kl, row_grad);
      d_q[i] = inside ? d.v[0] : d_q[i];
      if constexpr (kPrior) d_p[i] = inside ? d.v[1] : d_p[i];
    });
  }
}

// ---- the engine -------------------------------------------------------------------------------

struct Plain {  // NaN loses, which a softmax notices by its sum
  template <class T>
  static FASTVAE_HD T larger(T max, T s) {
    return math::max(max, s);
  }
};

template <class T, class Stored>
class CategorySweep {
 public:
  explicit CategorySweep(const Sweep& sweep)
      : s_(sweep),
        tile_rows_(std::max<int64_t>(1, kTile / std::max<int64_t>(1, s_.columns))),
        stride_((tile_rows_ * s_.columns + 3) / kNoiseGroup * kNoiseGroup + 2 * kNoiseGroup),
        memory_(new (std::align_val_t{64}) T[static_cast<size_t>(kBuffers * stride_)]) {
    std::fill_n(memory_.get(), kBuffers * stride_, T(0));
    inverse_temperature_ = GumbelSoftmax::inverse<T>(s_.parameters[0]);
  }

  // Each runs over rows begin..end.
  void gumbel_softmax(int64_t begin, int64_t end) {
    each_tile(begin, end, [&] {
      draw_softmax(s_.inputs[0], buffer(0));
      write(s_.outputs[0], buffer(0));
    });
  }

  void gumbel_one_hot(int64_t begin, int64_t end) {
    each_tile(begin, end, [&] {
      T* score = buffer(0);
      draw_scores(s_.inputs[0], score);
      raise_rows<GumbelOneHot>(score, rows_, s_.columns, max_);
      for (int64_t r = 0; r < rows_; ++r) {
        T* row = score + r * s_.columns;
        const bool exists = GumbelOneHot::has_largest(max_[r]);
        const T* first = std::find(row, row + s_.columns, max_[r]);
        std::fill_n(row, s_.columns, exists ? T(0) : not_a_number<T>());
        if (exists) row[first - row] = T(1);
      }
      write(s_.outputs[0], score);
    });
  }

  void gumbel_backward(int64_t begin, int64_t end) {
    each_tile(begin, end, [&] {
      draw_softmax(s_.inputs[1], buffer(0));
      add_gradient();
    });
  }

  void gumbel_backward_from_sample(int64_t begin, int64_t end) {
    each_tile(begin, end, [&] {
      read(s_.inputs[1], buffer(0));
      add_gradient();
    });
  }

  template <bool kPrior>
  void kl(int64_t begin, int64_t end) {
    each_tile(begin, end, [&] {
      is_long() ? compare_long<kPrior>() : compare<kPrior>();
      std::copy_n(kl_, rows_, static_cast<T*>(s_.row_sum) + row_);
    });
  }

  template <bool kPrior>
  void kl_backward(int64_t begin, int64_t end) {
    each_tile(begin, end, [&] {
      if (is_long()) {
        compare_long<kPrior>();
        kl_gradient_rows<kPrior>(kl_tile_, kl_, grads(), buffer(0), buffer(2));
        if (s_.outputs[0] != nullptr) write(s_.outputs[0], buffer(0));
        if (kPrior && s_.outputs[1] != nullptr) write(s_.outputs[1], buffer(2));
        return;
      }
      compare<kPrior>();
      T *q = buffer(0), *p = buffer(2), *kl = buffer(1), *grad = buffer(7);
      spread_rows(kl_, rows_, s_.columns, kl);
      spread_rows(grads(), rows_, s_.columns, grad);
      if constexpr (kPrior) {
        apply<ClassKl::Gradient>({q, p, buffer(3), buffer(4), buffer(5), buffer(6), kl, grad},
                                 {q, p});
        if (s_.outputs[1] != nullptr) write(s_.outputs[1], p);
      } else {
        apply<ClassKl::UniformGradient>({q, buffer(3), buffer(5), buffer(6), kl, grad}, {q},
                                        T(1) / static_cast<T>(s_.columns));
      }
      if (s_.outputs[0] != nullptr) write(s_.outputs[0], q);
    });
  }

  void log_prob(int64_t begin, int64_t end) {
    each_tile(begin, end, [&] {
      T *logits = buffer(0), *weights = buffer(2);
      read(s_.inputs[0], logits);
      weigh(logits, weights, T(1), max_, sum_);
      T* value = static_cast<T*>(s_.row_sum) + row_;
      for (int64_t r = 0; r < rows_; ++r) {
        const int64_t x = class_of(row_ + r);
        const bool exists = CategoricalLogProb::exists(x, s_.columns);
        value[r] = exists ? CategoricalLogProb::value(logits[r * s_.columns + x], max_[r], sum_[r])
                          : not_a_number<T>();
      }
    });
  }

  void log_prob_backward(int64_t begin, int64_t end) {
    each_tile(begin, end, [&] {
      T* y = buffer(0);
      read(s_.inputs[0], y);
      weigh(y, y, T(1), max_, sum_);
      const T* grad = grads();
      for (int64_t r = 0; r < rows_; ++r) {
        const bool exists = CategoricalLogProb::exists(class_of(row_ + r), s_.columns);
        sum_[r] = exists ? -grad[r] / sum_[r] : not_a_number<T>();
      }
      scale(y, sum_);
      for (int64_t r = 0; r < rows_; ++r) {
        const int64_t x = class_of(row_ + r);
        if (CategoricalLogProb::exists(x, s_.columns)) y[r * s_.columns + x] += grad[r];
      }
      write(s_.outputs[0], y);
    });
  }

 private:
  static constexpr int64_t kTile =
      512;  // elements, of short rows: eight buffers fit into the first-level cache
  static constexpr int kBuffers = 8;

  bool is_long() const { return s_.columns >= kShortRow; }
  T* buffer(int k) { return memory_.get() + k * stride_; }

  template <class Visit>
  void each_tile(int64_t begin, int64_t end, const Visit& visit) {
    for (row_ = begin; row_ < end; row_ += rows_) {
      rows_ = std::min(tile_rows_, end - row_);
      visit();
    }
  }

  // A step of a formula at every element of the tile.
  template <class F, class... Parameters>
  void apply(std::array<const T*, F::kArguments> arguments, std::array<T*, F::kValues> to,
             Parameters... parameters) {
    const T constants[] = {parameters..., T(0)};
    evaluate<F, T>(arguments.data(), constants, to.data(), padded(rows_ * s_.columns));
  }
  static int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

  const T* grads() const { return static_cast<const T*>(s_.row_inputs[0]) + row_; }

  int64_t class_of(int64_t row) const {
    const Operand& x = s_.inputs[1];
    return static_cast<const int64_t*>(
        x.data)[row / s_.inner * x.outer_stride + row % s_.inner * x.inner_stride];
  }

  void read(const Operand& x, T* to) const {
    const int64_t columns = s_.columns;
    for (int64_t r = 0; r < rows_;) {  // as many rows at once as follow one another
      const int64_t row = row_ + r, outer = row / s_.inner, inner = row % s_.inner;
      const Stored* from =
          static_cast<const Stored*>(x.data) + outer * x.outer_stride + inner * x.inner_stride;
      const bool dense = x.column_stride == 1 && x.inner_stride == columns;
      const int64_t n = dense ? std::min(rows_ - r, s_.inner - inner) : 1;
      gather(from, x.column_stride, to + r * columns, n * columns);
      r += n;
    }
  }

  void write(void* output, const T* from) const {
    scatter(from, static_cast<Stored*>(output) + row_ * s_.columns, rows_ * s_.columns);
  }

  void draw_scores(const Operand& logits, T* score) {
    const int64_t element = row_ * s_.columns;
    const philox::Key key{static_cast<uint64_t>(s_.key[0]), static_cast<uint64_t>(s_.key[1])};
    T* noise = buffer(1);
    fill_gumbel(key, static_cast<uint64_t>(element) / 4, noise, rows_ * s_.columns + element % 4);
    read(logits, score);
    apply<GumbelSoftmax::Score>({score, noise + element % 4}, {score});
  }

  void draw_softmax(const Operand& logits, T* y) {
    draw_scores(logits, y);
    weigh(y, y, inverse_temperature_, max_, sum_);
    normalise(y, sum_);
  }

  // The weights of each row relative to its largest, and both reductions.
  void weigh(const T* scores, T* weights, T inverse_temperature, T* max, T* sum) {
    raise_rows<Plain>(scores, rows_, s_.columns, max);
    if (is_long()) {
      weigh_rows(scores, rows_, s_.columns, max, inverse_temperature, weights, sum);
      return;
    }
    spread_rows(max, rows_, s_.columns, buffer(1));
    apply<SoftmaxWeight>({scores, buffer(1)}, {weights}, inverse_temperature);
    add_rows(weights, rows_, s_.columns, sum);
  }

  void invert(const T* sum, T* inverse) const {
    for (int64_t r = 0; r < rows_; ++r) inverse[r] = T(1) / sum[r];
  }
  void spread_inverses(const T* sum, T* to) {
    T inverse[kTile];
    invert(sum, inverse);
    spread_rows(inverse, rows_, s_.columns, to);
  }

  // Each row by a value of its own.
  void scale(T* x, const T* values) {
    if (is_long()) return scale_rows(x, rows_, s_.columns, values);
    spread_rows(values, rows_, s_.columns, buffer(1));
    apply<Product>({x, buffer(1)}, {x});
  }

  void normalise(T* weights, const T* sum) {
    T inverse[kTile];
    invert(sum, inverse);
    scale(weights, inverse);
  }

  void add_gradient() {
    T *y = buffer(0), *scratch = buffer(1), *grad = buffer(2);
    read(s_.inputs[0], grad);
    apply<Product>({y, grad}, {scratch});
    add_rows(scratch, rows_, s_.columns, sum_);
    spread_rows(sum_, rows_, s_.columns, scratch);
    apply<GumbelSoftmax::Gradient>({y, grad, scratch}, {y}, inverse_temperature_);
    write(s_.outputs[0], y);
  }

  // kl_; and what its gradient is made of: the weights of q and p in buffers 0 and 2, the inverses
  // of their sums in 3 and 4, the ratio of logarithms in 5, or of a uniform p its negative, and its
  // shift in 6.
  template <bool kPrior>
  void compare() {
    T *q = buffer(0), *p = buffer(2), *inverse_q = buffer(3), *inverse_p = buffer(4);
    T *ratio = buffer(5), *shift = buffer(6), *scratch = buffer(1);
    const int64_t columns = s_.columns;
    T max_p[kTile], sum_p[kTile], shifts[kTile];
    read(s_.inputs[0], q);
    raise_rows<Plain>(q, rows_, columns, max_);
    spread_rows(max_, rows_, columns, inverse_q);
    if constexpr (kPrior) {
      read(s_.inputs[1], p);
      raise_rows<Plain>(p, rows_, columns, max_p);
      spread_rows(max_p, rows_, columns, inverse_p);
      apply<ClassKl::LogRatio>({q, p, inverse_q, inverse_p}, {ratio});
      apply<SoftmaxWeight>({p, inverse_p}, {p}, T(1));
      add_rows(p, rows_, columns, sum_p);
    } else {
      apply<ClassKl::Below>({q, inverse_q}, {ratio});
      std::fill_n(sum_p, padded(rows_), static_cast<T>(columns));
    }
    apply<SoftmaxWeight>({q, inverse_q}, {q}, T(1));
    add_rows(q, rows_, columns, sum_);

    find_shifts(sum_p, shifts);
    spread_rows(shifts, rows_, columns, shift);
    spread_inverses(sum_, inverse_q);
    if constexpr (kPrior) {
      spread_inverses(sum_p, inverse_p);
      apply<ClassKl::Term>({q, p, inverse_q, inverse_p, ratio, shift}, {scratch});
    } else {
      apply<ClassKl::UniformTerm>({q, inverse_q, ratio, shift}, {scratch},
                                  T(1) / static_cast<T>(columns));
    }
    add_rows(scratch, rows_, columns, kl_);
  }

  // The same of long rows, and kl_tile_ in place of the buffers that hold what a row shares.
  template <bool kPrior>
  void compare_long() {
    T *q = buffer(0), *weight_q = buffer(1), *p = buffer(2), *weight_p = buffer(3);
    T max_p[kTile], sum_p[kTile], shifts[kTile];
    read(s_.inputs[0], q);
    weigh(q, weight_q, T(1), max_, sum_);
    if constexpr (kPrior) {
      read(s_.inputs[1], p);
      weigh(p, weight_p, T(1), max_p, sum_p);
    } else {
      std::fill_n(max_p, rows_, T(0));
      std::fill_n(sum_p, padded(rows_), static_cast<T>(s_.columns));
    }
    find_shifts(sum_p, shifts);
    for (int64_t r = 0; r < rows_; ++r) {
      kl_rows_[r] = {max_[r], max_p[r], T(1) / sum_[r], kPrior ? T(1) / sum_p[r] : T(1), shifts[r]};
    }
    kl_tile_ = {q, p, weight_q, weight_p, kl_rows_, rows_, s_.columns};
    add_kl_rows<kPrior>(kl_tile_, kl_);
  }

  void find_shifts(const T* sum_p, T* shifts) {
    const T* const sums[] = {sum_, sum_p};
    T* const of_rows[] = {shifts};
    const T none[] = {T(0)};
    evaluate<ClassKl::Shift, T>(sums, none, of_rows, padded(rows_));
  }

  struct Delete {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };

  const Sweep& s_;
  const int64_t tile_rows_, stride_;
  const std::unique_ptr<T[], Delete> memory_;
  T inverse_temperature_;
  int64_t row_ = 0, rows_ = 0;
  T max_[kTile], sum_[kTile], kl_[kTile];  // of rows
  KlRow<T> kl_rows_[kTile / kShortRow];    // of long ones
  KlTile<T> kl_tile_;
};

// Runs a method of the sweep for the dtype at hand.
template <class Run>
void sweep_categories(const Sweep& s, const Run& run) {
  with_types(s.dtype,
             [&]<class T, class Stored>(Types<T, Stored>) { run(CategorySweep<T, Stored>(s)); });
}

}  // namespace fastvae::cpu
