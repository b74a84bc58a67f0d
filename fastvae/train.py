"""The training loop: Adam on minibatches of the ELBO, stoppable at any step and resumable from it.

A run is a function of its :class:`Settings` and the model's config. All randomness (the order of
the images, dynamic binarization, the noise of z) comes from one generator, whose state is in the
checkpoint: a run that was stopped and resumed takes, on the same CPU and number of threads,
bitwise the same course as one that was not. Evaluation draws from a generator of its own and
disturbs nothing.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Generator, Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

import fastvae

from . import checkpoint, files, models, pictures
from .checkpoint import CheckpointError, Header, Settings
from .data import Dataset
from .extras import require

__all__ = [
    "Evaluation",
    "Trainer",
    "TrainingDiverged",
    "best_model",
    "evaluate",
    "fit",
    "picture",
    "save_results",
]

BEST = "best.safetensors"  # beside a checkpoint: the one of the best epoch
_EVALUATION_SEED = 20140416
_CHECKPOINT_SECONDS = 30.0


class TrainingDiverged(Exception):  # noqa: N818, it says what happened
    """The loss is NaN or infinite; the message names the step and what to try."""


def learning_rate(settings: Settings, epoch: int) -> float:
    """``lr / sqrt(1 + epoch / 10)``; with a moving average of the weights ``lr``.

    The two are there for the same: that the noise of the steps goes down. It depends on nothing
    but the epoch, so that a run may be prolonged, by epochs or by minutes, without having known
    its length.
    """
    return settings.lr if settings.ema else settings.lr / math.sqrt(1 + epoch / 10)


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type != "cpu":
        return True
    onednn = torch.backends.mkldnn.is_available()
    return onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Trainer:
    """A model in training: everything that changes from step to step, and how to store it.

    Attributes:
        model: the one that steps are taken with.
        average: with ``settings.ema`` its moving average, else the same.
        step: steps done.
        epoch: epochs done.
        batch: steps done of the epoch in progress.
        best: the highest score of :meth:`validate`, after ``best_epoch`` epochs; None without one.

    ``m1`` is what an M1+M2 is made on: its config and its weights.

    >>> data = fastvae.data.load("digits")
    >>> settings = fastvae.train.Settings(lr=3e-3)
    >>> config = {"latent_dim": 8, "hidden": [64]}
    >>> trainer = fastvae.train.Trainer("vae", config, data, settings)
    >>> for _ in range(3):
    ...     elbo, recon, kl = trainer.train_step()
    """

    def __init__(
        self,
        model: str,
        config: dict[str, Any],
        data: Dataset,
        settings: Settings,
        device: torch.device | str = "cpu",
        m1: models.VAE | None = None,
    ) -> None:
        self.name, self.settings = model, settings
        self.device = torch.device(device)
        if settings.precision == "bfloat16" and not _multiplies_bfloat16(self.device):
            warnings.warn(
                "this CPU multiplies bfloat16 matrices in software, some 60 times slower than "
                "float32",
                stacklevel=2,
            )
        self.data = data.to(self.device)
        with torch.random.fork_rng(devices=[]):  # initialize on the CPU: the same on every device
            torch.manual_seed(settings.seed)
            of_data = {
                "data_dim": data.train.shape[1],
                "likelihood": data.likelihood,
                "dataset_size": len(data.train),
            }
            wanted = models.MODELS[model].of_data if model in models.MODELS else ()
            own = {name: of_data[name] for name in wanted}
            base = {} if m1 is None else {"base": m1.config}
            self.model = models.build(model, {**own, **config, **base}).to(self.device)
            if m1 is not None:
                assert isinstance(self.model, models.M1M2)
                self.model.base.load_state_dict(m1.state_dict())
        if settings.warmup and not self.model.weighs_kl:
            raise ValueError(
                f"warmup must be 0 of a {model} whose objective has no KL to weigh, got "
                f"{settings.warmup}"
            )
        self.generator = Generator(self.device).manual_seed(settings.seed)
        self.model.prepare(self.data, self.generator)
        self.average = copy.deepcopy(self.model) if settings.ema else self.model
        self.optimizer = torch.optim.Adam(self._learnt().values(), lr=settings.lr, fused=True)
        self.step = self.epoch = self.batch = self.best_epoch = 0
        self.best: float | None = None
        self.order = torch.empty(0, dtype=torch.int64)
        self._ready = False  # to take steps: the model's weights may still change

    def begin_with(self, model: models.Model) -> None:
        """Take the weights of another before the first step; what it lacks, as a flow, stays.

        Raises:
            ValueError: if there have been steps, or the other is of another kind, activation or
                size, or has what this one lacks.
        """
        if self.step:
            raise ValueError(f"begin_with: step must be 0, got {self.step}")
        own, weights = self.model.state_dict(), model.state_dict()
        wrong = [n for n, w in weights.items() if n not in own or own[n].shape != w.shape]
        wrong += [
            n
            for n in ("activation", "likelihood")
            if self.model.config.get(n) != model.config.get(n)
        ]
        if wrong or type(model) is not type(self.model):
            other = f" with other {', '.join(wrong)}" if wrong else ""
            raise ValueError(
                f"begin_with: model must be a part of this {self.name}, got a "
                f"{type(model).__name__}{other}"
            )
        for one in (self.model, self.average):
            one.load_state_dict(own | weights)

    def _learnt(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def batches(self) -> int:
        """Steps per epoch."""
        return math.ceil(len(self.data.train) / self.settings.batch_size)

    def train_step(self) -> tuple[float, float, float]:
        """One step of Adam; returns the means of the minibatch's objective and of its terms.

        The terms are those of the ELBO, whatever the objective.

        Raises:
            TrainingDiverged: if the loss is NaN or infinite; the weights are as before the step.
        """
        if not self._ready:
            self.model.before_steps(self.data)
            self._ready = True
        if not self.model.training:  # but evaluated since
            self.model.train()
        if self.batch == 0:
            self.order = torch.randperm(
                len(self.data.train), generator=self.generator, device=self.device
            )
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.settings, self.epoch)
        start = self.batch * self.settings.batch_size
        rows = self.order[start : start + self.settings.batch_size]
        images = functools.partial(self.data.batch, generator=self.generator)
        batch = models.Batch(images(rows), rows, images)
        warm = self.settings.warmup
        kl_weight = min(1.0, (self.step + 1) / (warm * self.batches)) if warm else 1.0
        self.optimizer.zero_grad()
        half = self.settings.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            bound = self.model.objective(batch, kl_weight=kl_weight, generator=self.generator)
        terms = torch.stack([t.mean() for t in bound])
        elbo, recon, kl = terms.tolist()  # the one time a step waits for the device
        if not math.isfinite(elbo):
            raise self._diverged(
                self.step + 1,
                f"the ELBO is {elbo}, of a reconstruction of {recon:.4g} and a KL of {kl:.4g} nats",
            )
        torch.autograd.backward(-terms[0])
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        if self.settings.ema:
            self._move_average()
        self.step += 1
        self.batch += 1
        if self.batch == self.batches:
            self.batch, self.epoch = 0, self.epoch + 1
        return elbo, recon, kl

    @torch.no_grad()
    def _move_average(self) -> None:
        """``average = d_n average + (1 - d_n) weights`` after n steps before.

        d_n is n / (9 + n), at most ``ema``: so that the first weights are soon forgotten.
        """
        decay = min(self.settings.ema, self.step / (9 + self.step))
        average, weights = (list(one.parameters()) for one in (self.average, self.model))
        get_ema_multi_avg_fn(decay)(average, weights, self.step)  # type: ignore[arg-type]
        for mine, given in zip(self.average.buffers(), self.model.buffers(), strict=True):
            mine.copy_(given)

    def validate(self) -> bool:
        """Score the model on the validation images; returns whether it never did better.

        The score is the ELBO, or, where training has several samples, log p(x) by as many, with
        noise of a fixed seed: the bound that is maximised, but for the weights of its terms.
        """
        num_samples = self.model.config.get("num_samples") or 1
        if num_samples == 1:
            score, _, _ = _mean_elbo(self.average, self.data.valid)
        else:
            score = _mean_log_likelihood(self.average, self.data.valid, num_samples, quiet=True)
        if not score > (-math.inf if self.best is None else self.best):  # as no NaN is
            return False
        self.best, self.best_epoch = score, self.epoch
        return True

    @property
    def exhausted(self) -> bool:
        """Whether ``patience`` epochs have passed since the best one."""
        patience = self.settings.patience
        return patience > 0 and self.epoch - self.best_epoch >= patience

    def _diverged(self, step: int, what: str) -> TrainingDiverged:
        epoch = math.ceil(step / self.batches)
        return TrainingDiverged(
            f"training diverged at step {step} (epoch {epoch}): {what}; lower "
            f"--lr (now {self.settings.lr:g}), pass --clip-norm 10, and see whether log_var of the "
            "encoder or the decoder runs away"
        )

    @property
    def header(self) -> Header:
        """What a checkpoint says of the run, as far as it has come."""
        return Header(
            model=self.name,
            config=self.model.config,
            image_shape=self.data.image_shape,
            settings=self.settings,
            device=self.device.type,
            step=self.step,
            batch=self.batch,
            epoch=self.epoch,
            best=self.best,
            best_epoch=self.best_epoch,
        )

    def save(self, path: Path) -> None:
        """Write a checkpoint.

        Raises:
            TrainingDiverged: if a weight is NaN or infinite; nothing is written.
            OSError: if it cannot be written.
        """
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):  # a finite loss may have an infinite slope
                raise self._diverged(self.step, f"weights of {name} are not finite")
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.settings.ema:
            average = self.average.state_dict()
            tensors |= {f"average.{name}": value for name, value in average.items()}
        for name, parameter in self._learnt().items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        tensors |= {"generator": self.generator.get_state(), "order": self.order}
        checkpoint.write(path, self.header, tensors)

    @classmethod
    def resume(cls, path: Path, data: Dataset, device: torch.device | str = "cpu") -> Trainer:
        """The trainer that wrote the checkpoint, ready for the next step.

        Raises:
            CheckpointError: if the checkpoint cannot be read, or was written for other data or
                on another kind of device.
        """
        stored = checkpoint.read(path)
        header, device = stored.header, torch.device(device)
        if header.settings.data != data.name:
            raise CheckpointError(
                f"{path} was trained on {header.settings.data}, not on {data.name}; "
                f"pass --data {header.settings.data}, or another --out"
            )
        if header.device != device.type:
            raise CheckpointError(
                f"{path} was written on {header.device}, whose random numbers {device.type} cannot "
                f"continue; pass --device {header.device}"
            )
        stored.build_model()  # fails with a clear message where header and weights do not fit
        try:
            trainer = cls(header.model, header.config, data, header.settings, device)
            trainer._restore(stored)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise CheckpointError(
                f"{path} lacks what it takes to go on ({error}); use an older copy, or train again"
            ) from error
        return trainer

    def _restore(self, stored: checkpoint.Checkpoint) -> None:
        header = stored.header
        self.model.load_state_dict(stored.part("model"))
        if self.settings.ema:
            self.average.load_state_dict(stored.part("average"))
        optimizer = stored.part("optimizer")
        state = {
            i: {key: optimizer[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for i, (name, _) in enumerate(self._learnt().items() if header.step else ())
        }
        self.optimizer.load_state_dict(
            {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )
        for group in self.optimizer.param_groups:  # of an epoch that began before the checkpoint
            group["lr"] = learning_rate(self.settings, header.epoch)
        self.generator.set_state(stored.tensors["generator"])
        self.order = stored.tensors["order"].to(self.device)
        self.step, self.batch, self.epoch = header.step, header.batch, header.epoch
        self.best, self.best_epoch = header.best, header.best_epoch
        if self.batch and len(self.order) != len(self.data.train):
            raise ValueError(f"it shuffles {len(self.order)} images, not {len(self.data.train)}")


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into an answer, so that a step is never cut; the second one kills."""
    pressed = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, previous)

    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set  # Python delivers signals to the main thread only
        return
    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def fit(
    trainer: Trainer, path: Path, *, epochs: int | None = None, minutes: float | None = None
) -> bool:
    """Train until ``epochs`` are done in all, or ``minutes`` have passed in this call.

    Or, if the settings have ``patience``, until so many epochs were no better than the best: that
    one's checkpoint is beside ``path``, for :func:`best_model`.

    Shows a progress bar on a terminal, prints a line after epochs 1, 2, 5, 10, 20, 50 and so on,
    and writes a checkpoint to ``path`` at the start, after epochs at most twice a minute, at the
    end, and on Ctrl-C.

    Returns:
        False if Ctrl-C stopped it: after the step in progress, with the checkpoint written.

    Raises:
        TrainingDiverged: if the loss is NaN or infinite; the last checkpoint stays as it was.
        CheckpointError: if there was a best epoch, and its checkpoint cannot be read.
        OSError: if a checkpoint cannot be written.
    """
    if epochs is None and minutes is None:
        raise ValueError("fit: epochs or minutes must be given, got neither")
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    last_epoch = math.inf if epochs is None else epochs
    size = len(trainer.data.train)
    elbo_sum, kl_sum, seen, saved = 0.0, 0.0, 0, time.monotonic()
    bar_format = "{l_bar}{bar:20}| {rate_fmt}, {remaining} left{postfix}"
    if minutes is not None:  # then the end of the bar is not known
        bar_format = f"{{desc}}{{rate_fmt}}, {{elapsed}} of {minutes:g} min{{postfix}}"
    if trainer.best is not None:
        checkpoint.read(path.with_name(BEST))  # what is missing is better known now,
    trainer.save(path)  # and so is a bad folder, than after an hour
    bar = require("tqdm").tqdm(
        total=None if epochs is None else epochs * size,
        initial=trainer.epoch * size + trainer.batch * trainer.settings.batch_size,
        unit=" examples",
        unit_scale=True,
        disable=None,  # where the output is no terminal
        dynamic_ncols=True,
        bar_format=bar_format,
        leave=False,
    )
    with bar, _interruptible() as interrupted:
        while (
            trainer.epoch < last_epoch
            and time.monotonic() < deadline
            and not (trainer.exhausted or interrupted())
        ):
            batch_size = trainer.settings.batch_size
            count = min(batch_size, size - trainer.batch * batch_size)  # the last batch is smaller
            _, recon, kl = trainer.train_step()
            elbo_sum += count * (recon - kl)  # as of the validation images, whatever is maximised
            kl_sum, seen = kl_sum + count * kl, seen + count
            means = f"ELBO {elbo_sum / seen:.2f}, KL {kl_sum / seen:.2f}"
            bar.set_description(f"epoch {trainer.epoch + (trainer.batch > 0)}", refresh=False)
            bar.set_postfix_str(means, refresh=False)
            bar.update(count)
            if trainer.batch:
                continue
            if str(trainer.epoch).rstrip("0") in ("1", "2", "5") or trainer.epoch == last_epoch:
                valid, _, _ = _mean_elbo(trainer.average, trainer.data.valid)
                bar.write(
                    f"epoch {trainer.epoch:5d}   train ELBO {elbo_sum / seen:9.2f}   "
                    f"KL {kl_sum / seen:6.2f}   valid ELBO {valid:9.2f}"
                )
            elbo_sum, kl_sum, seen = 0.0, 0.0, 0
            better = trainer.settings.patience > 0 and trainer.validate()
            if better:
                trainer.save(path.with_name(BEST))
            # With a new best one at once: a run that is killed must not know of another.
            if better or time.monotonic() - saved > _CHECKPOINT_SECONDS:
                trainer.save(path)
                saved = time.monotonic()
        trainer.save(path)
        return not interrupted()


