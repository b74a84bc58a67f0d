// The CUDA engine: one kernel, for every formula, type and stride, that sweeps rows in one pass.
//
// Fused is all that a formula says: reading the inputs (at any stride, half types widened), drawing
// the noise, the arithmetic, writing the outputs, and summing each row. Nothing in between touches
// memory, so a sweep costs its inputs and outputs once, or its arithmetic if that takes longer.
//
// Packs. A thread takes one pack at a time: 16 bytes of float or half, 32 of double. Packs are
// counted over the whole [rows, columns] array, not from the start of each row. So in contiguous
// tensors of any width a pack is one or two aligned 16-byte accesses, and it is made of whole
// Philox blocks, each computed once. Where a row begins or ends within a pack, its elements are
// accessed one by one, and so are operands that lie at other strides or addresses; there is no
// second kernel.
//
// Teams. The threads that share a row are as many as it has packs, rounded up to a power of two:
//   columns (float)   team                          reduction of the row sum
//   up to 4           a thread, 128 rows a block    none
//   up to 256         2 to 32 threads of one warp   shuffles
//   more              a block of up to 128          shuffles, then one exchange in shared memory
// Very long rows are cut into segments, each a unit of work for a block of its own: always where
// there is nothing to sum; for sums, if the caller lends memory for the partial sums, which a
// second kernel adds. Where nothing is said of rows at all and they follow one another without a
// gap, they are taken for one long row. So a few wide rows keep a whole device busy.
//
// Row sums are reproducible to the bit: who adds what to what depends on the number of columns,
// and, where that is no multiple of a pack, on the position of the row within its pack. Nothing is
// atomic. Terms of one pack are added in T, everything beyond in double: one conversion and one
// addition every four elements are not seen beside memory traffic, even where double is slow.
//
// Blocks stride over the work, so any grid does it all. Indices are 64-bit throughout. All launches
// go through FASTVAE_LAUNCH, which tests/simt redefines to run these very kernels on a CPU.
#pragma once

#include <algorithm>
#include <utility>

#include "philox.h"
#include "sweep.h"

#ifndef FASTVAE_LAUNCH
#define FASTVAE_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, stream>>>(__VA_ARGS__)
#endif

// One sweep of a formula, for every dtype, and both that most have: all that a <family>.cu says.
#ifndef FASTVAE_INSTANTIATE_SWEEP
#define FASTVAE_INSTANTIATE_SWEEP(name, ...) \
  template const char* sweep_rows<__VA_ARGS__::name>(const Sweep&, void*);
#endif
#define FASTVAE_INSTANTIATE(...)                  \
  FASTVAE_INSTANTIATE_SWEEP(Forward, __VA_ARGS__) \
  FASTVAE_INSTANTIATE_SWEEP(Backward, __VA_ARGS__)

namespace fastvae::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kBlock = 128;          // threads: small, so that registers divide well
inline constexpr int kMaxBlocks = 1 << 16;  // several waves on any device; blocks stride from there

// ---- packs ------------------------------------------------------------------------------------

template <class Stored>
inline constexpr int kPack = sizeof(Stored) == 2 ? 8 : 4;  // elements; whole Philox blocks of 4

// A pack in registers, as 32-bit words, so that two halves share one.
template <class Stored>
struct alignas(16) Pack {
  uint32_t words[kPack<Stored> * sizeof(Stored) / 4];

