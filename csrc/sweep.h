// The contract between formulas and engines. A *sweep* visits every element of a [rows, columns]
// problem once: it reads the inputs, evaluates one formula, writes elementwise outputs, and sums
// terms over each row. rows.h sweeps on the CPU, rows.cuh on CUDA; formulas know neither. (What
// needs a row's maximum first reduces with lanes.h and a kernel of its own; see bound.h.)
//
// A formula says what it takes and gives, and evaluates one element:
//
//   struct Forward : Formula<Shape{.inputs = 2, .noise = true, .outputs = 1, .row_sums = 1}> {
//     template <class T>  // float, or double for double tensors; half types compute in float
//     static FASTVAE_HD Values<T, 2> eval(T mu, T log_var, T eps);   // {output, term of the sum}
//   };
//
// Arguments come as: the inputs, then the row inputs (one value for a whole row, such as the
// gradient of a row sum), then a standard normal if noise is asked for, then the parameters of the
// whole sweep. Values returns the outputs, then the terms of the row sums. A formula that does not
// always look at its noise says when it does, `static bool needs_noise(...)` of the other
// arguments: the CPU then draws no more than that.
#pragma once

#include <utility>

#include "math.h"

#if defined(__CUDACC__)  // the device converts in one instruction what the host does bit by bit
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastvae {

struct Shape {
  int inputs = 0;               // tensors read element by element
  int row_inputs = 0;           // tensors read once a row
  bool noise = false;           // one standard normal an element, from the sweep's key
  int outputs = 0;              // tensors written element by element
  int row_sums = 0;             // 0 or 1
  int parameters = 0;           // numbers, the same for every element
  bool many_registers = false;  // on a GPU: fewer threads then share a multiprocessor
  bool cpu_only = false;        // saves arithmetic by memory traffic, which is no bargain on a GPU

  constexpr int arguments() const { return inputs + row_inputs + (noise ? 1 : 0); }  // by element
  constexpr int values() const { return outputs + row_sums; }
};

template <Shape S>
struct Formula {
  static constexpr Shape shape = S;
  static constexpr int kArguments = S.arguments();
  static constexpr int kValues = S.values();
};

template <class T, int N>
struct Values {
  T v[N];
};

// The two formulas of a sum over rows that is known by its term and the term's gradient:
//
//   struct Laplace {
//     static constexpr int kInputs = 3;
//     template <class T>
//     static FASTVAE_HD T term(T x, T mu, T log_scale);
//     template <class T>
//     static FASTVAE_HD Values<T, 3> gradient(T x, T mu, T log_scale);
//   };
//   using LaplaceLogProb = RowSum<Laplace>;
template <class Term>
struct RowSum {
  using term = Term;
  static constexpr int kInputs = Term::kInputs;

  struct Forward : Formula<Shape{.inputs = kInputs, .row_sums = 1}> {
    template <class T, class... Rest>
    static FASTVAE_HD Values<T, 1> eval(T first, Rest... rest) {
      return {{Term::template term<T>(first, rest...)}};
    }
  };

  // Also gives the last input's derivative, which is kept for backward.
  struct ForwardKeeping
      : Formula<Shape{.inputs = kInputs, .outputs = 1, .row_sums = 1, .cpu_only = true}> {
    template <class T, class... Rest>
    static FASTVAE_HD Values<T, 2> eval(T first, Rest... rest) {
      return {{Term::template gradient<T>(first, rest...).v[kInputs - 1],
               Term::template term<T>(first, rest...)}};
    }
  };

  struct Backward : Formula<Shape{.inputs = kInputs, .row_inputs = 1, .outputs = kInputs}> {
    template <class T, class... Rest>  // the inputs, then the gradient of the sum
    static FASTVAE_HD Values<T, kInputs> eval(T first, Rest... rest) {
      const T arguments[] = {first, rest...};
      return scale(arguments, std::make_index_sequence<kInputs>{});
    }
    template <class T, size_t... I>
    static FASTVAE_HD Values<T, kInputs> scale(const T* arguments, std::index_sequence<I...>) {
      const Values<T, kInputs> gradient = Term::template gradient<T>(arguments[I]...);
      return {{(arguments[kInputs] * gradient.v[I])...}};
    }
  };
};

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Where element (row, column) of an input lies: rows are numbered outer * inner, which covers a
// leading sample dimension (outer stride 0), a middle one (inner stride 0) and sliced or transposed
// batches without a copy. Strides count elements.
struct Operand {
  const void* data = nullptr;
  int64_t outer_stride = 0, inner_stride = 0, column_stride = 0;
};

inline constexpr int kMaxInputs = 5, kMaxRowInputs = 1, kMaxOutputs = 4, kMaxParameters = 1;
inline constexpr int kMaxArguments = kMaxInputs + kMaxRowInputs + 1, kMaxValues = kMaxOutputs + 1;

struct Sweep {
  DType dtype = DType::kFloat32;  // of the inputs and outputs; row values are float, or double
  int64_t outer = 1, inner = 0, columns = 0;
  Operand inputs[kMaxInputs];
  const void* row_inputs[kMaxRowInputs] = {};  // [rows], contiguous
  void* outputs[kMaxOutputs] = {};             // [rows, columns], contiguous; null: not wanted
  void* row_sum = nullptr;                     // [rows]
  const int64_t* key = nullptr;                // seed and offset, in the memory of the device
                                 // element (row, column) takes normal row * columns + column
  double parameters[kMaxParameters] = {};
  double* partial_sums = nullptr;  // [rows, segments_per_row(columns)] of the engine, if > 1

  FASTVAE_HD int64_t rows() const { return outer * inner; }
};

namespace cuda {
// The pieces, in elements, that rows.cuh cuts long rows into: rows that it sums, if lent memory for
// the partial sums, and rows that it need not sum. The first begins up to 7 elements before its
// row.
inline constexpr int64_t kSegment = 16 * 1024, kFreeSegment = 1024;
inline int64_t segments_per_row(int64_t columns) { return (columns + 7 + kSegment - 1) / kSegment; }
}  // namespace cuda

// Half types as stored. They are read into and rounded from float, never computed in.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls f with the types of a dtype: that computed in, and that stored.
template <class T, class Stored>
struct Types {};
template <class F>
void with_types(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Types<float, float>());
    case DType::kFloat64:
      return f(Types<double, double>());
    case DType::kBFloat16:
      return f(Types<float, BFloat16>());
    case DType::kFloat16:
      return f(Types<float, Float16>());
  }
}

