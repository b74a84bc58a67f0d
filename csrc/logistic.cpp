// Logistic likelihoods as torch ops. The formulas are in logistic.h.
#include "logistic.h"

#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "binding.h"
#include "pixels.h"

namespace fastvae {

namespace cuda {
// logistic.cu. Null, or what CUDA complains of.
const char* sweep_pixels(const PixelMixture& mixture, void* stream);
}  // namespace cuda

namespace {

using c10::string_view;
using std::optional;

double levels(const char* op, int64_t num_bins) {
  TORCH_CHECK_VALUE(num_bins >= 2, "fastvae::", op, ": num_bins must be at least 2, got ",
                    num_bins);
  return static_cast<double>(num_bins - 1);
}

struct DiscretizedLogisticLogProbOp {
  static constexpr const char* kName = DiscretizedLogistic<LogScale>::kName;

  static RowOp op(const Tensor& x, const Tensor& mu, const Tensor& log_scale, int64_t num_bins) {
    RowOp op(kName, {{"x", x}, {"mu", mu}, {"log_scale", log_scale}});
    op.parameter(levels(kName, num_bins));
    return op;
  }

  static Tensor forward(const Tensor& x, const Tensor& mu, const Tensor& log_scale,
                        int64_t num_bins, string_view parameterization) {
    return with_scale(kName, parameterization, [&]<class S>(S) {
      return op(x, mu, log_scale, num_bins)
          .template run<typename DiscretizedLogistic<S>::Forward>()
          .row_sum;
    });
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
                                                     const Tensor& mu, const Tensor& log_scale,
                                                     int64_t num_bins, string_view parameterization,
                                                     std::array<bool, 3> wanted) {
    RowOp all = op(x, mu, log_scale, num_bins);
    all.row_input("grad", grad);
    return with_scale(kName, parameterization,
                      [&]<class S>(S) -> std::tuple<Tensor, Tensor, Tensor> {
                        auto [d_x, d_mu, d_log_scale] =
                            all.run<typename DiscretizedLogistic<S>::Backward>(wanted).outputs;
                        return {d_x, d_mu, d_log_scale};
                      });
  }
};

// One call of the mixture. All inputs broadcast over pixels, [...]; beyond, each has dimensions of
// its own: channels, components, or both.
class PixelOp {
 public:
  static constexpr const char* kName = "discretized_logistic_mixture_log_prob";

  PixelOp(const Tensor& x, const Tensor& logits, const Tensor& mu, const Tensor& log_scale,
          const optional<Tensor>& coeffs, int64_t num_bins, string_view parameterization)
      : inputs_{x, logits, mu, log_scale, coeffs.value_or(Tensor())} {
    for (size_t i = 0; i < kInputs; ++i) {
      if (inputs_[i].defined() || i != kCoeffs)
        check_input(kName, {kNames[i], inputs_[i]}, {"x", x});
    }
    const c10::SymInt channels = x.sym_size(-1), components = logits.sym_size(-1);
    check_ends(kMu, channels, components, "[..., C, K] with the C of x and the K of logits");
    check_ends(kLogScale, channels, components, "[..., C, K] with the C of x and the K of logits");
    if (coeffs) {
      check_ends(kCoeffs, channels * (channels - 1) / 2, components,
                 "[..., C (C - 1) / 2, K] with the C of x and the K of logits");
    }
    levels_ = levels(kName, num_bins);
    scale_map_ = scale_map(kName, parameterization);
    for (size_t i = 0; i < kInputs; ++i) {
      if (!inputs_[i].defined()) continue;
      const auto shape = inputs_[i].sym_sizes().slice(0, inputs_[i].dim() - kOwn[i]);
      if (i == 0) shape_.assign(shape.begin(), shape.end());
      if (shape == c10::SymIntArrayRef(shape_)) continue;
      try {
        shape_ = at::infer_size_symdimvector(shape_, shape);
      } catch (const c10::Error&) {
        TORCH_CHECK_VALUE(false, "fastvae::", kName, ": ", kNames[i],
                          " must broadcast with x over the pixels, got ", inputs_[i].sym_sizes(),
                          " and ", x.sym_sizes());
      }
    }
  }

