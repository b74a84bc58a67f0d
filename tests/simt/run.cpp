// Runs the cases that test_simt.py writes to standard input, each a Sweep with its data, and writes
// the outputs to standard output. Every buffer is an allocation of its own, of the exact size, so
// that AddressSanitizer sees the first byte read or written beyond it.
//
// A case is a Header, then for each input an InputHeader and its data, then the row input. The
// answer is each output that was wanted (of a virtual one, the end), then the row sums.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "autoregressive.h"
#include "channels.h"
#include "covariance.h"
#include "pairing.h"
#include "philox.h"
#include "residual_flow.h"
#include "spline.h"
#include "sweep.h"

namespace fastvae::cuda {
// mixture.cu, covariance.cu, logistic.cu, spline.cu, residual_flow.cu, sylvester.cu and
// autoregressive.cu, which a program of fewer sources lacks.
__attribute__((weak)) const char* sweep_pairs(const Pairing& p, bool backward, void* stream);
__attribute__((weak)) const char* sweep_triangles(const TriangleSweep& s, bool backward,
                                                  void* stream);
__attribute__((weak)) const char* sweep_pixels(const PixelMixture& p, void* stream);
__attribute__((weak)) const char* sweep_spline(const SplineSweep& s, void* stream);
template <class F>
__attribute__((weak)) const char* sweep_flow(const FlowSweep& s, bool backward, void* lent, void*);
template <class F>
__attribute__((weak)) int64_t flow_scratch(const FlowSweep& s, bool backward);
__attribute__((weak)) const char* sweep_sylvester(const SylvesterSweep& s, bool backward,
                                                  void* lent, void*);
__attribute__((weak)) int64_t sylvester_scratch(const SylvesterSweep& s, bool backward);
__attribute__((weak)) const char* unroll(const UnrollSweep& s, void* lent, void*);
__attribute__((weak)) int64_t unroll_scratch(const UnrollSweep& s);
}  // namespace fastvae::cuda

extern "C" const char* __asan_default_options() {
  return "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0";
}

