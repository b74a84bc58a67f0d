"""The benchmark: its records, checks and arithmetic. Nothing here depends on how fast it is."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, COMPOSITIONS

ROOT = Path(__file__).resolve().parent.parent
FIELDS = [
    *("op", "case", "device", "dtype", "mode", "provider", "median_s", "p20_s", "p80_s"),
    *("peak_bytes", "max_abs_err", "bytes_min", "torch", "threads", "git"),
]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def package(monkeypatch):
    """bench, imported as __main__ does: the repository last, so that the installed fastvae wins."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    from bench import measure, providers, run

    return measure, providers, run


def test_quick_run(tmp_path):
    ran = bench("--quick", "--op", "reparameterize_kl", "--threads", "1", "--out", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    records = json.loads((tmp_path / "results.json").read_text())
    assert all(list(r) == FIELDS for r in records)
    large = [r for r in records if r["case"] == "1024x64"]
    tiny = [r for r in records if r["case"] == "4x8"]
    assert len(records) == len(large) + len(tiny)
    assert {r["mode"] for r in large} == {"forward", "full"}
    expected = {"fastvae", "eager", "torch.distributions", "limit"}
    if ": compile: " not in ran.stdout:  # no C++ compiler: said, and the rest is measured
        expected |= {"compile"}
    for mode in ("forward", "full"):
        assert {r["provider"] for r in large if r["mode"] == mode} == expected
    assert [(r["provider"], r["mode"]) for r in tiny] == [
        ("fastvae", "forward"),
        ("eager", "forward"),
    ]
    for r in records:
        assert 0 < r["p20_s"] <= r["median_s"] <= r["p80_s"]
        assert (r["op"], r["device"], r["dtype"]) == ("reparameterize_kl", "cpu", "float32")
        assert 0 <= r["max_abs_err"] < 1e-3
    memory = {r["provider"]: r["peak_bytes"] for r in large if r["mode"] == "full"}
    assert memory["fastvae"] < 1024 < 1024 * 64 * 4 <= memory["eager"]  # the noise is never stored
    assert (tmp_path / "results.csv").read_text().startswith(",".join(FIELDS))
    summary = (tmp_path / "summary.txt").read_text()
    assert "Where fastvae loses:" in summary
    assert summary.strip() in ran.stdout
    assert (tmp_path / "results.png").exists() or "No plots" in summary


def test_unknown_op_exits_2_with_one_sentence():
    ran = bench("--op", "gaussian_kl", "nonsense")
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert line.startswith("bench: --op must be of reparameterize, ")
    assert line.endswith(", got nonsense")


@pytest.mark.parametrize("option", ["--op", "--provider", "--dtype"])
def test_unknown_name(package, option, capsys):
    _, _, run = package
    with pytest.raises(SystemExit) as exited:
        run.main([option, "nonsense"])
    assert exited.value.code == 2
    assert f"{option} must be of" in capsys.readouterr().err


def _measure(package, case, mode, shape=(16, 8)):
    measure, _, run = package
    clock = measure.CpuClock(threads=1, seconds=1e-4)
    wanted = ("fastvae", "eager", "torch.distributions", "limit")
    setting = run.Setting("cpu", 1, clock, 2, 1 << 20, "unknown", wanted)
    job = run.Job(case, case.sizes(shape), torch.float32, mode)
    records, problems = run.measure_job(job, setting)
    return {r.provider for r in records}, {p.provider: p.why for p in problems}


@pytest.mark.parametrize("mode", ["forward", "full"])
@pytest.mark.parametrize(
    "case", [c for c in CASES + COMPOSITIONS if c.bench], ids=lambda case: case.name
)
def test_all_providers_are_right(package, case, mode):
    timed, problems = _measure(package, case, mode)
    assert problems == {}
    assert {"fastvae", "eager", "limit"} <= timed


def _wrong_noise(mu, log_var):
    z = mu + torch.exp(0.5 * log_var) * (torch.rand_like(mu) * 2 - 1)
    return z, -0.5 * (1 + log_var - mu.pow(2) - log_var.exp()).sum(-1)


def _wrong_kl(mu, log_var):
    z = mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)
    return z, -0.5 * (1 + log_var - mu.pow(2) - 1.01 * log_var.exp()).sum(-1)