def best_model(trainer: Trainer, path: Path) -> models.Model:
    """What is to be scored of a run with its checkpoint at ``path``, in eval mode.

    The model of the best epoch where the settings have ``patience``, else as training left it;
    its moving average where they have ``ema``.

    Raises:
        CheckpointError: if the best one cannot be read, or is another run's or epoch's.
    """
    if trainer.best is None:
        return trainer.average.eval()
    best = checkpoint.read(path.with_name(BEST))
    header = best.header
    if header.epoch != trainer.best_epoch or header.course != trainer.header.course:
        raise CheckpointError(
            f"{best.path} is of epoch {header.epoch} of a run, and the best one of the run in "
            f"{path} is {trainer.best_epoch}; train on, or train again"
        )
    return best.build_model().eval().to(trainer.device)


@dataclass(frozen=True)
class Evaluation:
    """How a model does on the test set, in nats per image.

    Attributes:
        elbo, recon, kl: the means over the test set.
        log_likelihood: the mean importance-sampled log p(x), or None if not asked for.
        num_samples: K of ``log_likelihood``; 0 if it is exact.
        images: the number of test images.
        error: the share of them that is taken for another class, or None without classes.
    """

    elbo: float
    recon: float
    kl: float
    log_likelihood: float | None
    num_samples: int
    images: int
    error: float | None = None

    def __str__(self) -> str:
        lines = [
            f"test ELBO            {self.elbo:9.2f} nats   "
            f"(reconstruction {self.recon:.2f}, KL {self.kl:.2f})"
        ]
        if self.log_likelihood is not None:
            how = f"importance-sampled, K = {self.num_samples}" if self.num_samples else "exact"
            lines.append(
                f"test log-likelihood  {self.log_likelihood:9.2f} nats   "
                f"({how}, all {self.images} images)"
            )
        if self.error is not None:
            lines.append(f"test error           {100 * self.error:9.2f} %")
        return "\n".join(lines)