  std::tuple<Tensor, Tensor> forward(bool keep) {
    const Tensor log_prob = allocate(shape_, row_options(inputs_[0]));
    const Tensor kept = keep ? allocate(kept_shape(), row_options(inputs_[0])) : Tensor();
    if (inputs_[0].is_meta()) return {log_prob, kept};
    PixelMixture p = lay_out({});
    p.log_prob = log_prob.mutable_data_ptr();
    p.kept = keep ? kept.mutable_data_ptr() : nullptr;
    launch(p);
    return {log_prob, kept};
  }

  std::array<Tensor, 5> backward(const Tensor& grad, const optional<Tensor>& kept,
                                 std::array<bool, 5> wanted) {
    check_row_values(kName, {"grad", grad}, shape_, inputs_[0]);
    if (kept) {
      TORCH_CHECK_VALUE(kept->sym_sizes() == c10::SymIntArrayRef(kept_shape()), "fastvae::", kName,
                        ": kept must be what forward kept, got ", kept->sym_sizes(), " and ",
                        inputs_[0].sym_sizes());
      check_input(kName, {"kept", *kept}, {"grad", grad});
    }
    std::array<Tensor, 5> gradients;
    for (size_t i = 0; i < kInputs; ++i) {
      if (wanted[i] && inputs_[i].defined()) gradients[i] = allocate_as_lies(i);
    }
    if (inputs_[0].is_meta()) return gradients;

    const Tensor normalisers = (kept ? *kept : std::get<1>(forward(/*keep=*/true))).contiguous();
    const Tensor row_grad = grad.contiguous();
    std::array<Tensor, 5> written = gradients;
    PixelMixture p = lay_out(written);
    p.kept = normalisers.data_ptr();
    p.grad = row_grad.const_data_ptr();
    launch(p);
    for (size_t i = 0; i < kInputs; ++i) {
      if (!written[i].is_same(gradients[i])) gradients[i].copy_(written[i]);
    }
    return gradients;
  }

 private:
  static constexpr size_t kInputs = 5, kMu = 2, kLogScale = 3, kCoeffs = 4;
  static constexpr const char* kNames[] = {"x", "logits", "mu", "log_scale", "coeffs"};
  static constexpr int64_t kOwn[] = {1, 1, 2, 2, 2};  // dimensions beyond the pixels

  void check_ends(size_t i, const c10::SymInt& channels, const c10::SymInt& components,
                  const char* rule) const {
    const Tensor& x = inputs_[i];
    TORCH_CHECK_VALUE(x.dim() >= 2 && x.sym_size(-2) == channels && x.sym_size(-1) == components,
                      "fastvae::", kName, ": ", kNames[i], " must have shape ", rule, ", got ",
                      x.sym_sizes(), " and ", inputs_[0].sym_sizes(), ", ", inputs_[1].sym_sizes());
  }

  c10::SymDimVector kept_shape() const {  // [..., 2]
    c10::SymDimVector shape = shape_;
    shape.push_back(2);
    return shape;
  }
  c10::SymDimVector full_shape(size_t i) const {
    c10::SymDimVector shape = shape_;
    const auto own = inputs_[i].sym_sizes().slice(inputs_[i].dim() - kOwn[i]);
    shape.append(own.begin(), own.end());
    return shape;
  }

