"""Pixels by discretised logistic distributions, alone and in mixtures."""

from __future__ import annotations

from torch import Tensor

from .route import op

__all__ = ["discretized_logistic_log_prob", "discretized_logistic_mixture_log_prob"]

_discretized_logistic_log_prob = op("discretized_logistic_log_prob")
_discretized_logistic_mixture_log_prob = op("discretized_logistic_mixture_log_prob")


def discretized_logistic_log_prob(
    x: Tensor,
    mu: Tensor,
    log_scale: Tensor,
    num_bins: int = 256,
    *,
    parameterization: str = "log_scale",
) -> Tensor:
    r"""Log-probability of a logistic's bins on [-1, 1], summed over the last dimension.

    .. math::
        \log p(x \mid \mu, s) = \sum_d \log \left[
            \sigma\left(\frac{x_d + h - \mu_d}{s_d}\right) -
            \sigma\left(\frac{x_d - h - \mu_d}{s_d}\right) \right], \qquad h = \frac{1}{n - 1}

    The first bin is open to :math:`-\infty`, the last to :math:`+\infty`, so that the
    probabilities of all bins sum to 1.

    Args:
        x: ``[..., D]``, centres of bins, ``2 * i / (num_bins - 1) - 1`` of pixel value i. It is
            read as a real number: the first bin is all that lies below :math:`h - 1`.
        mu, log_scale: ``[..., D]``, :math:`\mu` and the scale :math:`s`, given by
            ``parameterization``. All three broadcast together and are not copied: with
            ``[K, B, D]`` parameters of K samples, ``x`` of ``[B, D]`` is read K times.
        num_bins: n; 256 for 8-bit pixels, 32 for 5-bit ones.
        parameterization: what ``log_scale`` holds, :math:`a`: ``"log_scale"``, :math:`s = e^a`;
            ``"scale"``, :math:`s = a`, NaN where it is negative; ``"softplus"``,
            :math:`s = \log(1 + e^a)`; ``"log_var"``, :math:`s = e^{a/2}`, so that :math:`a` is
            :math:`\log s^2` as of a Gaussian (the variance of a logistic is
            :math:`\pi^2 s^2 / 3`).

    Returns:
        Nats per row, ``[...]``; float32 for half types. The difference is formed as a product
        that loses no digit at any scale or distance: there is no floor to the scale, however it is
        given, and no mid-bin approximation, as there are in the code of PixelCNN++ and its
        descendants.

    Raises:
        TypeError: if a dtype is not floating, or they differ.
        ValueError: if the shapes do not broadcast, ``num_bins`` is less than 2, or there is no
            such parameterization.

    Paper: Kingma et al., "Improving Variational Inference with Inverse Autoregressive Flow",
    NeurIPS 2016, appendix C.

    >>> x = torch.tensor([[127.0, 255.0]]) / 127.5 - 1.0
    >>> fastvae.discretized_logistic_log_prob(x, torch.zeros(1, 2), torch.full((1, 2), -3.0))
    tensor([-23.2432])
    """
    return _discretized_logistic_log_prob(x, mu, log_scale, num_bins, parameterization)


def discretized_logistic_mixture_log_prob(
    x: Tensor,
    logits: Tensor,
    mu: Tensor,
    log_scale: Tensor,
    coeffs: Tensor | None = None,
    num_bins: int = 256,
    *,
    parameterization: str = "log_scale",
) -> Tensor:
    r"""Log-probability of pixels by a mixture of discretised logistics, channels conditioned.

    .. math::
        \log p(x) = \log \sum_{k=1}^{K} \mathrm{softmax}(l)_k
            \prod_{c=1}^{C} P\Big(x_c;\ \mu_{ck} + \sum_{j<c} \tanh(a_{cjk})\, x_j,\ s_{ck}\Big)

    with the bins P of :func:`discretized_logistic_log_prob`. With C = 3 and ``coeffs`` it is the
    output of PixelCNN++, NVAE, VDVAE; C = 1 serves grey pixels.

    Args:
        x: ``[..., C]`` in [-1, 1], channels last (a view of them: ``images.permute(0, 2, 3, 1)``).
        logits: ``[..., K]``, of the components; their softmax is taken here.
        mu, log_scale: ``[..., C, K]``.
        coeffs: ``[..., C * (C - 1) / 2, K]``, raw: tanh is taken here. In the order of
            PixelCNN++: green on red, blue on red, blue on green; on with 3 on 0, 3 on 1, ... of
            more channels. Default: none, the channels of a component are independent.
        num_bins: as in :func:`discretized_logistic_log_prob`.
        parameterization: what ``log_scale`` holds, as there.

    Returns:
        Nats per pixel, ``[...]``; float32 for half types; sum them over the image.

    The dimensions ``...`` broadcast together. Whatever their strides, inputs are read where they
    lie: slices of one network output, channels last or first, are not copied, and gradients lie in
    memory as their inputs do. Take the slices by ``split`` and ``chunk``, whose backward joins the
    gradients in one pass (each of ``out[..., a:b]`` would fill a tensor of the whole size). Memory
    beyond the gradients: two numbers a pixel.

    Raises:
        TypeError: if a dtype is not floating, or they differ.
        ValueError: if a shape does not follow from those of ``x`` and ``logits``, the pixels do
            not broadcast, ``num_bins`` is less than 2, or there is no such parameterization.

    Paper: Salimans et al., "PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture
    Likelihood and Other Modifications", ICLR 2017, section 2.1 and 2.2.

    >>> x, out = torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 8, 100)  # K = 10, as in PixelCNN++
    >>> logits, rest = out.split([10, 90], -1)
    >>> mu, log_scale, coeffs = rest.unflatten(-1, (3, 30)).chunk(3, -1)
    >>> log_px = fastvae.discretized_logistic_mixture_log_prob(x, logits, mu, log_scale, coeffs)
    >>> log_px[0, 0, 0]
    tensor(-18.7032)
    """
    return _discretized_logistic_mixture_log_prob(
        x, logits, mu, log_scale, coeffs, num_bins, parameterization
    )
