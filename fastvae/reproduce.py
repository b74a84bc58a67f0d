"""Published figures, run again: each row of ``recipes.toml`` is one, with all that decides it.

A run keeps its checkpoints in a folder and goes on from there, however often it was stopped. What
it writes at the end, or when its time is up, is a record: the paper's figure, ours for every seed,
how far training went, how long it took, and on what.
"""

from __future__ import annotations

import functools
import json
import math
import platform
import statistics
import time
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fastvae

from . import data, evaluation, files, models, train
from .checkpoint import CheckpointError, Header, Settings

__all__ = ["METRICS", "Recipe", "recipe", "recipes", "run"]

METRICS = {"error": "test error, %", "nll": "-log p(x), nats", "bound": "-ELBO, nats"}


@dataclass(frozen=True)
class Stage:
    """A model to train.

    ``features`` names the stage whose encoder it is a model of, ``start`` the one with whose
    weights it begins.
    """

    name: str
    model: str
    epochs: int
    config: dict[str, Any]
    settings: dict[str, Any]
    family: str  # the table it is written in
    features: str | None = None
    start: str | None = None


@dataclass(frozen=True)
class _Trained:
    """A stage as far as its epochs, or the time, went."""

    trainer: train.Trainer
    model: models.Model  # of the best epoch, if that was looked for
    seconds: float
    took: float  # of them, in this call
    begun: dict[str, Any]  # how far the stages were that it was made of

    @property
    def how_far(self) -> dict[str, Any]:
        best = self.trainer.best_epoch or None
        own = {
            "epochs": self.trainer.epoch,
            "best_epoch": best,
            "seconds": self.seconds,
            "precision": self.trainer.settings.precision,
        }
        return own | ({"of": self.begun} if self.begun else {})


@dataclass(frozen=True)
class Recipe:
    """A row: see the top of ``recipes.toml``."""

    name: str
    title: str
    paper: str
    metric: str
    published: float
    stages: tuple[Stage, ...]
    deviation: float | None = None
    from_memory: bool = False
    importance_samples: int = 0
    annealed_images: int = 0
    classifier: str | None = None
    classified: str | None = None
    num_labels: int | None = None


def recipes() -> dict[str, Recipe]:
    """All rows by name.

    >>> "m1m2-100" in fastvae.reproduce.recipes()
    True
    """
    tables = tomllib.loads((Path(__file__).parent / "recipes.toml").read_text())
    found: dict[str, Recipe] = {}
    written: dict[str, tuple[Stage, ...]] = {}
    for name, table in tables.items():
        stages = tuple(Stage(**stage, family=name) for stage in table.pop("stage"))
        stages = written[name] = written.get(table.pop("after", None), ()) + stages
        published, deviation = table.pop("published"), table.pop("deviation", None)
        if not isinstance(published, dict):
            found[name] = Recipe(
                name=name, published=published, deviation=deviation, stages=stages, **table
            )
            continue
        for labels, figure in published.items():
            found[f"{name}-{labels}"] = Recipe(
                name=f"{name}-{labels}",
                published=figure,
                deviation=deviation[labels],
                num_labels=int(labels),
                stages=stages,
                **table,
            )
    return found


def recipe(name: str) -> Recipe:
    """The row ``name``.

    Raises:
        ValueError: if there is none.
    """
    known = recipes()
    if name not in known:
        raise ValueError(f"there is no row {name!r}; take one of {', '.join(known)}")
    return known[name]


def run(
    row: Recipe,
    out: Path,
    *,
    seeds: int = 1,
    minutes: float | None = None,
    epochs: int | None = None,
    root: Path | None = None,
    device: str = "cpu",
    precision: str = "float32",
) -> dict[str, Any] | None:
    """Train what is not trained yet, score it, and write ``record-NAME.json`` into ``out``.

    Args:
        minutes: of training in this call, of all seeds together. A seed after the first that it
            leaves untrained is not scored.
        epochs: of every stage, in place of the recipe's: the record says so.
        precision: of the networks in training. Like the device, what is fast here decides it, not
            the recipe; the record says what it was. A stage that is trained already may have had
            another.

    Returns:
        The record; None if Ctrl-C stopped it.

    Raises:
        ValueError: if ``seeds`` is not positive.
        CheckpointError: if ``out`` holds a run of another recipe.
        TrainingDiverged: if a loss is NaN or infinite.
    """
    if seeds < 1:
        raise ValueError(f"reproduce: seeds must be positive, got {seeds}")
    path = out / f"record-{row.name}.json"
    left = math.inf if minutes is None else 60 * minutes
    results: list[dict[str, Any]] = []
    for seed in range(seeds):
        print(f"{row.name}, seed {seed}", flush=True)
        trained = _train(row, out, seed, epochs, left, root, device, precision)
        if trained is None:
            return None
        left -= sum(stage.took for stage in trained)
        if results and left <= 0 and not trained[-1].trainer.step:
            print("its time was up before it began", flush=True)
            break
        training = {
            stage.name: done.how_far for stage, done in zip(row.stages, trained, strict=True)
        }
        scores = _score(row, trained[-1], seed, root)
        results.append({"seed": seed, **scores, "training": training})
        values = [one["value"] for one in results]
        record = {
            **asdict(row),
            "stages": [asdict(stage) for stage in row.stages],  # as JSON reads them again
            "ours": statistics.fmean(values),
            "ours_deviation": statistics.stdev(values) if len(values) > 1 else None,
            "seeds": results,
            "device": _device_name(device),
            "precision": precision,
            "threads": torch.get_num_threads(),
            "fastvae": fastvae.__version__,
            "torch": torch.__version__,
        }
        files.write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
    return record


