// The slow direction of an affine autoregressive flow: x_d = step(z_d, outputs for d of x), column
// after column, through a masked network (MADE) of which each unit is computed once.
//
// Hidden units are in the order of their degrees, which rise evenly from the least to D - 1: unit u
// of n has degree least + floor(u (D - least) / n). One of degree m sees the units of the layer
// before up to degree m, and the inputs before m; it is known with column m - 1. The outputs for
// column d see the units up to degree d; all shifts come first, then all scales. So no weight that
// is masked is ever met.
#pragma once

#include "coupling.h"
#include "sweep.h"

namespace fastvae {

// ---- activations ----

enum class Activation : int { kRelu, kLeakyRelu, kElu, kSilu, kSigmoid, kTanh };

struct Relu {
  static constexpr const char* kName = "relu";
  static constexpr Activation kActivation = Activation::kRelu;

  template <class T>
  static FASTVAE_HD T eval(T x) {
    return math::max(T(0), x);
  }
};

struct LeakyRelu {
  static constexpr const char* kName = "leaky_relu";
  static constexpr Activation kActivation = Activation::kLeakyRelu;

  template <class T>
  static FASTVAE_HD T eval(T x) {
    return x > T(0) ? x : T(0.01) * x;
  }
};

struct Elu {
  static constexpr const char* kName = "elu";
  static constexpr Activation kActivation = Activation::kElu;

  template <class T>
  static FASTVAE_HD T eval(T x) {
    return x > T(0) ? x : T(2) * math::half_expm1(math::min(T(0), x));
  }
};

struct Logistic {
  static constexpr const char* kName = "sigmoid";
  static constexpr Activation kActivation = Activation::kSigmoid;

  template <class T>
  static FASTVAE_HD T eval(T x) {
    return math::sigmoid(x, math::exp_nonpositive(-math::abs(x)));
  }
};

struct Silu {
  static constexpr const char* kName = "silu";
  static constexpr Activation kActivation = Activation::kSilu;

  template <class T>
  static FASTVAE_HD T eval(T x) {
    return x * Logistic::eval(x);
  }
};

struct HyperbolicTangent {
  static constexpr const char* kName = "tanh";
  static constexpr Activation kActivation = Activation::kTanh;

  template <class T>
  static FASTVAE_HD T eval(T x) {
    return math::tanh(x).value;
  }
};

// Calls f with the activation of that number: f(Relu{}).
template <class F>
FASTVAE_HD auto with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kRelu:
      return f(Relu{});
    case Activation::kLeakyRelu:
      return f(LeakyRelu{});
    case Activation::kElu:
      return f(Elu{});
    case Activation::kSilu:
      return f(Silu{});
    case Activation::kSigmoid:
      return f(Logistic{});
    default:
      return f(HyperbolicTangent{});
  }
}

// ---- the sweep ----

inline constexpr int kMaxLayers = 32;

struct UnrollSweep {
  bool in_double = false;  // all is float, or double
  int64_t rows = 0, dims = 0;
  AffineKind kind = AffineKind::kExp;
  bool inverse = false;
  Activation activation = Activation::kRelu;
  int64_t least = 0;                    // degree of hidden units: 0, or 1 if dims > 1
  int layers = 0;                       // affine maps
  int64_t widths[kMaxLayers + 1] = {};  // of the inputs, the hidden layers and the outputs
  int64_t begins[kMaxLayers + 1] = {};  // of a layer's units among those of all
  const void *weights[kMaxLayers] = {}, *biases[kMaxLayers] = {};  // [after, before] and [after]
  const void* sums = nullptr;  // [rows, widths[1]], in place of the first bias; or null
  const void* z = nullptr;     // [rows, dims]
  void *x = nullptr, *log_det = nullptr;

  FASTVAE_HD int64_t parameters() const { return kind == AffineKind::kAdditive ? 1 : 2; }
  // Where the units of a layer begin, not the outputs, that become known with column d: at 0 of d =
  // -1, with which those become known that see no column.
  FASTVAE_HD int64_t begin(int layer, int64_t d) const {
    const int64_t steps = d + 1 - least, all = dims - least;
    if (layer == 0) return d < 0 ? 0 : d;
    return steps <= 0 ? 0
                      : (steps >= all ? widths[layer] : (steps * widths[layer] + all - 1) / all);
  }
};

}  // namespace fastvae
