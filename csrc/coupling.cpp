// Affine couplings as a torch op. The formulas are in coupling.h.
#include "coupling.h"

#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "binding.h"

namespace fastvae {
namespace {

using std::optional;

using c10::string_view;

struct AffineCouplingOp {
  static constexpr const char* kName = "affine_coupling";

  static std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& shift,
                                            const Tensor& scale, const optional<Tensor>& mask,
                                            string_view kind, bool inverse) {
    RowOp op = inputs({{"x", x}, {"shift", shift}, {"scale", scale}}, mask);
    RowOp::Result<Formula<Shape{.outputs = 1, .row_sums = 1}>> result;
    with_coupling(kind, inverse, mask.has_value(), [&]<class Coupling>(Coupling) {
      auto [outputs, row_sum] = op.run<typename Coupling::Forward>();
      result = {outputs, row_sum};
    });
    return {result.outputs[0], result.row_sum};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
      const optional<Tensor>& grad_y, const optional<Tensor>& grad_log_det, const Tensor& x,
      const Tensor& shift, const Tensor& scale, const optional<Tensor>& mask, string_view kind,
      bool inverse, std::array<bool, 4> wanted) {
    Tensor d_x, d_shift, d_scale, d_mask = mask && wanted[3] ? at::zeros_like(*mask) : Tensor();
    const RowOp all = inputs({{"x", x}, {"shift", shift}, {"scale", scale}}, mask);
    with_coupling(kind, inverse, mask.has_value(), [&]<class Coupling>(Coupling) {
      if (!grad_y) {  // what x and shift do not have either
        RowOp op = inputs({{"scale", scale.expand_symint(all.shape())}}, mask);
        op.row_input("grad_log_det", *grad_log_det);
        d_scale = op.run<typename Coupling::BackwardOfLogDet>({wanted[2]}).outputs[0];
        return;
      }
      RowOp op = inputs({{"grad_y", *grad_y}, {"x", x}, {"shift", shift}, {"scale", scale}}, mask);
      const auto rows = all.shape().slice(0, all.shape().size() - 1);
      op.row_input("grad_log_det",
                   grad_log_det ? *grad_log_det : at::zeros_symint(rows, row_options(x)));
      const std::array<bool, 3> computed = {wanted[0], wanted[1] && !Coupling::kPassesGradient,
                                            wanted[2]};
      std::tie(d_x, d_shift, d_scale) =
          std::tuple_cat(op.run<typename Coupling::Backward>(computed).outputs);
    });
    return {d_x, d_shift, d_scale, d_mask};
  }

 private:
  static RowOp inputs(std::initializer_list<Argument> tensors, const optional<Tensor>& mask) {
    RowOp op(kName, tensors);
    if (mask) op.input("mask", *mask);
    return op;
  }

  // Calls f with the formulas of a kind.
  template <class F>
  static void with_coupling(string_view kind, bool inverse, bool masked, const F& f) {
    with_one_of<Exp, TanhExp, Sigmoid, Gated>(kName, "kind", kind, [&]<class Kind>(Kind) {
      if (masked) {
        inverse ? f(AffineCoupling<Kind, true, true>()) : f(AffineCoupling<Kind, false, true>());
      } else {
        inverse ? f(AffineCoupling<Kind, true>()) : f(AffineCoupling<Kind, false>());
      }
    });
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define<AffineCouplingOp>(
      m,
      "(Tensor x, Tensor shift, Tensor scale, Tensor? mask=None, str kind=\"exp\", "
      "bool inverse=False) -> (Tensor y, Tensor log_det)",
      "(Tensor? grad_y, Tensor? grad_log_det, Tensor x, Tensor shift, Tensor scale, Tensor? mask, "
      "str kind, bool inverse, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace fastvae
