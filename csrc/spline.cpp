// Splines as a torch op. The formulas are in spline.h, the engine in pieces.h.
#include "spline.h"

#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>
#include <ATen/ops/zeros_like.h>

#include "binding.h"
#include "pieces.h"

namespace fastvae {

namespace cuda {
// spline.cu. Null, or what CUDA complains of.
const char* sweep_spline(const SplineSweep& sweep, void* stream);
}  // namespace cuda

namespace {

using std::optional;

using c10::string_view;

// What an op takes beside its tensors.
struct SplineSettings {
  double bound;
  string_view tails;
  bool inverse;
  double min_width, min_height, min_slope;
};

class SplineOp {
 public:
  static constexpr const char* kName = "rational_quadratic_spline";
  using Gradients = std::array<Tensor, 4>;

  SplineOp(const Tensor& x, const Tensor& widths, const Tensor& heights, const Tensor& slopes,
           const SplineSettings& settings)
      : settings_(settings) {
    const Argument first{"x", x};
    check_input(kName, first, first);
    check_input(kName, {"widths", widths}, first);
    check_input(kName, {"heights", heights}, first);
    check_input(kName, {"derivatives", slopes}, first);
    check_settings();
    const auto given = widths.sym_sizes();
    TORCH_CHECK_VALUE(widths.dim() > 1 && given.back() > 0, "fastvae::", kName,
                      ": widths must be [..., D, K] of at least one bin, got ", given);
    bins_ = given.back();
    for (const double smallest : {settings.min_width, settings.min_height}) {
      TORCH_CHECK_VALUE(bins_ * smallest < 1, "fastvae::", kName, ": ",
                        smallest == settings.min_width ? "min_bin_width" : "min_bin_height",
                        " must leave room for all bins, got ", smallest, " and ", bins_);
    }
    TORCH_CHECK_VALUE(heights.sym_sizes() == given, "fastvae::", kName,
                      ": heights must have the shape of widths, got ", heights.sym_sizes(), " and ",
                      given);
    c10::SymDimVector expected(given.begin(), given.end());
    expected.back() = circular() ? bins_ : bins_ - 1;
    TORCH_CHECK_VALUE(slopes.sym_sizes() == c10::SymIntArrayRef(expected), "fastvae::", kName,
                      ": derivatives must be [..., D, ", circular() ? "K" : "K - 1", "] with ",
                      settings.tails, " tails, got ", slopes.sym_sizes(), " and ", given);
    try {
      shape_ = at::infer_size_symdimvector(x.sym_sizes(), given.slice(0, given.size() - 1));
    } catch (const c10::Error&) {
      TORCH_CHECK_VALUE(false, "fastvae::", kName,
                        ": widths must broadcast with x but for the bins, got ", given, " and ",
                        x.sym_sizes());
    }
    inputs_ = {x, widths, heights, slopes};
    for (size_t i = 0; i < inputs_.size(); ++i) {
      c10::SymDimVector shape = shape_;
      if (i > 0) shape.push_back(inputs_[i].sym_sizes().back());
      inputs_[i] = inputs_[i].expand_symint(shape);
    }
  }

  std::tuple<Tensor, Tensor> forward() {
    Tensor y = allocate(shape_, inputs_[0].options());
    Tensor log_det = allocate(rows(), row_options(y));
    if (y.is_meta() || log_det.numel() == 0) return {y, log_det};
    if (y.numel() == 0) return {y, log_det.zero_()};
    SplineSweep sweep = lay_out();
    sweep.y = y.mutable_data_ptr();
    sweep.log_det = log_det.mutable_data_ptr();
    launch(sweep);
    return {y, log_det};
  }

  Gradients backward(const optional<Tensor>& grad_y, const optional<Tensor>& grad_log_det,
                     std::array<bool, 4> wanted) {
    if (grad_y) RowOp(kName, {{"x", inputs_[0]}, {"grad_y", *grad_y}});
    if (grad_log_det) {
      check_row_values(kName, {"grad_log_det", *grad_log_det}, rows(), inputs_[0]);
    }
    Gradients gradients;
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (wanted[i]) gradients[i] = allocate(inputs_[i].sym_sizes(), inputs_[i].options());
    }
    if (inputs_[0].is_meta() || inputs_[0].numel() == 0) return gradients;
    SplineSweep sweep = lay_out();
    const Tensor grad = grad_y ? grad_y->expand_symint(shape_).contiguous() : Tensor();
    const Tensor row_grad = grad_log_det ? grad_log_det->contiguous() : Tensor();
    if (grad_y) sweep.grad = grad.const_data_ptr();
    if (grad_log_det) sweep.grad_log_det = row_grad.const_data_ptr();
    void** const to[] = {&sweep.d_x, &sweep.d_widths, &sweep.d_heights, &sweep.d_slopes};
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (wanted[i]) *to[i] = gradients[i].mutable_data_ptr();
    }
    launch(sweep);
    return gradients;
  }

