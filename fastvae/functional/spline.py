"""Monotonic splines, each element's own, and their log-determinants."""

from __future__ import annotations

from torch import Tensor

from .route import op

__all__ = ["rational_quadratic_spline"]

_rational_quadratic_spline = op("rational_quadratic_spline")


def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    bound: float = 3,  # no floats, for torch.compile's sake: it takes one for a variable
    tails: str = "linear",
    inverse: bool = False,
    min_bin_width: float | None = None,
    min_bin_height: float | None = None,
    min_derivative: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A monotonic rational-quadratic spline through K bins for each element, and log-determinants.

    Bins, of :math:`[-B, B] \to [-B, B]`, have widths and heights of softmaxes, and between knots k
    and k + 1, with :math:`\theta = (x - x_k) / w_k` and :math:`s = h_k / w_k`,

    .. math::
        y = y_k + h_k \frac{s \theta^2 + d_k \theta (1 - \theta)}
                           {s + (d_{k+1} + d_k - 2 s)\, \theta (1 - \theta)}, \qquad
        w = 2B \big(m + (1 - mK) \operatorname{softmax}(\text{widths})\big), \qquad
        d = m_d + \operatorname{softplus}(\text{derivatives})

    .. math:: \log\Big|\det \frac{\partial y}{\partial x}\Big| = \sum_d \log \frac{dy_d}{dx_d}

    Args:
        x: ``[..., D]``; with ``inverse`` y.
        widths, heights: ``[..., D, K]``, any numbers, broadcast with ``x`` in their leading
            dimensions. Slices of a network's output are read where they lie.
        derivatives: ``[..., D, K - 1]``, of the inner knots; ``[..., D, K]`` if circular, the first
            also being the last.
        bound: B.
        tails: ``"linear"``: outside :math:`[-B, B]` the identity, with which the spline joins
            smoothly; ``"circular"``: x is an angle, and the spline goes on periodically,
            :math:`y(x + 2B) = y(x) + 2B`.
        inverse: the inverse spline, x from y, and its log-determinant.
        min_bin_width, min_bin_height: smallest bins, as fractions of 2B; 1e-3 unless given.
        min_derivative: smallest slope at a knot; 1e-3 unless given. The largest is 1e9.

    Returns:
        ``(y, log_det)``: ``[..., D]`` in the dtype of ``x``, and nats per row, ``[...]`` (float32
        for half types, which compute in float32). No rounding makes the root of the inverse
        complex, and gradients are finite for finite inputs.

    Raises:
        TypeError: if a dtype is not floating, or they differ.
        ValueError: if the shapes do not fit, a minimum is not positive, K bins of the smallest size
            do not fit, or there are no such tails.

    Paper: Durkan, Bekasov, Murray & Papamakarios, "Neural Spline Flows", NeurIPS 2019; circular:
    Rezende et al., "Normalizing flows on tori and spheres", ICML 2020.

    >>> x, widths, heights = torch.randn(5, 2), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    >>> derivatives = torch.randn(5, 2, 7)
    >>> y, log_det = fastvae.rational_quadratic_spline(x, widths, heights, derivatives)
    >>> z, _ = fastvae.rational_quadratic_spline(y, widths, heights, derivatives, inverse=True)
    >>> bool((x - z).abs().max() < 1e-4)
    True
    """
    return _rational_quadratic_spline(  # type: ignore[no-any-return]
        x,
        widths,
        heights,
        derivatives,
        bound,
        tails,
        inverse,
        1e-3 if min_bin_width is None else min_bin_width,
        1e-3 if min_bin_height is None else min_bin_height,
        1e-3 if min_derivative is None else min_derivative,
    )
