"""How long a call takes, how much memory, and how short it could be."""

from __future__ import annotations

import gc
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from cases import Case, Shape
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from .providers import Call, as_tuple

__all__ = [
    "Clock", "CpuClock", "CudaClock", "Spread", "bytes_min", "captured", "copy_limit", "interleave",
    "last_level_cache", "peak_bytes",
]  # fmt: skip


# --- time -----------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Seconds: 20th, 50th and 80th percentile over the rounds, each round given by its median."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, rounds: list[float]) -> Spread:
        cuts = statistics.quantiles(rounds, n=10, method="inclusive")
        return cls(cuts[1], cuts[4], cuts[7])

    def scaled(self, factor: float) -> Spread:
        return Spread(*(factor * x for x in self))


class Clock(Protocol):
    def __call__(self, call: Call) -> float:
        """The median time of one call, in one round."""


class CpuClock:
    """Warm caches, as in a training step whose tensors were just written."""

    def __init__(self, threads: int, seconds: float) -> None:
        self.threads, self.seconds = threads, seconds

    def __call__(self, call: Call) -> float:
        timer = Timer("call()", globals={"call": call}, num_threads=self.threads)
        return timer.blocked_autorange(min_run_time=self.seconds).median


class CudaClock:
    """Cold L2: each call follows a write of a buffer four times its size.

    The flush also keeps the device busy while the host prepares the launch, so that what is timed
    is the device, unless the host falls behind it: then the gaps count, as they do for a user.
    """

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        size = max(4 * last_level_cache("cuda"), 256 << 20)
        self.buffer = torch.empty(size, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Call) -> float:
        events = []
        for _ in range(self.repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self.buffer.zero_()
            start.record()
            call()
            stop.record()
            events.append((start, stop))
        torch.cuda.synchronize()  # once a round: a wait per call would time the wait
        milliseconds: list[float] = [start.elapsed_time(stop) for start, stop in events]
        return statistics.median(milliseconds) * 1e-3


def interleave(calls: dict[str, Call], clock: Clock, rounds: int) -> dict[str, Spread]:
    """Times all calls in turn, round after round: a machine that slows down slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(clock(calls[name]))
    return {name: Spread.of(seconds) for name, seconds in times.items()}


def captured(call: Call) -> Call:
    """The call as a CUDA graph: the device's own time, without Python and launches."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initialisations cannot be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


# --- memory ---------------------------------------------------------------------------------------


def _allocations(call: Call, device: torch.device) -> tuple[Any, int]:
    """The results of a call, and the most bytes that it held at one time, results included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        torch.cuda.synchronize()
        return results, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = call()
    recorded = profiler.profiler
    assert recorded is not None
    assert recorded.kineto_results is not None
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return results, peak


def peak_bytes(call: Call, held: list[Tensor]) -> int:
    """The most memory of one call beyond ``held`` (its inputs) and what it returns."""
    results, peak = _allocations(call, held[0].device)
    inputs = {t.untyped_storage().data_ptr() for t in held}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in as_tuple(results)}
    return max(0, peak - sum(s.nbytes() for p, s in storages.items() if p not in inputs))


# --- the limit ------------------------------------------------------------------------------------


def bytes_min(case: Case, shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """The fewest bytes that the case must read and write, were every tensor touched once.

    Row outputs are float32 for half types; forward writes them, backward reads their gradient.
    """
    full = mode == "full"
    row_elements = case.row_count(shape) * case.outputs.count("row") * (2 if full else 1)
    return case.elements(shape, full) * dtype.itemsize + row_elements * max(dtype.itemsize, 4)


def last_level_cache(device: str) -> int:
    """Bytes; 32 MiB where the system does not tell."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)([KM])", path.read_text().strip()):
            sizes.append(int(match[1]) << {"K": 10, "M": 20}[match[2]])
    return max(sizes[1:] or sizes)


def copy_limit(moved: int, device: str, cache: int) -> tuple[Call, float]:
    """A copy that stands for ``moved`` bytes read and written, and what to multiply its time by.

    Where that many bytes fit in the last-level cache, the copy moves exactly as many, and they are
    in the cache: a limit at memory speed could be beaten. Beyond it, the copy is at least four
    caches long, and its time is scaled.
    """
    size = max(1, moved // 2)  # each byte is read once and written once
    if moved > cache:
        size = max(size, 4 * cache)
    source, target = torch.ones(2, size, dtype=torch.uint8, device=device).unbind()
    return lambda: target.copy_(source), moved / (2 * size)
