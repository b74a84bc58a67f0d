// The Gaussian family on CUDA: nothing but names, the engine does the rest.
#include "gaussian.h"
#include "rows.cuh"

namespace fastvae::cuda {

FASTVAE_INSTANTIATE(Reparameterize)
FASTVAE_INSTANTIATE(StandardGaussianKl)
FASTVAE_INSTANTIATE(ReparameterizeKl)
FASTVAE_INSTANTIATE(GaussianKl)
FASTVAE_INSTANTIATE(GaussianLogProb)

}  // namespace fastvae::cuda
