// Affine couplings on CUDA: nothing but names, the engine does the rest.
#include "coupling.h"
#include "rows.cuh"

namespace fastvae::cuda {

#define FASTVAE_INSTANTIATE_COUPLING(...) \
  FASTVAE_INSTANTIATE(__VA_ARGS__)        \
  FASTVAE_INSTANTIATE_SWEEP(BackwardOfLogDet, __VA_ARGS__)

#define FASTVAE_INSTANTIATE_KIND(Kind)                            \
  FASTVAE_INSTANTIATE_COUPLING(AffineCoupling<Kind, false>)       \
  FASTVAE_INSTANTIATE_COUPLING(AffineCoupling<Kind, true>)        \
  FASTVAE_INSTANTIATE_COUPLING(AffineCoupling<Kind, false, true>) \
  FASTVAE_INSTANTIATE_COUPLING(AffineCoupling<Kind, true, true>)

FASTVAE_INSTANTIATE_KIND(Exp)
FASTVAE_INSTANTIATE_KIND(TanhExp)
FASTVAE_INSTANTIATE_KIND(Sigmoid)
FASTVAE_INSTANTIATE_KIND(Gated)

}  // namespace fastvae::cuda