def _wrong_gradient(mu, log_var):
    z, kl = CASES[1].eager(mu, log_var)
    return z + 0.1 * (mu - mu.detach()), kl


def _wrong_nan(mu, log_var):
    z, kl = CASES[1].eager(mu, log_var)
    return z, kl * float("nan")


def _raises(mu, log_var):
    raise RuntimeError("no luck\nand more lines")


@pytest.mark.parametrize(
    ("eager", "why"),
    [
        (_wrong_noise, "wrong: its noise has mean"),
        (_wrong_kl, "wrong: output 1 is off by"),
        (_wrong_gradient, "wrong: the gradient of mu is off by"),
        (_wrong_nan, "wrong: output 1 is off by nan"),
        (_raises, "RuntimeError: no luck"),
    ],
)
def test_wrong_provider_is_reported_not_timed(package, eager, why):
    case = next(c for c in CASES if c.op == "reparameterize_kl")
    timed, problems = _measure(package, dataclasses.replace(case, eager=eager), "full", (512, 8))
    assert timed == {"fastvae", "torch.distributions", "limit"}
    assert list(problems) == ["eager"]
    assert problems["eager"].startswith(why)
    assert "\n" not in problems["eager"]


def test_large_inputs_are_checked_at_both_ends(package, monkeypatch):
    _, providers, _ = package
    monkeypatch.setattr(providers, "_EDGE", 64)
    case = next(c for c in CASES if c.op == "gaussian_kl")
    inputs = case.draw((100, 8))
    assert list(providers._edges(inputs[0].shape)) == [slice(0, 8), slice(92, 100)]
    providers.check(case, "eager", case.eager, inputs, None)

    def tail(mu, log_var):
        return torch.cat((case.eager(mu[:-1], log_var[:-1]), torch.zeros(1)))

    with pytest.raises(providers.WrongAnswerError, match="output 0 is off"):
        providers.check(case, "eager", tail, inputs, None)


def test_limit_arithmetic(package):
    measure, _, _ = package
    both = next(c for c in CASES if c.op == "reparameterize_kl")
    n, rows = 128 * 32, 128
    assert measure.bytes_min(both, (128, 32), torch.float32, "forward") == 4 * (3 * n + rows)
    assert measure.bytes_min(both, (128, 32), torch.float32, "full") == 4 * (8 * n + 2 * rows)
    # half types: rows are float32
    assert measure.bytes_min(both, (128, 32), torch.float16, "forward") == 2 * 3 * n + 4 * rows
    # in the cache the copy moves as many bytes; beyond it, four caches, and its time is scaled
    for moved, scale in ((1000, 1.0), (10_000, 10_000 / (2 * 4 * 4096)), (10**6, 1.0)):
        copy, factor = measure.copy_limit(moved, "cpu", cache=4096)
        assert factor == pytest.approx(scale)
        assert copy().nbytes * 2 * factor == pytest.approx(moved)


def test_rounds_are_summed_up_by_percentiles(package):
    measure, _, _ = package
    spread = measure.Spread.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert spread == pytest.approx((2.0, 3.5, 5.0))
    assert spread.scaled(2.0) == pytest.approx((4.0, 7.0, 10.0))


def test_peak_memory_leaves_out_inputs_and_results(package):
    measure, _, _ = package
    x = torch.ones(1000)
    assert measure.peak_bytes(x.neg, [x]) == 0
    assert measure.peak_bytes(lambda: x.neg().neg(), [x]) == 4000
    assert measure.peak_bytes(lambda: x, [x]) == 0


@pytest.mark.parametrize("amortised", [False, True])
def test_steps_compare_the_same_bound(package, amortised):
    from bench.steps import FlowVAE, eager_elbo

    torch.manual_seed(0)
    model = FlowVAE(3, amortised).double()
    x = (torch.rand(4, 784) < 0.3).double()
    # Samples differ: their means must not.
    with torch.no_grad():
        pairs = [(model.elbo(x), eager_elbo(model, x)) for _ in range(2000)]
    ours, eager = (torch.stack(column) for column in zip(*pairs, strict=True))
    error = (ours.var(0) + eager.var(0)).div(len(pairs)).sqrt()
    assert bool(((ours.mean(0) - eager.mean(0)).abs() < 5.0 * error).all())
    assert bool((error < 0.01 * ours.mean(0).abs()).all())


