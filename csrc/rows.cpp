// The CPU engine of rows.h, torch-free.
#include "rows.h"

#include <iterator>
#include <type_traits>

namespace fastvae::cpu {
namespace {

constexpr int kTile = 512;  // elements; at most 9 live buffers of 2 KB

template <class T>
const Loops<T>& loops(const Kernel& kernel) {
  if constexpr (std::is_same_v<T, double>) {
    return kernel.in_double;
  } else {
    return kernel.in_float;
  }
}

template <class T, class Stored>
class RowSweep {
 public:
  RowSweep(const Kernel& kernel, const Sweep& sweep)
      : shape_(kernel.shape), loops_(loops<T>(kernel)), s_(sweep) {
    if (shape_.noise) {
      key_ = {static_cast<uint64_t>(s_.key[0]), static_cast<uint64_t>(s_.key[1])};
      std::fill(std::begin(noise_), std::end(noise_), T(0));  // what is not drawn is still read
    }
    std::copy_n(s_.parameters, kMaxParameters, parameters_);
  }

  // Rows begin..end, columns first..last of each. Sums go to sums[row - begin].
  void run(int64_t begin, int64_t end, int64_t first, int64_t last, double* sums) {
    const int64_t width = last - first;
    for (int64_t row = begin; row < end;) {
      if (width > kTile || width == 0) {
        double total = 0;
        for (int64_t c = first; c < last; c += kTile) {
          const int64_t n = std::min<int64_t>(kTile, last - c);
          tile(row, 1, c, n);
          if (shape_.row_sums > 0) total += sum(terms_, n);
        }
        if (shape_.row_sums > 0) sums[row - begin] = total;
        ++row;
      } else {  // as many whole rows as fit, all within one outer index
        const int64_t rows = std::min({kTile / width, end - row, s_.inner - row % s_.inner});
        tile(row, rows, first, width);
        if (shape_.row_sums > 0) {
          for (int64_t r = 0; r < rows; ++r) sums[row - begin + r] = sum(terms_ + r * width, width);
        }
        row += rows;
      }
    }
  }

 private:
  static constexpr bool kConverts = !std::is_same_v<T, Stored>;

  // Evaluates rows x width elements from (row, column): afterwards terms_ holds the row terms.
  void tile(int64_t row, int64_t rows, int64_t column, int64_t width) {
    const int64_t n = rows * width;
    const T* arguments[kMaxArguments];
    T* values[kMaxValues];

    for (int k = 0; k < shape_.inputs; ++k) {
      arguments[k] = input(s_.inputs[k], row, rows, column, width, buffers_[k]);
    }
    for (int k = 0; k < shape_.row_inputs; ++k) {
      T* spread = buffers_[shape_.inputs + k];
      const T* row_input = static_cast<const T*>(s_.row_inputs[k]) + row;
      for (int64_t r = 0; r < rows; ++r) std::fill_n(spread + r * width, width, row_input[r]);
      arguments[shape_.inputs + k] = spread;
    }
    if (shape_.noise) {
      const int64_t element = row * s_.columns + column;
      const bool draw = loops_.any_needs_noise == nullptr || loops_.any_needs_noise(arguments, n);
      if (draw) fill_normal(key_, static_cast<uint64_t>(element) / 4, noise_, n + element % 4);
      arguments[shape_.inputs + shape_.row_inputs] = noise_ + element % 4;
    }
    for (int k = 0; k < shape_.outputs; ++k) {
      T* direct = nullptr;
      if constexpr (!kConverts) direct = output(k, row, column);
      values[k] = direct != nullptr ? direct : results_[k];
    }
    if (shape_.row_sums > 0) values[shape_.outputs] = terms_;

    evaluate_padded(arguments, values, n);

    if constexpr (kConverts) {
      for (int k = 0; k < shape_.outputs; ++k) {
        if (Stored* to = output(k, row, column)) scatter(results_[k], to, n);
      }
    }
  }

  Stored* output(int k, int64_t row, int64_t column) const {
    Stored* base = static_cast<Stored*>(s_.outputs[k]);
    return base == nullptr ? nullptr : base + row * s_.columns + column;
  }

