"""One typed, documented function per op, a module per family.

No logic lives here beyond defaults, the choice of the route (:mod:`.route`), and what a few
products of torch's own matrices say as well as a kernel (:mod:`.linear`).
"""

from . import (
    bound,
    categorical,
    counts,
    coupling,
    covariance,
    gaussian,
    likelihood,
    linear,
    logistic,
    mixture,
    residual_flow,
    spline,
)
from .bound import *  # noqa: F403
from .categorical import *  # noqa: F403
from .counts import *  # noqa: F403
from .coupling import *  # noqa: F403
from .covariance import *  # noqa: F403
from .gaussian import *  # noqa: F403
from .likelihood import *  # noqa: F403
from .linear import *  # noqa: F403
from .logistic import *  # noqa: F403
from .mixture import *  # noqa: F403
from .residual_flow import *  # noqa: F403
from .spline import *  # noqa: F403

__all__: list[str] = []
__all__ += bound.__all__
__all__ += categorical.__all__
__all__ += counts.__all__
__all__ += coupling.__all__
__all__ += covariance.__all__
__all__ += gaussian.__all__
__all__ += likelihood.__all__
__all__ += linear.__all__
__all__ += logistic.__all__
__all__ += mixture.__all__
__all__ += residual_flow.__all__
__all__ += spline.__all__
