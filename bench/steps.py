"""Whole training steps: forward, backward and Adam of a VAE whose posterior is a planar flow."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from cases import eager_planar_flow
from torch import Tensor, nn

import fastvae
from fastvae import demo, models

__all__ = ["FlowVAE", "compare_steps", "eager_elbo"]

DATA, HIDDEN, LATENT = 784, 400, 40
BATCH = {"cpu": 128, "cuda": 512}


class FlowVAE(nn.Module):
    """A VAE whose planar steps all rows share, or of which each row has its own (amortised)."""

    def __init__(self, length: int, amortised: bool) -> None:
        super().__init__()
        posterior = {"posterior": "planar", "posterior_size": length} if amortised else {}
        self.vae = models.VAE(DATA, LATENT, (HIDDEN,), **posterior)
        self.flow = None if amortised else fastvae.flows.Planar(LATENT, length)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``mu``, ``log_var`` and the steps, ``[K, 2 L + 1]`` or ``[B, K, 2 L + 1]``."""
        context = self.vae.context(x)
        mu, log_var = self.vae.encoder[-1](context).chunk(2, -1)
        if self.flow is not None:
            return mu, log_var, self.flow.steps
        (planar,) = self.vae.flow.transforms
        return mu, log_var, planar.lines(context)

    def elbo(self, x: Tensor) -> Tensor:
        if self.flow is None:
            return self.vae.elbo(x).elbo
        mu, log_var, _ = self.encode(x)
        z, log_det = self.flow(fastvae.reparameterize(mu, log_var))
        zero = z.new_zeros(1)
        recon = fastvae.bernoulli_log_prob(x, *self.vae.decode(z))
        prior = fastvae.gaussian_log_prob(z, zero, zero)
        return recon + prior + fastvae.gaussian_entropy(log_var) + log_det


def eager_elbo(model: FlowVAE, x: Tensor) -> Tensor:
    """:meth:`FlowVAE.elbo` without any op of fastvae, a module for each step, ``[B]``."""
    mu, log_var, steps = model.encode(x)
    eps = torch.randn_like(mu)
    z = mu + eps * torch.exp(0.5 * log_var)
    log_q = -0.5 * (math.log(2.0 * math.pi) + log_var + eps * eps).sum(-1)
    for step in steps.split(1, -2):
        u, w, b = step[..., :LATENT], step[..., LATENT : 2 * LATENT], step[..., -1]
        z, log_det = eager_planar_flow(z, u, w, b)
        log_q = log_q - log_det
    log_prior = -0.5 * (math.log(2.0 * math.pi) + z * z).sum(-1)
    return demo.eager_bernoulli_log_prob(x, *model.vae.decode(z)) + log_prior - log_q


def compare_steps(device: str) -> Iterator[demo.Comparison]:
    """A step with fastvae's ops against one without, at each length of the flow."""
    x = (torch.rand(BATCH[device], DATA) < 0.3).float().to(device)
    for amortised in (False, True):
        for length in (16, 80):
            model = FlowVAE(length, amortised).to(device)
            what = f"planar, K = {length}, {'each row its own' if amortised else 'shared'}"
            fused = demo.stepper(model, FlowVAE.elbo, x)
            yield demo.compare(what, fused, demo.stepper(model, eager_elbo, x))
            if length == 16:  # it unrolls all steps: 80 of them take minutes
                compiled = demo.stepper(model, torch.compile(eager_elbo), x)
                yield demo.compare(what, fused, compiled, rival="compile")
