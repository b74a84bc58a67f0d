// Sylvester flows as a torch op. The formula is in residual_flow.h, the engine in products.h. What
// is made of a step's parameters before any row, and of their gradients after, is torch's to do:
// matrices of no more than [D, M].
#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/triu.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "binding.h"
#include "products.h"
#include "residual_flow.h"

namespace fastvae {

namespace cuda {
// sylvester.cu. Null, or what CUDA complains of. Scratch is as much as sylvester_scratch asks for.
const char* sweep_sylvester(const SylvesterSweep& sweep, bool backward, void* scratch,
                            void* stream);
int64_t sylvester_scratch(const SylvesterSweep& sweep, bool backward);  // bytes
}  // namespace cuda

namespace {

using std::optional;

// Products of n matrices, [n, I, J] and [n, J, N], into zeros, N padded to whole lanes. On a CPU
// torch's own depend in the last bits on the threads there are, and on where a matrix begins.
template <class T>
void multiply_on_cpu(const Tensor& a, const Tensor& b, const Tensor& out) {
  const T *a_data = a.const_data_ptr<T>(), *b_data = b.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  const int64_t work = out.size(1) * out.size(2) * a.size(2);
  at::parallel_for(0, a.size(0), 1 + 65536 / (1 + work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      cpu::multiply(a_data + i * a.stride(0), a.stride(1), a.stride(2), b_data + i * b.stride(0),
                    to + i * out.stride(0), a.size(1), a.size(2), b.size(2));
    }
  });
}
int64_t whole_lanes(int64_t n) { return (n + cpu::kLanes - 1) / cpu::kLanes * cpu::kLanes; }
void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  const int64_t n = b.size(2), width = out.size(2);
  if (!a.is_cpu()) {
    out.narrow(2, 0, n).copy_(at::bmm(a, b));
    return;
  }
  Tensor columns = b;
  if (n != width || b.stride(2) != 1 || b.stride(1) != n) {
    columns = at::zeros({b.size(0), b.size(1), width}, b.options());
    columns.narrow(2, 0, n).copy_(b);
  }
  a.scalar_type() == at::kDouble ? multiply_on_cpu<double>(a, columns, out)
                                 : multiply_on_cpu<float>(a, columns, out);
}
Tensor product_of(const Tensor& a, const Tensor& b) {
  const Tensor out = at::zeros({a.size(0), a.size(1), whole_lanes(b.size(2))}, a.options());
  multiply_into(out, a, b);
  return out.narrow(2, 0, b.size(2));
}

// Upper triangles as the steps have them: R and S of each of n lines, [n, M, M].
struct Triangles {
  Tensor given[2], full[2], product, gain;  // the last two [n, M]

  Triangles(const Tensor& r, const Tensor& s) : given{r, s} {
    auto result = diagonal_op().run<SylvesterDiagonal::Forward>().outputs;
    for (int i = 0; i < 2; ++i) {
      full[i] = at::triu(given[i]);
      diagonal(full[i]).copy_(result[static_cast<size_t>(i)]);
    }
    product = result[2];
    gain = result[3];
  }
  // Of the gradients of the full ones and of the gain makes those of R and S as given, in place.
  void pull(Tensor& d_r, Tensor& d_s, const Tensor& d_gain) const {
    d_r.triu_();
    d_s.triu_();
    RowOp op("sylvester_flow", {{"r", diagonal(given[0])},
                                {"s", diagonal(given[1])},
                                {"d_r", diagonal(d_r)},
                                {"d_s", diagonal(d_s)},
                                {"d_gain", d_gain}});
    auto result = op.run<SylvesterDiagonal::Backward>().outputs;
    diagonal(d_r).copy_(result[0]);
    diagonal(d_s).copy_(result[1]);
  }

 private:
  static Tensor diagonal(const Tensor& x) { return x.diagonal(0, -2, -1); }
  RowOp diagonal_op() const {
    return {"sylvester_flow", {{"r", diagonal(given[0])}, {"s", diagonal(given[1])}}};
  }
};

