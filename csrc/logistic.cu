// The logistic family on CUDA. The mixtures have a kernel of their own: a thread to a pixel, or,
// where the components of a pixel are neighbours in memory (channels last), a team of eight, which
// then read neighbours. Components come one after another, forward and backward, so registers hold
// one logistic distribution whatever the number of channels and components.
#include "channels.h"
#include "rows.cuh"

namespace fastvae::cuda {

FASTVAE_INSTANTIATE(DiscretizedLogistic<LogVar>)
FASTVAE_INSTANTIATE(DiscretizedLogistic<LogScale>)
FASTVAE_INSTANTIATE(DiscretizedLogistic<Scale>)
FASTVAE_INSTANTIATE(DiscretizedLogistic<Softplus>)

// By the map of a number: one kernel serves them all, and all its threads take the same branch.
template <class T>
FASTVAE_HD LogisticScale<T> scale_by(ScaleMap map, T s) {
  return with_map(map, [&]<class S>(S) { return logistic_scale<S>(s); });
}

inline constexpr int kPixelThreads = 128;

// The component at hand, of one pixel: what lies where, and the sums over channels.
template <class T, class Stored>
struct PixelReader {
  const PixelMixture& p;
  const Bins<T> bins;
  int64_t at[kMaxGroups];  // the pixel

  __device__ PixelReader(const PixelMixture& mixture, int64_t pixel)
      : p(mixture), bins(static_cast<T>(mixture.levels)) {
    int64_t rest = pixel;
#pragma unroll
    for (int g = 0; g < kMaxGroups; ++g) {
      at[g] = rest % p.sizes[g];
      rest /= p.sizes[g];
    }
  }

  __device__ int64_t place(const PixelOperand& x, int64_t channel, int64_t component) const {
    int64_t offset = channel * x.channel + component * x.component;
#pragma unroll
    for (int g = 0; g < kMaxGroups; ++g) offset += at[g] * x.pixel[g];
    return offset;
  }
  __device__ T read(const PixelOperand& x, int64_t channel, int64_t component) const {
    return load(static_cast<const Stored*>(x.data)[place(x, channel, component)]);
  }
  __device__ void write(const PixelOperand& x, int64_t channel, int64_t component, T value) const {
    if (x.data == nullptr) return;
    Stored* to = static_cast<Stored*>(const_cast<void*>(x.data));
    store(to[place(x, channel, component)], value);
  }

  __device__ LogisticScale<T> scale(int64_t c, int64_t k) const {
    return scale_by(p.scale_map, read(p.log_scale, c, k));
  }

  __device__ Bin<T> bin(int64_t c, int64_t k, T inverse_scale) const {
    T shift = 0;
    if (p.coeffs.data != nullptr) {
      for (int64_t j = 0; j < c; ++j) {
        shift += math::tanh(read(p.coeffs, pair_of(c, j), k)).value * read(p.x, j, 0);
      }
    }
    return Bin<T>(read(p.x, c, 0), read(p.mu, c, k), shift, inverse_scale, bins);
  }