@torch.no_grad()
def _mean_elbo(model: models.Model, x: Tensor) -> tuple[float, float, float]:
    generator = Generator(x.device).manual_seed(_EVALUATION_SEED)
    sums = torch.zeros(3, dtype=torch.float64, device=x.device)
    for part in torch.split(x, 500):
        terms = model.elbo(part.float(), generator=generator)
        sums += torch.stack([term.double().sum() for term in terms])
    elbo, recon, kl = (sums / len(x)).tolist()
    return elbo, recon, kl


def evaluate(
    model: models.Model, data: Dataset, num_samples: int = 128, device: torch.device | str = "cpu"
) -> Evaluation:
    """Score a model on the whole test set, with noise of a fixed seed.

    Args:
        num_samples: K of the importance-sampled log-likelihood; 0 leaves it out.

    >>> print(fastvae.train.evaluate(trainer.model, data))  # doctest: +SKIP
    test ELBO               -19.94 nats   (reconstruction -11.27, KL 8.67)
    test log-likelihood     -18.89 nats   (importance-sampled, K = 128, all 200 images)
    """
    test = data.test.to(device)
    elbo, recon, kl = _mean_elbo(model, test)
    log_likelihood = None
    if num_samples:
        log_likelihood = _mean_log_likelihood(model, test, num_samples)
    samples = 0 if model.exact else num_samples
    error = None if data.labels is None else _error(model, test, data.labels[2].to(device))
    return Evaluation(elbo, recon, kl, log_likelihood, samples, len(test), error)