class SylvesterOp {
 public:
  static constexpr const char* kName = "sylvester_flow";
  static constexpr const char* kArguments[] = {"z", "q", "r", "s", "b"};
  static constexpr int kInputs = 5;
  using Inputs = std::array<Tensor, kInputs>;

  SylvesterOp(const Inputs& inputs, bool inverse) : inputs_(inputs) {
    s_.inverse = inverse;
    const Argument first{"z", inputs[0]};
    for (int i = 0; i < kInputs; ++i) check_input(kName, {kArguments[i], inputs[i]}, first);
    const auto z = inputs[0].sym_sizes(), q = inputs[1].sym_sizes();
    TORCH_CHECK_VALUE(q.size() > 2 && q[q.size() - 2] == z.back(), "fastvae::", kName,
                      ": q must be [..., K, D, M] for the D of z, got ", q, " and ", z);
    lines_.assign(q.begin(), q.end() - 2);
    TORCH_CHECK_VALUE(lines_.back() > 0, "fastvae::", kName,
                      ": q must have at least one step, got ", q);
    TORCH_CHECK_VALUE(q.back() <= z.back(), "fastvae::", kName,
                      ": q must have no more columns than rows, got ", q);
    c10::SymDimVector triangle(q.begin(), q.end()), vector(q.begin(), q.end() - 2);
    triangle[triangle.size() - 2] = q.back();
    vector.push_back(q.back());
    for (int i = 2; i < kInputs; ++i) {
      const bool is_vector = i + 1 == kInputs;
      TORCH_CHECK_VALUE(inputs[i].sym_sizes() == c10::SymIntArrayRef(is_vector ? vector : triangle),
                        "fastvae::", kName, ": ", kArguments[i], " must be [..., K, ",
                        is_vector ? "M]" : "M, M]", " for the q of [..., K, D, M], got ",
                        inputs[i].sym_sizes(), " and ", q);
    }
    rows_ = broadcast_rows(kName, first, {"q", inputs[1]}, lines_);
    shape_ = rows_;
    shape_.push_back(z.back());
  }

  std::tuple<Tensor, Tensor> forward() {
    Tensor log_det = allocate(rows_, row_options(inputs_[0]));
    if (inputs_[0].is_meta()) {
      return {allocate(shape_, inputs_[0].options()), log_det};
    }
    lay_out();
    Tensor z = allocate(shape_, z_.options());
    if (z.numel() == 0) return {z.to(inputs_[0].scalar_type()), log_det.zero_()};
    s_.out = z.mutable_data_ptr();
    s_.log_det = log_det.mutable_data_ptr();
    launch(false);
    return {z.to(inputs_[0].scalar_type()), log_det};
  }

