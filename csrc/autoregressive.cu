// The slow direction of affine autoregressive flows on CUDA (UnrollSweep in autoregressive.h): a
// block to a tile of rows, whose units lie in lent memory, which the caches hold. A warp to a row
// finds x_d, then a warp to a hidden unit and half of the rows; its lanes share the units that a
// sum is over. Rows of the last tile that are not there repeat the last row, and write nothing.
#include "autoregressive.h"

#include "rows.cuh"

namespace fastvae::cuda {

namespace {

inline constexpr int kTile = 8, kTileBlock = kTile * kWarp, kTileBlocks = 4;
inline constexpr int kRowsOfWarp = 4;  // whose sums read a weight once
inline constexpr int64_t kMostTiles = 4096;

inline int64_t blocks_of(const UnrollSweep& s) {
  return std::min(kMostTiles, (s.rows + kTile - 1) / kTile);
}

// A tile of rows, and the units that are known of them, [row][unit].
template <class T>
struct Tile {
  const UnrollSweep& s;
  T* units;
  int64_t first;
  int lane, warp;

  __device__ __forceinline__ int64_t row(int r) const {
    return first + r < s.rows ? first + r : s.rows - 1;
  }
  __device__ __forceinline__ T* of(int r, int layer) const {
    return units + r * s.begins[s.layers] + s.begins[layer];
  }
  // What a unit's sum begins with.
  __device__ __forceinline__ T start(int layer, int64_t unit, int r) const {
    if (layer == 1 && s.sums != nullptr) {
      return static_cast<const T*>(s.sums)[row(r) * s.widths[1] + unit];
    }
    return static_cast<const T*>(s.biases[layer - 1])[unit];
  }
  // Sums over the first `count` units of the layer before, of kCount rows from r.
  template <int kCount>
  __device__ __forceinline__ void sum(int layer, int64_t unit, int64_t count, int r,
                                      T (&sums)[kCount]) const {
    const T* weights = static_cast<const T*>(s.weights[layer - 1]) + unit * s.widths[layer - 1];
    const T* before = of(r, layer - 1);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = 0;
    for (int64_t k = lane; k < count; k += kWarp) {
      const T weight = weights[k];
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] += weight * before[i * s.begins[s.layers] + k];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sums[i] = warp_sum(sums[i], kWarp) + start(layer, unit, r + i);
    }
  }

  // x_d of the warp's row. All lanes do the same.
  __device__ __forceinline__ void move(int64_t d, double& log_det) const {
    T shift[1], scale[1] = {0};
    const int64_t count = s.begin(s.layers - 1, d);
    sum(s.layers, d, count, warp, shift);
    if (s.parameters() == 2) sum(s.layers, s.dims + d, count, warp, scale);
    const T z = static_cast<const T*>(s.z)[row(warp) * s.dims + d];
    const auto moved = with_kind(s.kind, [&](auto kind) {
      using Kind = decltype(kind);
      return s.inverse ? AffineCoupling<Kind, true>::Forward::eval(z, shift[0], scale[0])
                       : AffineCoupling<Kind, false>::Forward::eval(z, shift[0], scale[0]);
    });
    log_det += moved.v[1];
    if (lane == 0) {
      of(warp, 0)[d] = moved.v[0];
      if (first + warp < s.rows) {
        static_cast<T*>(s.x)[(first + warp) * s.dims + d] = moved.v[0];
      }
    }
  }

  // The units of a layer that become known with column d.
  __device__ __forceinline__ void learn(int layer, int64_t d) const {
    const int64_t from = s.begin(layer, d), to = s.begin(layer, d + 1);
    const int64_t count = s.begin(layer - 1, d + 1);
    constexpr int kParts = kTile / kRowsOfWarp;
    for (int64_t task = warp; task < (to - from) * kParts; task += kTile) {
      const int64_t unit = from + task / kParts;
      const int r = static_cast<int>(task % kParts) * kRowsOfWarp;
      T sums[kRowsOfWarp];
      sum(layer, unit, count, r, sums);
      // A row to a lane: the activation once.
      T own = sums[0];
#pragma unroll
      for (int i = 1; i < kRowsOfWarp; ++i) own = lane == i ? sums[i] : own;
      own = with_activation(s.activation, [&](auto activation) { return activation.eval(own); });
      if (lane < kRowsOfWarp) of(r + lane, layer)[unit] = own;
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kTileBlock, kTileBlocks)
    unroll_kernel(const UnrollSweep s, T* units) {
  units += blockIdx.x * (kTile * s.begins[s.layers]);
  const int lane = lane_of_warp(), warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTile; first < s.rows;
       first += gridDim.x * static_cast<int64_t>(kTile)) {
    const Tile<T> tile{s, units, first, lane, warp};
    double log_det = 0;
    for (int64_t d = -1; d < s.dims; ++d) {
      if (d >= 0) tile.move(d, log_det);
      __syncthreads();
      for (int layer = 1; layer < s.layers; ++layer) {
        tile.learn(layer, d);
        __syncthreads();
      }
    }
    if (lane == 0 && first + warp < s.rows) {
      static_cast<T*>(s.log_det)[first + warp] = static_cast<T>(log_det);
    }
  }
}

template <class T>
const char* run_unroll(const UnrollSweep& s, void* lent, cudaStream_t stream) {
  const auto kernel = unroll_kernel<T>;
  FASTVAE_LAUNCH(kernel, blocks_of(s), kTileBlock, stream, s, static_cast<T*>(lent));
  return launch_error();
}

}  // namespace

int64_t unroll_scratch(const UnrollSweep& s) {
  return blocks_of(s) * kTile * s.begins[s.layers] * (s.in_double ? 8 : 4);
}

// Runs on the stream, a cudaStream_t, without waiting for it. Null, or what CUDA says.
const char* unroll(const UnrollSweep& s, void* lent, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return s.in_double ? run_unroll<double>(s, lent, cuda_stream)
                     : run_unroll<float>(s, lent, cuda_stream);
}

}  // namespace fastvae::cuda
