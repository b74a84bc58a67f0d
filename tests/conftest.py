"""Where the data lies, and which device the generic tests run on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
if "FASTVAE_DATA" not in os.environ and SHARED.is_dir():
    os.environ["FASTVAE_DATA"] = str(SHARED)


@pytest.fixture(scope="session")
def device() -> str:
    """cpu, or what FASTVAE_TEST_DEVICE names (bench/device.sh says cuda)."""
    name = os.environ.get("FASTVAE_TEST_DEVICE", "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.fail(f"FASTVAE_TEST_DEVICE={name}, but torch sees no CUDA device")
    return name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where FASTVAE_TEST_DEVICE is no CPU, what asks for it; of FASTVAE_TEST_SHARD=2/8 a part."""
    chosen = items
    if os.environ.get("FASTVAE_TEST_DEVICE", "cpu") != "cpu":
        chosen = [item for item in chosen if "device" in getattr(item, "fixturenames", ())]
    if shard := os.environ.get("FASTVAE_TEST_SHARD"):
        first, step = map(int, shard.split("/"))
        chosen = chosen[first::step]
    if len(chosen) < len(items):
        kept = set(chosen)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = chosen


@pytest.fixture
def double():
    """float64 by default, from one seed: for what is checked against exact numbers."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def threads():
    """Set the number of threads for one test: ``threads(4)``."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
