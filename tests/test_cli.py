"""The command line as a user meets it: what it prints, which files it leaves, its exit codes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvae
from fastvae import checkpoint, demo, functional
from fastvae.cli import main

QUICK = ["--latent-dim", "3", "--hidden", "16", "--epochs", "2", "--importance-samples", "4"]


@pytest.fixture(autouse=True)
def _in_a_folder_without_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTVAE_DATA", str(tmp_path / "data"))


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr with which a command ends with exit code 2."""
    try:
        code = main(list(argv))
    except SystemExit as exit:  # argparse
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("fastvae")
    return err


def train(*argv: str) -> int:
    return main(["train", "vae", *QUICK, *argv])


def test_train_prints_scores_and_leaves_its_files(capsys, tmp_path):
    assert train() == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "1,397 train, 200 valid and 200 test images of 8x8" in out
    assert "test ELBO" in out
    assert "K = 4, all 200 images" in out
    folder = tmp_path / "runs" / "vae-digits"
    names = ["checkpoint.safetensors", "picture.png", "results.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert all(f"runs/vae-digits/{name}" in out for name in names)
    assert checkpoint.read(folder / "checkpoint.safetensors").header.epoch == 2


def test_patience_takes_the_best_epoch(capsys, tmp_path):
    argv = ("train", "vae", "--latent-dim", "2", "--hidden", "16", "--lr", "0.02")
    assert main([*argv, "--patience", "2", "--epochs", "500", "--importance-samples", "0"]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "runs" / "vae-digits"
    best = checkpoint.read(folder / "best.safetensors").header
    assert best.epoch == best.best_epoch < 498
    assert f"the best of {best.epoch + 2} epochs: {best.epoch}\n" in out
    assert "runs/vae-digits/best.safetensors" in out
    results = json.loads((folder / "results.json").read_text())
    assert (results["epoch"], results["best_epoch"]) == (best.epoch + 2, best.epoch)
    text = refusal(capsys, "train", "vae", "--resume", "--patience", "3")
    assert "--patience 3 is not the 2 of the run" in text


def test_resume_goes_on_and_a_second_run_does_not_overwrite_the_first(capsys):
    path = Path("runs/vae-digits/checkpoint.safetensors")
    assert train("--lr", "0.003") == 0
    capsys.readouterr()
    assert "exists; pass --resume" in refusal(capsys, "train", "vae")
    assert checkpoint.read(path).header.epoch == 2
    assert main(["train", "vae", "--resume", "--epochs", "3", "--importance-samples", "0"]) == 0
    out = capsys.readouterr().out
    assert "going on after step 28" in out
    assert "log-likelihood" not in out
    header = checkpoint.read(path).header
    assert (header.epoch, header.settings.lr, header.config["hidden"]) == (3, 0.003, [16])


@pytest.mark.parametrize(
    ("option", "value", "stored"),
    [
        ("--lr", "0.5", "0.002"),
        ("--latent-dim", "7", "3"),
        ("--hidden", "8,8", "[16]"),
        ("--posterior", "planar", "gaussian"),
        ("--seed", "1", "0"),
        ("--batch-size", "7", "100"),
        ("--data", "mnist", "digits"),
        ("--ema", "0.9", "0.0"),
        ("--precision", "bfloat16", "float32"),
    ],
)
def test_resume_refuses_another_course(capsys, option, value, stored):
    assert train("--out", "here") == 0
    capsys.readouterr()
    text = refusal(capsys, "train", "vae", "--out", "here", "--resume", option, value)
    assert f"is not the {stored} of the run in here; leave it out" in text
    assert train("--out", "here", "--resume", "--data", "digits") == 0  # the same is no other


def test_train_with_a_flow_and_sample_from_it(capsys):
    flow = ("--posterior", "planar", "--posterior-size", "3")
    assert train(*flow) == 0
    assert main(["train", "vae", "--resume", "--epochs", "3", *flow]) == 0
    assert "test log-likelihood" in capsys.readouterr().out
    path = Path("runs/vae-digits/checkpoint.safetensors")
    config = checkpoint.read(path).header.config
    assert (config["posterior"], config["posterior_size"]) == ("planar", 3)
    assert main(["sample", str(path)]) == 0
    capsys.readouterr()
    text = refusal(capsys, "train", "vae", "--resume", "--posterior-size", "4")
    assert "--posterior-size 4 is not the 3 of the run" in text
    text = refusal(capsys, "train", "vae", "--out", "new", "--posterior-size", "4")
    assert "posterior_size must go with one of low-rank, mixture, planar" in text


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "the following arguments are required: model"),
        (["train", "gan"], "invalid choice: 'gan'"),
        (["train", "vae", "--data", "cifar"], "invalid choice: 'cifar'"),
        (["train", "vae", "--posterior", "spline"], "--posterior: invalid choice: 'spline'"),
        (
            ["train", "vae", "--posterior-size", "0"],
            "--posterior-size: must be an integer from 1 to",
        ),
        (["train", "vae", "--epochs", "0"], "--epochs: must be an integer from 1 to"),
        (["train", "vae", "--epochs", "1.5"], "--epochs: must be an integer"),
        (["train", "vae", "--batch-size", "-1"], "--batch-size: must be an integer"),
        (["train", "vae", "--lr", "0"], "--lr: must be a positive number, got '0'"),
        (["train", "vae", "--lr", "nan"], "--lr: must be a positive number, got 'nan'"),
        (["train", "vae", "--lr", "inf"], "--lr: must be a positive number, got 'inf'"),
        (["train", "vae", "--ema", "1"], "--ema: must be a number between 0 and 1, got '1'"),
        (["train", "vae", "--precision", "half"], "--precision: invalid choice: 'half'"),
        (["train", "vae", "--minutes", "soon"], "--minutes: must be a positive number"),
        (["train", "vae", "--hidden", "200,x"], "--hidden: must be an integer"),
        (["train", "vae", "--hidden", "200,"], "--hidden: must be an integer"),
        (["train", "vae", "--latent-dim", "9" * 400], "--latent-dim: must be an integer"),
        (["train", "vae", "--seed", "-1"], "--seed: must be an integer from 0"),
        (["train", "vae", "--importance-samples", "-1"], "must be an integer from 0"),
        (["train", "vae", "--device", "toaster"], "--device must be cpu or cuda, got 'toaster'"),
        (["train", "vae", "--device", "mps"], "--device mps has no kernels: no kernel for mps"),
        (["train", "vae", "--download"], "--download fetches mnist only, not digits"),
        (["train", "vae", "--resume"], "runs/vae-digits/checkpoint.safetensors is not a file"),
        (["train", "vae", "--data", "mnist"], "does not exist; set FASTVAE_DATA or --root"),
        (["train", "vae", "--data", "mnist", "--root", "x"], "fastvae: x/mnist/train-images"),
        (["sample", "nothing.safetensors"], "nothing.safetensors is not a file"),
        (["sample"], "the following arguments are required: checkpoint"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistakes_end_with_one_sentence(capsys, argv, complaint):
    assert complaint in refusal(capsys, *argv)
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys):
    assert "needs a GPU" in refusal(capsys, "train", "vae", "--device", "cuda")


def test_an_out_that_is_a_file(capsys):
    Path("taken").write_text("")
    assert train("--out", "taken") == 2
    err = capsys.readouterr().err
    assert "taken" in err
    assert err.endswith("pass another --out\n")


def test_a_damaged_checkpoint(capsys):
    assert train() == 0
    capsys.readouterr()
    path = Path("runs/vae-digits/checkpoint.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    assert "is damaged" in refusal(capsys, "train", "vae", "--resume")
    assert "is damaged" in refusal(capsys, "sample", str(path))


def test_divergence_is_exit_code_3(capsys):
    assert train("--lr", "1e30") == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "diverged at step" in err
    path = "runs/vae-digits/checkpoint.safetensors"
    assert f"the last good checkpoint is {path}" in err
    assert checkpoint.read_model(Path(path)).sample(3).isfinite().all()


def test_ctrl_c_stops_with_130_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "fastvae", "train", "vae", *QUICK, "--out", "my run"]
    command[command.index("--epochs") + 1] = "100000"
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch     5"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""
    header = checkpoint.read(tmp_path / "my run" / "checkpoint.safetensors").header
    assert header.epoch >= 5
    assert f"stopped after step {header.step} " in out
    again = shlex.split(out.splitlines()[-1].removeprefix("go on with: "))
    assert again[0] == "fastvae"
    again[again.index("--epochs") + 1] = str(header.epoch + 1)
    assert main(again[1:]) == 0
    after = checkpoint.read(tmp_path / "my run" / "checkpoint.safetensors").header
    assert (after.epoch, after.batch) == (header.epoch + 1, 0)


def test_ctrl_c_outside_training_is_130_too(capsys, monkeypatch):
    def press(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastvae.data.load", press)
    assert train() == 130
    assert capsys.readouterr().err == "\nfastvae: stopped\n"


def test_sample_draws_the_same_picture_for_the_same_seed(capsys):
    assert train() == 0
    stored = "runs/vae-digits/checkpoint.safetensors"
    for name, seed in (("a.png", "0"), ("b.png", "0"), ("c.png", "1")):
        capsys.readouterr()
        assert main(["sample", stored, "-n", "7", "--seed", seed, "--out", name]) == 0
        assert capsys.readouterr().out == f"{name}\n"
    a, b, c = (Path(name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a.startswith(b"\x89PNG")
    assert a == b != c


def test_demo_trains_draws_and_compares(capsys, monkeypatch):
    monkeypatch.setattr(demo, "_ROUNDS", 3)
    monkeypatch.setattr(demo, "_SECONDS", 0.01)
    assert main(["demo", "--minutes", "0.01"]) == 0
    out = capsys.readouterr().out
    assert "test ELBO" in out
    assert Path("runs/demo/picture.png").is_file()
    assert "runs/demo/picture.png" in out
    speed = [line for line in out.splitlines() if " ms   eager " in line]
    assert [line.split()[0] for line in speed] == ["training", "of"]
    assert main(["demo", "--minutes", "0.01"]) == 0  # again, over the first


def test_demo_leaves_a_trained_run_alone(capsys):
    assert train("--out", "mine") == 0
    capsys.readouterr()
    before = Path("mine/checkpoint.safetensors").read_bytes()
    assert "mine/checkpoint.safetensors exists" in refusal(capsys, "demo", "--out", "mine")
    assert Path("mine/checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 34 GB"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_one_sentence(capsys, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(fastvae.train, "Trainer", fail)
    assert "there is not memory enough; take fewer" in refusal(capsys, "train", "vae")


def test_a_bug_is_not_called_a_lack_of_memory(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(fastvae.train, "Trainer", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train()


def test_nobody_reads_what_is_printed():
    command = f"{sys.executable} -m fastvae train vae --epochs 1 --hidden 8 --out cut"
    script = f"{command} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout == "141\n", done.stderr


def test_the_eager_path_of_the_demo_is_the_same_model():
    """A comparison with something else would be worth nothing."""
    from fastvae import models

    torch.manual_seed(0)
    model, x = models.VAE(12, latent_dim=3, hidden=(8,)), torch.rand(50, 12).round()
    with torch.no_grad():
        model.encoder[-1].bias[3:] = -20  # sigma = 5e-5: the two draw other noise, and hardly any
        fused, eager = model.elbo(x).elbo, demo.eager_elbo(model, x)
        assert float(model.elbo(x).kl.min()) > 20
    torch.testing.assert_close(fused, eager, rtol=1e-4, atol=0)


def test_info_names_every_op_and_its_path(capsys):
    assert main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert torch.__version__ in lines["torch"]
    for op in functional.route.OPS:
        assert lines[op].startswith("cpu: ")


def test_info_into_a_pipe_that_is_closed():
    process = subprocess.run(
        f"{sys.executable} -m fastvae info | true; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True,
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["--version"]])
def test_help_is_no_error(capsys, argv):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 0
    assert "fastvae" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["tqdm", "safetensors", "sklearn", "matplotlib"])
def test_a_missing_extra_is_named_before_the_training(capsys, monkeypatch, package):
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises ModuleNotFoundError
    text = refusal(capsys, "train", "vae")
    assert package.replace("sklearn", "scikit-learn") in text
    assert text.endswith("pip install 'fastvae[train]'\n")
    assert not Path("runs").exists()


def test_importing_fastvae_imports_no_extra():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"  # torch itself imports tqdm where it is installed
        "import fastvae, fastvae.cli, fastvae.models\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "sys.exit(bool(new & {'tqdm', 'safetensors', 'sklearn', 'matplotlib'}))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
