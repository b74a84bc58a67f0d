// Likelihoods of counts on CUDA: nothing but names, the engine does the rest.
#include "counts.h"
#include "rows.cuh"

namespace fastvae::cuda {

FASTVAE_INSTANTIATE(PoissonLogProb)
FASTVAE_INSTANTIATE(NegativeBinomialLogProb)
FASTVAE_INSTANTIATE(ZeroInflatedNegativeBinomialLogProb)

}  // namespace fastvae::cuda
