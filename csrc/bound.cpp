// Importance-weighted bounds as torch ops. The formula is in bound.h.
#include "bound.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include "binding.h"
#include "lanes.h"

namespace fastvae {
namespace {

class LogMeanExpOp : public RowOp {
 public:
  static constexpr const char* kName = "log_mean_exp";

  static Tensor forward(const Tensor& log_w) {
    LogMeanExpOp op(log_w);
    Tensor bound =
        allocate(c10::SymIntArrayRef(op.shape_).slice(0, op.shape_.size() - 1), row_options(log_w));
    if (log_w.is_meta()) return bound;
    Sweep sweep = op.lay_out();
    sweep.row_sum = bound.mutable_data_ptr();
    op.launch<LogMeanExp::Forward>(sweep);
    return bound;
  }

  static Tensor backward(const Tensor& grad, const Tensor& log_w, std::array<bool, 1> wanted) {
    LogMeanExpOp op(log_w);
    op.row_input("grad", grad);
    if (!wanted[0]) return Tensor();
    Tensor gradient = at::empty_like(log_w);  // lies as log_w does: the samples' dimension leading
    if (log_w.is_meta()) return gradient;
    op.inputs_.push_back(gradient);
    Sweep sweep = op.lay_out();
    sweep.outputs[0] = op.inputs_[1].mutable_data_ptr();
    op.launch<LogMeanExp::Backward>(sweep);
    if (!op.inputs_[1].is_same(gradient)) gradient.copy_(op.inputs_[1]);  // too many strides
    return gradient;
  }

 private:
  explicit LogMeanExpOp(const Tensor& log_w) : RowOp(kName, {{"log_w", log_w}}) {}

  template <class F>
  void launch(const Sweep& sweep) const {
    if (sweep.rows() == 0) return;
#ifdef FASTVAE_CUDA
    if (!inputs_[0].is_cpu()) {
      launch_on_cuda(name_, inputs_[0],
                     [&](void* stream) { return cuda::sweep_rows<F>(sweep, stream); });
      return;
    }
#endif
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, sweep.columns));
    at::parallel_for(0, sweep.rows(), grain,
                     [&](int64_t begin, int64_t end) { cpu::reduce_rows<F>(sweep, begin, end); });
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define<LogMeanExpOp>(m, "(Tensor log_w) -> Tensor",
                       "(Tensor grad, Tensor log_w, bool[1] wanted) -> Tensor");
}

}  // namespace fastvae
