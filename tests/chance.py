"""Chance in tests: generators of a known seed, and what a mean over replicates must be."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def assert_mean(samples: Tensor, truth, dim: int = 0, small: float = 0.05, what: str = "") -> None:
    """Within four standard errors, which themselves must be small enough to say something."""
    mean, error = samples.mean(dim), samples.std(dim) / math.sqrt(samples.shape[dim])
    truth = torch.as_tensor(truth, dtype=samples.dtype)
    off = (mean - truth).abs()
    assert (off <= 4 * error + 1e-9).all(), f"{what}: {mean} is not {truth} +- {error}"
    assert (error < small).all(), f"{what}: {error} tells nothing"