  // The tile of one input: in place where it lies as the formula wants it, else gathered.
  const T* input(const Operand& x, int64_t row, int64_t rows, int64_t column, int64_t width,
                 T* buffer) const {
    const Stored* from = static_cast<const Stored*>(x.data) + row / s_.inner * x.outer_stride +
                         row % s_.inner * x.inner_stride + column * x.column_stride;
    const bool dense = x.column_stride == 1 && (rows == 1 || x.inner_stride == width);
    if constexpr (!kConverts) {
      if (dense) return from;
    }
    if (dense) {
      gather(from, 1, buffer, rows * width);
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        gather(from + r * x.inner_stride, x.column_stride, buffer + r * width, width);
      }
    }
    return buffer;
  }

  // The tail goes through a padded copy: reading or writing past a tensor's end is not ours to do.
  void evaluate_padded(const T* const* arguments, T* const* values, int64_t n) {
    const int64_t whole = n / kLanes * kLanes, rest = n - whole;
    if (whole > 0) loops_.evaluate(arguments, parameters_, values, whole);
    if (rest == 0) return;
    T in[kMaxArguments][kLanes], out[kMaxValues][kLanes];
    const T* tail_arguments[kMaxArguments];
    T* tail_values[kMaxValues];
    const int inputs = shape_.arguments(), results = shape_.values();
    for (int k = 0; k < inputs; ++k) {
      std::fill_n(std::copy(arguments[k] + whole, arguments[k] + n, in[k]), kLanes - rest,
                  arguments[k][n - 1]);
      tail_arguments[k] = in[k];
    }
    for (int k = 0; k < results; ++k) tail_values[k] = out[k];
    loops_.evaluate(tail_arguments, parameters_, tail_values, kLanes);
    for (int k = 0; k < results; ++k) std::copy_n(out[k], rest, values[k] + whole);
  }

  const Shape shape_;
  const Loops<T>& loops_;
  const Sweep& s_;
  philox::Key key_{};
  T parameters_[kMaxParameters];
  alignas(64) T buffers_[kMaxInputs + kMaxRowInputs][kTile];
  alignas(64) T noise_[kTile + kNoiseGroup];
  alignas(64) T results_[kMaxOutputs][kTile];
  alignas(64) T terms_[kTile];
};

template <class T, class Stored>
void sweep_units(const Kernel& kernel, const Sweep& s, int64_t begin, int64_t end) {
  RowSweep<T, Stored> sweep(kernel, s);
  const bool sums_rows = kernel.shape.row_sums > 0;
  const int64_t segments = segments_per_row(s.columns);
  if (segments > 1) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / segments, first = unit % segments * kSegment;
      double* sum = sums_rows ? s.partial_sums + unit : nullptr;
      sweep.run(row, row + 1, first, std::min(s.columns, first + kSegment), sum);
    }
    return;
  }
  constexpr int64_t kChunk = 256;
  double sums[kChunk];
  for (int64_t row = begin; row < end; row += kChunk) {
    const int64_t rows = std::min(kChunk, end - row);
    sweep.run(row, row + rows, 0, s.columns, sums);
    if (sums_rows) {
      T* row_sum = static_cast<T*>(s.row_sum) + row;
      for (int64_t r = 0; r < rows; ++r) row_sum[r] = static_cast<T>(sums[r]);
    }
  }
}

}  // namespace

void sweep_units(const Kernel& kernel, const Sweep& s, int64_t begin, int64_t end) {
  with_types(s.dtype, [&]<class T, class Stored>(Types<T, Stored>) {
    sweep_units<T, Stored>(kernel, s, begin, end);
  });
}

void add_segments(const Sweep& s) {
  const int64_t segments = segments_per_row(s.columns);
  for (int64_t row = 0; row < s.rows(); ++row) {
    double sum = 0;
    for (int64_t k = 0; k < segments; ++k) sum += s.partial_sums[row * segments + k];
    if (s.dtype == DType::kFloat64) {
      static_cast<double*>(s.row_sum)[row] = sum;
    } else {
      static_cast<float*>(s.row_sum)[row] = static_cast<float>(sum);
    }
  }
}

}  // namespace fastvae::cpu
