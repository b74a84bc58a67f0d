"""The mean of importance weights, in logarithms: the op under every bound of K samples."""

from __future__ import annotations

from torch import Tensor

from .route import op

__all__ = ["log_mean_exp"]

_log_mean_exp = op("log_mean_exp")


def log_mean_exp(log_w: Tensor) -> Tensor:
    r"""Logarithm of the mean of exponentials over the last dimension.

    .. math:: L = \log \frac1K \sum_k e^{l_k}, \qquad
        \frac{\partial L}{\partial l_k} = \frac{e^{l_k}}{\sum_j e^{l_j}}

    Args:
        log_w: ``[..., K]``, at any strides: for samples that lead, ``log_w.movedim(0, -1)`` is read
            in place.

    Returns:
        ``[...]``, nats; float32 for half types. Exact for equal weights and for K = 1. A row that
        is -inf throughout (or without columns) gives -inf, and its gradient is zero; +inf and NaN
        give themselves. The weights are normalised to a few ulp, however large ``log_w`` is.

    Raises:
        TypeError: if the dtype is not floating.

    Paper: Burda, Grosse & Salakhutdinov, "Importance Weighted Autoencoders", ICLR 2016, eq. 8.

    >>> fastvae.log_mean_exp(torch.tensor([0.0, 1.0]).log())
    tensor(-0.6931)
    """
    return _log_mean_exp(log_w)