  // The logarithm of the component's probability of all channels.
  __device__ T score(int64_t k) const {
    T linear = 0, ratio = 1;
    for (int64_t c = 0; c < p.channels; ++c) {
      const LogisticScale<T> s = scale(c, k);
      const auto score = bin(c, k, s.inverse).score(s.log, bins);
      linear += score.linear;
      ratio *= score.ratio;
      if (c % 16 == 15) {  // a product of sixteen is still a normal number
        linear += math::log_normal(ratio);
        ratio = 1;
      }
    }
    return linear + math::log_normal(ratio);
  }
};

// Over a team; every thread of it gets the result. Threads of a pixel beyond the last come too.
template <int kTeam, class T, class Combine>
__device__ __forceinline__ T across(T x, const Combine& combine) {
#pragma unroll
  for (int step = kTeam / 2; step > 0; step /= 2) {
    x = combine(x, __shfl_xor_sync(0xffffffffu, x, step));
  }
  return x;
}
template <int kTeam, class T>
__device__ __forceinline__ T sum_across(T x) {
  return across<kTeam>(x, [](T a, T b) { return a + b; });
}
template <class T>
__device__ __forceinline__ T larger_or_nan(T a, T b) {
  return b > a || b != b ? b : a;
}

template <class T, class Stored, int kTeam>
__device__ T largest_logit(const PixelReader<T, Stored>& pixel, int member) {
  T most = -math::kInfinity<T>;
  for (int64_t k = member; k < pixel.p.components; k += kTeam) {
    most = larger_or_nan(most, pixel.read(pixel.p.logits, 0, k));
  }
  return across<kTeam>(most, [](T a, T b) { return larger_or_nan(a, b); });
}

template <class T, class Stored, int kTeam>
__global__ void __launch_bounds__(kPixelThreads, 1) pixel_forward(const PixelMixture p) {
  const int member = static_cast<int>(threadIdx.x) % kTeam;
  constexpr int kPixels = kPixelThreads / kTeam;
  const int64_t pixels = p.pixels();
  for (int64_t first = blockIdx.x * int64_t{kPixels}; first < pixels;
       first += gridDim.x * int64_t{kPixels}) {
    const int64_t index = first + threadIdx.x / kTeam;
    const bool there = index < pixels;
    const PixelReader<T, Stored> pixel(p, there ? index : pixels - 1);
    const T most = largest_logit<T, Stored, kTeam>(pixel, member);
    T top = -math::largest<T>(), sum = 0, weights = 0;
    for (int64_t k = member; k < p.components; k += kTeam) {
      const T relative = pixel.read(p.logits, 0, k) - most;
      const T term = relative + pixel.score(k);
      const T to = math::raised_top(top, term);
      sum = sum * math::exp(top - to) + math::exp(term - to);
      top = to;
      weights += math::exp_weight(relative);
    }
    const T highest = across<kTeam>(top, [](T a, T b) { return math::max(a, b); });
    sum = sum_across<kTeam>(sum * math::exp(top - highest));
    weights = sum_across<kTeam>(weights);
    if (member != 0 || !there) continue;
    const Normaliser<T> n(highest, sum, weights);
    if (p.log_prob != nullptr) static_cast<T*>(p.log_prob)[index] = n.log_prob;
    if (p.kept != nullptr) {
      static_cast<T*>(p.kept)[2 * index] = n.kept;
      static_cast<T*>(p.kept)[2 * index + 1] = n.kept_weights;
    }
  }
}

template <class T, class Stored, int kTeam>
__global__ void __launch_bounds__(kPixelThreads, 1) pixel_backward(const PixelMixture p) {
  const int member = static_cast<int>(threadIdx.x) % kTeam;
  constexpr int kPixels = kPixelThreads / kTeam;
  const int64_t pixels = p.pixels();
  for (int64_t first = blockIdx.x * int64_t{kPixels}; first < pixels;
       first += gridDim.x * int64_t{kPixels}) {
    const int64_t index = first + threadIdx.x / kTeam;
    const bool there = index < pixels;
    const PixelReader<T, Stored> pixel(p, there ? index : pixels - 1);
    const T most = largest_logit<T, Stored, kTeam>(pixel, member);
    const int64_t row = there ? index : pixels - 1;
    const T grad = static_cast<const T*>(p.grad)[row];
    const T kept = static_cast<const T*>(p.kept)[2 * row];
    const T kept_weights = static_cast<const T*>(p.kept)[2 * row + 1];
    for (int64_t k = member; there && k < p.components; k += kTeam) {
      const T relative = pixel.read(p.logits, 0, k) - most;
      const T weight = math::exp_weight(relative + pixel.score(k) - kept);
      pixel.write(p.d_logits, 0, k, grad * (weight - math::exp_weight(relative - kept_weights)));
      for (int64_t c = 0; c < p.channels; ++c) {
        const LogisticScale<T> scale = pixel.scale(c, k);
        const auto slope = pixel.bin(c, k, scale.inverse).gradient();
        const T d_mean = math::weighed(grad * weight, slope.mean);
        pixel.write(p.d_mu, c, k, d_mean);
        pixel.write(p.d_log_scale, c, k,
                    math::weighed(grad * weight, math::weighed(slope.log_scale, scale.slope)));
        for (int64_t j = 0; p.d_coeffs.data != nullptr && j < c; ++j) {
          const T slope_of = math::tanh(pixel.read(p.coeffs, pair_of(c, j), k)).slope;
          pixel.write(p.d_coeffs, pair_of(c, j), k,
                      math::weighed(d_mean, slope_of * pixel.read(p.x, j, 0)));
        }
      }
    }
    // The gradient of x, which is seldom wanted, forms all of it again, channel by channel.
    for (int64_t j = 0; p.d_x.data != nullptr && j < p.channels; ++j) {
      T d_x = 0;
      for (int64_t k = member; k < p.components; k += kTeam) {
        const T relative = pixel.read(p.logits, 0, k) - most;
        const T weight = grad * math::exp_weight(relative + pixel.score(k) - kept);
        const int64_t last = p.coeffs.data != nullptr ? p.channels - 1 : j;
        for (int64_t c = j; c <= last; ++c) {
          const auto slope = pixel.bin(c, k, pixel.scale(c, k).inverse).gradient();
          const T share = c == j ? T(-1) : math::tanh(pixel.read(p.coeffs, pair_of(c, j), k)).value;
          d_x += share * math::weighed(weight, slope.mean);
        }
      }
      d_x = sum_across<kTeam>(d_x);
      if (member == 0 && there) pixel.write(p.d_x, j, 0, d_x);
    }
  }
}

template <class T, class Stored, int kTeam>
const char* launch_pixels(const PixelMixture& p, cudaStream_t stream) {
  constexpr int64_t kPixels = kPixelThreads / kTeam;
  const int64_t blocks = std::min<int64_t>(kMaxBlocks, (p.pixels() + kPixels - 1) / kPixels);
  if (blocks == 0) return nullptr;
  const auto kernel =
      p.grad == nullptr ? pixel_forward<T, Stored, kTeam> : pixel_backward<T, Stored, kTeam>;
  FASTVAE_LAUNCH(kernel, blocks, kPixelThreads, stream, p);
  return launch_error();
}

template <class T, class Stored>
const char* launch_pixels(const PixelMixture& p, cudaStream_t stream) {
  const bool together = p.mu.component == 1 && p.mu.pixel[0] != 1 && p.components > 1;
  return together ? launch_pixels<T, Stored, 8>(p, stream) : launch_pixels<T, Stored, 1>(p, stream);
}

// Runs forward, or backward if there is a gradient, on the stream, a cudaStream_t, without waiting
// for it. Null, or what CUDA says.
const char* sweep_pixels(const PixelMixture& p, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const char* error = "unknown dtype";
  with_types(p.dtype, [&]<class T, class Stored>(Types<T, Stored>) {
    error = launch_pixels<T, Stored>(p, cuda_stream);
  });
  return error;
}

}  // namespace fastvae::cuda
