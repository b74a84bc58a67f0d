"""Mixtures of diagonal Gaussians: every row meets every component, and no pair is stored."""

from __future__ import annotations

from torch import Tensor

from .route import op

__all__ = ["aggregate_posterior", "gaussian_mixture_log_prob"]

_aggregate_posterior = op("aggregate_posterior")
_gaussian_mixture_log_prob = op("gaussian_mixture_log_prob")


def gaussian_mixture_log_prob(
    z: Tensor,
    mu: Tensor,
    log_var: Tensor,
    log_weights: Tensor | None = None,
    *,
    parameterization: str = "log_var",
) -> Tensor:
    r"""Log-density of a mixture of diagonal Gaussians: a VampPrior, a Gaussian mixture prior.

    .. math::
        \log p(z) = \log \sum_{k=1}^{K} w_k \prod_d N(z_d; \mu_{kd}, \sigma_{kd}^2)

    Args:
        z: ``[..., D]``.
        mu, log_var: the components, ``[K, D]`` each.
        log_weights: :math:`\log w_k`, ``[K]``, used as given: normalise them yourself
            (``log_softmax``). Default: all :math:`1/K`.
        parameterization: what ``log_var`` holds, as in :func:`fastvae.reparameterize`.

    Returns:
        Nats per row, ``[...]``; float32 for half types; -inf, with a gradient of zero, where no
        component has any density.

    Memory and gradients are of the size of the arguments: neither forward nor backward stores
    anything for a pair of row and component. Far components keep all digits.

    Raises:
        TypeError: if a dtype is not floating, or they differ.
        ValueError: if ``mu`` is not ``[K, D]``, another shape does not follow from it, or there is
            no such parameterization.

    Paper: Tomczak & Welling, "VAE with a VampPrior", AISTATS 2018, eq. 9.

    >>> mu = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    >>> fastvae.gaussian_mixture_log_prob(torch.zeros(1, 2), mu, torch.zeros(2, 2))
    tensor([-2.3379])
    """
    return _gaussian_mixture_log_prob(z, mu, log_var, log_weights, parameterization)


def aggregate_posterior(
    z: Tensor,
    mu: Tensor,
    log_var: Tensor,
    dataset_size: int | None = None,
    estimator: str = "mws",
    *,
    legacy_mss: bool = False,
    parameterization: str = "log_var",
) -> tuple[Tensor, Tensor]:
    r"""Minibatch estimates of the aggregate posterior and of the product of its marginals.

    .. math::
        \log q(z_i) \approx \log \sum_j w_{ij} \prod_d q(z_{id} | x_j), \qquad
        \log \prod_d q(z_{id}) \approx \sum_d \log \sum_j w_{ij}\, q(z_{id} | x_j)

    Their difference is the total correlation that beta-TCVAE penalises.

    Args:
        z: one sample per datum, ``[B, D]``.
        mu, log_var: the posteriors :math:`q(z|x_j) = N(\mu_j, \sigma_j^2)` that they came from,
            ``[B, D]``.
        dataset_size: N, at least B. Without it, with ``"mws"``, the batch is all there is:
            :math:`w_{ij} = 1/B`, a plain average.
        estimator: the weights. ``"mws"``, minibatch weighted: :math:`w_{ij} = 1/(BN)`.
            ``"mss"``, minibatch stratified, M = B - 1: :math:`1/N` for j = i,
            :math:`(N-M)/(NM)` for the next row (of the last, the first), :math:`1/M` for the
            others. Every row of these sums to 1; if B = 1, the one weight is 1.
        legacy_mss: put the three weights of ``"mss"`` where the code of the paper and its
            descendants (pythae, disentangling-vae) put them: :math:`1/N` in column 0 in place of
            the diagonal, :math:`(N-M)/(NM)` in column 1, and in column 0 of row B - 2, whose
            weights then sum to more than 1. Only to reproduce published results.
        parameterization: what ``log_var`` holds, as in :func:`fastvae.reparameterize`.

    Returns:
        ``(log_qz, log_prod_qz)``: nats per row, ``[B]`` each; float32 for half types.

    Time is :math:`O(B^2 D)`, memory :math:`O(BD)`, forward and backward.

    Raises:
        TypeError: if a dtype is not floating, or they differ.
        ValueError: if the shapes are not all ``[B, D]``, the estimator is unknown,
            ``dataset_size`` is less than B or, with ``"mss"``, missing, or ``legacy_mss`` is given
            without ``"mss"``, or there is no such parameterization.

    Paper: Chen, Li, Grosse & Duvenaud, "Isolating Sources of Disentanglement in VAEs", NeurIPS
    2018, appendix C.

    >>> z, mu, log_var = torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2)
    >>> log_qz, log_prod_qz = fastvae.aggregate_posterior(z, mu, log_var, 100, "mss")
    >>> log_qz
    tensor([-1.8379, -1.8379, -1.8379])
    """
    return _aggregate_posterior(
        z, mu, log_var, dataset_size, estimator, legacy_mss, parameterization
    )