 private:
  bool circular() const { return settings_.tails == "circular"; }
  c10::SymIntArrayRef rows() const {
    return c10::SymIntArrayRef(shape_).slice(0, shape_.size() - 1);
  }

  void check_settings() const {
    TORCH_CHECK_VALUE(settings_.tails == "linear" || circular(), "fastvae::", kName,
                      ": tails must be one of linear, circular, got ", settings_.tails);
    const auto check = [](const char* name, double value) {
      TORCH_CHECK_VALUE(value > 0 && std::isfinite(value), "fastvae::", kName, ": ", name,
                        " must be positive and finite, got ", value);
    };
    check("bound", settings_.bound);
    check("min_bin_width", settings_.min_width);
    check("min_bin_height", settings_.min_height);
    check("min_derivative", settings_.min_slope);
  }

  // Leading dimensions become one, without a copy unless they lie in memory as no stride can say.
  SplineSweep lay_out() {
    SplineSweep s;
    s.dtype = dtype_of(inputs_[0]);
    s.columns = inputs_[0].size(-1);
    s.rows = inputs_[0].numel() / s.columns;
    s.bins = inputs_[1].size(-1);
    s.inverse = settings_.inverse, s.circular = circular();
    s.bound = settings_.bound, s.min_slope = settings_.min_slope;
    s.min_width = settings_.min_width, s.min_height = settings_.min_height;
    SplineOperand* const to[] = {&s.x, &s.widths, &s.heights, &s.slopes};
    for (size_t i = 0; i < inputs_.size(); ++i) {
      Tensor& x = inputs_[i];
      x = i == 0 ? x.reshape({s.rows, s.columns}) : x.reshape({s.rows, s.columns, x.size(-1)});
      *to[i] = {x.const_data_ptr(), x.stride(0), x.stride(1), i == 0 ? 0 : x.stride(2)};
    }
    return s;
  }

  void launch(const SplineSweep& sweep) const {
#ifdef FASTVAE_CUDA
    if (inputs_[0].is_cuda()) {
      launch_on_cuda(kName, inputs_[0],
                     [&](void* stream) { return cuda::sweep_spline(sweep, stream); });
      return;
    }
#endif
    const int64_t grain = std::max<int64_t>(1, 8192 / (sweep.columns * sweep.bins));
    with_types(sweep.dtype, [&]<class T, class Stored>(Types<T, Stored>) {
      at::parallel_for(0, sweep.rows, grain, [&](int64_t begin, int64_t end) {
        cpu::SplineTask<T, Stored> task(sweep);
        sweep.y != nullptr ? task.forward(begin, end) : task.backward(begin, end);
      });
    });
  }

  const SplineSettings settings_;
  std::array<Tensor, 4> inputs_;
  c10::SymDimVector shape_;
  c10::SymInt bins_;
};

struct DefinedSpline {
  static constexpr const char* kName = SplineOp::kName;

  static std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& widths,
                                            const Tensor& heights, const Tensor& derivatives,
                                            double bound, string_view tails, bool inverse,
                                            double min_bin_width, double min_bin_height,
                                            double min_derivative) {
    return SplineOp(x, widths, heights, derivatives,
                    {bound, tails, inverse, min_bin_width, min_bin_height, min_derivative})
        .forward();
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
      const optional<Tensor>& grad_y, const optional<Tensor>& grad_log_det, const Tensor& x,
      const Tensor& widths, const Tensor& heights, const Tensor& derivatives, double bound,
      string_view tails, bool inverse, double min_bin_width, double min_bin_height,
      double min_derivative, std::array<bool, 4> wanted) {
    return std::tuple_cat(
        SplineOp(x, widths, heights, derivatives,
                 {bound, tails, inverse, min_bin_width, min_bin_height, min_derivative})
            .backward(grad_y, grad_log_det, wanted));
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  const std::string tensors = "Tensor x, Tensor widths, Tensor heights, Tensor derivatives, ";
  define<DefinedSpline>(
      m,
      "(" + tensors +
          "float bound=3.0, str tails=\"linear\", bool inverse=False, float min_bin_width=0.001, "
          "float min_bin_height=0.001, float min_derivative=0.001) -> (Tensor y, Tensor log_det)",
      "(Tensor? grad_y, Tensor? grad_log_det, " + tensors +
          "float bound, str tails, bool inverse, float min_bin_width, float min_bin_height, "
          "float min_derivative, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace fastvae
