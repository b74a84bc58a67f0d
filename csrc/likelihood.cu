// The other likelihoods on CUDA: nothing but names, the engine does the rest.
#include "likelihood.h"
#include "rows.cuh"

namespace fastvae::cuda {

FASTVAE_INSTANTIATE(BernoulliLogProb)
FASTVAE_INSTANTIATE(ContinuousBernoulliLogProb)
FASTVAE_INSTANTIATE(LaplaceLogProb<LogVar>)
FASTVAE_INSTANTIATE(LaplaceLogProb<LogScale>)
FASTVAE_INSTANTIATE(LaplaceLogProb<Scale>)
FASTVAE_INSTANTIATE(LaplaceLogProb<Softplus>)

}  // namespace fastvae::cuda
