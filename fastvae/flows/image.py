"""Images: transforms of pixels, whose channels are their columns, at several scales."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .flow import Chain
from .transform import Transform, no_determinant

__all__ = ["Multiscale"]


def squeeze(x: Tensor) -> Tensor:
    """Each 2 x 2 pixels become channels of one: ``[..., H, W, C]`` to ``[..., H/2, W/2, 4C]``."""
    *lead, height, width, channels = x.shape
    x = x.reshape(*lead, height // 2, 2, width // 2, 2, channels)
    return x.movedim(-4, -3).flatten(-3)


def unsqueeze(x: Tensor) -> Tensor:
    *lead, height, width, channels = x.shape
    x = x.reshape(*lead, height, width, 2, 2, channels // 4)
    return x.movedim(-3, -4).reshape(*lead, 2 * height, 2 * width, channels // 4)


class Multiscale(Transform):
    """From rows of noise to images, ``[..., C, H, W]``, by transforms of pixels at each scale.

    From data to noise: squeeze 2 x 2 pixels into channels, transform the pixels, let half of the
    channels be noise, and go on with the other half (Dinh et al. 2017, Glow).

    Args:
        shape: ``(C, H, W)``.
        levels: for each scale, the finest first, the transforms of its pixels, from noise to data;
            pixels are ``[..., H/2^i, W/2^i, channels]``, and columns are their channels, of which
            :meth:`channels` tells the number. Networks that look at other pixels too are
            :func:`conv_net`'s.

    >>> channels = fastvae.flows.Multiscale.channels((3, 8, 8), 2)
    >>> channels
    [12, 24]
    >>> glow = fastvae.flows.Multiscale(
    ...     (3, 8, 8), [[fastvae.flows.Linear(c), fastvae.flows.ActNorm(c)] for c in channels]
    ... )
    >>> x, log_det = glow.forward_and_log_det(torch.randn(5, 3 * 8 * 8))
    >>> x.shape, log_det.shape
    (torch.Size([5, 3, 8, 8]), torch.Size([5]))
    """

    def __init__(self, shape: tuple[int, int, int], levels: Iterable[Iterable[Transform]]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.levels = nn.ModuleList(Chain(level) for level in levels)
        all_channels = self.channels(shape, len(self.levels))
        channels, height, width = shape
        self.dim = channels * height * width
        kept = [*(c // 2 for c in all_channels[:-1]), all_channels[-1]]
        # Of the noise of each level, (H, W, channels).
        self.sizes = [(height >> i + 1, width >> i + 1, c) for i, c in enumerate(kept)]

    @staticmethod
    def channels(shape: Sequence[int], levels: int) -> list[int]:
        """How many channels the pixels of each level have."""
        if len(shape) != 3 or levels < 1 or min(shape) < 1 or any(n % 2**levels for n in shape[1:]):
            raise ValueError(
                "Multiscale: shape must be (C, H, W), H and W multiples of 2 to the levels, got "
                f"{tuple(shape)} and {levels} levels"
            )
        return [4 * shape[0] * 2**level for level in range(levels)]

    def _levels(self) -> list[Chain]:
        return list(self.levels)  # type: ignore[arg-type]

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.check(z, None)
        total = no_determinant(z)
        parts = z.split([math.prod(size) for size in self.sizes], -1)
        x: Tensor | None = None
        for level, size, part in reversed(
            list(zip(self._levels(), self.sizes, parts, strict=True))
        ):
            noise = part.unflatten(-1, size)
            x = noise if x is None else torch.cat([x, noise], -1)
            x, log_det = level.forward_and_log_det(x, self._of_pixels(context))
            total = total + log_det.sum((-2, -1))
            x = unsqueeze(x)
        assert x is not None
        return x.movedim(-1, -3), total

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if tuple(x.shape[-3:]) != self.shape:
            raise ValueError(
                f"Multiscale: x must be [..., {', '.join(map(str, self.shape))}], "
                f"got {list(x.shape)}"
            )
        x = x.movedim(-3, -1)
        total = no_determinant(x[..., 0, 0, :])
        parts: list[Tensor] = []
        for level in self._levels():
            x = squeeze(x)
            x, log_det = level.inverse_and_log_det(x, self._of_pixels(context))
            total = total + log_det.sum((-2, -1))
            if len(parts) + 1 < len(self.levels):
                x, noise = x.chunk(2, -1)
            else:
                noise = x
            parts.append(noise.flatten(-3))
        return torch.cat(parts, -1), total

    @staticmethod
    def _of_pixels(context: Tensor | None) -> Tensor | None:
        return None if context is None else context[..., None, None, :]

    def extra_repr(self) -> str:
        return f"shape={self.shape}"
