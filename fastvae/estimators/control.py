"""Control variates of the score function: they centre a learning signal, and may scale it.

Each takes the signal ``[K, ...]`` of samples to another one. It stays unbiased so long as nothing
that is subtracted from a sample's signal depends on that very sample.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .surrogate import check_floating, check_same_device, wide

__all__ = ["MovingAverage", "leave_one_out"]


def leave_one_out(signal: Tensor) -> Tensor:
    r"""Each sample's signal less the mean of the others'.

    .. math:: s_k - \frac{1}{K - 1} \sum_{j \ne k} s_j

    Unbiased, since the others are independent of sample k; nothing is learnt, nothing is tuned.

    Args:
        signal: ``[K, ...]``, the samples leading: independent draws of one q.

    Returns:
        ``[K, ...]``, detached; float32 for half types. A sample that is infinite or NaN makes the
        others of its datapoint so, and no others.

    Raises:
        TypeError: if ``signal`` is not a floating-point tensor.
        ValueError: if there are fewer than two samples.

    Papers: Kool, van Hoof & Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", ICLR 2019
    workshop; for the bound of K samples (vimco): Mnih & Rezende, "Variational Inference for Monte
    Carlo Objectives", ICML 2016.

    >>> fastvae.leave_one_out(torch.tensor([1.0, 2.0, 6.0]))
    tensor([-3.0000, -1.5000,  4.5000])
    """
    check_floating("leave_one_out", "signal", signal)
    if signal.dim() == 0 or len(signal) < 2:
        raise ValueError(
            f"fastvae::leave_one_out: signal must have at least two samples, got"
            f" {list(signal.shape)}"
        )
    signal = wide(signal.detach())
    samples = len(signal)
    return (signal - signal.mean(0)) * (samples / (samples - 1))


class MovingAverage(nn.Module):
    r"""The signal less a running mean of those before it, and divided by their deviation if asked.

    .. math::
        \frac{s - c}{\max(1, \sqrt v)}, \qquad
        c \leftarrow \alpha c + (1 - \alpha)\, \overline{s}, \quad
        v \leftarrow \alpha v + (1 - \alpha)\, \overline{(s - \overline s)^2}

    A call uses c and v as earlier calls left them, and then, in training mode, adds its own signal
    to them: so what is subtracted never depends on the sample, and the estimate is unbiased, which
    with the update first it is not. Both are corrected for starting from nothing. The first signal
    of all is passed on as it is: call the module once on a batch before training, and discard what
    it returns, where that is too much.

    Args:
        decay: :math:`\alpha` in [0, 1).
        normalize: divide by the deviation where that is above 1, as NVIL does. The gradient of q is
            then that of the bound times a positive number (per entry of ``shape``): the learning
            rate of q adapts, while the model's gradient is left alone.
        shape: of the trailing dimensions that have averages of their own: ``(F,)`` with F factors;
            default: one for all.

    Signals that are infinite or NaN, or whose batch statistics would be, are passed on, but leave
    no trace in the state. It is three buffers, ``mean``, ``variance`` and ``weight``, saved in
    checkpoints; in evaluation mode they are read only. Keep them in float32: half types have too
    few digits for a slow average. Under DDP they are those of rank 0, like BatchNorm's, if the
    module is part of what DDP wraps; else each rank has its own, and is as unbiased. Nothing is
    read back to the host. Like any state that is written in place, it makes ``torch.func``
    transforms raise in training mode; and keep it out of what activation checkpointing runs twice.

    Raises:
        TypeError: if the signal is not a floating-point tensor.
        ValueError: if ``decay`` is not in [0, 1), ``shape`` has a size below 1, or the signal's
            shape does not end in ``shape`` after at least one dimension or lies elsewhere.

    Papers: Ranganath, Gerrish & Blei, "Black Box Variational Inference", AISTATS 2014; Mnih &
    Gregor, "Neural Variational Inference and Learning in Belief Networks", ICML 2014, algorithm 1.

    >>> average = fastvae.estimators.MovingAverage(decay=0.9)
    >>> average(torch.tensor([1.0, 3.0])), average(torch.tensor([1.0, 3.0]))
    (tensor([1., 3.]), tensor([-1.,  1.]))
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor

    def __init__(
        self, decay: float = 0.9, *, normalize: bool = False, shape: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"fastvae::MovingAverage: decay must be in [0, 1), got {decay}")
        if min(shape, default=1) < 1:
            raise ValueError(f"fastvae::MovingAverage: shape must be positive, got {list(shape)}")
        self.decay, self.normalize, self.shape = decay, normalize, tuple(shape)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.zeros(shape))
        self.register_buffer("weight", torch.zeros(shape))  # 1 - decay^t

    def forward(self, signal: Tensor) -> Tensor:
        """The signal ``[K, ...]``, centred; detached, float32 for half types."""
        self._check(signal)
        signal = wide(signal.detach())
        centred = signal - self.mean
        if self.normalize:
            centred = centred / self.variance.sqrt().clamp(min=1.0)
        if self.training:
            self._update(signal)
        return centred

    @torch.no_grad()
    def _update(self, signal: Tensor) -> None:
        rows = signal.to(wide(self.mean).dtype).reshape(-1, *self.shape)
        finite = rows.isfinite()
        count = finite.sum(0)
        rows = rows.masked_fill(~finite, 0.0)
        mean = rows.sum(0) / count.clamp(min=1)
        variance = (rows - mean).masked_fill(~finite, 0.0).square().sum(0) / count.clamp(min=1)
        usable = (count > 0) & mean.isfinite() & variance.isfinite()

        weight = torch.where(usable, self.decay * self.weight + (1 - self.decay), self.weight)
        step = (1 - self.decay) / weight.clamp(min=1 - self.decay)  # the first is 1
        self.mean.copy_(torch.where(usable, torch.lerp(wide(self.mean), mean, step), self.mean))
        self.variance.copy_(
            torch.where(usable, torch.lerp(wide(self.variance), variance, step), self.variance)
        )
        self.weight.copy_(weight)

    def _check(self, signal: Tensor) -> None:
        check_floating("MovingAverage", "signal", signal)
        dims = len(self.shape)
        if signal.dim() <= dims or signal.shape[signal.dim() - dims :] != self.shape:
            wanted = ", ".join(map(str, ("K, ...", *self.shape)))
            raise ValueError(
                f"fastvae::MovingAverage: signal must be [{wanted}], got {list(signal.shape)}"
            )
        check_same_device("MovingAverage", "signal", signal, "the state", self.mean)

    def extra_repr(self) -> str:
        return f"decay={self.decay}, normalize={self.normalize}, shape={self.shape}"