  // A gradient, dense, with its dimensions in the order in which those of the input lie in memory:
  // of channels-first slices, channels first.
  Tensor allocate_as_lies(size_t i) const {
    const c10::SymDimVector shape = full_shape(i);
    const Tensor& x = inputs_[i];
    const auto ndim = static_cast<int64_t>(shape.size()), missing = ndim - x.dim();
    c10::SmallVector<int64_t, 6> order;  // outermost first
    for (int64_t dim = 0; dim < ndim; ++dim) {
      auto at = order.end();
      if (dim >= missing && x.sym_size(dim - missing) != 1) {
        while (at != order.begin()) {
          const int64_t other = *(at - 1) - missing;
          const bool swap = other >= 0 && x.sym_size(other) != 1 &&
                            x.sym_stride(other) < x.sym_stride(dim - missing) &&
                            x.sym_stride(other) != 0;
          if (!swap) break;
          --at;
        }
      }
      order.insert(at, dim);
    }
    c10::SymDimVector permuted;
    std::vector<int64_t> back(static_cast<size_t>(ndim));
    for (int64_t k = 0; k < ndim; ++k) {
      permuted.push_back(shape[order[k]]);
      back[order[k]] = k;
    }
    return allocate(permuted, x.options()).permute(back);
  }

  // Sizes are concrete from here on. Inputs are copied, and outputs replaced by new ones, if they
  // lie in more ways than the engines can walk.
  PixelMixture lay_out(std::array<Tensor, 5>& outputs) {
    c10::SmallVector<int64_t, 6> shape;
    for (const c10::SymInt& size : shape_) shape.push_back(size.guard_int(__FILE__, __LINE__));
    const auto ndim = static_cast<int64_t>(shape.size());
    PixelMixture p;
    PixelOperand* const operands[] = {&p.x,   &p.logits,   &p.mu,   &p.log_scale,   &p.coeffs,
                                      &p.d_x, &p.d_logits, &p.d_mu, &p.d_log_scale, &p.d_coeffs};
    const auto tensor = [&](size_t k) -> Tensor& {
      return k < kInputs ? inputs_[k] : outputs[k - kInputs];
    };
    const auto stride = [&](size_t k, int64_t dim) -> int64_t {  // 0 where it is broadcast
      const Tensor& x = tensor(k);
      if (!x.defined()) return 0;
      const int64_t own = dim - (ndim - (x.dim() - kOwn[k % kInputs]));
      return own < 0 || x.size(own) == 1 ? 0 : x.stride(own);
    };
    const auto collapse = [&] {  // adjacent dimensions that all walk as one, innermost first
      int groups = 0;
      std::fill_n(p.sizes, kMaxGroups, 1);
      for (int64_t dim = ndim - 1; dim >= 0; --dim) {
        if (shape[dim] == 1) continue;
        bool merges = groups > 0;
        for (size_t k = 0; merges && k < 2 * kInputs; ++k) {
          merges = stride(k, dim) == operands[k]->pixel[groups - 1] * p.sizes[groups - 1];
        }
        if (!merges && groups == kMaxGroups) return false;
        if (!merges) {
          for (size_t k = 0; k < 2 * kInputs; ++k) operands[k]->pixel[groups] = stride(k, dim);
        }
        groups += merges ? 0 : 1;
        p.sizes[groups - 1] *= shape[dim];
      }
      return true;
    };
    if (!collapse()) {
      for (size_t k = 0; k < kInputs; ++k) {
        if (inputs_[k].defined()) {
          inputs_[k] = inputs_[k].expand_symint(full_shape(k)).contiguous();
        }
        if (outputs[k].defined()) {
          outputs[k] = at::empty(outputs[k].sizes(), outputs[k].options());
        }
      }
      for (PixelOperand* x : operands) *x = {};
      collapse();
    }
    p.dtype = dtype_of(inputs_[0]);
    p.channels = inputs_[0].size(-1);
    p.components = inputs_[1].size(-1);
    p.levels = levels_;
    p.scale_map = scale_map_;
    for (size_t k = 0; k < 2 * kInputs; ++k) {
      const Tensor& x = tensor(k);
      if (!x.defined()) continue;
      operands[k]->data = k < kInputs ? x.const_data_ptr() : x.mutable_data_ptr();
      const bool values = k % kInputs == 0, logits = k % kInputs == 1;
      operands[k]->channel = values ? x.stride(-1) : logits ? 0 : x.stride(-2);
      operands[k]->component = values ? 0 : x.stride(-1);
    }
    return p;
  }
  PixelMixture lay_out(std::array<Tensor, 5>&& none) { return lay_out(none); }

