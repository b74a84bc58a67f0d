// Likelihoods as torch ops. The formulas are in likelihood.h.
#include "likelihood.h"

#include "binding.h"

namespace fastvae {
namespace {

using std::optional;

struct BernoulliLogProbOp {
  static constexpr const char* kName = "bernoulli_log_prob";

  static Tensor forward(const Tensor& x, const Tensor& logits) {
    RowOp op(kName, {{"x", x}, {"logits", logits}});
    return op.run<BernoulliLogProb::Forward>().row_sum;
  }

  static std::tuple<Tensor, Tensor> forward_keeping(const Tensor& x, const Tensor& logits) {
    RowOp op(kName, {{"x", x}, {"logits", logits}});
    auto result = op.run<BernoulliLogProb::ForwardKeeping>();
    return {result.row_sum, result.outputs[0]};
  }

  static std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
                                             const Tensor& logits, const optional<Tensor>& kept,
                                             std::array<bool, 2> wanted) {
    if (kept && !wanted[0]) return {Tensor(), chain_rule(kName, grad, *kept)};
    RowOp op(kName, {{"x", x}, {"logits", logits}});
    auto [d_x, d_logits] =
        op.row_input("grad", grad).run<BernoulliLogProb::Backward>(wanted).outputs;
    return {d_x, d_logits};
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define<BernoulliLogProbOp>(
      m, "(Tensor x, Tensor logits) -> Tensor",
      "(Tensor grad, Tensor x, Tensor logits, Tensor? kept, bool[2] wanted) -> (Tensor, Tensor)",
      "(Tensor x, Tensor logits) -> (Tensor, Tensor)");
}

}  // namespace fastvae
