"""Linear flows: rows by a matrix whose log-determinant is a sum of logarithms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["linear_flow"]

KINDS = ("lu", "lower", "upper")


def linear_flow(
    z: Tensor,
    matrix: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "lu",
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""``x = W z + b`` for each row, and its log-determinant, of triangles.

    .. math::
        W = L\,(U + \operatorname{diag} e^{s}), \qquad
        \log\Big|\det \frac{\partial x}{\partial z}\Big| = \sum_d s_d

    L has ones on its diagonal, and U zeros. One matrix holds them, as LAPACK packs them: L below
    the diagonal, U above it, and on it s. Whatever it holds, W is invertible, and no determinant is
    computed of a matrix. With ``kind="lower"`` W is the lower triangle, its diagonal :math:`e^s`,
    and what is above is not looked at; ``"upper"`` likewise.

    On pixels whose channels are the last dimension this is Glow's invertible 1x1 convolution. The
    products and solutions of triangles are those of BLAS, which nothing of ours would beat.

    Args:
        z: ``[..., D]``; with ``inverse`` x.
        matrix: ``[D, D]``.
        bias: b, ``[D]``.
        kind: ``"lu"``, ``"lower"`` or ``"upper"``.
        inverse: the inverse, z of x, and its log-determinant; triangles are solved, W is not
            inverted.

    Returns:
        ``(x, log_det)``: ``[..., D]``, and nats per row, ``[...]``, float32 for half types. A
        half-typed inverse is solved in float32.

    Raises:
        ValueError: if the shapes do not fit, or there is no such kind.

    Paper: Kingma & Dhariwal, "Glow", NeurIPS 2018, section 3.2.

    >>> matrix = 0.1 * torch.randn(4, 4)
    >>> x, log_det = fastvae.linear_flow(torch.randn(5, 4), matrix)
    >>> torch.allclose(log_det, matrix.diagonal().sum().expand(5))
    True
    """
    if torch.is_autocast_enabled(z.device.type):
        z = z.to(torch.promote_types(z.dtype, matrix.dtype))
    size = z.shape[-1]
    if matrix.shape != (size, size):
        raise ValueError(
            "fastvae::linear_flow: matrix must be [D, D] for the D of z, got "
            f"{list(matrix.shape)} and {list(z.shape)}"
        )
    if bias is not None and bias.shape != (size,):
        raise ValueError(
            f"fastvae::linear_flow: bias must be [D], got {list(bias.shape)} and {list(z.shape)}"
        )
    if kind not in KINDS:
        raise ValueError(
            f"fastvae::linear_flow: kind must be one of {', '.join(KINDS)}, got {kind}"
        )
    for name, x in (("matrix", matrix), ("bias", bias)):
        if x is not None and x.dtype != z.dtype:
            raise TypeError(
                f"fastvae::linear_flow: {name} must have the dtype of z, "
                f"got {x.dtype} and {z.dtype}"
            )
    # Not rounded by autocast: inverse and density would no longer be those of this map.
    with torch.autocast(z.device.type, enabled=False):
        return _linear_flow(z, matrix, bias, kind, inverse)


def _linear_flow(
    z: Tensor, matrix: Tensor, bias: Tensor | None, kind: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    size = z.shape[-1]
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    triangles = matrix.to(wide)
    log_diagonal = triangles.diagonal()
    scale = torch.diag_embed(log_diagonal.exp())
    lower, upper = triangles.tril(-1), triangles.triu(1)
    log_det = log_diagonal.sum().expand(z.shape[:-1])
    if not inverse:
        if kind == "lu":
            whole = (lower + torch.eye(size, dtype=wide, device=z.device)) @ (upper + scale)
        else:
            whole = (lower if kind == "lower" else upper) + scale
        return torch.nn.functional.linear(z, whole.to(z.dtype), bias), log_det
    rows = (z if bias is None else z - bias).to(wide)
    rows = rows.reshape(math.prod(z.shape[:-1]), size)
    solve = torch.linalg.solve_triangular  # rows on the left: z W' = x
    if kind == "lu":
        rows = solve(lower.mT, rows, upper=True, left=False, unitriangular=True)
    if kind == "lower":
        rows = solve((lower + scale).mT, rows, upper=True, left=False)
    else:
        rows = solve((upper + scale).mT, rows, upper=False, left=False)
    return rows.view(z.shape).to(z.dtype), -log_det
