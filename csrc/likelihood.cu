// The other likelihoods on CUDA: nothing but names, the engine does the rest.
#include "likelihood.h"
#include "rows.cuh"

namespace fastvae::cuda {

FASTVAE_INSTANTIATE(BernoulliLogProb)

}  // namespace fastvae::cuda
