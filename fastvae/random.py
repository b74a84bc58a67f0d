"""Keys: the explicit randomness of every sampling function.

A *key* is an int64 tensor ``(seed, offset)``. The noise of element ``i`` (counted over the whole
output, row-major) is a pure function of the key and ``i``: Philox4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011) with counter ``offset + i // 4``, word ``i % 4``,
turned into normals by Box-Muller, or each into a Gumbel. It does not depend on the device, the
number of threads, or how a batch was split, so a key replays a sample anywhere.

Everything here is plain PyTorch. :func:`words`, :func:`uniform`, :func:`normal` and :func:`gumbel`
are the definition that the kernels are tested against, and what runs where the kernels cannot
(functorch transforms, forward-mode AD, devices without kernels).
"""

from __future__ import annotations

import math
from operator import index

import torch
from torch import Tensor

__all__ = [
    "fold_in",
    "from_generator",
    "gumbel",
    "key",
    "normal",
    "shard",
    "to_generator",
    "uniform",
    "words",
]

_MASK = 0xFFFFFFFF
_MUL0, _MUL1 = 0xD2511F53, 0xCD9E8D57
_WEYL0, _WEYL1 = 0x9E3779B9, 0xBB67AE85
_INT64_MAX = 2**63 - 1


def _signed(x: int) -> int:
    """The int64 with the bits of the unsigned 64-bit ``x``."""
    return (x + 2**63) % 2**64 - 2**63


def check_key(who: str, key: Tensor) -> None:
    """As the ops do.

    Raises:
        TypeError: if the key is not int64.
        ValueError: if it has another shape than ``[2]``.
    """
    if key.dtype != torch.int64:
        raise TypeError(f"fastvae::{who}: key must be int64 (seed, offset), got {key.dtype}")
    if key.shape != (2,):
        shape = list(key.shape)
        raise ValueError(f"fastvae::{who}: key must have shape [2] (seed, offset), got {shape}")