def _train(
    row: Recipe,
    out: Path,
    seed: int,
    epochs: int | None,
    left: float,
    root: Path | None,
    device: str,
    precision: str,
) -> list[_Trained] | None:
    """Every stage; None if Ctrl-C stopped one."""
    trained: dict[str, _Trained] = {}
    load = functools.cache(lambda name: data.load(name, root))
    for stage in row.stages:
        settings = Settings(seed=seed, precision=precision, **stage.settings)
        dataset = load(settings.data)
        own = issubclass(models.MODELS[stage.model], models.M2)  # rows share what has no labels
        folder = out / (row.name if own else stage.family) / f"seed-{seed}" / stage.name
        path, begun = folder / "checkpoint.safetensors", folder / "begun.json"
        config = dict(stage.config)
        if own:
            config["num_labels"] = row.num_labels
        m1 = trained[stage.features].model if stage.features else None
        assert m1 is None or isinstance(m1, models.VAE)
        trainer = train.Trainer(stage.model, config, dataset, settings, device, m1)
        last, took = stage.epochs if epochs is None else epochs, 0.0
        if path.exists():
            wanted = trainer.header.course
            trainer = train.Trainer.resume(path, dataset, device)
            if trainer.epoch >= last or trainer.exhausted:
                wanted |= {"precision": trainer.settings.precision}
            _check_same(trainer.header, wanted, path)
        else:
            if stage.start:
                trainer.begin_with(trained[stage.start].model)
            of = {name: trained[name].how_far for name in (stage.features, stage.start) if name}
            files.write_atomically(begun, json.dumps(of).encode())
        if trainer.epoch < last and left > 0 and not trainer.exhausted:
            before, start = _seconds(folder), time.monotonic()
            minutes = None if math.isinf(left) else left / 60
            try:
                finished = train.fit(trainer, path, epochs=last, minutes=minutes)
            finally:  # also where it diverged
                took = time.monotonic() - start
                files.write_atomically(folder / "seconds", f"{before + took:.3f}\n".encode())
            if not finished:
                return None
            left -= took
        model = train.best_model(trainer, path)
        of = json.loads(begun.read_text()) if begun.exists() else {}
        trained[stage.name] = _Trained(trainer, model, _seconds(folder), took, of)
    return list(trained.values())


def _check_same(header: Header, wanted: dict[str, Any], path: Path) -> None:
    """A run that goes on must be one of the recipe."""
    wanted = dict.fromkeys(header.course) | wanted
    if name := header.differs(wanted):
        raise CheckpointError(
            f"{path} was trained with {name} {header.course.get(name)!r}, this run has "
            f"{wanted[name]!r}; pass another --out, or delete it"
        )


def _seconds(folder: Path) -> float:
    """Of training so far."""
    path = folder / "seconds"
    return float(path.read_text()) if path.exists() else 0.0


def _score(row: Recipe, last: _Trained, seed: int, root: Path | None) -> dict[str, Any]:
    model, dataset = last.model, last.trainer.data
    if row.classified is not None:
        dataset = data.load(row.classified, root).to(last.trainer.device)
    if row.classifier is not None:
        assert row.num_labels is not None
        assert isinstance(model, models.VAE)
        error = evaluation.few_label_error(
            model, dataset, row.num_labels, row.classifier, seed=seed
        )
        return {"value": 100 * error}
    found = train.evaluate(model, dataset, row.importance_samples, last.trainer.device)
    print(found, flush=True)
    value = {"error": found.error, "nll": found.log_likelihood, "bound": found.elbo}[row.metric]
    assert value is not None
    value = 100 * value if row.metric == "error" else -value
    scores = {"value": value, "test": asdict(found)}
    if row.annealed_images:
        assert isinstance(model, models.LatentVector)
        x = dataset.some_test(row.annealed_images).to(last.trainer.device)
        generator = torch.Generator(x.device).manual_seed(seed)
        log_p = evaluation.annealed_log_likelihood(model, x, generator=generator)
        scores["annealed"] = {"images": len(x), "value": -float(log_p.double().mean())}
        print(
            f"annealed             {log_p.double().mean():9.2f} nats   ({len(x)} images)",
            flush=True,
        )
    return scores


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    names = cpus.read_text().split("model name") if cpus.exists() else []
    name = names[1].split(":", 1)[1].split("\n", 1)[0].strip() if len(names) > 1 else ""
    return name or platform.processor() or platform.machine()
