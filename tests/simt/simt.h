// CUDA on a CPU, for tests: enough of its language for g++ to compile the kernels of csrc unchanged
// (g++ -x c++ -include simt.h csrc/gaussian.cu), and a scheduler that runs them as a GPU might at
// its worst.
//
// Every thread of a block is a fiber. A fiber runs until it reaches a barrier or a shuffle; then
// the next runs. Which is next is the schedule: lowest thread first, or highest. Both run a warp as
// far as it can get before another warp starts, so a missing __syncthreads shows as data that is
// not there yet (shared memory starts as NaN) or no longer there. Blocks run one after another, and
// a test may ask for fewer of them than were launched for, or for a single one.
#pragma once

#define FASTVAE_SIMT 1

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Not within a template: g++ ignores sections there, and the memory would not start as NaN.
#define __shared__ static __attribute__((section("simt_shared")))

#define FASTVAE_LAUNCH(kernel, blocks, threads, stream, ...) \
  simt::launch(blocks, threads, [&] { kernel(__VA_ARGS__); }), static_cast<void>(stream)

// The formulas that the .cu files instantiate, by name: "GaussianKl<LogVar>.Forward".
#define FASTVAE_INSTANTIATE_SWEEP(name, ...) FASTVAE_REGISTER(__COUNTER__, name, __VA_ARGS__)
#define FASTVAE_REGISTER(n, ...) FASTVAE_REGISTER_AS(n, __VA_ARGS__)
#define FASTVAE_REGISTER_AS(n, name, ...)                \
  [[maybe_unused]] static const bool is_registered_##n = \
      (simt::formulas()[#__VA_ARGS__ "." #name] = sweep_rows<__VA_ARGS__::name>, true);

namespace fastvae {
struct Sweep;
}

namespace simt {

using SweepFunction = const char* (*)(const fastvae::Sweep&, void*);
inline std::map<std::string, SweepFunction>& formulas() {
  static std::map<std::string, SweepFunction> by_name;
  return by_name;
}

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};
inline Dim thread_index, block_index, block_dim, grid_dim;

struct Options {
  bool highest_first = false;
  int64_t most_blocks = INT64_MAX;  // a grid of more is cut to this; the kernels stride anyway
  int64_t only_block = -1;          // run just this one of the grid
};
inline Options options;

void run_grid(int64_t blocks, int threads, void (*kernel)(const void*), const void* context);

template <class Kernel>
void launch(int64_t blocks, int threads, const Kernel& kernel) {
  run_grid(blocks, threads, [](const void* k) { (*static_cast<const Kernel*>(k))(); }, &kernel);
}

// Hands 8 bytes to the other lanes of the mask and returns those of lane `from`.
uint64_t exchange(unsigned mask, uint64_t value, int from);
void block_barrier();
int lane();

template <class T>
T shuffle(unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, from);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define blockDim simt::block_dim
#define gridDim simt::grid_dim

inline void __syncthreads() { simt::block_barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { simt::exchange(mask, 0, simt::lane()); }
template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return simt::shuffle(mask, value, from & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip) {
  return simt::shuffle(mask, value, simt::lane() ^ flip);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  const int from = simt::lane() + distance;
  return simt::shuffle(mask, value, from < 32 ? from : simt::lane());
}

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline void __stwb(uint4* to, uint4 value) { *to = value; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