  __device__ __forceinline__ Stored get(int j) const {
    if constexpr (sizeof(Stored) == 2) {
      return {static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2)))};
    } else if constexpr (sizeof(Stored) == 4) {
      return __builtin_bit_cast(Stored, words[j]);
    } else {
      const uint64_t high = words[2 * j + 1];
      return __builtin_bit_cast(Stored, high << 32 | words[2 * j]);
    }
  }

  __device__ __forceinline__ void set(int j, Stored x) {  // once, of a pack that was zero
    if constexpr (sizeof(Stored) == 2) {
      words[j / 2] |= static_cast<uint32_t>(x.bits) << (16 * (j % 2));
    } else if constexpr (sizeof(Stored) == 4) {
      words[j] = __builtin_bit_cast(uint32_t, x);
    } else {
      words[2 * j] = static_cast<uint32_t>(__builtin_bit_cast(uint64_t, x));
      words[2 * j + 1] = static_cast<uint32_t>(__builtin_bit_cast(uint64_t, x) >> 32);
    }
  }

  // The next four elements first: eight halves go through a loop of four, twice.
  __device__ __forceinline__ void rotate() {
    if constexpr (sizeof(Stored) == 2) {
      const uint32_t w0 = words[0], w1 = words[1];
      words[0] = words[2], words[1] = words[3], words[2] = w0, words[3] = w1;
    }
  }

  // Both at 16-byte alignment. Plain stores the compiler would merge with those of write_elements,
  // one by one; __stwb, an ordinary store otherwise, it leaves whole.
  static __device__ __forceinline__ Pack read(const Stored* from) {
    return *reinterpret_cast<const Pack*>(from);
  }
  __device__ __forceinline__ void write(Stored* to) const {
#pragma unroll
    for (size_t i = 0; i < sizeof(words) / 16; ++i) {
      const uint32_t* w = words + 4 * i;
      __stwb(reinterpret_cast<uint4*>(to) + i, make_uint4(w[0], w[1], w[2], w[3]));
    }
  }
};

// The part of a pack that belongs to the row at hand: elements first, ..., last - 1.
template <class Stored>
struct Slot {
  int64_t column;   // of element 0; negative where the row begins within the pack
  int first, last;  // 0 and kPack but for the two ends of a row
  __device__ Slot(int64_t column, int64_t columns)
      : column(column),
        first(column < 0 ? static_cast<int>(-column) : 0),
        last(columns - column < kPack<Stored> ? static_cast<int>(columns - column)
                                              : kPack<Stored>) {}
  __device__ bool whole() const { return first == 0 && last == kPack<Stored>; }
  __device__ bool has(int j) const { return first <= j && j < last; }
};

// One by one, what lies at other strides or addresses, and the ends of rows.
template <class Stored>
__device__ __forceinline__ Pack<Stored> read_elements(const Stored* row, int64_t stride,
                                                      const Slot<Stored>& slot) {
  Pack<Stored> pack = {};
  const Stored* from = row + slot.column * stride;
#pragma unroll
  for (int j = 0; j < kPack<Stored>; ++j) {
    if (slot.has(j)) pack.set(j, *from);
    from += stride;  // not j * stride: kept for every j and operand, that would fill the registers
  }
  return pack;
}

template <class Stored>
__device__ __forceinline__ void write_elements(Stored* row, const Slot<Stored>& slot,
                                               const Pack<Stored>& pack) {
#pragma unroll
  for (int j = 0; j < kPack<Stored>; ++j) {
    if (slot.has(j)) row[slot.column + j] = pack.get(j);
  }
}

// Four normals, of one Philox block. The key is read each time, from the first-level cache: known
// before the loop, its twenty round keys would occupy a register each.
template <class T>
__device__ __forceinline__ void draw(const int64_t* key, int64_t element, T (&normals)[4]) {
  const philox::Words w =
      philox::block({static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1])},
                    static_cast<uint64_t>(element) / 4);
  const philox::Pair<T> a = philox::normal_pair<T>(w.x[0], w.x[1]);
  const philox::Pair<T> b = philox::normal_pair<T>(w.x[2], w.x[3]);
  normals[0] = a.first;
  normals[1] = a.second;
  normals[2] = b.first;
  normals[3] = b.second;
}

template <class F, class T, size_t... A, size_t... P>
__device__ __forceinline__ Values<T, F::kValues> evaluate(const T (&arguments)[sizeof...(A)],
                                                          const Sweep& s, std::index_sequence<A...>,
                                                          std::index_sequence<P...>) {
  return F::template eval<T>(arguments[A]..., static_cast<T>(s.parameters[P])...);
}

// ---- warps of a grid ---------------------------------------------------------------------------

__device__ __forceinline__ int64_t warp_of_grid() {
  return (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / kWarp;
}
__device__ __forceinline__ int64_t warps_of_grid() {
  return gridDim.x * static_cast<int64_t>(blockDim.x) / kWarp;
}
__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }

// ---- the sum over a team ----------------------------------------------------------------------

// Every lane gets the sum over its aligned group of `width` lanes, a power of two.
template <class T>
__device__ __forceinline__ T warp_sum(T x, int width) {
  for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// A number for each warp of the block, for exchanges between them.
__device__ inline double* block_memory() {
  __shared__ double memory[kBlock / kWarp];
  return memory;
}

// The sum over the block, in its first warp.
__device__ inline double block_sum(double x) {
  double* const partial = block_memory();
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  x = warp_sum(x, kWarp);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  if (warp == 0) {
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    x = warp_sum(lane < warps ? partial[lane] : 0.0, kWarp);
  }
  __syncthreads();  // the next row's sums must not overwrite what the first warp still reads
  return x;
}

// ---- the kernel -------------------------------------------------------------------------------

// A sweep, laid out for the kernel by plan().
struct Plan {
  Sweep sweep;
  int64_t segments = 1, segment = 0;  // pieces of a row, and their elements: a multiple of a pack
  int team = 1, threads = 0;          // threads that share a piece, and that make a block
  unsigned packed_inputs = 0, packed_outputs = 0;  // bit k: operand k goes a pack at a time
};

// Blocks that fit on a multiprocessor at once, at least, which caps the registers of a thread. Six,
// at 80 registers, so that enough loads are in flight; three where each thread has six packs or
// more on their way itself, in or out, or computes in double; two of what takes all there are.
template <class T, Shape S>
inline constexpr int kMinBlocks =
    S.many_registers && sizeof(T) == 8                                ? 2
    : S.inputs + S.outputs < 6 && sizeof(T) == 4 && !S.many_registers ? 6
                                                                      : 3;

// Grid-stride over units = rows x segments; `team` threads to a unit.
template <class F, class T, class Stored>
__global__ void __launch_bounds__(kBlock, (kMinBlocks<T, F::shape>)) sweep_kernel(const Plan plan) {
  constexpr Shape S = F::shape;
  constexpr int P = kPack<Stored>;
  const Sweep& s = plan.sweep;
  const int lane = static_cast<int>(threadIdx.x) % plan.team;
  const int64_t teams = static_cast<int>(blockDim.x) / plan.team;
  const int64_t units = s.rows() * plan.segments;

  // The condition is the same for the whole block, so that all of it meets in block_sum.
  for (int64_t base = blockIdx.x * teams; base < units; base += gridDim.x * teams) {
    const int64_t unit = base + static_cast<int>(threadIdx.x) / plan.team;
    double sum = 0;
    if (unit < units) {
      const int64_t row = plan.segments == 1 ? unit : unit / plan.segments;
      const int64_t outer = s.outer == 1 ? 0 : row / s.inner, inner = row - outer * s.inner;
      const int64_t begin = row * s.columns;  // the first element of the row
      const int64_t first = (unit - row * plan.segments) * plan.segment - begin % P;
      const int64_t last = s.columns - first < plan.segment ? s.columns : first + plan.segment;

      const Stored* from[S.inputs];
#pragma unroll
      for (int k = 0; k < S.inputs; ++k) {
        const Operand& x = s.inputs[k];
        from[k] =
            static_cast<const Stored*>(x.data) + outer * x.outer_stride + inner * x.inner_stride;
      }
      T row_inputs[S.row_inputs > 0 ? S.row_inputs : 1];
#pragma unroll
      for (int k = 0; k < S.row_inputs; ++k) {
        row_inputs[k] = static_cast<const T*>(s.row_inputs[k])[row];
      }

      for (int64_t column = first + lane * P; column < last; column += plan.team * P) {
        const Slot<Stored> slot(column, s.columns);

        Pack<Stored> in[S.inputs];
        // Mostly everything lies in packs: then all loads are on their way before the first is
        // used.
        if (plan.packed_inputs == (1u << S.inputs) - 1 && slot.whole()) {
#pragma unroll
          for (int k = 0; k < S.inputs; ++k) {
            in[k] = Pack<Stored>::read(from[k] + column);
          }
        } else {
#pragma unroll
          for (int k = 0; k < S.inputs; ++k) {
            if ((plan.packed_inputs >> k & 1) && slot.whole()) {
              in[k] = Pack<Stored>::read(from[k] + column);
            } else {
              in[k] = read_elements(from[k], s.inputs[k].column_stride, slot);
            }
          }
        }

        Pack<Stored> out[S.outputs > 0 ? S.outputs : 1] = {};
        T pack_sum = 0;
#pragma unroll 1  // eight halves at once would need twice the registers
        for (int quad = 0; quad < P; quad += 4) {
          T normals[4], terms[4];
          if constexpr (S.noise) draw(s.key, begin + column + quad, normals);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            T arguments[F::kArguments];
#pragma unroll
            for (int k = 0; k < S.inputs; ++k) arguments[k] = load(in[k].get(i));
#pragma unroll
            for (int k = 0; k < S.row_inputs; ++k) arguments[S.inputs + k] = row_inputs[k];
            if constexpr (S.noise) arguments[F::kArguments - 1] = normals[i];

            const Values<T, F::kValues> result =
                evaluate<F, T>(arguments, s, std::make_index_sequence<F::kArguments>{},
                               std::make_index_sequence<S.parameters>{});
#pragma unroll
            for (int k = 0; k < S.outputs; ++k) {
              Stored stored;
              store(stored, result.v[k]);
              out[k].set(i, stored);
            }
            if constexpr (S.row_sums > 0) {
              terms[i] = slot.has(quad + i) ? result.v[S.outputs] : T(0);
            }
          }
#pragma unroll
          for (int k = 0; k < S.inputs; ++k) in[k].rotate();
#pragma unroll
          for (int k = 0; k < S.outputs; ++k) out[k].rotate();
          if constexpr (S.row_sums > 0) pack_sum += (terms[0] + terms[1]) + (terms[2] + terms[3]);
        }
        sum += pack_sum;

#pragma unroll
        for (int k = 0; k < S.outputs; ++k) {
          if (s.outputs[k] == nullptr) continue;
          Stored* to = static_cast<Stored*>(s.outputs[k]) + begin;
          if ((plan.packed_outputs >> k & 1) && slot.whole()) {
            out[k].write(to + column);
          } else {
            write_elements(to, slot, out[k]);
          }
        }
      }
    }

    if constexpr (S.row_sums > 0) {
      sum = plan.team <= kWarp ? warp_sum(sum, plan.team) : block_sum(sum);
      if (lane == 0 && unit < units) {
        if (plan.segments == 1) {
          static_cast<T*>(s.row_sum)[unit] = static_cast<T>(sum);
        } else {
          s.partial_sums[unit] = sum;
        }
      }
    }
  }
}

