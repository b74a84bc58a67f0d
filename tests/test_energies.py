"""The densities U1 to U4 of Rezende & Mohamed (2015), and the flows fitted to them."""

from __future__ import annotations

import math

import pytest
import torch

from fastvae import energies
from fastvae.cli import main

POINTS = ((0.0, 0.0), (2.0, 0.0), (-1.3, 0.7), (1.1, -2.4))


def by_hand(name: str, z1: float, z2: float) -> float:
    """Table 1 of the paper."""
    w1 = math.sin(2 * math.pi * z1 / 4)
    w2 = 3 * math.exp(-(((z1 - 1) / 0.6) ** 2) / 2)
    w3 = 3 / (1 + math.exp(-(z1 - 1) / 0.3))
    gauss = lambda x, s: math.exp(-((x / s) ** 2) / 2)  # noqa: E731
    return {
        "U1": ((math.hypot(z1, z2) - 2) / 0.4) ** 2 / 2
        - math.log(gauss(z1 - 2, 0.6) + gauss(z1 + 2, 0.6)),
        "U2": ((z2 - w1) / 0.4) ** 2 / 2,
        "U3": -math.log(gauss(z2 - w1, 0.35) + gauss(z2 - w1 + w2, 0.35)),
        "U4": -math.log(gauss(z2 - w1, 0.4) + gauss(z2 - w1 + w3, 0.35)),
    }[name]


@pytest.mark.parametrize("name", energies.ENERGIES)
def test_energies_are_those_of_the_paper(name):
    z = torch.tensor(POINTS, dtype=torch.float64)
    exact = torch.tensor([by_hand(name, *point) for point in POINTS], dtype=torch.float64)
    torch.testing.assert_close(energies.energy(name, z), exact, atol=1e-12, rtol=1e-12)
    far = torch.tensor([[50.0, 0.0], [0.0, -50.0]])
    assert (energies.energy(name, far) > 1e4).all()  # the wall


@pytest.mark.parametrize("name", energies.ENERGIES)
def test_densities_integrate_to_one(name):
    z, area = energies.grid(300)
    total = energies.log_density(name, z).exp().sum() * area
    assert abs(total - 1.0) <= 1e-3


def test_fitting_brings_a_flow_nearer_and_leaves_the_seed_alone():
    make = energies.FLOWS["splines"]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    short = energies.fit("U1", make, steps=1, seeds=(0,))
    long = energies.fit("U1", make, steps=150, seeds=(0,))
    assert torch.equal(torch.get_rng_state(), state)
    assert 0.0 < long.divergence < 0.3 * short.divergence
    images = energies.images("U1", [short.flow, long.flow], points=20)
    assert images.shape == (3, 400)
    assert (images >= 0.0).all()
    assert images[0].max() == 1.0


def test_command_prints_divergences_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "energies.png"
    assert main(["energies", "--steps", "2", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
    for name in (*energies.ENERGIES, *energies.FLOWS, str(out)):
        assert name in text


def test_a_bad_place_is_said_before_anything_is_fitted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(energies, "fit", lambda *args, **options: pytest.fail("it was fitted"))
    (tmp_path / "file").touch()
    for bad in (tmp_path, tmp_path / "file" / "x.png"):
        assert main(["energies", "--out", str(bad)]) == 2
        assert str(tmp_path) in capsys.readouterr().err
