"""Estimators of log p(x), of bounds on it, and of their gradients.

- :mod:`.bound`: bounds of K weighted samples, each with the right gradient

All are made of the ops of :mod:`fastvae.functional`, in Python, and the functions can be imported
from ``fastvae``.
"""

from . import bound
from .bound import *  # noqa: F403

__all__: list[str] = []
__all__ += bound.__all__
