"""Estimators of log p(x), of bounds on it, and of their gradients.

- :mod:`.evidence`: the evidence lower bound of a Gaussian posterior in its three forms
- :mod:`.bound`: bounds of K weighted samples, each with the right gradient
- :mod:`.importance`: log p(x) from any number of importance samples, in the memory of a few
- :mod:`.annealed`: log p(x) from chains that are led to the posterior
- :mod:`.score`: the score function's gradient, for latents that cannot be reparameterised
- :mod:`.control`: what takes its variance away

All are made of the ops of :mod:`fastvae.functional`, in Python, and the functions can be imported
from ``fastvae``.
"""

from . import annealed, bound, control, evidence, importance, score
from .annealed import *  # noqa: F403
from .bound import *  # noqa: F403
from .control import *  # noqa: F403
from .evidence import *  # noqa: F403
from .importance import *  # noqa: F403
from .score import *  # noqa: F403

__all__: list[str] = []
__all__ += annealed.__all__
__all__ += bound.__all__
__all__ += control.__all__
__all__ += evidence.__all__
__all__ += importance.__all__
__all__ += score.__all__
