"""Residual flows: stacks of planar, radial, Householder and Sylvester steps, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from .route import op

__all__ = [
    "householder_columns",
    "householder_flow",
    "orthogonal_columns",
    "planar_flow",
    "radial_flow",
    "sylvester_flow",
]

_householder_flow = op("householder_flow")
_planar_flow = op("planar_flow")
_radial_flow = op("radial_flow")
_sylvester_flow = op("sylvester_flow")


def planar_flow(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""K planar steps, one after the other, and the log-determinant of all; or their inverse.

    .. math::
        z_k = z_{k-1} + \hat u_k \tanh(w_k^\top z_{k-1} + b_k), \qquad
        \log\Big|\det \frac{\partial z_K}{\partial z_0}\Big| =
        \sum_k \log\big(1 + h'_k\, w_k^\top \hat u_k\big)

    with :math:`h' = 1 - \tanh^2`. Whatever the parameters, each step is invertible:

    .. math::
        \hat u = u + \big(\operatorname{softplus}(w^\top u) - 1 - w^\top u\big)
        \frac{w}{\lVert w \rVert^2}, \qquad w^\top \hat u > -1.

    Where :math:`\lVert w \rVert^2` is 0, or too small for a normal number of its type, the step is
    a translation, and :math:`\hat u = u`.

    Args:
        z: ``[..., D]``.
        u, w: ``[K, D]``, the same for all rows, or each row's own, ``[..., K, D]``, whose leading
            dimensions broadcast with those of ``z`` (amortised: from a network).
        b: ``[K]`` or ``[..., K]``.
        inverse: take the steps back, the last one first: ``z`` is what the flow gave, and
            ``log_det`` that of the inverse, minus the flow's. A step has no inverse in closed form;
            one number a row is found, :math:`a + w^\top\hat u \tanh a = w^\top z_k + b`, by a
            fixed count of Halley's iterations from bounds on it. How exactly depends on how nearly
            a step folds: a rounding of :math:`z_k` grows by :math:`1 / (1 + h' w^\top \hat u)`.

    Returns:
        ``(z, log_det)``: ``[..., D]`` in the dtype of ``z``, and nats per row, ``[...]`` (float32
        for half types).

    Nothing is stored of the steps between: backward walks them again, a few rows at a time.

    Raises:
        TypeError: if a dtype is not floating, or they differ.
        ValueError: if the shapes do not fit.

    Paper: Rezende & Mohamed, "Variational Inference with Normalizing Flows", ICML 2015, section
    4.1 and appendix A.1.

    >>> u, w, b = torch.randn(8, 2), torch.randn(8, 2), torch.randn(8)
    >>> z, log_det = fastvae.planar_flow(torch.randn(5, 2), u, w, b)
    >>> z.shape, log_det.shape
    (torch.Size([5, 2]), torch.Size([5]))
    >>> start, back = fastvae.planar_flow(z, u, w, b, inverse=True)
    >>> torch.allclose(log_det + back, torch.zeros(5), atol=1e-4)
    True
    """
    return _planar_flow(z, u, w, b, inverse)  # type: ignore[no-any-return]


