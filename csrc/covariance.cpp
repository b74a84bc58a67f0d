// Gaussians of full covariance as torch ops. The formulas are in covariance.h, the engine in
// triangle.h.
#include "covariance.h"

#include <ATen/Parallel.h>

#include "binding.h"
#include "triangle.h"

namespace fastvae {

namespace cuda {
// covariance.cu. Null, or what CUDA complains of.
const char* sweep_triangles(const TriangleSweep& sweep, bool backward, void* stream);
}  // namespace cuda

namespace {

using c10::string_view;
using std::optional;

// The op that has the diagonal.
std::tuple<Tensor, Tensor> diagonal_forward(const Tensor& mu, const Tensor& diagonal,
                                            const Tensor& key, string_view parameterization) {
  using Signature =
      std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, string_view, double);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastvae::reparameterize_kl", "")
                             .typed<Signature>();
  return op.call(mu, diagonal, key, parameterization, 0.0);
}
std::tuple<Tensor, Tensor> diagonal_backward(const optional<Tensor>& grad_z,
                                             const optional<Tensor>& grad_kl, const Tensor& mu,
                                             const Tensor& diagonal, const Tensor& key,
                                             string_view parameterization,
                                             std::array<bool, 2> wanted) {
  using Signature = std::tuple<Tensor, Tensor>(
      const optional<Tensor>&, const optional<Tensor>&, const Tensor&, const Tensor&, const Tensor&,
      const optional<Tensor>&, string_view, double, std::array<bool, 2>);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastvae::reparameterize_kl_backward", "")
                             .typed<Signature>();
  return op.call(grad_z, grad_kl, mu, diagonal, key, {}, parameterization, 0.0, wanted);
}

class TriangleOp {
 public:
  static constexpr const char* kName = "reparameterize_tril_kl";

  TriangleOp(const Tensor& mu, const Tensor& scale_tril, const Tensor& key)
      : mu_(mu), scale_tril_(scale_tril), key_(key) {
    for (const Argument& argument : {Argument{"mu", mu}, Argument{"scale_tril", scale_tril}}) {
      check_input(kName, argument, {"mu", mu});
    }
    const c10::SymInt dims = mu.sym_size(-1);
    TORCH_CHECK_VALUE(
        scale_tril.dim() > 1 && scale_tril.sym_size(-1) == dims && scale_tril.sym_size(-2) == dims,
        "fastvae::", kName, ": scale_tril must be [..., D, D] for the D of mu, got ",
        scale_tril.sym_sizes(), " and ", mu.sym_sizes());
    diagonal_ = wide(scale_tril.diagonal(0, -2, -1));
    RowOp rows(kName, {{"mu", mu}, {"scale_tril", scale_tril.diagonal(0, -2, -1)}});
    rows.key(key);
    rows_.assign(rows.shape().begin(), rows.shape().end());
  }

  std::tuple<Tensor, Tensor> forward(string_view parameterization) {
    auto [z, kl] = diagonal_forward(wide(mu_), diagonal_, key_, parameterization);
    if (!z.is_meta() && z.numel() > 0) {
      TriangleSweep sweep = lay_out(triangles());
      sweep.z = z.mutable_data_ptr();
      sweep.kl = kl.mutable_data_ptr();
      launch(sweep, false);
    }
    return {z.to(mu_.scalar_type()), kl};
  }

  std::tuple<Tensor, Tensor> backward(const optional<Tensor>& grad_z,
                                      const optional<Tensor>& grad_kl, string_view parameterization,
                                      std::array<bool, 2> wanted) {
    const c10::SymIntArrayRef rows(rows_.data(), rows_.size() - 1);
    if (grad_z) RowOp(kName, {{"mu", mu_}, {"grad_z", *grad_z}});  // broadcasts
    if (grad_kl) check_row_values(kName, {"grad_kl", *grad_kl}, rows, mu_);
    // On all rows: what they share is summed by autograd, or in the sweep.
    const Tensor mu = wide(mu_).expand_symint(rows_), diagonal = diagonal_.expand_symint(rows_);
    const optional<Tensor> wide_grad_z =
        grad_z ? optional(wide(*grad_z).expand_symint(rows_).contiguous()) : grad_z;
    auto [d_mu, d_diagonal] =
        diagonal_backward(wide_grad_z, grad_kl, mu, diagonal, key_, parameterization, wanted);
    if (d_mu.defined()) d_mu = d_mu.to(mu_.scalar_type());
    if (!wanted[1]) return {d_mu, Tensor()};

    const bool shares = shares_triangles();
    c10::SymDimVector shape(scale_tril_.sym_sizes().begin(), scale_tril_.sym_sizes().end());
    if (!shares) {
      shape = rows_;
      shape.push_back(rows_.back());
    }
    const Tensor d_scale_tril = allocate(shape, scale_tril_.options());
    if (d_scale_tril.is_meta() || d_scale_tril.numel() == 0) return {d_mu, d_scale_tril};
    if (mu.numel() == 0) return {d_mu, d_scale_tril.zero_()};  // no row says anything of it
    TriangleSweep sweep = lay_out(shares ? triangles() : expanded_triangles());
    const Tensor row_grads = grad_kl ? grad_kl->contiguous() : Tensor();
    if (grad_z) sweep.grad_z = wide_grad_z->const_data_ptr();
    if (grad_kl) sweep.grad_kl = row_grads.const_data_ptr();
    d_diagonal = d_diagonal.contiguous();
    sweep.d_diagonal = d_diagonal.const_data_ptr();
    sweep.d_scale_tril = d_scale_tril.mutable_data_ptr();
    launch(sweep, true);
    return {d_mu, d_scale_tril};
  }

