// Sylvester flows as a torch op. The formula is in residual_flow.h, the engine in products.h. On
// CUDA what is made of a step's parameters before any row, and of their gradients after, is torch's
// to do: matrices of no more than [D, M].
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

int64_t whole_lanes(int64_t n) { return (n + cpu::kLanes - 1) / cpu::kLanes * cpu::kLanes; }

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
    Tensor d_lines = allocate(size, wide);
    s_.d_lines = d_lines.mutable_data_ptr();
    launch(true);

    gradients[0] = d_z;
    for (int i = 1; i < kInputs; ++i) {
      if (wanted[i]) gradients[i] = allocate(inputs_[i].sym_sizes(), wide);
    }
    if (!s_.shared) {
      c10::SymDimVector one = lines_;
      one.push_back(gradient_size);
      d_lines = at::sum_to(d_lines, one).contiguous();
    }
    inputs_[0].is_cpu() ? pull_lines(d_lines, gradients) : pull_with_torch(d_lines, gradients);
    for (int i = 0; i < kInputs; ++i) {
      if (!gradients[i].defined()) continue;
      gradients[i] = gradients[i].to(inputs_[0].scalar_type());
    }
    return gradients;
  }

 private:
  void lay_out() {
    const auto type = row_options(inputs_[0]).dtype().toScalarType();
    const auto wide = [&](int i) { return inputs_[i].to(type); };
    z_ = wide(0).expand_symint(shape_).contiguous();
    for (int i = 1; i < kInputs; ++i) {
      given_[i - 1] = wide(i).contiguous().flatten(0, i < 4 ? -3 : -2);
      s_.given[i - 1] = given_[i - 1].const_data_ptr();
    }
    s_.in_double = type == at::kDouble;
    s_.rows = 1;
    for (const c10::SymInt& size : rows_) s_.rows *= size.expect_int();
    s_.dims = given_[0].size(-2), s_.rank = given_[0].size(-1);
    s_.width = whole_lanes(s_.dims), s_.rank_width = whole_lanes(s_.rank);
    s_.steps = lines_.back().expect_int();
    s_.shared = lines_.size() == 1;
    s_.z = z_.const_data_ptr();

    Tensor table = inputs_[0].is_cpu() ? lay_lines_out() : lay_out_with_torch();
    if (!s_.shared) {
      c10::SymDimVector one = lines_, all = rows_;
      one.push_back(s_.line_size());
      all.push_back(lines_.back());
      all.push_back(s_.line_size());
      table = table.view_symint(one).expand_symint(all).contiguous();
    }
    table_ = table;
    s_.lines = table_.const_data_ptr();
  }

  // Lines, and the gradients of what was given of those of d_lines: by the engine.
  template <class Work>
  void each_line(const Work& work) const {
    const int64_t size = 1 + 2 * s_.dims * s_.rank * s_.rank;
    at::parallel_for(0, given_[0].size(0), 1 + 32768 / size, work);
  }
  Tensor lay_lines_out() const {
    const Tensor table = allocate({given_[0].size(0), s_.line_size()}, z_.options());
    with_real([&]<class T>(T*) {
      T* to = table.mutable_data_ptr<T>();
      each_line([&](int64_t begin, int64_t end) { cpu::LineTask<T>(s_).lay_out(begin, end, to); });
    });
    return table;
  }
  void pull_lines(const Tensor& d_lines, const Inputs& gradients) {
    for (int i = 1; i < kInputs; ++i) {
      if (gradients[i].defined()) s_.d_given[i - 1] = gradients[i].mutable_data_ptr();
    }
    with_real([&]<class T>(T*) {
      T* from = d_lines.mutable_data_ptr<T>();
      each_line([&](int64_t begin, int64_t end) {
        cpu::LineTask<T>(s_).pull(begin, end, from, s_.shared ? sum_count() : 1);
      });
    });
  }
  template <class F>
  void with_real(const F& f) const {
    s_.in_double ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
  }

  // The same by torch, for CUDA.
  Tensor lay_out_with_torch() const {
    const Tensor q = given_[0];
    const int64_t n = q.size(0);
    const Tensor table = at::zeros({n, s_.line_size()}, z_.options());
    int64_t at = 0;
    const auto put = [&](int64_t rows, int64_t width, const Tensor& x) {
      const Tensor to = table.as_strided({n, rows, x.size(2)}, {s_.line_size(), width, 1}, at);
      to.copy_(x);
      at += rows * width;
    };
    const Triangles triangles(given_[1], given_[2]);
    const Tensor r = triangles.full[0], s = triangles.full[1];
    for (const Tensor& x : {at::bmm(q, s.mT()), at::bmm(q, r)}) {
      put(s_.dims, s_.rank_width, x);
      put(s_.rank, s_.width, x.mT());
    }
    for (const Tensor& numbers : {given_[3], triangles.gain, triangles.product}) {
      put(1, s_.rank_width, numbers.unsqueeze(1));
    }
    if (s_.inverse) {
      const Tensor t = at::bmm(s, r).triu_(1);
      put(s_.rank, s_.rank_width, t);
      put(s_.rank, s_.rank_width, t.mT());
    }
    return table;
  }
  void pull_with_torch(const Tensor& d_lines, const Inputs& gradients) const {
    const Tensor q = given_[0];
    int64_t at = 0;
    const auto part = [&](int64_t rows) {
      const Tensor x = d_lines.as_strided({q.size(0), rows, s_.rank},
                                          {s_.gradient_size(), s_.rank_width, 1}, at);
      at += rows * s_.rank_width;
      return x;
    };
    const Tensor d_in = part(s_.dims), d_out = part(s_.dims), d_b = part(1).squeeze(1),
                 d_gain = part(1).squeeze(1);
    const Triangles triangles(given_[1], given_[2]);
    const Tensor r = triangles.full[0], s = triangles.full[1];
    Tensor d_r = at::bmm(q.mT(), d_out), d_s = at::bmm(d_in.mT(), q);
    if (s_.inverse) {
      const Tensor d_t = part(s_.rank).triu(1);
      d_r += at::bmm(s.mT(), d_t);
      d_s += at::bmm(d_t, r.mT());
    }
    triangles.pull(d_r, d_s, d_gain);
    const Tensor d_q = at::bmm(d_out, r.mT()) + at::bmm(d_in, s);
    const Tensor* all[] = {&d_q, &d_r, &d_s, &d_b};
    for (int i = 1; i < kInputs; ++i) {
      if (gradients[i].defined())
        gradients[i].copy_(all[i - 1]->view_symint(gradients[i].sym_sizes()));
    }
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
  Tensor z_;
  std::array<Tensor, 4> given_;  // the other inputs in the type computed in, of n lines each
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
