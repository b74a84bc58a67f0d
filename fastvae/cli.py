"""The command line: ``fastvae train``, ``sample``, ``evaluate`` and others."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import torch

import fastvae

from . import (
    checkpoint,
    data,
    demo,
    energies,
    evaluation,
    files,
    functional,
    models,
    pictures,
    reproduce,
    train,
)
from .checkpoint import CheckpointError, Settings
from .data import DataError
from .extras import MissingExtraError, require
from .models.posterior import Gaussian

__all__ = ["main"]

_EXIT = """\
exit codes:
  0    done
  2    something is wrong with an option, the data or a checkpoint; one sentence says what
  3    training diverged: the loss became NaN or infinite
  130  stopped by Ctrl-C; training then writes its checkpoint and says how to go on
  141  nobody reads the output any more, as behind a pipe to head
"""
_DEMO = Path("runs/demo")
_CHECKPOINT, _RESULTS, _PICTURE = "checkpoint.safetensors", "results.json", "picture.png"
# the options that are the model's, and those that are the training's
_CONFIG = (
    "latent_dim", "layers", "hidden", "activation", "posterior", "posterior_size", "prior",
    "prior_size", "objective", "num_samples", "beta", "free_bits", "inference", "refine_steps",
    "num_labels", "alpha", "prune",
)  # fmt: skip
_SETTINGS = tuple(field.name for field in fields(Settings))


class _UsageError(Exception):
    """The options do not make sense together."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence instead of the usage and a sentence."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _number(
    kind: Callable[[str], float], rule: str, valid: Callable[[float], bool]
) -> Callable[[str], float]:
    """An argparse type: a ``kind`` that is ``valid``, or the message "must be ``rule``"."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not valid(value):  # false for NaN too
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return value

    return parse


_MOST = 1_000_000  # of anything counted here; more is a slip of the finger, and ends in no memory
_count = _number(int, f"an integer from 1 to {_MOST:,}", lambda n: 1 <= n <= _MOST)
_count_or_zero = _number(int, f"an integer from 0 to {_MOST:,}", lambda n: 0 <= n <= _MOST)
_image_count = _number(int, "an integer from 1 to 10,000", lambda n: 1 <= n <= 10_000)
_width = _number(int, "an integer from 1 to 65,536", lambda n: 1 <= n <= 65_536)
_seed = _number(int, "an integer from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63)
_positive = _number(float, "a positive number", lambda x: 0 < x < math.inf)
_decay = _number(float, "a number between 0 and 1", lambda x: 0 < x < 1)


def _widths(text: str) -> list[int]:
    return [int(_width(width)) for width in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="fastvae",
        description="Train and try models made of fastvae's fused kernels.",
        epilog=_EXIT,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"fastvae {fastvae.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train_parser = commands.add_parser(
        "train",
        help="train a model, score it on the test set and draw what it has learnt",
        description="Train a model, score it on the test set and draw what it has learnt.",
        epilog=_EXIT,
        formatter_class=raw,
    )
    train_parser.set_defaults(run=_train)
    train_parser.add_argument("model", choices=list(models.MODELS), help="which model")
    default = Settings()
    add = train_parser.add_argument_group("data").add_argument
    add("--data", choices=list(data.DATASETS), help=f"default: {default.data}")
    add("--root", type=Path, help="folder of the data sets; default: $FASTVAE_DATA or the cache")
    add("--download", action="store_true", help="fetch the files first (mnist only)")
    add = train_parser.add_argument_group(
        "the model; what is not given is its own, and a resumed run keeps all"
    ).add_argument
    add("--latent-dim", type=_width, metavar="N", help="size of z, factors, or classes")
    add("--layers", type=_count, metavar="L", help="of a dlgm or sbn, each with latents of its own")
    add("--hidden", type=_widths, metavar="N,N", help="hidden widths; of a vae 200,200")
    add("--activation", choices=list(models.ACTIVATIONS), help="of a vae tanh")
    posteriors = (*models.POSTERIORS, *models.factor_analysis.POSTERIORS)
    add("--posterior", choices=list(dict.fromkeys(posteriors)), help="of z given x")
    add("--posterior-size", type=_count, metavar="K", help="its rank, components or steps")
    add("--prior", choices=["standard", *models.PRIORS], help="of z")
    add("--prior-size", type=_count, metavar="K", help="its components, pseudo-inputs or steps")
    objectives = (
        *models.OBJECTIVES,
        *models.naive_bayes.OBJECTIVES,
        *models.sigmoid_belief.OBJECTIVES,
    )
    add("--objective", choices=list(dict.fromkeys(objectives)), help="what is maximised")
    add("--num-samples", type=_count, metavar="K", help="of an objective of many samples")
    add("--beta", type=_positive, metavar="X", help="of the objectives beta and tc")
    add("--free-bits", type=_positive, metavar="X", help="nats for each dimension of z")
    add("--inference", choices=models.local.INFERENCES, help="of a local-vae; default: local")
    add(
        "--num-labels",
        type=_count,
        metavar="N",
        help="of m2 and m1m2, images known; default: 100",
    )
    add("--alpha", type=_positive, metavar="X", help="weight of m2's classifier; default: 0.1")
    add("--prune", type=_decay, metavar="X", help="classes of less q(y|x) cost m2's steps nothing")
    add("--features", type=Path, metavar="CHECKPOINT", help="of the VAE, M1, of an m1m2")
    add("--refine-steps", type=_count, metavar="K", help="of each image's own; default: 2")
    add = train_parser.add_argument_group(
        "what decides the course; a resumed run keeps it"
    ).add_argument
    add("--batch-size", type=_count, metavar="N", help=f"default: {default.batch_size}")
    add("--lr", type=_positive, help=f"Adam's first learning rate; default: {default.lr:g}")
    add("--clip-norm", type=_positive, metavar="X", help="clip gradients; default: off")
    add("--warmup", type=_count, metavar="N", help="epochs in which the KL's weight rises to 1")
    add(
        "--patience",
        type=_count,
        metavar="N",
        help="end after N epochs without a better validation score, and take the best one",
    )
    add(
        "--ema",
        type=_decay,
        metavar="X",
        help="take a moving average of the weights, of this decay a step, at a constant --lr",
    )
    add(
        "--precision",
        choices=checkpoint.PRECISIONS,
        help="of the networks in training; bfloat16 is faster where the processor has it; "
        "default: float32",
    )
    add("--seed", type=_seed, metavar="N", help=f"default: {default.seed}")
    add = train_parser.add_argument_group("how long, where, and what comes out").add_argument
    add(
        "--epochs",
        type=_count,
        metavar="N",
        help="in all; default: 100, or no limit with --minutes",
    )
    add("--minutes", type=_positive, metavar="X", help="of training in this call")
    add("--device", help="cpu or cuda; default: cuda where fastvae has kernels for it")
    add("--out", type=Path, metavar="DIR", help="default: runs/MODEL-DATA")
    add("--resume", action="store_true", help=f"go on from DIR/{_CHECKPOINT}")
    add(
        "--importance-samples",
        type=_count_or_zero,
        default=128,
        metavar="K",
        help="of the test log-likelihood; 0 leaves it out; default: 128",
    )

    sample_parser = commands.add_parser(
        "sample",
        help="draw images from a trained model",
        description="Draw images from a trained model.",
    )
    sample_parser.set_defaults(run=_sample)
    sample_parser.add_argument(
        "checkpoint", type=Path, help="a checkpoint that fastvae train wrote"
    )
    sample_parser.add_argument("-n", type=_image_count, default=100, help="default: 100")
    sample_parser.add_argument("--seed", type=_seed, default=0, help="default: 0")
    sample_parser.add_argument("--out", type=Path, metavar="PNG", default=Path("samples.png"))

    where = _Parser(add_help=False)
    where.add_argument("--root", type=Path, help="folder of the data sets")
    where.add_argument(
        "--device", help="cpu or cuda; default: cuda where fastvae has kernels for it"
    )

    evaluate_parser = commands.add_parser(
        "evaluate",
        parents=[where],
        help="what a trained model loses of log p(x), and where",
        description="What a trained model loses of log p(x), and where: its active units, the gaps "
        "of amortised inference, log p(x) by annealing, and whether the intervals of q hold.",
    )
    evaluate_parser.set_defaults(run=_evaluate)
    add = evaluate_parser.add_argument
    add("checkpoint", type=Path, help="a checkpoint that fastvae train wrote")
    add("--images", type=_count, metavar="N", default=500, help="of the test set; default: 500")
    add("--annealing-steps", type=_count, metavar="T", default=300, help="default: 300")
    add("--chains", type=_count, metavar="K", default=8, help="for each image; default: 8")
    add("--out", type=Path, metavar="DIR", help="default: the checkpoint's folder")

    reproduce_parser = commands.add_parser(
        "reproduce",
        parents=[where],
        help="run a published figure again, by its recipe",
        description="Run a published figure again, by its recipe in fastvae/recipes.toml; the same "
        "command goes on where the last one stopped. Without a name, list the rows.",
    )
    reproduce_parser.set_defaults(run=_reproduce)
    add = reproduce_parser.add_argument
    add("name", nargs="?", help="a row")
    add("--seeds", type=_count, metavar="N", default=1, help="default: 1")
    add("--epochs", type=_count, metavar="N", help="of each stage; default: the recipe's")
    add("--minutes", type=_positive, metavar="X", help="of training in this call")
    add(
        "--precision",
        choices=checkpoint.PRECISIONS,
        default="float32",
        help="of the networks in training; default: float32",
    )
    add("--out", type=Path, metavar="DIR", default=Path("runs/reproduce"))

    demo_parser = commands.add_parser(
        "demo",
        help="a short training, its picture, and its speed against eager PyTorch",
        description="A short training, its picture, and its speed against eager PyTorch, in about "
        "a minute: on binarized_mnist where the data folder has it, else on digits.",
    )
    demo_parser.set_defaults(run=_demo)
    demo_parser.add_argument("--root", type=Path, help="folder of the data sets")
    demo_parser.add_argument(
        "--minutes", type=_positive, metavar="X", default=0.6, help="of training"
    )
    demo_parser.add_argument("--out", type=Path, metavar="DIR", default=_DEMO)

    energies_parser = commands.add_parser(
        "energies",
        help="fit flows to the four densities of Rezende & Mohamed (2015), and draw them",
        description="Fit planar flows of 2, 8 and 32 steps and a spline flow to the four densities "
        "of Rezende & Mohamed (2015, table 1), and draw them beside the truth, in about 2 minutes.",
    )
    energies_parser.set_defaults(run=_energies)
    energies_parser.add_argument("--steps", type=_count, metavar="N", default=4000, help="of Adam")
    energies_parser.add_argument("--seed", type=_seed, metavar="N", default=0)
    energies_parser.add_argument("--out", type=Path, metavar="PNG", default=Path("energies.png"))

    info_parser = commands.add_parser(
        "info",
        help="versions, instruction set, threads, CUDA, and the path of every op",
        description="Versions, instruction set, threads, CUDA, and the path of every op.",
    )
    info_parser.set_defaults(run=_info)
    return parser


def _device(name: str | None) -> str:
    if name is None:
        cuda = torch.cuda.is_available() and fastvae.build_info()["cuda"]
        return "cuda" if cuda else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise _UsageError(f"--device must be cpu or cuda, got {name!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise _UsageError(f"--device {name} needs a GPU, and torch {torch.__version__} sees none")
    path = fastvae.route("reparameterize_kl", name)
    if path.startswith("none"):
        raise _UsageError(
            f"--device {name} has no kernels: {path.removeprefix('none').strip(' ()')}"
        )
    return name


def _check_same(args: argparse.Namespace, header: checkpoint.Header) -> None:
    """Options that were given must be those of the run that goes on."""
    names = ("model", *_SETTINGS, *_CONFIG)
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if name := header.differs(given):
        option = name if name == "model" else "--" + name.replace("_", "-")
        raise _UsageError(
            f"{option} {given[name]} is not the {header.course.get(name)} of the run in "
            f"{args.out}; leave it out, or start a new run with another --out"
        )


def _m1(args: argparse.Namespace) -> models.VAE | None:
    """The VAE of --features, if the model is made on one."""
    if args.features is None:
        if args.model == "m1m2" and not args.resume:
            raise _UsageError("m1m2 needs --features, the checkpoint of a vae")
        return None
    if args.model != "m1m2":
        raise _UsageError(f"--features goes with m1m2 only, got {args.model}")
    model = checkpoint.read_model(args.features)
    if type(model) is not models.VAE:
        raise _UsageError(f"--features must be a checkpoint of a vae, got {args.features}")
    return model


def _train(args: argparse.Namespace, argv: list[str]) -> int:
    for package in ("safetensors", "tqdm", "matplotlib"):  # known now, not after the training
        require(package)
    if args.out is None:
        args.out = Path("runs") / f"{args.model}-{args.data or Settings.data}"
    path = args.out / _CHECKPOINT
    header = None
    if args.resume:
        header = checkpoint.read(path).header
        _check_same(args, header)
        args.data = header.settings.data
    elif path.exists():
        raise _UsageError(f"{path} exists; pass --resume to go on with it, or another --out")
    settings = Settings(**{k: v for k in _SETTINGS if (v := getattr(args, k)) is not None})
    device = _device(args.device or (header.device if header else None))
    if args.download:
        if data.folder(settings.data) != data.folder("mnist"):
            raise _UsageError(f"--download fetches mnist only, not {settings.data}")
        print(f"mnist is in {data.download_mnist(args.root)}")
    dataset, m1 = data.load(settings.data, args.root), _m1(args)
    if header:
        trainer = train.Trainer.resume(path, dataset, device)
        model = trainer.model
        if m1 is not None and not (isinstance(model, models.M1M2) and model.is_made_on(m1)):
            raise _UsageError(
                f"--features {args.features} is not the M1 of the run in {args.out}; leave it out"
            )
    else:
        config = {k: v for k in _CONFIG if (v := getattr(args, k)) is not None}
        try:
            trainer = train.Trainer(args.model, config, dataset, settings, device, m1)
        except ValueError as error:  # of options that are not for this model
            raise _UsageError(str(error)) from error
    epochs = args.epochs or (None if args.minutes else 100)
    again = [*argv, *["--resume"] * (not args.resume)]
    return _run(trainer, args.out, epochs, args.minutes, args.importance_samples, again)


def _run(
    trainer: train.Trainer,
    out: Path,
    epochs: int | None,
    minutes: float | None,
    importance_samples: int,
    again: list[str],
) -> int:
    """Train, score and draw; ``again`` is the command line that goes on after a Ctrl-C."""
    dataset, path = trainer.data, out / _CHECKPOINT
    height, width = dataset.image_shape
    threads = torch.get_num_threads()
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{trainer.name} with {parameters:,} parameters on {dataset.name}: {len(dataset.train):,} "
        f"train, {len(dataset.valid):,} valid and {len(dataset.test):,} test images of "
        f"{height}x{width}\n"
        f"{trainer.device}, {threads} thread{'s' * (threads > 1)}, "
        f"{fastvae.route('reparameterize_kl', trainer.device.type)}"
        + (f"; going on after step {trainer.step}" if trainer.step else "")
    )
    try:
        if train.fit(trainer, path, epochs=epochs, minutes=minutes):
            _report(trainer, out, importance_samples)
            return 0
        print(f"\nstopped after step {trainer.step} (epoch {trainer.epoch + 1}), wrote {path}")
    except train.TrainingDiverged as error:
        raise train.TrainingDiverged(f"{error}; the last good checkpoint is {path}") from error
    except KeyboardInterrupt:  # while scoring, or for the second time
        print("\nstopped")
    if path.exists():
        print(f"go on with: {shlex.join(['fastvae', *again])}")
    return 130


def _report(trainer: train.Trainer, out: Path, importance_samples: int) -> None:
    """Score and draw what has been trained."""
    dataset = trainer.data
    model = train.best_model(trainer, out / _CHECKPOINT)
    written = [("picture", _PICTURE), ("results", _RESULTS), ("checkpoint", _CHECKPOINT)]
    if trainer.best is not None:
        print(f"the best of {trainer.epoch} epochs: {trainer.best_epoch}")
        written.append(("the best", train.BEST))
    evaluation = train.evaluate(model, dataset, importance_samples, trainer.device)
    print(f"\n{evaluation}\n")
    epochs = trainer.epoch if trainer.best is None else trainer.best_epoch
    title = f"{trainer.name} on {dataset.name} after {epochs} epochs: "
    title += f"test ELBO {evaluation.elbo:.2f} nats"
    train.picture(out / _PICTURE, model, dataset, title, trainer.device)
    train.save_results(out / _RESULTS, trainer, evaluation)
    for label, name in written:
        print(f"{label:<11} {out / name}")


def _sample(args: argparse.Namespace, argv: list[str]) -> int:
    stored = checkpoint.read(args.checkpoint)
    model = stored.build_model().eval()
    generator = torch.Generator().manual_seed(args.seed)
    header, images = stored.header, model.sample(args.n, generator=generator)
    title = f"{args.n} samples of {header.model} on {header.settings.data}"
    columns = math.ceil(math.sqrt(args.n * header.image_shape[0] / header.image_shape[1]))
    pictures.save(args.out, title, [(f"seed {args.seed}", images)], header.image_shape, columns)
    print(args.out)
    return 0


def _evaluate(args: argparse.Namespace, argv: list[str]) -> int:
    require("matplotlib")
    stored = checkpoint.read(args.checkpoint)
    header, device = stored.header, _device(args.device)
    model = stored.build_model().eval().requires_grad_(False).to(device)
    if not isinstance(model, models.LatentVector):
        raise _UsageError(f"evaluate takes models whose z is a vector, not {header.model}")
    dataset = data.load(header.settings.data, args.root).to(device)
    x, generator = dataset.some_test(args.images), torch.Generator(device).manual_seed(0)
    out = args.out or args.checkpoint.parent
    out.mkdir(parents=True, exist_ok=True)  # a bad one is better known now
    steps, chains = args.annealing_steps, args.chains

    means = evaluation.posterior_means(model, dataset.test)
    active = evaluation.active_units(means)
    print(f"active units         {int(active.sum()):6d} of {len(active)}", flush=True)
    results: dict[str, object] = {
        "checkpoint": str(args.checkpoint),
        "epoch": header.epoch,
        "images": len(x),
        "annealing_steps": steps,
        "chains": chains,
        "active_units": int(active.sum()),
    }
    if isinstance(model.posterior(x[:1]), Gaussian):
        gaps = evaluation.inference_gaps(model, x, generator=generator)
        print(f"{gaps}, of {len(x)} images", flush=True)
        results["gaps"] = gaps._asdict()
    log_px = evaluation.annealed_log_likelihood(model, x, steps, chains, generator=generator)
    results["annealed"] = float(log_px.double().mean())
    print(f"annealed             {log_px.double().mean():9.2f} nats", flush=True)
    bracket = evaluation.bidirectional(model, len(x), steps, chains, generator=generator)
    results["bidirectional"] = bracket._asdict()
    print(
        f"of its own images    {bracket.lower:9.2f} nats   enclosed to "
        f"{bracket.upper - bracket.lower:.2f}"
    )
    held = evaluation.calibration(model, generator=generator)
    results["calibration"] = held
    for level, share in held.items():
        print(f"{100 * level:.0f} % intervals       {100 * share:9.1f} % hold the z of an image")
    panels = [("one dimension of z a row", evaluation.traversals(model, means))]
    path = out / "traversals.png"
    title = f"{header.model} on {header.settings.data}"
    pictures.save(path, title, panels, header.image_shape, columns=10)
    files.write_atomically(out / "evaluation.json", (json.dumps(results, indent=2) + "\n").encode())
    print(f"\npicture     {path}\nresults     {out / 'evaluation.json'}")
    return 0


def _reproduce(args: argparse.Namespace, argv: list[str]) -> int:
    if args.name is None:
        for name, row in reproduce.recipes().items():
            figure = f"{row.published:g}{' (from memory)' * row.from_memory}"
            print(f"{name:<12} {reproduce.METRICS[row.metric]:<16} {figure:<22} {row.title}")
        return 0
    for package in ("safetensors", "tqdm", "sklearn"):
        require(package)
    try:
        row = reproduce.recipe(args.name)
    except ValueError as error:
        raise _UsageError(str(error)) from error
    record = reproduce.run(
        row,
        args.out,
        seeds=args.seeds,
        minutes=args.minutes,
        epochs=args.epochs,
        root=args.root,
        device=_device(args.device),
        precision=args.precision,
    )
    if record is None:
        print(f"\nstopped; go on with: {shlex.join(['fastvae', *argv])}")
        return 130
    spread = record["ours_deviation"]
    print(
        f"\n{row.title} ({row.paper})\n{reproduce.METRICS[row.metric]}: published "
        f"{row.published:g}{' (from memory)' * row.from_memory}, here {record['ours']:.2f}"
        + (f" ({spread:.2f} over {len(record['seeds'])} seeds)" if spread is not None else "")
        + f"\nrecord      {args.out / f'record-{row.name}.json'}"
    )
    return 0


def _demo(args: argparse.Namespace, argv: list[str]) -> int:
    for package in ("safetensors", "tqdm", "matplotlib"):
        require(package)
    path = args.out / _CHECKPOINT
    if path.exists() and args.out != _DEMO:
        raise _UsageError(f"{path} exists; pass another --out")
    there = data.folder("binarized_mnist", args.root).is_dir()
    dataset = data.load("binarized_mnist" if there else "digits", args.root)
    trainer = train.Trainer("vae", {}, dataset, Settings(data=dataset.name))
    epochs = None if there else 300
    again = ["train", trainer.name, "--out", str(args.out), "--data", dataset.name, "--resume"]
    again += ["--root", str(args.root)] if args.root else []
    again += ["--minutes", f"{args.minutes:g}"] if epochs is None else ["--epochs", str(epochs)]
    code = _run(trainer, args.out, epochs, args.minutes, 32, again)
    if code:
        return code
    x = dataset.batch(torch.arange(trainer.settings.batch_size))
    assert isinstance(trainer.model, models.VAE)
    print("\nspeed against eager PyTorch (medians; in brackets the quartiles of the ratio)")
    print(demo.compare_training_step(trainer.model, x))
    print(demo.compare_elbo_terms(trainer.model, x))
    return 0


def _energies(args: argparse.Namespace, argv: list[str]) -> int:
    require("matplotlib")
    if args.out.is_dir():
        raise _UsageError(f"--out must be a file, got the folder {args.out}")
    args.out.parent.mkdir(parents=True, exist_ok=True)  # a bad one is better known now
    names = list(energies.FLOWS)
    print("KL(q || p) in nats   " + "".join(f"{name:>16}" for name in names))
    rows = []
    for name in energies.ENERGIES:
        fits = [
            energies.fit(name, make, args.steps, seeds=(args.seed, args.seed + 1))
            for make in energies.FLOWS.values()
        ]
        print(f"{name:<21}" + "".join(f"{one.divergence:16.3f}" for one in fits), flush=True)
        rows.append(energies.images(name, [one.flow for one in fits]))
    columns = torch.stack(rows, 1)
    panels = list(zip(["truth", *names], columns, strict=True))
    side = math.isqrt(columns.shape[-1])
    pictures.save(args.out, "U1 to U4, and flows fitted to them", panels, (side, side), columns=1)
    print(args.out)
    return 0


def _info(args: argparse.Namespace, argv: list[str]) -> int:
    info = fastvae.build_info()
    torch_built = f" (built with {info['torch_built']})" if info["torch_built"] else ""
    root = data.data_root()
    found = [name for name in data.DATASETS if name == "digits" or data.folder(name).is_dir()]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU in sight"
    rows = [
        ("fastvae", f"{info['version']}, {'compiled' if info['compiled'] else 'not compiled'}"),
        ("torch", f"{info['torch']}{torch_built}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("cpu level", str(info["isa"])),
        ("threads", str(info["threads"])),
        ("cuda", f"{'kernels built' if info['cuda'] else 'no kernels built'}, {gpu}"),
        ("data", f"{root} ({', '.join(found)})"),
    ]
    if info["reason"]:
        rows.append(("reason", str(info["reason"])))
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for op in functional.route.OPS:
        paths = (f"{device}: {fastvae.route(op, device)}" for device in devices)
        rows.append((op, ", ".join(paths).replace(f" ({info['reason']})", "")))  # said above
    print("\n".join(f"{name:<20} {value}" for name, value in rows))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code that ``fastvae --help`` explains.

    >>> main(["train", "vae", "--epochs", "20"])  # doctest: +SKIP
    0
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args, argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\nfastvae: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `fastvae info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 0 if args.command == "info" else 128 + signal.SIGPIPE
    except train.TrainingDiverged as error:
        print(f"fastvae: {error}", file=sys.stderr)
        return 3
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not (
            isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        ):
            raise
        print(
            "fastvae: there is not memory enough; take fewer samples or chains, smaller batches "
            "or a smaller model",
            file=sys.stderr,
        )
    except (_UsageError, DataError, CheckpointError, MissingExtraError) as error:
        print(f"fastvae: {error}", file=sys.stderr)
    except OSError as error:  # a folder that is a file, a full disk
        name = error.filename2 or error.filename  # of a move, where to
        place = f"{name}: " if name else ""
        print(f"fastvae: {place}{error.strerror or error}; pass another --out", file=sys.stderr)
    return 2
