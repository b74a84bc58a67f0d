"""Affine couplings: each column scaled and shifted by what a network made of other columns."""

from __future__ import annotations

import torch
from torch import Tensor

from .route import op

__all__ = ["affine_coupling"]

_affine_coupling = op("affine_coupling")


def affine_coupling(
    x: Tensor,
    shift: Tensor,
    scale: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    kind: str = "exp",
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The affine step of a coupling or autoregressive flow, and its log-determinant.

    With t the shift, s the scale as the network gave it, and :math:`\sigma` made of s by the kind:

    ==============  ==================================  ========================================
    ``kind``        y                                   :math:`\sigma(s)`
    ==============  ==================================  ========================================
    ``"exp"``       :math:`\sigma x + t`                :math:`e^s`
    ``"tanh_exp"``  :math:`\sigma x + t`                :math:`e^{\tanh s}` (RealNVP)
    ``"sigmoid"``   :math:`\sigma (x + t)`              :math:`1 / (1 + e^{-(s + 2)})` (Glow)
    ``"gated"``     :math:`\sigma x + (1 - \sigma) t`   :math:`1 / (1 + e^{-s})` (IAF)
    ==============  ==================================  ========================================

    .. math:: \log\Big|\det \frac{\partial y}{\partial x}\Big| = \sum_d \log \sigma(s_d)

    Without a scale the step is additive, y = x + t, of log-determinant 0 (NICE), and ``kind`` says
    nothing. A coupling of two halves transforms a slice, ``x[..., d:]``, which is read where it
    lies; one with a mask transforms all columns and lets some pass.

    Args:
        x: ``[..., D]``; with ``inverse`` y.
        shift, scale: ``[..., D]``, broadcast with ``x`` and not copied.
        mask: where it is 1 (or true), a column passes unchanged; 0 elsewhere. Broadcast likewise,
            mostly ``[D]``. It gets no gradient.
        inverse: the inverse step, x from y, and its log-determinant.

    Returns:
        ``(y, log_det)``: ``[..., D]`` in the dtype of ``x``, and nats per row, ``[...]`` (float32
        for half types).

    Raises:
        TypeError: if a dtype is not floating, or they differ.
        ValueError: if the shapes do not broadcast, or there is no such kind.

    Papers: Dinh, Krueger & Bengio, "NICE", ICLR workshop 2015; Dinh, Sohl-Dickstein & Bengio,
    "Density estimation using Real NVP", ICLR 2017; Kingma et al., "Improved variational inference
    with inverse autoregressive flow", NeurIPS 2016; Kingma & Dhariwal, "Glow", NeurIPS 2018.

    >>> x, shift, scale = torch.randn(3, 5, 4).unbind()
    >>> y, log_det = fastvae.affine_coupling(x, shift, scale, kind="tanh_exp")
    >>> z, minus = fastvae.affine_coupling(y, shift, scale, kind="tanh_exp", inverse=True)
    >>> bool((x - z).abs().max() < 1e-5), bool((log_det + minus).abs().max() < 1e-5)
    (True, True)
    """
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = mask.to(x.dtype)
    if scale is None:  # one operation of PyTorch's, and nothing to fuse it with
        _check_additive(x, shift, mask)
        step = -shift if inverse else shift
        y = x + (step if mask is None else torch.where(mask > 0.5, 0.0, step))
        is_double = x.dtype == torch.float64
        return y, y.new_zeros(y.shape[:-1], dtype=None if is_double else torch.float32)
    return _affine_coupling(x, shift, scale, mask, kind, inverse)  # type: ignore[no-any-return]


def _check_additive(x: Tensor, shift: Tensor, mask: Tensor | None) -> None:
    """What the op would have said."""
    start = "fastvae::affine_coupling:"
    if not x.dtype.is_floating_point:
        raise TypeError(f"{start} x must be of a floating type, got {x.dtype}")
    shape = x.shape
    for name, given in (("x", x), ("shift", shift), ("mask", mask)):
        if given is None:
            continue
        if given.dim() == 0:
            raise ValueError(f"{start} {name} must have at least one dimension, got a 0-dim tensor")
        if given.dtype != x.dtype:
            types = f"{given.dtype} and {x.dtype}"
            raise TypeError(f"{start} {name} must have the dtype of x, got {types}")
        try:
            shape = torch.broadcast_shapes(shape, given.shape)
        except RuntimeError as error:
            shapes = f"{list(given.shape)} and {list(x.shape)}"
            raise ValueError(f"{start} {name} must broadcast with x, got {shapes}") from error
