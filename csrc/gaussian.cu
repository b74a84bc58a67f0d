// The Gaussian family on CUDA: nothing but names, the engine does the rest.
#include "gaussian.h"
#include "rows.cuh"

namespace fastvae::cuda {

#define FASTVAE_INSTANTIATE_WITH(S)                \
  FASTVAE_INSTANTIATE(Reparameterize<S>)           \
  FASTVAE_INSTANTIATE(StandardGaussianKl<S>)       \
  FASTVAE_INSTANTIATE(StandardGaussianKl<S, true>) \
  FASTVAE_INSTANTIATE(ReparameterizeKl<S>)         \
  FASTVAE_INSTANTIATE(ReparameterizeKl<S, true>)   \
  FASTVAE_INSTANTIATE(GaussianKl<S>)               \
  FASTVAE_INSTANTIATE(GaussianKl<S, true>)         \
  FASTVAE_INSTANTIATE(GaussianLogProb<S>)

FASTVAE_INSTANTIATE_WITH(LogVar)
FASTVAE_INSTANTIATE_WITH(LogScale)
FASTVAE_INSTANTIATE_WITH(Scale)
FASTVAE_INSTANTIATE_WITH(Softplus)

}  // namespace fastvae::cuda