def _mean_log_likelihood(
    model: models.Model, x: Tensor, num_samples: int, quiet: bool = False
) -> float:
    generator = Generator(x.device).manual_seed(_EVALUATION_SEED)
    parts = torch.split(x, 1600 // min(num_samples, 16))
    hide = True if quiet else None  # None: where the output is no terminal
    bar = require("tqdm").tqdm(parts, desc="log-likelihood", disable=hide, leave=False)
    log_p = [model.log_likelihood(part.float(), num_samples, generator=generator) for part in bar]
    return float(torch.cat(log_p).double().mean())


@torch.no_grad()
def _error(model: models.Model, x: Tensor, y: Tensor) -> float | None:
    logits = [model.classify(part.float()) for part in x.split(1000)]
    found = [one.argmax(-1) for one in logits if one is not None]
    return float((torch.cat(found) != y).double().mean()) if found else None


def picture(
    path: Path,
    model: models.Model,
    data: Dataset,
    title: str,
    device: torch.device | str = "cpu",
) -> None:
    """Test images, what the model makes of them, and images it makes up, as one PNG."""
    columns = 10
    n = columns * (columns * data.image_shape[1] // data.image_shape[0])  # nearly a square
    test = data.some_test(n).to(device)
    generator = Generator(device).manual_seed(_EVALUATION_SEED)
    panels = [
        ("test images" + ", binarized" * (data.noise == "bernoulli"), test),
        *model.panels(test, generator),
    ]
    pictures.save(path, title, panels, data.image_shape, columns)


def save_results(path: Path, trainer: Trainer, evaluation: Evaluation) -> None:
    """Write the scores, and what they were reached with, as JSON."""
    info = fastvae.build_info()
    results = {
        "fastvae": info["version"],
        "torch": info["torch"],
        "model": trainer.name,
        "config": trainer.model.config,
        "settings": asdict(trainer.settings),
        "epoch": trainer.epoch,
        "best_epoch": trainer.best_epoch or None,
        "step": trainer.step,
        "test": asdict(evaluation),
    }
    files.write_atomically(path, (json.dumps(results, indent=2) + "\n").encode())