namespace {

using namespace fastvae;

struct Header {  // test_simt.py packs the same
  char name[64];
  int64_t dtype, outer, inner, columns;
  int64_t inputs, row_inputs, outputs, row_sums;  // how many
  int64_t wanted;                                 // bit k: output k
  int64_t output_offset;                          // elements from a 16-byte boundary to the outputs
  int64_t lend_partial_sums;
  int64_t highest_first, most_blocks, only_block;  // simt::Options
  int64_t virtual_bytes;  // if not 0: outputs are huge, and this much of their end is answered
  int64_t key[2];
  double parameter;
};
struct InputHeader {
  int64_t bytes, offset;  // of the data, and from a 16-byte boundary to it
  int64_t outer_stride, inner_stride, column_stride;
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

Buffer allocate(int64_t bytes) {  // 16-byte aligned, filled with NaN
  char* p = static_cast<char*>(std::malloc(static_cast<size_t>(bytes)));
  std::memset(p, 0xff, static_cast<size_t>(bytes));
  return Buffer(p);
}

void receive(void* to, size_t bytes) {
  if (bytes > 0 && std::fread(to, bytes, 1, stdin) != 1) {
    std::fputs("run: a case ends early\n", stderr);
    std::exit(2);
  }
}

// Name "philox": the raw words of blocks 0, ..., columns - 1 of the key's stream.
void run_philox(const Header& h) {
  for (int64_t i = 0; i < h.columns; ++i) {
    const philox::Words words =
        philox::block({static_cast<uint64_t>(h.key[0]), static_cast<uint64_t>(h.key[1])},
                      static_cast<uint64_t>(i));
    std::fwrite(words.x, sizeof words.x, 1, stdout);
  }
}

void run_case(const Header& h) {
  std::vector<Buffer> buffers;
  Sweep sweep;
  sweep.dtype = static_cast<DType>(h.dtype);
  sweep.outer = h.outer, sweep.inner = h.inner, sweep.columns = h.columns;
  sweep.key = h.key;
  sweep.parameters[0] = h.parameter;
  const int64_t item = h.dtype == 0 ? 4 : h.dtype == 1 ? 8 : 2, row_item = h.dtype == 1 ? 8 : 4;
  const int64_t rows = h.outer * h.inner;

  for (int64_t k = 0; k < h.inputs; ++k) {
    InputHeader in;
    receive(&in, sizeof in);
    buffers.push_back(allocate(in.offset + in.bytes));
    receive(buffers.back().get() + in.offset, static_cast<size_t>(in.bytes));
    sweep.inputs[k] = {buffers.back().get() + in.offset, in.outer_stride, in.inner_stride,
                       in.column_stride};
  }
  for (int64_t k = 0; k < h.row_inputs; ++k) {
    buffers.push_back(allocate(rows * row_item));
    receive(buffers.back().get(), static_cast<size_t>(rows * row_item));
    sweep.row_inputs[k] = buffers.back().get();
  }
  const int64_t output_bytes = rows * h.columns * item;
  std::vector<std::pair<const char*, int64_t>> answer;
  for (int64_t k = 0; k < h.outputs; ++k) {
    if (!(h.wanted >> k & 1)) continue;
    if (h.virtual_bytes > 0) {  // too large to be real: only what is touched takes memory
      char* p = static_cast<char*>(mmap(nullptr, static_cast<size_t>(output_bytes),
                                        PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (p == MAP_FAILED) std::exit(3);
      sweep.outputs[k] = p;
      answer.push_back({p + output_bytes - h.virtual_bytes, h.virtual_bytes});
    } else {
      buffers.push_back(allocate(h.output_offset * item + output_bytes));
      sweep.outputs[k] = buffers.back().get() + h.output_offset * item;
      answer.push_back({static_cast<char*>(sweep.outputs[k]), output_bytes});
    }
  }
  if (h.row_sums > 0) {
    buffers.push_back(allocate(rows * row_item));
    sweep.row_sum = buffers.back().get();
    answer.push_back({buffers.back().get(), rows * row_item});
  }
  if (h.lend_partial_sums) {
    buffers.push_back(allocate(rows * cuda::segments_per_row(h.columns) * 8));
    sweep.partial_sums = reinterpret_cast<double*>(buffers.back().get());
  }

  simt::options = {h.highest_first != 0, h.most_blocks, h.only_block};
  const auto formula = simt::formulas().find(h.name);
  const char* error =
      formula == simt::formulas().end() ? "no such formula" : formula->second(sweep, nullptr);
  if (error != nullptr) {
    std::fprintf(stderr, "run: %s: %s\n", h.name, error);
    std::exit(2);
  }
  for (const auto& [data, bytes] : answer) {
    if (bytes > 0) std::fwrite(data, static_cast<size_t>(bytes), 1, stdout);
  }
}

// Name "pairs": rows, components and dims come as outer, inner and columns, the map to a scale as
// `inputs`; a PairHeader follows, then the inputs that there are, contiguous: z, mu, log_var,
// log_weights, kept, grad, grad_prod. The answer is log_prob, log_prod, kept; or d_z, d_mu,
// d_log_var, d_log_weights, as wanted.
struct PairHeader {
  int64_t marginals, backward, log_weights, grad, grad_prod;
  int64_t weighting;
  double rest, own, next;
};

void run_pairs(const Header& h) {
  PairHeader more;
  receive(&more, sizeof more);
  const int64_t item = h.dtype == 1 ? 8 : 4;
  Pairing p;
  p.dtype = static_cast<DType>(h.dtype);
  p.marginals = more.marginals != 0;
  p.rows = h.outer, p.components = h.inner, p.dims = h.columns;
  p.scale_map = static_cast<ScaleMap>(h.inputs);
  p.weights = {static_cast<Weighting>(more.weighting), more.rest, more.own, more.next};

  std::vector<Buffer> buffers;
  const auto input = [&](bool there, int64_t elements) -> void* {
    if (!there) return nullptr;
    buffers.push_back(allocate(elements * item));
    receive(buffers.back().get(), static_cast<size_t>(elements * item));
    return buffers.back().get();
  };
  std::vector<std::pair<const char*, int64_t>> answer;
  const auto output = [&](bool wanted, int64_t elements) -> void* {
    if (!wanted) return nullptr;
    buffers.push_back(allocate(elements * item));
    answer.push_back({buffers.back().get(), elements * item});
    return buffers.back().get();
  };
  const bool backward = more.backward != 0;
  p.z = input(true, p.rows * p.dims);
  p.mu = input(true, p.components * p.dims);
  p.log_var = input(true, p.components * p.dims);
  p.log_weights = input(more.log_weights != 0, p.components);
  p.kept = input(backward, p.rows * p.kept_columns());
  p.grad = input(more.grad != 0, p.rows);
  p.grad_prod = input(more.grad_prod != 0, p.rows);
  if (backward) {
    p.d_z = output(h.wanted & 1, p.rows * p.dims);
    p.d_mu = output(h.wanted & 2, p.components * p.dims);
    p.d_log_var = output(h.wanted & 4, p.components * p.dims);
    p.d_log_weights = output(h.wanted & 8, p.components);
  } else {
    p.log_prob = output(true, p.rows);
    p.log_prod = output(p.marginals, p.rows);
    p.kept = output(h.wanted & 1, p.rows * p.kept_columns());
  }
  buffers.push_back(allocate(cuda::scratch_bytes(p)));
  p.scratch = buffers.back().get();

  simt::options = {h.highest_first != 0, h.most_blocks, h.only_block};
  const char* error = cuda::sweep_pairs(p, backward, nullptr);
  if (error != nullptr) {
    std::fprintf(stderr, "run: %s: %s\n", h.name, error);
    std::exit(2);
  }
  for (const auto& [data, bytes] : answer) {
    if (bytes > 0) std::fwrite(data, static_cast<size_t>(bytes), 1, stdout);
  }
}

// Name "triangles": rows, triangles and dims come as outer, inner and columns; scale_tril as an
// input, whose strides are those from triangle to triangle, line to line, column to column. Then,
// contiguous: z and kl, which come back; or those there are of grad_z and grad_kl (wanted, bits 0
// and 1), and d_diagonal, for d_scale_tril.
void run_triangles(const Header& h) {
  const bool backward = h.row_inputs != 0;
  const int64_t item = h.dtype == 0 ? 4 : h.dtype == 1 ? 8 : 2, wide = h.dtype == 1 ? 8 : 4;
  const int64_t elements = h.outer * h.columns;
  TriangleSweep s;
  s.dtype = static_cast<DType>(h.dtype);
  s.rows = h.outer, s.triangles = h.inner, s.dims = h.columns, s.key = h.key;
  InputHeader in;
  receive(&in, sizeof in);
  std::vector<Buffer> buffers;
  const auto input = [&](int64_t bytes) {
    buffers.push_back(allocate(bytes));
    receive(buffers.back().get(), static_cast<size_t>(bytes));
    return buffers.back().get();
  };
  s.scale_tril = input(in.bytes);
  s.triangle_stride = in.outer_stride, s.line_stride = in.inner_stride;
  s.column_stride = in.column_stride;
  std::vector<std::pair<const char*, int64_t>> answer;
  if (backward) {
    if (h.wanted & 1) s.grad_z = input(elements * wide);
    if (h.wanted & 2) s.grad_kl = input(h.outer * wide);
    s.d_diagonal = input(elements * wide);
    const int64_t bytes = h.inner * h.columns * h.columns * item;
    buffers.push_back(allocate(bytes));
    s.d_scale_tril = buffers.back().get();
    answer.push_back({buffers.back().get(), bytes});
  } else {
    s.z = input(elements * wide);
    s.kl = input(h.outer * wide);
    answer.push_back({static_cast<char*>(s.z), elements * wide});
    answer.push_back({static_cast<char*>(s.kl), h.outer * wide});
  }
  simt::options = {h.highest_first != 0, h.most_blocks, h.only_block};
  const char* error = cuda::sweep_triangles(s, backward, nullptr);
  if (error != nullptr) {
    std::fprintf(stderr, "run: %s: %s\n", h.name, error);
    std::exit(2);
  }
  for (const auto& [data, bytes] : answer) {
    if (bytes > 0) std::fwrite(data, static_cast<size_t>(bytes), 1, stdout);
  }
}

// Names "planar_flow" and "radial_flow": rows, steps and dims come as outer, inner and columns,
// whether lines are shared as `inputs`, whether it is the inverse as `outputs`. Then, contiguous:
// z, the vectors, the numbers of lines, and for backward those there are of grad_z and grad_log_det
// (wanted, bits 0 and 1). The answer is z and log_det, or the gradients of all.
template <class F>
void run_flow(const Header& h) {
  const bool backward = h.row_inputs != 0;
  const int64_t item = h.dtype == 0 ? 4 : h.dtype == 1 ? 8 : 2, wide = h.dtype == 1 ? 8 : 4;
  FlowSweep s;
  s.dtype = static_cast<DType>(h.dtype);
  s.rows = h.outer, s.steps = h.inner, s.dims = h.columns, s.shared = h.inputs != 0;
  s.inverse = h.outputs != 0;
  std::vector<Buffer> buffers;
  std::vector<std::pair<const char*, int64_t>> answer;
  const auto input = [&](int64_t bytes) {
    buffers.push_back(allocate(bytes));
    receive(buffers.back().get(), static_cast<size_t>(bytes));
    return buffers.back().get();
  };
  const auto output = [&](int64_t bytes) {
    buffers.push_back(allocate(bytes));
    answer.push_back({buffers.back().get(), bytes});
    return buffers.back().get();
  };
  const int64_t z = s.rows * s.dims * item, vector = s.line_count() * s.dims * item;
  const int64_t number = s.line_count() * item, row = s.rows * wide;
  s.z = input(z);
  for (int i = 0; i < F::kVectors; ++i) s.vectors[i] = input(vector);
  for (int i = 0; i < F::kGiven; ++i) s.given[i] = input(number);
  if (backward) {
    if (h.wanted & 1) s.grad_out = input(z);
    if (h.wanted & 2) s.grad_log_det = input(row);
    s.d_z = output(z);
    for (int i = 0; i < F::kVectors; ++i) s.d_vectors[i] = output(vector);
    for (int i = 0; i < F::kGiven; ++i) s.d_given[i] = output(number);
  } else {
    s.out = output(z);
    s.log_det = output(row);
  }
  simt::options = {h.highest_first != 0, h.most_blocks, h.only_block};
  const Buffer lent = allocate(cuda::flow_scratch<F>(s, backward));
  const char* error = cuda::sweep_flow<F>(s, backward, lent.get(), nullptr);
  if (error != nullptr) {
    std::fprintf(stderr, "run: %s: %s\n", h.name, error);
    std::exit(2);
  }
  for (const auto& [data, bytes] : answer) {
    if (bytes > 0) std::fwrite(data, static_cast<size_t>(bytes), 1, stdout);
  }
}

// Name "spline": rows, bins and columns come as outer, inner and columns, whether inverse and
// circular as `inputs` and `row_sums`, the bound as the parameter. Then x, widths, heights, slopes,
// each an InputHeader, whose strides are those from row to row, column to column, bin to bin, and
// its data; and for backward those there are of grad and grad_log_det (wanted, bits 0 and 1). The
// answer is y and log_det, or the gradients, of which bits 2 to 5 name those wanted.
void run_spline(const Header& h) {
  const bool backward = h.row_inputs != 0;
  const int64_t item = h.dtype == 0 ? 4 : h.dtype == 1 ? 8 : 2, wide = h.dtype == 1 ? 8 : 4;
  SplineSweep s;
  s.dtype = static_cast<DType>(h.dtype);
  s.rows = h.outer, s.bins = h.inner, s.columns = h.columns;
  s.inverse = h.inputs != 0, s.circular = h.row_sums != 0, s.bound = h.parameter;
  s.min_width = s.min_height = s.min_slope = 1e-3;
  std::vector<Buffer> buffers;
  std::vector<std::pair<const char*, int64_t>> answer;
  const auto input = [&](int64_t bytes) {
    buffers.push_back(allocate(bytes));
    receive(buffers.back().get(), static_cast<size_t>(bytes));
    return buffers.back().get();
  };
  const auto output = [&](int64_t bytes) {
    buffers.push_back(allocate(bytes));
    answer.push_back({buffers.back().get(), bytes});
    return buffers.back().get();
  };
  for (SplineOperand* x : {&s.x, &s.widths, &s.heights, &s.slopes}) {
    InputHeader in;
    receive(&in, sizeof in);
    *x = {input(in.bytes), in.outer_stride, in.inner_stride, in.column_stride};
  }
  const int64_t elements = s.rows * s.columns;
  if (backward) {
    if (h.wanted & 1) s.grad = input(elements * item);
    if (h.wanted & 2) s.grad_log_det = input(s.rows * wide);
    if (h.wanted & 4) s.d_x = output(elements * item);
    if (h.wanted & 8) s.d_widths = output(elements * s.bins * item);
    if (h.wanted & 16) s.d_heights = output(elements * s.bins * item);
    if (h.wanted & 32) s.d_slopes = output(elements * s.slope_count() * item);
  } else {
    s.y = output(elements * item);
    s.log_det = output(s.rows * wide);
  }
  simt::options = {h.highest_first != 0, h.most_blocks, h.only_block};
  if (const char* error = cuda::sweep_spline(s, nullptr)) {
    std::fprintf(stderr, "run: %s: %s\n", h.name, error);
    std::exit(2);
  }
  for (const auto& [data, bytes] : answer) {
    if (bytes > 0) std::fwrite(data, static_cast<size_t>(bytes), 1, stdout);
  }
}

// Name "sylvester_flow": rows, steps and dims come as outer, inner and columns, the rank as
// `lend_partial_sums`, whether lines are shared as `inputs`, the inverse as `outputs`. Then,
// contiguous: z, lines as SylvesterSweep has them, and for backward those there are of grad_z and
// grad_log_det. The answer is z and log_det, or the gradients of z and of the lines.
void run_sylvester(const Header& h) {
  const bool backward = h.row_inputs != 0;
  const int64_t item = h.dtype == 0 ? 4 : 8;
  const auto whole = [](int64_t n) { return (n + 15) / 16 * 16; };
  SylvesterSweep s;
  s.in_double = h.dtype == 1;
  s.rows = h.outer, s.steps = h.inner, s.dims = h.columns, s.shared = h.inputs != 0;
  s.inverse = h.outputs != 0;
  s.rank = h.lend_partial_sums, s.width = whole(s.dims), s.rank_width = whole(s.rank);
  const int64_t lines = (s.shared ? 1 : s.rows) * s.steps, size = s.gradient_size();
  std::vector<Buffer> buffers;
  std::vector<std::pair<const char*, int64_t>> answer;
  const auto input = [&](int64_t count) {
    buffers.push_back(allocate(count * item));
    receive(buffers.back().get(), static_cast<size_t>(count * item));
    return buffers.back().get();
  };
  const auto output = [&](int64_t count) {
    buffers.push_back(allocate(count * item));
    answer.push_back({buffers.back().get(), count * item});
    return buffers.back().get();
  };
  s.z = input(s.rows * s.dims);
  s.lines = input(lines * s.line_size());
  if (backward) {
    if (h.wanted & 1) s.grad_out = input(s.rows * s.dims);
    if (h.wanted & 2) s.grad_log_det = input(s.rows);
    s.d_z = output(s.rows * s.dims);
    char* d_lines = output(lines * size);
    std::memset(d_lines, 0, static_cast<size_t>(lines * size * item));
    s.d_lines = d_lines;
  } else {
    s.out = output(s.rows * s.dims);
    s.log_det = output(s.rows);
  }
  simt::options = {h.highest_first != 0, h.most_blocks, h.only_block};
  const Buffer lent = allocate(cuda::sylvester_scratch(s, backward));
  const char* error = cuda::sweep_sylvester(s, backward, lent.get(), nullptr);
  if (error != nullptr) {
    std::fprintf(stderr, "run: %s: %s\n", h.name, error);
    std::exit(2);
  }
  for (const auto& [data, bytes] : answer) {
    if (bytes > 0) std::fwrite(data, static_cast<size_t>(bytes), 1, stdout);
  }
}

// Name "unroll_affine": rows, layers and dims come as outer, inner and columns, the kind as
// `inputs`, the activation as `outputs`, the least degree as `row_sums`, whether it is the inverse
// as `row_inputs`, whether there are sums as `wanted`. Then, contiguous: z, the widths of the
// inputs and of all layers, weights and bias of each layer, sums. The answer is x and log_det.
void run_unroll(const Header& h) {
  const int64_t item = h.dtype == 0 ? 4 : 8;
  UnrollSweep s;
  s.in_double = h.dtype == 1;
  s.rows = h.outer, s.layers = static_cast<int>(h.inner), s.dims = h.columns;
  s.kind = static_cast<AffineKind>(h.inputs), s.inverse = h.row_inputs != 0;
  s.activation = static_cast<Activation>(h.outputs), s.least = h.row_sums;
  std::vector<Buffer> buffers;
  const auto input = [&](int64_t count) {
    buffers.push_back(allocate(count * item));
    receive(buffers.back().get(), static_cast<size_t>(count * item));
    return buffers.back().get();
  };
  s.z = input(s.rows * s.dims);
  receive(s.widths, sizeof(int64_t) * static_cast<size_t>(s.layers + 1));
  for (int i = 0; i < s.layers; ++i) {
    s.weights[i] = input(s.widths[i] * s.widths[i + 1]);
    s.biases[i] = input(s.widths[i + 1]);
    s.begins[i + 1] = s.begins[i] + s.widths[i];
  }
  if (h.wanted != 0) s.sums = input(s.rows * s.widths[1]);
  const Buffer x = allocate(s.rows * s.dims * item), log_det = allocate(s.rows * item);
  s.x = x.get(), s.log_det = log_det.get();
  simt::options = {h.highest_first != 0, h.most_blocks, h.only_block};
  const Buffer lent = allocate(cuda::unroll_scratch(s));
  if (const char* error = cuda::unroll(s, lent.get(), nullptr)) {
    std::fprintf(stderr, "run: %s: %s\n", h.name, error);
    std::exit(2);
  }
  std::fwrite(x.get(), static_cast<size_t>(s.rows * s.dims * item), 1, stdout);
  std::fwrite(log_det.get(), static_cast<size_t>(s.rows * item), 1, stdout);
}

// Name "pixels": channels and components come as inner and columns, the number of bins less one as
// the parameter, the map to a scale as `inputs`; sizes follow. Then x, logits, mu, log_scale and
// coeffs, each an OperandHeader and its data; backward has the kept, the gradients, and an
// OperandHeader for the gradient of each. The answer is log_prob and kept; or the gradients. An
// operand of no bytes is not there.
struct OperandHeader {
  int64_t bytes;
  int64_t pixel[kMaxGroups], channel, component;
};

void run_pixels(const Header& h) {
  PixelMixture p;
  p.dtype = static_cast<DType>(h.dtype);
  p.channels = h.inner, p.components = h.columns;
  p.levels = h.parameter;
  p.scale_map = static_cast<ScaleMap>(h.inputs);
  const bool backward = h.row_inputs != 0;
  receive(p.sizes, sizeof p.sizes);
  const int64_t row_item = h.dtype == 1 ? 8 : 4;

  std::vector<Buffer> buffers;
  std::vector<std::pair<const char*, int64_t>> answer;
  const auto operand = [&](PixelOperand& x, bool input) {
    OperandHeader header;
    receive(&header, sizeof header);
    if (header.bytes == 0) return;
    buffers.push_back(allocate(header.bytes));
    x.data = buffers.back().get();
    std::copy_n(header.pixel, kMaxGroups, x.pixel);
    x.channel = header.channel, x.component = header.component;
    if (input) {
      receive(buffers.back().get(), static_cast<size_t>(header.bytes));
    } else {
      answer.push_back({buffers.back().get(), header.bytes});
    }
  };
  for (PixelOperand* x : {&p.x, &p.logits, &p.mu, &p.log_scale, &p.coeffs}) operand(*x, true);
  const auto rows = [&](int64_t bytes, bool input) -> void* {
    buffers.push_back(allocate(bytes));
    input ? receive(buffers.back().get(), static_cast<size_t>(bytes))
          : answer.push_back({buffers.back().get(), bytes});
    return buffers.back().get();
  };
  p.kept = rows(2 * p.pixels() * row_item, backward);
  if (backward) {
    p.grad = rows(p.pixels() * row_item, true);
    for (PixelOperand* x : {&p.d_x, &p.d_logits, &p.d_mu, &p.d_log_scale, &p.d_coeffs}) {
      operand(*x, false);
    }
  } else {
    p.log_prob = rows(p.pixels() * row_item, false);
  }

  simt::options = {h.highest_first != 0, h.most_blocks, h.only_block};
  if (const char* error = cuda::sweep_pixels(p, nullptr)) {
    std::fprintf(stderr, "run: %s: %s\n", h.name, error);
    std::exit(2);
  }
  for (const auto& [data, bytes] : answer) {
    if (bytes > 0) std::fwrite(data, static_cast<size_t>(bytes), 1, stdout);
  }
}

}  // namespace

int main() {
  Header header;
  while (std::fread(&header, sizeof header, 1, stdin) == 1) {
    const std::string name = header.name;
    const auto run_one = name == "philox"             ? run_philox
                         : name == "pairs"            ? run_pairs
                         : name == "triangles"        ? run_triangles
                         : name == "pixels"           ? run_pixels
                         : name == "householder_flow" ? run_flow<Householder>
                         : name == "planar_flow"      ? run_flow<Planar>
                         : name == "radial_flow"      ? run_flow<Radial>
                         : name == "sylvester_flow"   ? run_sylvester
                         : name == "unroll_affine"    ? run_unroll
                         : name == "spline"           ? run_spline
                                                      : run_case;
    run_one(header);
  }
}