// row_sum[r] = the sum of partial_sums[r, :], a warp to a row.
template <class T>
__global__ void __launch_bounds__(kBlock)
    add_segments_kernel(const double* partial_sums, int64_t rows, int64_t segments, T* row_sum) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = static_cast<int>(blockDim.x) / kWarp;
  for (int64_t base = blockIdx.x * warps; base < rows; base += gridDim.x * warps) {
    const int64_t row = base + static_cast<int>(threadIdx.x) / kWarp;
    double sum = 0;
    if (row < rows) {
      for (int64_t k = lane; k < segments; k += kWarp) sum += partial_sums[row * segments + k];
    }
    sum = warp_sum(sum, kWarp);
    if (lane == 0 && row < rows) row_sum[row] = static_cast<T>(sum);
  }
}

// ---- the launch -------------------------------------------------------------------------------

// Renumbers rows so that fewer indices describe the same elements: no outer index where one stride
// leads from each row to the next, and one long row where nothing is said of rows at all.
template <Shape S>
void merge_rows(Sweep& s) {
  const auto all_inputs = [&](auto&& holds) {
    return std::all_of(s.inputs, s.inputs + S.inputs, holds);
  };
  if (s.inner == 1) {
    std::swap(s.outer, s.inner);
    for (Operand& x : s.inputs) std::swap(x.outer_stride, x.inner_stride);
  }
  if (all_inputs([&](const Operand& x) { return x.outer_stride == s.inner * x.inner_stride; })) {
    s.inner *= std::exchange(s.outer, 1);
  }
  if (S.row_inputs == 0 && S.row_sums == 0 && s.outer == 1 && all_inputs([&](const Operand& x) {
        return s.inner == 1 || x.inner_stride == s.columns * x.column_stride;
      })) {
    s.columns *= std::exchange(s.inner, 1);
  }
}