  Inputs backward(const optional<Tensor>& grad_z, const optional<Tensor>& grad_log_det,
                  std::array<bool, kInputs> wanted) {
    const Tensor z = inputs_[0].expand_symint(shape_);
    if (grad_z) RowOp(kName, {{"z", z}, {"grad_z", *grad_z}});
    if (grad_log_det) check_row_values(kName, {"grad_log_det", *grad_log_det}, rows_, inputs_[0]);
    Inputs gradients;
    if (inputs_[0].is_meta() || z.numel() == 0) {
      for (int i = 0; i < kInputs; ++i) {
        if (wanted[i]) gradients[i] = at::zeros_like(i == 0 ? z : inputs_[i]);
      }
      return gradients;
    }
    lay_out();
    const auto wide = z_.options();
    const Tensor grad = grad_z ? grad_z->expand_symint(shape_).to(wide).contiguous() : Tensor();
    const Tensor row_grad = grad_log_det ? grad_log_det->contiguous() : Tensor();
    if (grad_z) s_.grad_out = grad.const_data_ptr();
    if (grad_log_det) s_.grad_log_det = row_grad.const_data_ptr();
    const Tensor d_z = wanted[0] ? allocate(shape_, wide) : Tensor();
    if (wanted[0]) s_.d_z = d_z.mutable_data_ptr();
    // Of shared lines there are the sums of several runs of rows.
    c10::SymDimVector size;
    if (s_.shared) size.push_back(sum_count());
    size.append(s_.shared ? lines_ : rows_);
    if (!s_.shared) size.push_back(lines_.back());
    const int64_t gradient_size = s_.gradient_size();
    size.push_back(gradient_size);
    Tensor sums = at::zeros_symint(size, wide);
    s_.d_lines = sums.mutable_data_ptr();
    launch(true);

    c10::SymDimVector one = lines_;
    one.push_back(gradient_size);
    const Tensor d_lines =
        (s_.shared ? sums.sum(0) : at::sum_to(sums, one)).view({q_.size(0), gradient_size});
    int64_t at = 0;
    const auto part = [&](int64_t rows) {
      const Tensor x =
          d_lines.as_strided({q_.size(0), rows, s_.rank}, {gradient_size, s_.rank_width, 1}, at);
      at += rows * s_.rank_width;
      return x;
    };
    const Tensor d_in = part(s_.dims), d_out = part(s_.dims), d_b = part(1).squeeze(1),
                 d_gain = part(1).squeeze(1);
    const Triangles& t = *triangles_;
    gradients[0] = d_z;
    if (wanted[1]) {
      gradients[1] = product_of(d_out, t.full[0].mT()) + product_of(d_in, t.full[1]);
    }
    if (wanted[2] || wanted[3]) {
      Tensor d_r = product_of(q_.mT(), d_out).contiguous();
      Tensor d_s = product_of(d_in.mT(), q_).contiguous();
      if (s_.inverse) {
        const Tensor d_t = part(s_.rank).triu(1);
        d_r += product_of(t.full[1].mT(), d_t);
        d_s += product_of(d_t, t.full[0].mT());
      }
      t.pull(d_r, d_s, d_gain);
      if (wanted[2]) gradients[2] = d_r;
      if (wanted[3]) gradients[3] = d_s;
    }
    if (wanted[4]) gradients[4] = d_b.contiguous();
    for (int i = 0; i < kInputs; ++i) {
      if (!gradients[i].defined()) continue;
      if (i > 0) gradients[i] = gradients[i].view_symint(inputs_[i].sym_sizes());
      gradients[i] = gradients[i].to(inputs_[0].scalar_type());
    }
    return gradients;
  }

 private:
  void lay_out() {
    const auto type = row_options(inputs_[0]).dtype().toScalarType();
    const auto wide = [&](int i) { return inputs_[i].to(type); };
    z_ = wide(0).expand_symint(shape_).contiguous();
    q_ = wide(1).contiguous().flatten(0, -3);
    triangles_.emplace(wide(2).flatten(0, -3), wide(3).flatten(0, -3));
    s_.in_double = type == at::kDouble;
    s_.rows = 1;
    for (const c10::SymInt& size : rows_) s_.rows *= size.expect_int();
    s_.dims = q_.size(-2), s_.rank = q_.size(-1);
    s_.width = whole_lanes(s_.dims), s_.rank_width = whole_lanes(s_.rank);
    s_.steps = lines_.back().expect_int();
    s_.shared = lines_.size() == 1;
    s_.z = z_.const_data_ptr();

    const int64_t n = q_.size(0);
    const int64_t line_size = s_.line_size();
    Tensor table = at::zeros({n, line_size}, z_.options());
    int64_t at = 0;
    const auto part = [&](int64_t rows, int64_t width) {
      const Tensor x = table.as_strided({n, rows, width}, {line_size, width, 1}, at);
      at += rows * width;
      return x;
    };
    const Tensor r = triangles_->full[0], s = triangles_->full[1], q_t = q_.mT();
    multiply_into(part(s_.dims, s_.rank_width), q_, s.mT());
    multiply_into(part(s_.rank, s_.width), s, q_t);
    multiply_into(part(s_.dims, s_.rank_width), q_, r);
    multiply_into(part(s_.rank, s_.width), r.mT(), q_t);
    for (const Tensor& numbers : {wide(4).flatten(0, -2), triangles_->gain, triangles_->product}) {
      part(1, s_.rank_width).narrow(2, 0, s_.rank).copy_(numbers.unsqueeze(1));
    }
    if (s_.inverse) {
      const Tensor t = part(s_.rank, s_.rank_width);
      multiply_into(t, s, r);
      t.triu_(1);
      part(s_.rank, s_.rank_width).narrow(2, 0, s_.rank).copy_(t.narrow(2, 0, s_.rank).mT());
    }
    if (!s_.shared) {
      c10::SymDimVector one = lines_, all = rows_;
      one.push_back(line_size);
      all.push_back(lines_.back());
      all.push_back(line_size);
      table = table.view_symint(one).expand_symint(all).contiguous();
    }
    table_ = table;
    s_.lines = table_.const_data_ptr();
  }

