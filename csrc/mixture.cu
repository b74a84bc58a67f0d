// The mixture family on CUDA.
#include "pairs.cuh"

namespace fastvae::cuda {

// Runs forward or backward on the stream, a cudaStream_t, without waiting for it. Null, or what
// CUDA says.
const char* sweep_pairs(const Pairing& p, bool backward, void* stream) {
  const auto run = p.dtype == DType::kFloat64
                       ? (p.marginals ? run_pairs<double, true> : run_pairs<double, false>)
                       : (p.marginals ? run_pairs<float, true> : run_pairs<float, false>);
  return run(p, backward, static_cast<cudaStream_t>(stream));
}

}  // namespace fastvae::cuda