// Whether every pack that lies whole in a row is 16-byte aligned in this operand.
template <class Stored>
bool is_packed(const Operand& x, const Sweep& s) {
  constexpr int64_t kAligned = 16 / sizeof(Stored);
  return x.column_stride == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
         (s.inner == 1 || (x.inner_stride - s.columns) % kAligned == 0) &&
         (s.outer == 1 || (x.outer_stride - s.inner * s.columns) % kAligned == 0);
}

template <Shape S, class T, class Stored>
Plan plan(const Sweep& sweep) {
  constexpr int64_t P = kPack<Stored>;
  Plan plan = {.sweep = sweep};
  Sweep& s = plan.sweep;
  merge_rows<S>(s);
  for (int k = 0; k < S.inputs; ++k) {
    if (is_packed<Stored>(s.inputs[k], s)) plan.packed_inputs |= 1u << k;
  }
  for (int k = 0; k < S.outputs; ++k) {
    if (reinterpret_cast<uintptr_t>(s.outputs[k]) % 16 == 0) plan.packed_outputs |= 1u << k;
  }

  // A row of a width that is no multiple of a pack may begin anywhere within one.
  const int64_t touched = s.columns + (s.columns % P == 0 ? 0 : P - 1);
  plan.segment = S.row_sums > 0 ? kSegment : kFreeSegment;
  plan.segments = (touched + plan.segment - 1) / plan.segment;
  if (plan.segments <= 1 || (S.row_sums > 0 && s.partial_sums == nullptr)) {
    plan.segments = 1;
    plan.segment = touched / P * P + P;
  }

  const int64_t packs = (std::min(touched, plan.segment) + P - 1) / P;
  if (packs <= 2 * kWarp) {  // up to two packs a thread: cheaper than a block's barriers
    plan.team = 1;
    while (plan.team < packs && plan.team < kWarp) plan.team *= 2;
    plan.threads = kBlock;
  } else {
    plan.team = plan.threads =
        static_cast<int>(std::min<int64_t>(kBlock, (packs + kWarp - 1) / kWarp * kWarp));
  }
  return plan;
}

inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class F, class T, class Stored>
const char* sweep_rows(const Sweep& sweep, cudaStream_t stream) {
  constexpr Shape S = F::shape;
  if (sweep.rows() == 0 || (sweep.columns == 0 && S.row_sums == 0)) return nullptr;

  const Plan plan = cuda::plan<S, T, Stored>(sweep);
  const auto blocks_for = [](int64_t units, int64_t units_per_block) {
    return std::min<int64_t>(kMaxBlocks, (units + units_per_block - 1) / units_per_block);
  };
  const int64_t units = plan.sweep.rows() * plan.segments;
  const auto kernel = sweep_kernel<F, T, Stored>;
  FASTVAE_LAUNCH(kernel, blocks_for(units, plan.threads / plan.team), plan.threads, stream, plan);
  if (S.row_sums > 0 && plan.segments > 1) {
    const auto add_segments = add_segments_kernel<T>;
    FASTVAE_LAUNCH(add_segments, blocks_for(sweep.rows(), kBlock / kWarp), kBlock, stream,
                   sweep.partial_sums, sweep.rows(), plan.segments, static_cast<T*>(sweep.row_sum));
  }
  return launch_error();
}

// Runs a sweep on the stream, a cudaStream_t, without waiting for it. Null, or what CUDA says.
template <class F>
const char* sweep_rows(const Sweep& sweep, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const char* error = "unknown dtype";
  with_types(sweep.dtype, [&]<class T, class Stored>(Types<T, Stored>) {
    error = sweep_rows<F, T, Stored>(sweep, cuda_stream);
  });
  return error;
}

}  // namespace fastvae::cuda
