"""The command line, and the loop over cases, dtypes, sizes and modes."""

from __future__ import annotations

import argparse
import datetime
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import CASES, COMPOSITIONS, Case, Shape

import fastvae

from .measure import (
    Clock,
    CpuClock,
    CudaClock,
    bytes_min,
    captured,
    copy_limit,
    interleave,
    last_level_cache,
    peak_bytes,
)
from .predict import H200, predict, table
from .providers import PROVIDERS, Call, WrongAnswerError, as_tuple, build, check, timed_call
from .report import Problem, Record, write
from .steps import compare_steps

__all__ = ["Job", "Setting", "main", "measure_job"]

ROOT = Path(__file__).resolve().parent.parent
TINY: Shape = (4, 8)  # rows and columns, where the cost of a call is all there is
MOST_BYTES = 4e9  # what is written by hand may fill with one tensor
DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Setting:
    """What all records of a run share."""

    device: str
    threads: int
    clock: Clock
    rounds: int
    cache: int
    git: str
    providers: tuple[str, ...] = PROVIDERS


@dataclass(frozen=True, eq=False)
class Job:
    """One line of the table."""

    case: Case
    shape: Shape  # the case's sizes
    dtype: torch.dtype
    mode: str  # "forward" or "full"

    @property
    def tiny(self) -> bool:
        return self.shape == self.case.sizes(TINY)

    @property
    def name(self) -> str:
        shape = TINY if self.tiny else self.shape
        return " ".join(filter(None, ("x".join(map(str, shape)), self.case.variant)))

    @property
    def title(self) -> str:
        return f"{self.case.op} {self.name} {str(self.dtype).removeprefix('torch.')} {self.mode}"

    def problem(self, provider: str, why: str, suffix: str = "") -> Problem:
        return Problem(self.title + suffix, provider, why)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, WrongAnswerError):
        return f"wrong: {lines[0]}"
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def measure_job(job: Job, setting: Setting) -> tuple[list[Record], list[Problem]]:
    """Checks every provider, then times those that are right."""
    case, device = job.case, setting.device
    inputs = case.draw_sizes(job.shape, job.dtype, device=device)
    if job.mode == "full" or job.tiny:  # a tiny forward is timed as a training step has it
        for tensor, spec in zip(inputs, case.inputs, strict=True):
            tensor.requires_grad_(not spec.data)
    moved = bytes_min(case, job.shape, job.dtype, job.mode)
    wanted = ("fastvae", "eager") if job.tiny else setting.providers
    functions = build(case, device, tuple(p for p in wanted if p in setting.providers))

    problems: list[Problem] = []
    calls: dict[str, Call] = {}
    graphs: dict[str, Call] = {}
    errors: dict[str, float] = {"limit": 0.0}
    peaks: dict[str, int] = {"limit": 0}

    by_hand = case.eager_bytes(job.shape) * job.dtype.itemsize // 4
    for provider, function in functions.items():
        compiled = provider.startswith("compile")
        may_fit = provider == "fastvae" or (compiled and device == "cuda")
        if by_hand > MOST_BYTES and not may_fit:
            problems.append(job.problem(provider, f"skipped: one tensor of {by_hand / 1e9:.1f} GB"))
            continue
        if compiled and case.unrolls(job.shape):
            problems.append(
                job.problem(provider, "skipped: it unrolls all steps, and takes minutes")
            )
            continue
        try:
            grads = None
            if job.mode == "full":
                g = torch.Generator().manual_seed(1)
                grads = [
                    torch.randn(o.shape, generator=g, dtype=torch.float64).to(device, o.dtype)
                    for o in as_tuple(function(*inputs))
                ]
            errors[provider] = check(case, provider, function, inputs, grads)
            call = timed_call(function, inputs, grads)
            call()
            peaks[provider] = peak_bytes(call, [*inputs, *(grads or [])])
            calls[provider] = call
        except Exception as error:  # whatever ails one provider, the others are still timed
            problems.append(job.problem(provider, _one_line(error)))
            continue
        if device == "cuda" and not job.tiny and provider != "compile-max-autotune":
            try:  # max-autotune is a graph already
                graphs[provider] = captured(call)
            except Exception as error:
                problems.append(job.problem(provider, _one_line(error), " graph"))

    scale = 1.0
    if "limit" in setting.providers and not job.tiny:
        copy, scale = copy_limit(moved, device, setting.cache)
        calls["limit"] = copy
        if graphs:
            graphs["limit"] = captured(copy)

    records = []
    for name, group in ((job.name, calls), (f"{job.name} graph", graphs)):
        if not group:
            continue
        for provider, spread in interleave(group, setting.clock, setting.rounds).items():
            p20, median, p80 = spread.scaled(scale) if provider == "limit" else spread
            records.append(
                Record(
                    op=case.op,
                    case=name,
                    device=device,
                    dtype=str(job.dtype).removeprefix("torch."),
                    mode=job.mode,
                    provider=provider,
                    median_s=median,
                    p20_s=p20,
                    p80_s=p80,
                    peak_bytes=peaks[provider],
                    max_abs_err=errors[provider],
                    bytes_min=moved,
                    torch=torch.__version__,
                    threads=setting.threads,
                    git=setting.git,
                )
            )
    return records, problems