  void launch(const PixelMixture& p) const {
    if (p.pixels() == 0) return;
#ifdef FASTVAE_CUDA
    if (inputs_[0].is_cuda()) {
      launch_on_cuda(kName, inputs_[0],
                     [&](void* stream) { return cuda::sweep_pixels(p, stream); });
      return;
    }
#endif
    constexpr int64_t kGrain = 2048;  // logistic distributions, that a thread should have at least
    const int64_t of_block = cpu::kLanes * std::max<int64_t>(1, p.channels * p.components);
    at::parallel_for(0, (p.pixels() + cpu::kLanes - 1) / cpu::kLanes,
                     std::max<int64_t>(1, kGrain / of_block),
                     [&](int64_t begin, int64_t end) { cpu::sweep_pixels(p, begin, end); });
  }

  std::array<Tensor, 5> inputs_;
  c10::SymDimVector shape_;  // of the pixels
  double levels_ = 0;
  ScaleMap scale_map_ = ScaleMap::kLogScale;
};

struct DiscretizedLogisticMixtureLogProbOp {
  static constexpr const char* kName = PixelOp::kName;
  static constexpr Keeps kKeeps{.derivative = true, .everywhere = true};

  static Tensor forward(const Tensor& x, const Tensor& logits, const Tensor& mu,
                        const Tensor& log_scale, const optional<Tensor>& coeffs, int64_t num_bins,
                        string_view parameterization) {
    PixelOp op(x, logits, mu, log_scale, coeffs, num_bins, parameterization);
    return std::get<0>(op.forward(/*keep=*/false));
  }

  static std::tuple<Tensor, Tensor> forward_keeping(const Tensor& x, const Tensor& logits,
                                                    const Tensor& mu, const Tensor& log_scale,
                                                    const optional<Tensor>& coeffs,
                                                    int64_t num_bins,
                                                    string_view parameterization) {
    PixelOp op(x, logits, mu, log_scale, coeffs, num_bins, parameterization);
    return op.forward(/*keep=*/true);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
      const Tensor& grad, const Tensor& x, const Tensor& logits, const Tensor& mu,
      const Tensor& log_scale, const optional<Tensor>& coeffs, const optional<Tensor>& kept,
      int64_t num_bins, string_view parameterization, std::array<bool, 5> wanted) {
    PixelOp op(x, logits, mu, log_scale, coeffs, num_bins, parameterization);
    auto [d_x, d_logits, d_mu, d_log_scale, d_coeffs] = op.backward(grad, kept, wanted);
    return {d_x, d_logits, d_mu, d_log_scale, d_coeffs};
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  const std::string settings = "int num_bins=256, str parameterization=\"log_scale\"";
  const std::string backward_settings = "int num_bins, str parameterization, ";
  define<DiscretizedLogisticLogProbOp>(
      m, "(Tensor x, Tensor mu, Tensor log_scale, " + settings + ") -> Tensor",
      "(Tensor grad, Tensor x, Tensor mu, Tensor log_scale, " + backward_settings +
          "bool[3] wanted) -> (Tensor, Tensor, Tensor)");
  const std::string inputs = "Tensor x, Tensor logits, Tensor mu, Tensor log_scale, Tensor? coeffs";
  const std::string mixture = "(" + inputs + "=None, " + settings + ") -> ";
  define<DiscretizedLogisticMixtureLogProbOp>(
      m, mixture + "Tensor",
      "(Tensor grad, " + inputs + ", Tensor? kept, " + backward_settings +
          "bool[5] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      mixture + "(Tensor, Tensor)");
}

}  // namespace fastvae
