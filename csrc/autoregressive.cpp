// The slow direction of affine autoregressive flows as a torch op, private to fastvae.flows, which
// takes it where no gradient is wanted. What it computes is in autoregressive.h, the engine in
// units.h. Half types compute in float32.
#include "autoregressive.h"

#include <ATen/Parallel.h>

#include "binding.h"
#include "units.h"

namespace fastvae {

namespace cuda {
// autoregressive.cu. Null, or what CUDA complains of. Scratch is as much as unroll_scratch asks
// for.
const char* unroll(const UnrollSweep& sweep, void* scratch, void* stream);
int64_t unroll_scratch(const UnrollSweep& sweep);  // bytes
}  // namespace cuda

namespace {

using std::optional;

class UnrollAffine {
 public:
  static constexpr const char* kName = "unroll_affine";

  UnrollAffine(const Tensor& z, at::TensorList weights, at::TensorList biases,
               const optional<Tensor>& sums, int64_t least, c10::string_view kind, bool inverse,
               c10::string_view activation)
      : z_(z) {
    s_.kind = with_one_of<Exp, TanhExp, Sigmoid, Gated, Additive>(
        kName, "kind", kind, []<class Kind>(Kind) { return Kind::kKind; });
    s_.activation = with_one_of<Relu, LeakyRelu, Elu, Silu, Logistic, HyperbolicTangent>(
        kName, "activation", activation, []<class A>(A) { return A::kActivation; });
    s_.inverse = inverse;
    s_.least = least;
    const Argument first{"z", z};
    check_input(kName, first, first);
    const c10::SymInt dims = z.sym_size(-1);
    TORCH_CHECK_VALUE(dims > 0, "fastvae::", kName, ": z must have at least one column, got ",
                      z.sym_sizes());
    TORCH_CHECK_VALUE(least == 0 || (least == 1 && dims > 1), "fastvae::", kName,
                      ": least must be 0, or 1 of several columns, got ", least, " and ",
                      z.sym_sizes());
    TORCH_CHECK_VALUE(!weights.empty() && weights.size() <= kMaxLayers, "fastvae::", kName,
                      ": weights must be of 1 to ", kMaxLayers, " layers, got ", weights.size());
    TORCH_CHECK_VALUE(biases.size() == weights.size(), "fastvae::", kName,
                      ": biases must be one for each of weights, got ", biases.size(), " and ",
                      weights.size());
    c10::SymInt before = dims;
    for (size_t i = 0; i < weights.size(); ++i) {
      check_input(kName, {"weights", weights[i]}, first);
      check_input(kName, {"biases", biases[i]}, first);
      const auto sizes = weights[i].sym_sizes();
      TORCH_CHECK_VALUE(sizes.size() == 2 && sizes[0] > 0 && sizes[1] == before, "fastvae::", kName,
                        ": weights must be [N, ", before, "] in layer ", i, ", got ", sizes);
      TORCH_CHECK_VALUE(biases[i].dim() == 1 && biases[i].sym_size(0) == sizes[0],
                        "fastvae::", kName, ": biases must be [N] for weights of [N, ..], got ",
                        biases[i].sym_sizes(), " and ", sizes);
      before = sizes[0];
    }
    TORCH_CHECK_VALUE(before == dims * s_.parameters(), "fastvae::", kName,
                      ": weights must end in ", s_.parameters(), " for each column of z, got ",
                      weights.back().sym_sizes(), " and ", z.sym_sizes());
    if (sums) {
      check_input(kName, {"sums", *sums}, first);
      c10::SymDimVector shape(z.sym_sizes().begin(), z.sym_sizes().end());
      shape.back() = weights[0].sym_size(0);
      TORCH_CHECK_VALUE(sums->sym_sizes() == c10::SymIntArrayRef(shape), "fastvae::", kName,
                        ": sums must be [.., N] for z of [.., D] and weights of [N, D], got ",
                        sums->sym_sizes(), ", ", z.sym_sizes(), " and ", weights[0].sym_sizes());
    }
    if (!z.is_meta()) lay_out(weights, biases, sums);
  }

  std::tuple<Tensor, Tensor> run() {
    const auto rows = z_.sym_sizes().slice(0, z_.sym_sizes().size() - 1);
    Tensor log_det = allocate(rows, row_options(z_));
    if (z_.is_meta()) return {allocate(z_.sym_sizes(), z_.options()), log_det};
    const Tensor x = allocate(z_.sym_sizes(), row_options(z_));
    s_.x = x.mutable_data_ptr();
    s_.log_det = log_det.mutable_data_ptr();
    if (s_.rows > 0) launch();
    return {x.to(z_.scalar_type()), log_det};
  }

 private:
  void lay_out(at::TensorList weights, at::TensorList biases, const optional<Tensor>& sums) {
    const auto type = row_options(z_).dtype().toScalarType();
    const auto data = [&](const Tensor& x) {
      held_.push_back(x.to(type).contiguous());
      return held_.back().const_data_ptr();
    };
    s_.in_double = type == at::kDouble;
    s_.dims = z_.size(-1);
    s_.rows = z_.numel() / s_.dims;
    s_.layers = static_cast<int>(weights.size());
    s_.widths[0] = s_.dims;
    s_.z = data(z_);
    for (int i = 0; i < s_.layers; ++i) {
      const auto layer = static_cast<size_t>(i);
      s_.weights[i] = data(weights[layer]), s_.biases[i] = data(biases[layer]);
      s_.widths[i + 1] = weights[layer].size(0);
      s_.begins[i + 1] = s_.begins[i] + s_.widths[i];
    }
    if (sums) s_.sums = data(*sums);
  }

  void launch() {
#ifdef FASTVAE_CUDA
    if (z_.is_cuda()) {
      const Tensor scratch = allocate({cuda::unroll_scratch(s_)}, z_.options().dtype(at::kByte));
      launch_on_cuda(kName, z_, [&](void* stream) {
        return cuda::unroll(s_, scratch.mutable_data_ptr(), stream);
      });
      return;
    }
#endif
    s_.in_double ? launch_on_cpu<double>() : launch_on_cpu<float>();
  }
  template <class T>
  void launch_on_cpu() const {
    int64_t work = 0;  // of a block: weights that it meets
    for (int i = 0; i < s_.layers; ++i) work += s_.widths[i] * s_.widths[i + 1] / 2;
    at::parallel_for(0, cpu::UnitTask<T>::blocks(s_), 1 + 8192 / (1 + work),
                     [&](int64_t begin, int64_t end) { cpu::UnitTask<T>(s_).run(begin, end); });
  }

  const Tensor& z_;
  std::vector<Tensor> held_;  // what the sweep points to
  UnrollSweep s_;
};

std::tuple<Tensor, Tensor> unroll_affine(const Tensor& z, at::TensorList weights,
                                         at::TensorList biases, const optional<Tensor>& sums,
                                         int64_t least, c10::string_view kind, bool inverse,
                                         c10::string_view activation) {
  return UnrollAffine(z, weights, biases, sums, least, kind, inverse, activation).run();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define_forward(m, UnrollAffine::kName,
                 "(Tensor z, Tensor[] weights, Tensor[] biases, Tensor? sums, int least, str kind, "
                 "bool inverse, str activation) -> (Tensor x, Tensor log_det)",
                 TORCH_FN(unroll_affine));
}

}  // namespace fastvae