 private:
  // In the type computed in: what has D elements a row is little beside the triangles.
  Tensor wide(const Tensor& x) const { return x.to(row_options(mu_).dtype().toScalarType()); }

  // Whether row r has triangle r % triangles: the leading dimensions of scale_tril are the last of
  // the rows'. Other broadcasts are expanded.
  bool shares_triangles() const {
    int64_t dim = scale_tril_.dim() - 3;  // leading dimensions, last first
    while (dim >= 0) {
      const int64_t of_rows =
          static_cast<int64_t>(rows_.size()) - 1 - (scale_tril_.dim() - 2 - dim);
      if (scale_tril_.sym_size(dim) != rows_[static_cast<size_t>(of_rows)]) break;
      --dim;
    }
    for (; dim >= 0; --dim) {
      if (scale_tril_.sym_size(dim) != 1) return false;
    }
    return true;
  }
  Tensor triangles() const {  // [triangles, D, D]
    return shares_triangles() ? flat(scale_tril_) : expanded_triangles();
  }
  Tensor expanded_triangles() const {
    c10::SymDimVector shape = rows_;
    shape.push_back(rows_.back());
    return flat(scale_tril_.expand_symint(shape));
  }
  static Tensor flat(const Tensor& x) { return x.reshape({-1, x.size(-1), x.size(-1)}); }

  TriangleSweep lay_out(const Tensor& triangles) {
    held_ = triangles;
    held_key_ = key_.contiguous();
    TriangleSweep s;
    s.dtype = dtype_of(scale_tril_);
    s.dims = triangles.size(-1);
    s.triangles = triangles.size(0);
    s.rows = 1;
    for (size_t i = 0; i + 1 < rows_.size(); ++i) s.rows *= rows_[i].expect_int();
    s.scale_tril = triangles.const_data_ptr();
    s.triangle_stride = triangles.stride(0);
    s.line_stride = triangles.stride(1);
    s.column_stride = triangles.stride(2);
    s.key = held_key_.const_data_ptr<int64_t>();
    return s;
  }

  void launch(const TriangleSweep& sweep, bool backward) const {
#ifdef FASTVAE_CUDA
    if (mu_.is_cuda()) {
      launch_on_cuda(kName, mu_,
                     [&](void* stream) { return cuda::sweep_triangles(sweep, backward, stream); });
      return;
    }
#endif
    with_types(sweep.dtype,
               [&]<class T, class Stored>(Types<T, Stored>) { run<T, Stored>(sweep, backward); });
  }

  template <class T, class Stored>
  static void run(const TriangleSweep& s, bool backward) {
    using Task = cpu::TriangleTask<T, Stored>;
    const int64_t units = backward ? s.triangles * Task::strips(s) : s.rows;
    const int64_t elements =
        backward ? cpu::kStrip * s.dims * (s.rows / s.triangles) : s.dims * s.dims / 2 + 1;
    const int64_t grain = std::max<int64_t>(1, 16384 / elements);
    at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
      Task task(s);
      backward ? task.backward(begin, end) : task.forward(begin, end);
    });
  }

  Tensor mu_, scale_tril_, key_, diagonal_, held_, held_key_;
  c10::SymDimVector rows_;  // [..., D]
};

struct ReparameterizeTrilKlOp {
  static constexpr const char* kName = TriangleOp::kName;

  static std::tuple<Tensor, Tensor> forward(const Tensor& mu, const Tensor& scale_tril,
                                            const Tensor& key, string_view parameterization) {
    return TriangleOp(mu, scale_tril, key).forward(parameterization);
  }

  static std::tuple<Tensor, Tensor> backward(const optional<Tensor>& grad_z,
                                             const optional<Tensor>& grad_kl, const Tensor& mu,
                                             const Tensor& scale_tril, const Tensor& key,
                                             string_view parameterization,
                                             std::array<bool, 2> wanted) {
    return TriangleOp(mu, scale_tril, key).backward(grad_z, grad_kl, parameterization, wanted);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define<ReparameterizeTrilKlOp>(
      m,
      "(Tensor mu, Tensor scale_tril, Tensor key, str parameterization=\"scale\") "
      "-> (Tensor z, Tensor kl)",
      "(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor scale_tril, Tensor key, "
      "str parameterization, bool[2] wanted) -> (Tensor, Tensor)");
}

}  // namespace fastvae