def radial_flow(
    z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""K radial steps, one after the other, and the log-determinant of all; or their inverse.

    .. math::
        z_k = z_{k-1} + \hat\beta_k h_k\, (z_{k-1} - c_k), \qquad
        h_k = \frac{1}{\hat\alpha_k + \lVert z_{k-1} - c_k \rVert}

    .. math::
        \log\Big|\det \frac{\partial z_K}{\partial z_0}\Big| = \sum_k
        (D - 1) \log(1 + \hat\beta_k h_k) + \log(1 + \hat\beta_k \hat\alpha_k h_k^2)

    Whatever the parameters, each step is invertible: :math:`\hat\alpha =
    \operatorname{softplus}(\alpha)`, at least 1e-12, and :math:`\hat\beta =
    \operatorname{softplus}(\beta) - \hat\alpha > -\hat\alpha`. With :math:`\alpha = \beta` a step
    is the identity.

    Args:
        z: ``[..., D]``.
        center: ``[K, D]``, the same for all rows, or each row's own, ``[..., K, D]``, whose leading
            dimensions broadcast with those of ``z``.
        alpha, beta: ``[K]`` or ``[..., K]``.
        inverse: take the steps back, the last one first, as in :func:`planar_flow`; here the radius
            before a step is the root of a quadratic.

    Returns, raises, and what is stored: as :func:`planar_flow`.

    Paper: Rezende & Mohamed, "Variational Inference with Normalizing Flows", ICML 2015, section
    4.1 and appendix A.2.

    >>> z, log_det = fastvae.radial_flow(
    ...     torch.randn(5, 2), torch.randn(8, 2), torch.zeros(8), torch.ones(8)
    ... )
    >>> bool((log_det > 0).all())
    True
    """
    return _radial_flow(z, center, alpha, beta, inverse)  # type: ignore[no-any-return]


def householder_flow(z: Tensor, v: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    r"""K reflections, one after the other: an orthogonal map, whose log-determinant is 0.

    .. math:: z_k = z_{k-1} - 2\, n_k\, n_k^\top z_{k-1}, \qquad n = v / \lVert v \rVert

    Where :math:`\lVert v \rVert^2` is 0, or no normal number of its type, a step is the identity.

    Args:
        z: ``[..., D]``.
        v: ``[K, D]``, the same for all rows, or each row's own, ``[..., K, D]``, whose leading
            dimensions broadcast with those of ``z`` (amortised: from a network).
        inverse: take the reflections back, the last one first.

    Returns, raises, and what is stored: as :func:`planar_flow`.

    Paper: Tomczak & Welling, "Improving Variational Auto-Encoders using Householder Flow", 2016.

    >>> z = torch.randn(5, 4)
    >>> x, log_det = fastvae.householder_flow(z, torch.randn(3, 4))
    >>> torch.allclose(x.norm(dim=-1), z.norm(dim=-1))
    True
    """
    return _householder_flow(z, v, inverse)  # type: ignore[no-any-return]


def sylvester_flow(
    z: Tensor, q: Tensor, r: Tensor, s: Tensor, b: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""K Sylvester steps, one after the other, and the log-determinant of all; or their inverse.

    .. math::
        z_k = z_{k-1} + Q_k \hat R_k \tanh(\hat S_k Q_k^\top z_{k-1} + b_k), \qquad
        \log\Big|\det \frac{\partial z_K}{\partial z_0}\Big| =
        \sum_k \sum_i \log\big(1 + h'_{k,i}\, \hat r_{k,ii}\, \hat s_{k,ii}\big)

    A planar step of rank M at once. The columns of Q are orthonormal, which is the caller's to see
    to (:func:`householder_columns`; :func:`orthogonal_columns`; columns of a permutation): the
    log-determinant is that of the map only if they are. :math:`\hat R` and :math:`\hat S` are the
    upper triangles of ``r`` and ``s``, the tanh of whose diagonals keeps each product of two above
    -1: whatever they are, each step is invertible.

    Args:
        z: ``[..., D]``.
        q: ``[K, D, M]``, the same for all rows, or each row's own, ``[..., K, D, M]``, whose
            leading dimensions broadcast with those of ``z`` (amortised: from a network). M <= D.
        r, s: ``[K, M, M]`` or ``[..., K, M, M]``; what is below the diagonal is not looked at.
        b: ``[K, M]`` or ``[..., K, M]``.
        inverse: take the steps back, the last one first, as in :func:`planar_flow`. With the
            argument of tanh for a, :math:`a + \hat S \hat R \tanh a = \hat S Q^\top z_k + b` is
            solved from the last element to the first, each as a planar step's. It is the inverse
            of the flow only if the columns of Q are orthonormal.

    Returns, raises, and what is stored: as :func:`planar_flow`.

    Paper: van den Berg et al., "Sylvester Normalizing Flows for Variational Inference", UAI 2018,
    where ``s`` is R tilde.

    >>> q = fastvae.householder_columns(torch.randn(4, 8, 3))
    >>> r, s, b = torch.randn(4, 3, 3), torch.randn(4, 3, 3), torch.randn(4, 3)
    >>> z, log_det = fastvae.sylvester_flow(torch.randn(5, 8), q, r, s, b)
    >>> z.shape, log_det.shape
    (torch.Size([5, 8]), torch.Size([5]))
    >>> start, back = fastvae.sylvester_flow(z, q, r, s, b, inverse=True)
    >>> torch.allclose(log_det + back, torch.zeros(5), atol=1e-4)
    True
    """
    return _sylvester_flow(z, q, r, s, b, inverse)  # type: ignore[no-any-return]


def householder_columns(x: Tensor) -> Tensor:
    r"""Orthonormal columns, ``[..., D, M]``, of any parameters of that shape, M <= D.

    The first M columns of a product of M Householder reflections. The i-th is that of a vector
    which is 1 at i, ``x[..., i + 1:, i]`` below and 0 above, so that no parameters are singular;
    what is on and above the diagonal of ``x`` is not looked at. Composed of torch ops.

    >>> q = fastvae.householder_columns(torch.randn(8, 3))
    >>> torch.allclose(q.mT @ q, torch.eye(3), atol=1e-5)
    True
    """
    below = _wide(x).tril(-1)
    tau = 2.0 / (1.0 + below.square().sum(-2))
    return torch.linalg.householder_product(below, tau).to(x.dtype)


def orthogonal_columns(x: Tensor, steps: int = 40) -> Tensor:
    r"""Orthonormal columns, ``[..., D, M]``: those nearest to any of full rank, M <= D.

    .. math:: Q \leftarrow Q \big(I + \tfrac12 (I - Q^\top Q)\big)

    from ``x``, scaled so that its largest singular value is at most 1. A step brings a small one
    1.5 times nearer to 1: one that is a fraction f of the largest takes log(1/f) / 0.4 of them, and
    some five more for the last digits. The default does for f of 1e-6, which is what float32 knows.
    Composed of torch ops, and computed in float32 or float64.

    Paper: van den Berg et al., "Sylvester Normalizing Flows for Variational Inference", UAI 2018,
    after Björck & Bowie, 1971.

    >>> q = fastvae.orthogonal_columns(torch.randn(8, 3))
    >>> torch.allclose(q.mT @ q, torch.eye(3), atol=1e-5)
    True
    """
    q = _wide(x)
    # The result is the same of any multiple of x, and so are its gradients.
    with torch.autocast(x.device.type, enabled=False):
        if x.numel() > 0:
            tiny = torch.finfo(q.dtype).tiny
            q = q / q.detach().abs().amax((-2, -1), keepdim=True).clamp(min=tiny)
            gram = (q.mT @ q).detach().abs().sum(-1).amax(-1)  # at least the square of the largest
            q = q * gram.clamp(min=tiny).rsqrt()[..., None, None]
        for _ in range(steps):
            q = 1.5 * q - 0.5 * q @ (q.mT @ q)
    return q.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
