// Likelihoods of counts as torch ops. The formulas are in counts.h.
#include "counts.h"

#include "binding.h"

namespace fastvae {

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define_row_sum<PoissonLogProb>(m);
  define_row_sum<NegativeBinomialLogProb>(m);
  define_row_sum<ZeroInflatedNegativeBinomialLogProb>(m);
}

}  // namespace fastvae