# --- occupancy ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (256, 64, 0, 4),  # 8 warps of 2048 registers: 4 blocks fill the file
        (256, 65, 0, 3),  # of which a warp takes 2304
        (384, 88, 0, 1),
        (1024, 32, 0, 2),  # 64 warps
        (32, 16, 0, 32),  # no more blocks than that
        (128, 32, 100_000, 2),  # of shared memory
    ],
)
def test_occupancy_is_what_is_scarcest(package, threads, registers, shared, blocks):
    from bench.occupancy import resident

    assert resident(threads, registers, shared, "sm_90") == blocks


def test_widths_are_read_off_the_disassembly(package):
    from bench.occupancy import sections, widths

    code = """
                Function : first
        /*0010*/ LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/ LDG.E R4, [R2.64] ;  /*0030*/ @P0 LDG.E.U16 R4, [R2.64] ;
                Function : second
        /*0010*/ STG.E.64 [R2.64], R4 ;  /*0020*/ LDG.E.128 R4, [R2.64] ;
    """
    parts = dict(sections(code, "Function : "))
    assert list(parts) == ["first", "second"]
    assert widths(parts["first"], "LDG") == "128: 1, 32: 1, 16: 1"
    assert widths(parts["first"], "STG") == ""
    assert widths(parts["second"], "STG") == "64: 1"


def test_occupancy_of_a_source(package, tmp_path):
    """Where the tools are: no kernel keeps a stack, and rows are read 16 bytes at a time."""
    import csv
    import shutil

    from bench import occupancy

    has_dump = shutil.which("cuobjdump") or importlib.util.find_spec("triton")
    if not (shutil.which("nvcc") and has_dump):
        pytest.skip("no nvcc, or no cuobjdump (pip install triton)")
    table = tmp_path / "kernels.csv"
    assert occupancy.main([str(ROOT / "csrc" / "gaussian.cu"), "--out", str(table)]) == 0
    kernels = list(csv.DictReader(table.open()))
    assert all(k["stack"] == "0" and int(k["occupancy"]) > 0 for k in kernels)
    wide = [k for k in kernels if k["name"].startswith("sweep_kernel<GaussianKl")]
    assert wide
    assert all(k["loads"].startswith("128") for k in wide if "float, float" in k["name"])


def test_the_check_knows_what_rows_share(package):
    """The gradient of shared parameters is a sum over all rows, not over those at the ends."""
    _, providers, _ = package
    case = next(c for c in CASES if c.name == "planar_flow")
    inputs = case.draw_sizes((9000, 64, 2), requires_grad=True)
    grads = [torch.ones(9000, 64), torch.ones(9000)]
    assert providers.check(case, "fastvae", case.fastvae, inputs, grads) > 0


def test_predictions_count_bytes_and_operations(package):
    from bench.predict import H200, operations, predict

    case = next(c for c in CASES if c.name == "gaussian_log_prob")
    p = predict(case, (1 << 16, 1 << 10), torch.bfloat16, "full")
    assert p.bytes == 8 * 2**26 * 2 + 2 * 2**16 * 4
    assert (p.bound, p.seconds) == ("memory", p.bytes / H200.bandwidth)
    assert predict(case, (4, 8), torch.float32, "forward").bound == "launches"
    # Of a planar step, forward: D (w z + b, u tanh) and what a row and a step cost.
    case = next(c for c in CASES if c.name == "planar_flow")
    few, many = (operations(case, (100, 1000, k), "forward") for k in (1, 11))
    assert 0.9 * 4e5 <= (many - few) / 10 <= 1.1 * 4e5


def test_predictions_print_without_a_gpu():
    ran = bench("--predict", "--op", "bernoulli_log_prob", "--dtype", "float32", "bfloat16")
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == 5
    assert "bernoulli_log_prob 65536x1024 bfloat16 full" in ran.stdout