  int64_t sum_count() const {
    return inputs_[0].is_cpu() ? cpu::ProductTask<float>::chunks(s_) : 1;
  }

  void launch(bool backward) const {
#ifdef FASTVAE_CUDA
    if (inputs_[0].is_cuda()) {
      const Tensor scratch =
          allocate({cuda::sylvester_scratch(s_, backward)}, inputs_[0].options().dtype(at::kByte));
      launch_on_cuda(kName, inputs_[0], [&](void* stream) {
        return cuda::sweep_sylvester(s_, backward, scratch.mutable_data_ptr(), stream);
      });
      return;
    }
#endif
    s_.in_double ? run<double>(backward) : run<float>(backward);
  }
  template <class T>
  void run(bool backward) const {
    using Task = cpu::ProductTask<T>;
    const int64_t units = backward ? Task::chunks(s_) : Task::blocks(s_);
    const int64_t work = 2 * s_.rows * s_.dims * s_.rank * s_.steps * (backward ? 3 : 1) / units;
    at::parallel_for(0, units, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, work)),
                     [&](int64_t begin, int64_t end) {
                       backward ? Task(s_).backward(begin, end) : Task(s_).forward(begin, end);
                     });
  }

  Inputs inputs_;
  Tensor z_, q_;  // in the type computed in; the second [n, D, M], as it was given
  std::optional<Triangles> triangles_;
  c10::SymDimVector rows_, lines_, shape_;
  Tensor table_;
  SylvesterSweep s_;
};

struct DefinedSylvester {
  static constexpr const char* kName = SylvesterOp::kName;

  static std::tuple<Tensor, Tensor> forward(const Tensor& z, const Tensor& q, const Tensor& r,
                                            const Tensor& s, const Tensor& b, bool inverse) {
    return SylvesterOp({z, q, r, s, b}, inverse).forward();
  }
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
      const optional<Tensor>& grad_z, const optional<Tensor>& grad_log_det, const Tensor& z,
      const Tensor& q, const Tensor& r, const Tensor& s, const Tensor& b, bool inverse,
      std::array<bool, SylvesterOp::kInputs> wanted) {
    auto g = SylvesterOp({z, q, r, s, b}, inverse).backward(grad_z, grad_log_det, wanted);
    return {g[0], g[1], g[2], g[3], g[4]};
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  const TensorsSchema<SylvesterOp> schema;
  define<DefinedSylvester>(
      m, "(" + schema.inputs + ", bool inverse=False) -> (Tensor z, Tensor log_det)",
      "(Tensor? grad_z, Tensor? grad_log_det, " + schema.inputs + ", bool inverse, " +
          schema.wanted + ") -> (" + schema.gradients + ")");
}

}  // namespace fastvae