def jobs(
    ops: Sequence[str], dtypes: Sequence[str], quick: bool, device: str = "cpu"
) -> Iterator[Job]:
    for case in (c for c in (*CASES, *COMPOSITIONS) if c.op in ops and c.bench):
        for dtype in (getattr(torch, d) for d in dtypes):
            on_device = device == "cuda" and case.device_bench
            sizes = sorted(on_device or case.bench, key=math.prod)
            if quick:
                sizes = [[s for s in sizes if math.prod(s) <= 2**17 or s == sizes[0]][-1]]
            for shape in sizes:
                yield Job(case, shape, dtype, "forward")
                yield Job(case, shape, dtype, "full")
            yield Job(case, case.sizes(TINY), dtype, "forward")


def _git() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):  # a tree without .git
        return "unknown"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    ops = list(dict.fromkeys(c.op for c in (*CASES, *COMPOSITIONS)))
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    some: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--op", default=ops, help=f"default all: {', '.join(ops)}", **some)
    parser.add_argument(
        "--steps", action="store_true", help="whole training steps of a VAE with a flow, instead"
    )
    parser.add_argument(
        "--predict",
        action="store_true",
        help=f"what a {H200.name} would take at its limits, instead; needs no GPU",
    )
    parser.add_argument("--quick", action="store_true", help="one small size, few rounds")
    parser.add_argument("--out", type=Path, help="default bench/results/<date>-<device>")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default=["float32"], help=", ".join(DTYPES), **some)
    parser.add_argument("--provider", default=PROVIDERS, help=", ".join(PROVIDERS), **some)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args(argv)
    for option, known in (("op", ops), ("dtype", DTYPES), ("provider", PROVIDERS)):
        for name in getattr(args, option):
            if name not in known:
                message = f"--{option} must be of {', '.join(known)}, got {name}"
                print(f"bench: {message}", file=sys.stderr)
                sys.exit(2)
    if args.predict:
        return args
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench: --device cuda needs a GPU, and torch sees none", file=sys.stderr)
        sys.exit(2)
    if (path := fastvae.route(CASES[0].op, args.device)) != f"{args.device} kernel":
        print(f"bench: there is no kernel to time, but {path}", file=sys.stderr)
        sys.exit(2)
    return args


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    if args.predict:
        todo = jobs(args.op, args.dtype, args.quick, "cuda")
        print(
            table(
                predict(j.case, j.shape, j.dtype, j.mode)
                for j in todo
                if not j.tiny and j.case in CASES
            )
        )
        return 0
    signal.signal(signal.SIGTERM, _interrupt)  # under `timeout`, what is measured is still written
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if args.device == "cpu" and args.threads > 1 and load + args.threads > cores + 0.5:
        print(
            f"bench: the load is {load:.1f} on {cores} cores: threads will wait for each other, and"
            " small parallel calls look 100 times too slow; wait, or take --threads 1",
            file=sys.stderr,
        )
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rounds = 3 if args.quick else 7
    clock: Clock = CpuClock(args.threads, 0.01 if args.quick else 0.05)
    machine = "cpu"
    if args.device == "cuda":
        clock = CudaClock(repeats=5 if args.quick else 15)
        machine = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    cache = last_level_cache(args.device)
    setting = Setting(args.device, args.threads, clock, rounds, cache, _git(), tuple(args.provider))

    if args.steps:
        for comparison in compare_steps(args.device):
            print(comparison)
        return 0
    todo = list(jobs(args.op, args.dtype, args.quick, args.device))
    done: dict[Job, tuple[list[Record], list[Problem]]] = {}
    # The largest first: they tell most, should the time run out.
    for job in sorted(todo, key=lambda job: -math.prod(job.shape)):
        print(f"[{len(done) + 1}/{len(todo)}] {job.title}", file=sys.stderr)
        try:
            done[job] = measure_job(job, setting)
        except KeyboardInterrupt:
            break
    finished = [done[job] for job in todo if job in done]
    records = [r for some, _ in finished for r in some]
    problems = [p for _, some in finished for p in some]
    problems += [job.problem("all", "not reached") for job in todo if job not in done]

    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    out = args.out or ROOT / "bench" / "results" / f"{today}-{machine}"
    print(write(records, problems, out))
    return 1 if any(p.provider in ("fastvae", "all") for p in problems) else 0
