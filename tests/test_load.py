"""Import without a usable module: the reference path, one warning, and what to do about it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvae

PROGRAM = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastvae
import torch
print(len([w for w in caught if "fastvae" in str(w.message)]))
print(*(w.message for w in caught if "fastvae" in str(w.message)))
mu = torch.randn(3, 4, requires_grad=True)
z, kl = fastvae.reparameterize_kl(mu, torch.zeros(3, 4), key=fastvae.random.key(1))
(z.sum() + kl.sum()).backward()
assert torch.allclose(mu.grad, 1 + mu)
assert fastvae.reparameterize(mu, mu, 5).shape == (5, 3, 4)
assert fastvae.gaussian_kl(mu, mu, mu, mu).abs().max() == 0
assert torch.func.vmap(fastvae.bernoulli_log_prob)(mu, mu).shape == (3,)
assert fastvae.gaussian_log_prob(mu, mu, mu).shape == (3,)
print(fastvae.build_info()["compiled"], fastvae.route("gaussian_kl", "cpu"))
"""


def copy_of_package(folder: Path) -> Path:
    """The Python files, and the compiled ones where they are installed."""
    source = Path(fastvae.__file__).parent
    shutil.copytree(source, folder / "fastvae", ignore=shutil.ignore_patterns("__pycache__"))
    if fastvae._load.module is not None:
        installed = Path(fastvae._load.module.__file__)
        for file in (installed, installed.parent / "_build.py"):
            shutil.copy(file, folder / "fastvae")
    return folder / "fastvae"


def run(folder: Path) -> list[str]:
    # -S and an explicit path: an editable install's import hook must not find the real package
    path = [str(folder), *(p for p in sys.path if p.endswith("site-packages"))]
    code = f"import sys; sys.path[:0] = {path!r}\n" + PROGRAM
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_a_module(tmp_path):
    package = copy_of_package(tmp_path)
    for file in (*package.glob("_C*.so"), package / "_build.py"):
        file.unlink(missing_ok=True)
    count, warning, state = run(tmp_path)
    assert count == "1"
    assert "no compiled module" in warning
    assert torch.__version__ in warning
    assert "pip install" in warning
    assert state.startswith("False reference (no compiled module")


@pytest.mark.skipif(not fastvae.build_info()["compiled"], reason="no compiled module to spoil")
def test_built_for_another_torch_is_not_loaded(tmp_path):
    package = copy_of_package(tmp_path)
    (package / "_build.py").write_text('TORCH_VERSION = "1.2.3+cu000"\nCUDA = False\nISA = ""\n')
    for module in package.glob("_C*.so"):
        module.write_bytes(b"loading this would fail: it must not be tried")
    count, warning, state = run(tmp_path)
    assert count == "1"
    assert f"built with torch 1.2.3+cu000, running torch {torch.__version__}" in warning
    assert "pip install --no-build-isolation" in warning
    assert state.startswith("False reference")


@pytest.mark.skipif(not fastvae.build_info()["compiled"], reason="no compiled module to spoil")
def test_module_that_does_not_load(tmp_path):
    for module in copy_of_package(tmp_path).glob("_C*.so"):
        module.write_bytes(b"no shared library")
    count, warning, _ = run(tmp_path)
    assert count == "1"
    assert "does not load" in warning


@pytest.mark.skipif(not fastvae.build_info()["compiled"], reason="no compiled module")
def test_a_good_copy_loads_without_a_warning(tmp_path):
    copy_of_package(tmp_path)
    count, _, state = run(tmp_path)
    assert count == "0"
    assert state == "True cpu kernel"


def test_import_costs_no_optional_dependency():
    # torch itself may import tqdm: what counts is what fastvae adds
    base = subprocess.run(
        [sys.executable, "-c", "import sys, torch; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    extras = {"matplotlib", "tqdm", "safetensors", "sklearn", "scipy"} - set(base)
    code = f"import sys, fastvae; found = {extras!r} & sys.modules.keys(); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_modules_that_want_more_are_there_when_asked_for():
    code = """
import sys, fastvae
assert "fastvae.models" not in sys.modules
print(fastvae.models.VAE(4).latent_dim, fastvae.data.DATASETS["digits"].__name__)
fastvae.nothing
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[0] == "50"
    assert "module 'fastvae' has no attribute 'nothing'" in done.stderr


def test_route_names_every_path():
    assert fastvae.route("gaussian_kl", "cpu").startswith(("cpu kernel", "reference"))
    with pytest.raises(ValueError, match=r"op must be one of .*, got nonsense"):
        fastvae.route("nonsense", "cpu")
    assert fastvae.route("gaussian_kl", "mps").startswith(("none (no kernel for mps", "reference"))


@pytest.mark.parametrize("built", ["2.13.0", "2.13.1+cu130", "2.13.0+cpu"])
def test_patch_releases_and_variants_run_together(built):
    assert fastvae._load._same_torch(built, "2.13.0+cpu")
    assert not fastvae._load._same_torch(built, "2.14.0")
    assert not fastvae._load._same_torch(built, "3.13.0")
