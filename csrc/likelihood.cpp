// Likelihoods as torch ops. The formulas are in likelihood.h.
#include "likelihood.h"

#include "binding.h"

namespace fastvae {

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define_row_sum<BernoulliLogProb>(m);
  define_row_sum<ContinuousBernoulliLogProb>(m);
  define_row_sum<LaplaceLogProb, LogScale, LogVar, Scale, Softplus>(m);
}

}  // namespace fastvae