FASTVAE_HD float load(float x) { return x; }
FASTVAE_HD double load(double x) { return x; }
FASTVAE_HD float load(BFloat16 x) { return math::from_bits(static_cast<uint32_t>(x.bits) << 16); }
FASTVAE_HD float load(Float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  // Shift exponent and mantissa into place; the product repairs the exponent bias, and normalises
  // subnormals on the way. What overflowed the float16 range of exponents was inf or NaN.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const float value = math::from_bits(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  return math::from_bits(math::to_bits(value) | special | sign);
#endif
}

FASTVAE_HD void store(float& to, float x) { to = x; }
FASTVAE_HD void store(double& to, double x) { to = x; }
FASTVAE_HD void store(BFloat16& to, float x) {  // round to nearest even; NaN stays NaN
#if defined(__CUDA_ARCH__)
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = math::to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
#endif
}
FASTVAE_HD void store(Float16& to, float x) {
#if defined(__CUDA_ARCH__)
  to.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t sign = (math::to_bits(x) >> 16) & 0x8000u;
  const float magnitude = math::abs(x);
  const uint32_t bits = math::to_bits(magnitude);
  const uint32_t normal = (bits - 0x38000000u + 0x0fffu + ((bits >> 13) & 1u)) >> 13;
  // Adding 1/2 aligns the mantissa so that the addition itself rounds to the subnormal grid.
  const uint32_t subnormal = math::to_bits(magnitude + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x1p-14f ? subnormal : normal;
  const uint32_t value = magnitude < 65520.0f ? finite : (x == x ? 0x7c00u : 0x7e00u);
  to.bits = static_cast<uint16_t>(value | sign);
#endif
}

}  // namespace fastvae
