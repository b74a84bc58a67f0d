"""Checkpoints: ONE safetensors file that holds all that a run needs to go on.

Tensors are named ``model.*``, ``optimizer.*``, ``average.*`` (the model's moving average, if it has
one), ``generator`` (the state of the random generator) and ``order`` (the epoch's permutation of
the training images). One metadata entry, ``fastvae``, is JSON: which model, which data, which
settings, and how far the run is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from . import files, models
from .extras import require

__all__ = [
    "PRECISIONS",
    "Checkpoint",
    "CheckpointError",
    "Header",
    "Settings",
    "read",
    "read_model",
    "write",
]

PRECISIONS = ("float32", "bfloat16")
_FORMAT = 1


class CheckpointError(Exception):
    """A checkpoint cannot be used; one sentence says which, what is wrong, and what to do."""


@dataclass(frozen=True)
class Settings:
    """What decides the course of a run; a resumed run keeps them.

    Raises:
        ValueError: if one of them says nothing that a run could do.
    """

    data: str = "digits"
    batch_size: int = 100
    lr: float = 2e-3
    clip_norm: float | None = None
    warmup: int = 0  # epochs in which the weight of the KL divergence rises to 1
    patience: int = 0  # epochs without a better validation score that end it; 0: any number
    ema: float = 0.0  # decay per step of the weights' moving average, which is scored; 0: none
    precision: str = "float32"  # of the networks in training: or bfloat16, by torch.autocast
    seed: int = 0

    def __post_init__(self) -> None:
        clip = self.clip_norm
        for name, good, rule in (
            ("batch_size", self.batch_size >= 1, "positive"),
            ("lr", self.lr > 0, "positive"),
            ("clip_norm", clip is None or clip > 0, "positive, or None"),
            ("warmup", self.warmup >= 0, "at least 0"),
            ("patience", self.patience >= 0, "at least 0"),
            ("ema", 0 <= self.ema < 1, "in [0, 1)"),
            ("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
        ):
            if not good:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Header:
    """The JSON of a checkpoint."""

    model: str
    config: dict[str, Any]
    image_shape: tuple[int, int]
    settings: Settings
    device: str  # the kind that drew the noise: a generator's state fits only its own kind
    step: int
    batch: int  # minibatches done of the epoch that ``order`` shuffles
    epoch: int  # epochs done
    best: float | None = None  # the highest validation score so far, if any was taken
    best_epoch: int = 0  # the epochs it was reached after

    @property
    def course(self) -> dict[str, Any]:
        """All that a run keeps when it goes on, by name."""
        return {"model": self.model, **self.config, **vars(self.settings)}

    def differs(self, course: Mapping[str, Any]) -> str | None:
        """The first name of which the run has another value, if there is one."""
        own = self.course
        return next((name for name in course if course[name] != own.get(name)), None)


@dataclass(frozen=True)
class Checkpoint:
    """A header and its tensors."""

    path: Path
    header: Header
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors called ``<name>.*``, without the prefix."""
        prefix = name + "."
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def build_model(self) -> models.Model:
        """The model with its weights: their moving average, if there is one.

        Raises:
            CheckpointError: if they do not fit together.
        """
        try:
            model = models.build(self.header.model, self.header.config)
            model.load_state_dict(self.part("average") or self.part("model"))
        except (ValueError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{self.path} does not fit this fastvae ({reason}); train the model again"
            ) from error
        return model


def write(path: Path, header: Header, tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint so that a crash leaves the previous one whole.

    Raises:
        OSError: if it cannot be written.
        MissingExtraError: without safetensors.
    """
    metadata = {"fastvae": json.dumps({"format": _FORMAT, **asdict(header)})}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    files.write_atomically(path, require("safetensors.torch").save(plain, metadata))


def read(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: if the file is missing, cut short, damaged, or not one of fastvae's.
        MissingExtraError: without safetensors.
    """
    safetensors = require("safetensors")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; pass a checkpoint that fastvae train wrote")
    try:
        with safetensors.safe_open(path, "pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({error}); use an older copy, or train again"
        ) from error
    if "fastvae" not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file of another program; "
            "pass a checkpoint that fastvae train wrote"
        )
    try:
        header = _parse(json.loads(metadata["fastvae"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has a header that this fastvae cannot read ({error}); "
            "use the fastvae that wrote it, or train again"
        ) from error
    return Checkpoint(path, header, tensors)


def read_model(path: Path) -> models.Model:
    """The model of a checkpoint, on the CPU, in eval mode.

    >>> path = pathlib.Path("runs/vae-digits/checkpoint.safetensors")
    >>> model = fastvae.checkpoint.read_model(path)  # doctest: +SKIP
    >>> images = model.sample(4)  # doctest: +SKIP
    """
    return read(path).build_model().eval()


def _parse(values: dict[str, Any]) -> Header:
    version = values.pop("format")
    if version != _FORMAT:
        raise ValueError(f"format {version}, not {_FORMAT}")
    required = {field.name for field in fields(Header) if field.default is MISSING}
    missing = required - values.keys()
    if missing:
        raise ValueError(f"no {', '.join(sorted(missing))}")
    values["settings"] = Settings(**values["settings"])
    height, width = values["image_shape"]
    values["image_shape"] = (int(height), int(width))
    return Header(**values)
