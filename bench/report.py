"""What a run leaves behind: results.json, results.csv, summary.txt and results.png."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["Problem", "Record", "render", "write"]


@dataclass(frozen=True)
class Record:
    """One provider on one case. The fields are a contract: scripts elsewhere read them."""

    op: str  # the public function
    case: str  # its sizes, "128x32", and words: a variant ("prior"), a CUDA graph ("graph")
    device: str
    dtype: str
    mode: str  # "forward", or "full": forward and backward
    provider: str
    median_s: float
    p20_s: float
    p80_s: float
    peak_bytes: int  # beyond inputs and results
    max_abs_err: float  # of outputs, and of gradients in mode full, against float64
    bytes_min: int
    torch: str
    threads: int
    git: str


@dataclass(frozen=True)
class Problem:
    """A provider that was not timed."""

    where: str  # op, case, dtype, mode
    provider: str
    why: str


Line = dict[str, Record]  # the providers of one case, dtype and mode


def _lines(records: Iterable[Record]) -> list[Line]:
    lines: dict[tuple[str, ...], Line] = {}
    for r in records:
        lines.setdefault((r.op, r.case, r.dtype, r.mode), {})[r.provider] = r
    return list(lines.values())


def _any(line: Line) -> Record:
    return next(iter(line.values()))


def _time(seconds: float) -> str:
    units = (("s ", 1.0), ("ms", 1e-3), ("us", 1e-6))
    unit, size = next((u for u in units if seconds >= 0.9995 * u[1]), units[-1])
    value = seconds / size
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"


def _ratio(over: Record | None, under: Record | None) -> str:
    if over is None or under is None:
        return "-"
    ratio = over.median_s / under.median_s
    return f"{ratio:.{0 if ratio >= 99.5 else 1 if ratio >= 9.95 else 2}f}"


def _bytes(n: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} B"


def _columns(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _table(lines: list[Line]) -> list[str]:
    shown = list(dict.fromkeys(p for line in lines for p in line))
    short = {"torch.distributions": "t.distr.", "compile-max-autotune": "autotune"}
    head = ["op", "case", "dtype", "mode", *(short.get(p, p) for p in shown)]
    head += ["/eager", "/compile", "x limit", "memory", "eager's"]
    rows = [head]
    for line in lines:
        one = _any(line)
        ours, eager, compiled = (line.get(p) for p in ("fastvae", "eager", "compile"))
        rows.append(
            [one.op, one.case, one.dtype, one.mode]
            + [_time(line[p].median_s) if p in line else "-" for p in shown]
            + [_ratio(eager, ours), _ratio(compiled, ours), _ratio(ours, line.get("limit"))]
            + [_bytes(r.peak_bytes) if r else "-" for r in (ours, eager)]
        )
    return _columns(rows, left=4)


def _losses(lines: list[Line]) -> list[str]:
    """Where another provider is faster."""
    rows = []
    for line in lines:
        ours = line.get("fastvae")
        for other in line.values():
            if ours is None or other.provider == "limit" or other.median_s >= ours.median_s:
                continue
            rows.append(
                [
                    ours.op,
                    ours.case,
                    ours.dtype,
                    ours.mode,
                    f"{other.provider} {ours.median_s / other.median_s:.2f}x faster,",
                    f"{_time(other.median_s).strip()} against {_time(ours.median_s).strip()}"
                    + (" (their spreads overlap)" if other.p80_s >= ours.p20_s else ""),
                ]
            )
    return _columns(rows, left=6) if rows else ["nowhere in this run"]


def render(records: Sequence[Record], problems: Sequence[Problem]) -> str:
    """The summary in plain text."""
    text: list[str] = []
    lines = _lines(records)
    tiny = [line for line in lines if _is_tiny(line)]
    large = [line for line in lines if not _is_tiny(line)]
    if records:
        r = records[0]
        text += [f"{r.device}, {r.threads} threads, torch {r.torch}, git {r.git}", ""]
    if large:
        text += _table(large)
        text += [
            "",
            "/eager, /compile: how many times faster fastvae is. x limit: its time over that of a"
            " copy of the fewest bytes.",
            "memory: the most held beyond inputs and results.",
        ]
    if tiny:
        rows = [["op", "case", "dtype", "fastvae us", "eager us", "/eager"]]
        for line in tiny:
            one, ours, eager = _any(line), line.get("fastvae"), line.get("eager")
            times = [f"{1e6 * r.median_s:.1f}" if r else "-" for r in (ours, eager)]
            rows.append([one.op, one.case, one.dtype, *times, _ratio(eager, ours)])
        text += ["", "The cost of a call: forward with grad, 4x8", *_columns(rows, left=3)]
    text += ["", "Where fastvae loses:", *(f"  {row}" for row in _losses(lines))]
    if problems:
        text += ["", "Not timed:"]
        text += [f"  {p.where}: {p.provider}: {p.why}" for p in problems]
    return "\n".join(text)


def _is_tiny(line: Line) -> bool:
    return _any(line).case.split()[0] == "4x8"


# --- the figure -----------------------------------------------------------------------------------

_STYLE = {  # colour (Okabe-Ito, told apart by the colour-blind), marker
    "fastvae": ("#0072B2", "s"),
    "eager": ("#D55E00", "o"),
    "compile": ("#009E73", "D"),
    "compile-max-autotune": ("#56B4E9", "v"),
    "torch.distributions": ("#999999", "^"),
}


def _plot(records: Sequence[Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    lines = [line for line in _lines(records) if "fastvae" in line and not _is_tiny(line)]
    dtypes = list(dict.fromkeys(_any(line).dtype for line in lines))
    keys = list(dict.fromkeys((r.op, r.case, r.mode) for r in map(_any, lines)))
    if not keys:
        return
    # one row per key, a gap and a heading where an op begins
    place: dict[tuple[str, str, str], float] = {}
    headings: list[tuple[float, str]] = []
    y = 0.0
    for key in keys:
        if not headings or headings[-1][1] != key[0]:
            y += 0.5 if headings else 0
            headings.append((y, key[0]))
            y += 1
        place[key] = y
        y += 1
    labels = [f"{case}  {mode}" for _, case, mode in keys]

    figure, axes = plt.subplots(
        1, 2 * len(dtypes), sharey=True, squeeze=False, layout="constrained",
        figsize=(3 + 7.2 * len(dtypes), 1.8 + 0.23 * y),
        width_ratios=[1.25, 1] * len(dtypes),
    )  # fmt: skip
    for i, dtype in enumerate(dtypes):
        speed, limit = axes[0][2 * i : 2 * i + 2]
        here = {(r.op, r.case, r.mode): line for line in lines
                if (r := line["fastvae"]).dtype == dtype}  # fmt: skip
        for name, (colour, marker) in _STYLE.items():
            xs = {place[k]: v[name].median_s / v["fastvae"].median_s
                  for k, v in here.items() if name in v}  # fmt: skip
            if xs and name != "fastvae":
                speed.scatter(list(xs.values()), list(xs), c=colour, marker=marker, s=30,
                              edgecolors="white", linewidths=0.5, label=name, zorder=3)  # fmt: skip
            reach = {place[k]: 100 * v["limit"].median_s / v[name].median_s
                     for k, v in here.items() if name in v and "limit" in v}  # fmt: skip
            if name == "fastvae":
                limit.barh(list(reach), list(reach.values()), height=0.62, color=colour,
                           alpha=0.85, label=name, zorder=2)  # fmt: skip
            elif reach and name in ("eager", "compile"):
                limit.scatter(list(reach.values()), list(reach), c=colour, marker=marker, s=22,
                              edgecolors="white", linewidths=0.5, label=name, zorder=3)  # fmt: skip
        speed.set_xscale("log")
        low, high = speed.get_xlim()
        low, high = min(low, 0.7), max(high, 2.5)
        speed.axvspan(low, 1, color="#cc0000", alpha=0.06, lw=0, zorder=0)
        speed.axvline(1, color="black", lw=0.8, zorder=2)
        speed.set_xlim(low, high)
        few = (1.0, 2.0, 5.0) if high / low < 400 else (1.0,)
        speed.xaxis.set_major_locator(LogLocator(subs=few))
        speed.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
        speed.xaxis.set_minor_formatter(NullFormatter())
        speed.set_title(f"{dtype}: speedup of fastvae over", fontsize=10, loc="left")
        limit.axvline(100, color="black", lw=0.8, zorder=2)
        limit.set_xlim(0, min(200, max(108, limit.get_xlim()[1])))
        limit.set_title(f"{dtype}: percent of the speed of a copy", fontsize=10, loc="left")
        for axis in (speed, limit):
            axis.set_axisbelow(True)
            axis.grid(axis="x", color="#dddddd", lw=0.6)
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(axis="y", length=0)
            axis.tick_params(axis="x", labelsize=8)
            handles, names = axis.get_legend_handles_labels()
            shown = sorted(zip(names, handles, strict=True), key=lambda x: list(_STYLE).index(x[0]))
            axis.legend([h for _, h in shown], [n for n, _ in shown], fontsize=8,
                        frameon=False, ncols=4, loc="upper left", columnspacing=1.2,
                        handletextpad=0.4, bbox_to_anchor=(-0.02, -0.35 / (0.23 * y)))  # fmt: skip
    first = axes[0][0]
    first.set_yticks(list(place.values()), labels, fontsize=8, family="monospace")
    first.set_ylim(y - 0.3, -0.6)
    for at, op in headings:
        first.text(-0.01, at, op, transform=first.get_yaxis_transform(), ha="right", va="center",
                   fontsize=9, fontweight="bold")  # fmt: skip
    r = records[0]
    figure.suptitle(f"fastvae on {r.device}, {r.threads} threads, torch {r.torch}", fontsize=11,
                    x=0.01, ha="left")  # fmt: skip
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(records: Sequence[Record], problems: Sequence[Problem], out: Path) -> str:
    """Write all files into the folder ``out``; returns the summary."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [asdict(r) for r in records]
    (out / "results.json").write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Record)])
        writer.writeheader()
        writer.writerows(rows)
    text = render(records, problems)
    try:
        _plot(records, out / "results.png")
    except ImportError as error:
        text += f"\n\nNo plots: {error} (pip install matplotlib)"
    (out / "summary.txt").write_text(text + "\n")
    return f"{text}\n\nWritten to {out}"