def key(seed: int, offset: int = 0, device: torch.device | str | None = None) -> Tensor:
    """The key ``(seed, offset)`` as an int64 tensor of shape ``[2]``.

    Both are taken modulo 2^64; ``offset`` counts blocks of four elements.

    >>> fastvae.random.key(0).tolist()
    [0, 0]
    """
    numbers = [_signed(index(seed)), _signed(index(offset))]
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def from_generator(
    generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Draw a fresh key from ``generator``, or from the device's default generator.

    A torch operation, so ``torch.manual_seed``, checkpointing, ``vmap``'s ``randomness=`` and CUDA
    graphs treat it like any other draw.
    """
    if device is None and generator is not None:
        device = generator.device
    return torch.randint(_INT64_MAX, (2,), generator=generator, device=device)


def to_generator(key: Tensor) -> torch.Generator:
    """torch's own generator, on the key's device, that the key seeds: for what has no kernel.

    Its noise is that of the device and of the order of the draws, as the rest of this module's is
    not; on the CPU it knows 2^32 seeds.

    >>> generator = fastvae.random.to_generator(fastvae.random.key(0))
    >>> torch.rand(2, generator=generator).shape
    torch.Size([2])
    """
    return torch.Generator(key.device).manual_seed(int(fold_in(key, 0)[0]))


def fold_in(key: Tensor, data: int) -> Tensor:
    """A new key, a hash of ``key`` and an integer: one independent stream per step, layer or rank.

    >>> key = fastvae.random.key(0)
    >>> per_layer = [fastvae.random.fold_in(key, layer) for layer in range(3)]
    """
    check_key("fold_in", key)
    data = (data + 1) % 2**64  # 0 would be the block that sampling itself draws
    lo = _philox(
        (key[1] & _MASK, (key[1] >> 32) & _MASK, data & _MASK, data >> 32),
        key[0] & _MASK,
        (key[0] >> 32) & _MASK,
    )
    return torch.stack((lo[0] | (lo[1] << 32), lo[2] | (lo[3] << 32)))


def shard(key: Tensor, row_offset: int, row_size: int) -> Tensor:
    """The key with which rows ``row_offset, row_offset + 1, ...`` of a batch are sampled alone.

    With rows of ``row_size`` elements, rank ``r`` of a data-parallel job draws from
    ``shard(key, r * rows_per_rank, row_size)`` exactly the noise it would have had in one process.

    Raises:
        ValueError: if the rows before the shard do not fill whole blocks of four elements.
    """
    check_key("shard", key)
    elements = row_offset * row_size
    if elements % 4:
        raise ValueError(
            "fastvae::shard: row_offset * row_size must be a multiple of 4 (one Philox block), "
            f"got {row_offset} * {row_size}"
        )
    return torch.stack((key[0], key[1] + _signed(elements // 4 % 2**64)))


def _mul_hi_lo(a: int, b: Tensor | int) -> tuple[Tensor, Tensor]:
    product = (
        torch.as_tensor(b) * a
    )  # wraps modulo 2^64; the bits are those of the unsigned product
    return (product >> 32) & _MASK, product & _MASK


def _philox(
    counter: tuple[Tensor | int, ...], key0: Tensor, key1: Tensor, rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        hi0, lo0 = _mul_hi_lo(_MUL0, c0)
        hi1, lo1 = _mul_hi_lo(_MUL1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ key0, lo1, hi0 ^ c3 ^ key1, lo0
        key0, key1 = (key0 + _WEYL0) & _MASK, (key1 + _WEYL1) & _MASK
    return c0, c1, c2, c3  # type: ignore[return-value]


def words(key: Tensor, blocks: int) -> Tensor:
    """The raw 32-bit words of a key's first ``blocks`` blocks, int64 of shape ``[blocks, 4]``."""
    check_key("random", key)
    block = key[1] + torch.arange(blocks, device=key.device)
    zero = torch.zeros_like(block)
    counter = (block & _MASK, (block >> 32) & _MASK, zero, zero)
    return torch.stack(_philox(counter, key[0] & _MASK, (key[0] >> 32) & _MASK), dim=-1)


def _check(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise TypeError(f"fastvae::random: dtype must be floating, got {dtype}")
    if any(size < 0 for size in shape):
        raise ValueError(f"fastvae::random: shape must not be negative, got {list(shape)}")


def _uniforms(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Of whole blocks that cover ``shape``, ``[blocks, 4]``; float32 for half types."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = words(key, (math.prod(shape) + 3) // 4)
    return x.to(compute) * 2.0**-32 + 2.0**-33


def _take(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return x.flatten()[: math.prod(shape)].reshape(shape).to(dtype)


def uniform(
    key: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype = torch.float32
) -> Tensor:
    r"""Uniforms ``u = x 2^{-32} + 2^{-33}`` in (0, 1], from all 32 bits of word ``x``.

    Half types are computed in float32 and rounded.
    """
    _check(shape, dtype)
    return _take(_uniforms(key, shape, dtype), shape, dtype)


def normal(
    key: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype = torch.float32
) -> Tensor:
    r"""Standard normals by Box-Muller: ``sqrt(-2 log u_0) (cos, sin)(2 pi u_1)``.

    Half types are computed in float32 and rounded. Largest ``|z|``: 6.76.

    >>> fastvae.random.normal(fastvae.random.key(0), (2, 3)).shape
    torch.Size([2, 3])
    """
    _check(shape, dtype)
    u = _uniforms(key, shape, dtype)
    radius = torch.sqrt(-2.0 * torch.log(u[..., 0::2]))
    # The quarter turn is taken off exactly, so that cos and sin keep their digits near their zeros.
    quarter = torch.round(4.0 * u[..., 1::2])
    angle = (2.0 * math.pi) * (u[..., 1::2] - 0.25 * quarter)
    sin, cos = torch.sin(angle), torch.cos(angle)
    odd, turn = quarter % 2 == 1, quarter % 4
    cos_turn = torch.where(odd, sin, cos) * torch.where((turn == 1) | (turn == 2), -1.0, 1.0)
    sin_turn = torch.where(odd, cos, sin) * torch.where(turn >= 2, -1.0, 1.0)
    z = torch.stack((radius * cos_turn, radius * sin_turn), dim=-1)
    return _take(z, shape, dtype)


def gumbel(
    key: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype = torch.float32
) -> Tensor:
    r"""Standard Gumbels ``-log(-log u)``, of the exact ``u``, whatever the dtype.

    In float32 a ``u`` close to 1 would be 1, and its Gumbel infinite; here the largest is
    ``33 log 2 = 22.87``, the smallest ``-log(33 log 2) = -3.13``.

    >>> fastvae.random.gumbel(fastvae.random.key(0), (2, 3)).shape
    torch.Size([2, 3])
    """
    _check(shape, dtype)
    u = _uniforms(key, shape, torch.float64)
    return _take(-torch.log(-torch.log(u)), shape, dtype)
