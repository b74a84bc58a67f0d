"""Training: resuming, stopping, diverging, and checkpoints that are whole or refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastvae
from fastvae import checkpoint, data, files, models, pictures, train
from fastvae.checkpoint import CheckpointError, Settings
from fastvae.train import Trainer, TrainingDiverged

CONFIG = {"latent_dim": 4, "hidden": [16]}


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits")


def make(digits: data.Dataset, **settings: object) -> Trainer:
    return Trainer("vae", CONFIG, digits, Settings(**settings))


def run(trainer: Trainer, steps: int) -> list[tuple[float, float, float]]:
    return [trainer.train_step() for _ in range(steps)]


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    tensors = dict(trainer.model.state_dict())
    tensors |= {f"average.{name}": value for name, value in trainer.average.state_dict().items()}
    for i, moments in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"{i}.{name}": value for name, value in moments.items()}
    tensors["generator"] = trainer.generator.get_state()
    return {name: value.clone() for name, value in tensors.items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- the course of a run --------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 9, 14, 15], ids=lambda steps: f"after{steps}")
@pytest.mark.parametrize(
    "settings", [{}, {"clip_norm": 0.5}, {"ema": 0.9, "precision": "bfloat16"}], ids=str
)
def test_a_resumed_run_takes_the_same_course_bitwise(digits, tmp_path, stop, settings):
    """14 steps are an epoch: stops within the first, at its end, and within the second."""
    straight = make(digits, **settings)
    losses = run(straight, 31)
    path = tmp_path / "c.safetensors"
    stopped = make(digits, **settings)
    first = run(stopped, stop)
    stopped.save(path)
    torch.manual_seed(12345)  # the resumed process has another global generator
    resumed = Trainer.resume(path, digits)
    train.evaluate(resumed.model, digits, num_samples=4)  # which draws from a generator of its own
    assert (resumed.step, resumed.epoch, resumed.batch) == (stop, stop // 14, stop % 14)
    assert first + run(resumed, 31 - stop) == losses
    assert same(state(resumed), state(straight))
    rate = train.learning_rate(Settings(**settings), 2)
    assert [g["lr"] for g in resumed.optimizer.param_groups] == [rate]


def test_the_seed_decides_the_course_and_nothing_else_does(digits):
    before = torch.random.get_rng_state()
    one, two, three = make(digits), make(digits), make(digits, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    losses = run(one, 3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert run(two, 3) == losses
    assert run(three, 3) != losses


def test_an_epoch_shows_every_image_once(digits):
    trainer, seen = make(digits, batch_size=500), []
    trainer.data = Recorder(**vars(trainer.data), seen=seen)
    run(trainer, 3)
    assert [len(rows) for rows in seen] == [500, 500, 397]
    assert sorted(torch.cat(seen).tolist()) == list(range(1397))
    run(trainer, 3)
    assert not torch.equal(seen[0], seen[3])


class Recorder(data.Dataset):
    def __init__(self, seen: list[torch.Tensor], **fields: object) -> None:
        super().__init__(**fields)
        object.__setattr__(self, "seen", seen)

    def batch(self, rows: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        self.seen.append(rows)
        return super().batch(rows, generator)


def test_clipping_changes_the_course(digits):
    free, clipped = make(digits), make(digits, clip_norm=1e-9)
    run(free, 1)
    run(clipped, 1)
    norms = [max(float(p.grad.norm()) for p in t.model.parameters()) for t in (free, clipped)]
    assert norms[0] > 1e-3
    assert norms[1] <= 1e-9


def test_training_learns(digits, tmp_path, capsys):
    trainer = Trainer("vae", {"latent_dim": 8, "hidden": [64]}, digits, Settings())
    before = train.evaluate(trainer.model, digits, num_samples=0)
    assert train.fit(trainer, tmp_path / "c", epochs=22)
    after = train.evaluate(trainer.model, digits, num_samples=16)
    assert before.elbo < -43  # 64 pixels at random: 64 log 2 = 44.4
    assert after.elbo > -28
    assert after.log_likelihood is not None
    assert after.log_likelihood > after.elbo
    assert after.elbo == pytest.approx(after.recon - after.kl, abs=1e-4)
    assert train.evaluate(trainer.model, digits, num_samples=16) == after
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1]) for line in lines] == [1, 2, 5, 10, 20, 22]
    assert all("train ELBO" in line and "KL" in line and "valid ELBO" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vae", {"objective": "iwae"}),
        ("vae", {"objective": "dreg"}),
        ("sbn", {"objective": "vimco"}),
        ("sbn", {"objective": "rws"}),
    ],
    ids=lambda of: of if isinstance(of, str) else of["objective"],
)
def test_the_terms_of_many_samples_are_those_of_the_bound_of_one(digits, name, options):
    config = {"latent_dim": 4, "num_samples": 20, **options}
    trainer = Trainer(name, config, digits, Settings(batch_size=len(digits.train)))
    elbo = trainer.model.elbo(digits.batch(torch.arange(len(digits.train))))
    value, recon, kl = trainer.train_step()
    assert recon == pytest.approx(elbo.recon.mean().item(), abs=0.2)
    assert kl == pytest.approx(elbo.kl.mean().item(), abs=0.1)
    assert value > recon - kl + 0.2  # the bound of 20 samples


def test_the_log_says_the_bound_whatever_is_maximised(digits, tmp_path, capsys):
    config = {"latent_dim": 2, "hidden": [4], "objective": "beta", "beta": 50.0}
    trainer = Trainer("vae", config, digits, Settings(batch_size=2000, warmup=3))
    again = Trainer("vae", config, digits, Settings(batch_size=2000, warmup=3))
    train.fit(trainer, tmp_path / "c", epochs=1)
    value, recon, kl = again.train_step()
    assert abs(recon - kl - value) > 1.0
    assert f"train ELBO {recon - kl:9.2f}   KL {kl:6.2f} " in capsys.readouterr().out


def test_fit_goes_on_to_the_epochs_in_all(digits, tmp_path):
    path = tmp_path / "c"
    train.fit(make(digits), path, epochs=1)
    resumed = Trainer.resume(path, digits)
    train.fit(resumed, path, epochs=3)
    assert (resumed.epoch, resumed.step) == (3, 42)
    assert checkpoint.read(path).header.step == 42
    done = state(resumed)
    train.fit(resumed, path, epochs=3)  # there already
    assert same(state(resumed), done)


def test_fit_stops_when_its_minutes_are_over(digits, tmp_path):
    trainer = make(digits)
    assert train.fit(trainer, tmp_path / "c", minutes=0.01)
    assert trainer.step > 0
    assert checkpoint.read(tmp_path / "c").header.step == trainer.step
    with pytest.raises(ValueError, match="epochs or minutes must be given"):
        train.fit(trainer, tmp_path / "c")


def test_training_ends_when_no_epoch_is_better_and_keeps_the_best(digits, tmp_path):
    scores, trainer = [], make(digits, patience=4, lr=1e-2)
    validate = trainer.validate

    def record() -> bool:
        better = validate()
        scores.append(train._mean_elbo(trainer.model, digits.valid)[0])
        return better

    trainer.validate = record
    path = tmp_path / "c.safetensors"
    assert train.fit(trainer, path, epochs=1000)
    assert trainer.epoch == len(scores) < 1000
    assert trainer.best == max(scores)
    assert trainer.best_epoch == scores.index(max(scores)) + 1 == trainer.epoch - 4
    model = train.best_model(trainer, path)
    assert train._mean_elbo(model, digits.valid)[0] == trainer.best
    train.fit(trainer, path, epochs=1000)  # there is nothing left to do
    assert trainer.epoch == len(scores)
    # Stopped within an epoch and resumed, it finds the same.
    stopped, other = make(digits, patience=4, lr=1e-2), tmp_path / "other.safetensors"
    train.fit(stopped, other, epochs=3)
    run(stopped, 5)
    stopped.save(other)
    resumed = Trainer.resume(other, digits)
    train.fit(resumed, other, epochs=1000)
    assert (resumed.best, resumed.best_epoch) == (trainer.best, trainer.best_epoch)
    assert same(state(resumed), state(trainer))
    (tmp_path / train.BEST).unlink()
    for late in (train.best_model, lambda *of: train.fit(*of, epochs=1000)):
        with pytest.raises(CheckpointError, match=r"best\.safetensors is not a file"):
            late(trainer, path)


def test_a_run_that_is_killed_knows_its_best_epoch(digits, tmp_path):
    class Killed(Trainer):
        def train_step(self) -> tuple[float, float, float]:
            if self.step == 50:  # within the fourth epoch, each of which was the best so far
                raise SystemExit
            return super().train_step()

    path, settings = tmp_path / "c.safetensors", Settings(patience=9)
    with pytest.raises(SystemExit):
        train.fit(Killed("vae", CONFIG, digits, settings), path, epochs=20)
    resumed, best = Trainer.resume(path, digits), checkpoint.read(tmp_path / train.BEST).header
    assert (best.epoch, best.best) == (resumed.best_epoch, resumed.best) == (3, resumed.best)
    assert train._mean_elbo(train.best_model(resumed, path), digits.valid)[0] == best.best
    old = path.read_bytes()
    train.fit(resumed, path, epochs=5)
    path.write_bytes(old)
    with pytest.raises(CheckpointError, match=r"of epoch [45] of a run, and .* is 3; train on"):
        train.best_model(Trainer.resume(path, digits), path)
    other = Trainer("vae", CONFIG, digits, Settings(patience=9, seed=1))
    other.best, other.best_epoch = 0.0, checkpoint.read(tmp_path / train.BEST).header.epoch
    with pytest.raises(CheckpointError, match="train again"):
        train.best_model(other, path)


def test_a_score_that_is_nan_is_never_the_best(digits, monkeypatch):
    scores = iter([float("nan"), -30.0, float("nan"), -20.0, -25.0])
    monkeypatch.setattr(train, "_mean_elbo", lambda *_: (next(scores), 0.0, 0.0))
    trainer = make(digits, patience=9)
    assert [trainer.validate() for _ in range(5)] == [False, True, False, True, False]
    assert trainer.best == -20.0


@pytest.mark.parametrize("options", [{}, {"objective": "iwae", "num_samples": 20}])
def test_the_score_is_of_the_bound_that_training_has(digits, options):
    trainer = Trainer("vae", {**CONFIG, **options}, digits, Settings(patience=1))
    assert trainer.validate()
    draw, valid = torch.Generator().manual_seed(1), digits.valid.float()
    if options:
        known = trainer.model.log_likelihood(valid, 20, generator=draw)
    else:
        known = trainer.model.elbo(valid, generator=draw).elbo
    assert trainer.best == pytest.approx(known.mean().item(), abs=0.1)


def test_a_model_that_was_scored_trains_on(digits, tmp_path):
    config = {"latent_dim": 4, "objective": "nvil"}
    one, other = (Trainer("sbn", config, digits, Settings()) for _ in range(2))
    for trainer in (one, other):
        trainer.train_step()
    assert not train.best_model(one, tmp_path / "c").training
    for trainer in (one, other):
        trainer.train_step()
    for name, value in one.model.state_dict().items():  # the running means of NVIL among them
        assert torch.equal(value, other.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("sbn", {"latent_dim": 4}),
        ("naive-bayes", {"latent_dim": 4, "objective": "score"}),
        ("local-vae", {**CONFIG, "inference": "local"}),
    ],
    ids=lambda of: of if isinstance(of, str) else "",
)
def test_a_warm_up_that_would_do_nothing_is_refused(digits, name, config):
    with pytest.raises(ValueError, match=f"warmup must be 0 of a {name} .*, got 5"):
        Trainer(name, config, digits, Settings(warmup=5))
    assert Trainer(name, config, digits, Settings()).step == 0


def test_without_patience_the_last_epoch_is_what_is_scored(digits, tmp_path):
    trainer = make(digits)
    train.fit(trainer, tmp_path / "c.safetensors", epochs=2)
    assert train.best_model(trainer, tmp_path / "c.safetensors") is trainer.model
    assert not trainer.model.training
    assert not (tmp_path / train.BEST).exists()


def test_the_learning_rate_falls_with_the_epochs(digits):
    trainer = make(digits, lr=1e-2, batch_size=2000)
    rates = []
    for _ in range(31):
        trainer.train_step()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[0] == 1e-2
    assert rates[30] == pytest.approx(0.5e-2)


# --- the moving average and the lower precision ---------------------------------------------------


def test_the_average_is_of_the_weights_after_every_step(digits, tmp_path):
    trainer, plain = (make(digits, ema=ema, lr=1e-2, batch_size=2000) for ema in (0.3, 0.0))
    assert plain.average is plain.model
    expected = None
    for decay in (None, 1 / 10, 2 / 11, 3 / 12, 0.3, 0.3):  # less at first
        trainer.train_step()
        weights = {name: p.detach().double() for name, p in trainer.model.named_parameters()}
        if decay is None:
            expected = weights
        else:
            expected = {n: decay * e + (1 - decay) * weights[n] for n, e in expected.items()}
    for name, p in trainer.average.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-5, atol=1e-7)
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-2  # the average is in place of a decay
    path = tmp_path / "c.safetensors"
    trainer.save(path)
    stored = checkpoint.read_model(path)
    assert train.evaluate(stored, digits, 4) == train.evaluate(trainer.average, digits, 4)
    assert train.evaluate(stored, digits, 4) != train.evaluate(trainer.model, digits, 4)


def test_the_best_epoch_is_one_of_the_average(digits, tmp_path):
    trainer, path = make(digits, patience=3, ema=0.9, lr=1e-2), tmp_path / "c.safetensors"
    train.fit(trainer, path, epochs=40)
    model = train.best_model(trainer, path)
    assert train._mean_elbo(model, digits.valid)[0] == trainer.best


def test_bfloat16_is_for_the_networks_in_training_and_learns_as_much(digits):
    seen = []

    def watch(module: torch.nn.Module, args: object, out: torch.Tensor) -> None:
        seen.append(out.dtype)

    half, full = (make(digits, precision=precision) for precision in ("bfloat16", "float32"))
    half.model.decoder.register_forward_hook(watch)
    ours, theirs = (run(trainer, 140) for trainer in (half, full))
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert ours[0][0] == pytest.approx(theirs[0][0], rel=5e-3)
    ends = [sum(elbo for elbo, _, _ in run[-14:]) / 14 for run in (ours, theirs)]
    assert ends[0] == pytest.approx(ends[1], abs=0.5)
    seen.clear()
    train.evaluate(half.model, digits, 2)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_without_bfloat16_is_said(digits, monkeypatch, fast):
    monkeypatch.setattr(train, "_multiplies_bfloat16", lambda _: fast)
    for precision in checkpoint.PRECISIONS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make(digits, precision=precision)
        said = ["bfloat16 matrices in software" in str(one.message) for one in caught]
        assert said == [True] * (precision == "bfloat16" and not fast)


_EVERY = [
    *((name, {}) for name in models.MODELS if name not in ("vae", "m1m2", "factor-analysis")),
    ("local-vae", {"inference": "semi"}),
    ("factor-analysis", {"likelihood": "gaussian"}),
    ("m1m2", {"base": models.VAE(64, 4, hidden=(8,)).config}),
    *(("vae", {"posterior": name}) for name in models.POSTERIORS),
    *(("vae", {"prior": name}) for name in models.PRIORS),
    *(("vae", {"objective": name}) for name in models.OBJECTIVES),
    *(
        ("vae", {"posterior": name, "objective": objective, "num_samples": 4})
        for objective, names in (("iwae", ("full", "low-rank", "mixture")), ("dreg", ("full",)))
        for name in names
    ),
    *(("sbn", {"objective": name}) for name in models.sigmoid_belief.OBJECTIVES),
    *(("naive-bayes", {"objective": name}) for name in models.naive_bayes.OBJECTIVES),
]


@pytest.mark.parametrize(("name", "config"), _EVERY, ids=str)
def test_every_model_has_the_gradient_of_float32_in_bfloat16(digits, name, config):
    """Nearly: of the first step, whose noise has the same seed in both."""
    slopes = []
    for precision in checkpoint.PRECISIONS:
        trainer = Trainer(name, config, digits, Settings(precision=precision, batch_size=1000))
        trainer.train_step()
        given = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        slopes.append(torch.cat([grad.flatten() for grad in given]).double())
    one, two = slopes
    assert one.norm() > 0
    assert torch.cosine_similarity(one, two, 0) > 0.999
    assert two.norm() == pytest.approx(one.norm().item(), rel=5e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "float16"}, "precision must be one of float32, bfloat16, got 'float16'"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"ema": float("nan")}, r"ema must be in \[0, 1\), got nan"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"lr": -1e-3}, "lr must be positive, got -0.001"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, or None, got 0.0"),
        ({"clip_norm": -1.0}, "clip_norm must be positive, or None, got -1.0"),
        ({"warmup": -2}, "warmup must be at least 0, got -2"),
        ({"patience": -1}, "patience must be at least 0, got -1"),
    ],
)
def test_settings_that_are_none_are_refused(digits, settings, message):
    with pytest.raises(ValueError, match=message):
        make(digits, **settings)


# --- Ctrl-C ---------------------------------------------------------------------------------------


def test_ctrl_c_finishes_the_step_and_writes_the_checkpoint(digits, tmp_path):
    class Interrupted(Trainer):
        def train_step(self) -> tuple[float, float, float]:
            if self.step == 16:
                os.kill(os.getpid(), signal.SIGINT)
            return super().train_step()

    before = signal.getsignal(signal.SIGINT)
    trainer, path = Interrupted("vae", CONFIG, digits, Settings()), tmp_path / "c"
    assert not train.fit(trainer, path, epochs=100)
    assert signal.getsignal(signal.SIGINT) is before
    assert trainer.step == 17
    straight = make(digits)
    run(straight, 20)
    resumed = Trainer.resume(path, digits)
    run(resumed, 3)
    assert same(state(resumed), state(straight))


# --- divergence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(digits, tmp_path, poison):
    trainer, path = make(digits), tmp_path / "c"
    run(trainer, 5)
    trainer.save(path)
    content = path.read_bytes()
    trainer.model.decoder[-1].bias.data[3] = poison
    before = state(trainer)
    with pytest.raises(TrainingDiverged) as caught:
        trainer.train_step()
    text = str(caught.value)
    assert "diverged at step 6 (epoch 1): the ELBO is" in text
    assert all(hint in text for hint in ("lower --lr (now 0.002)", "--clip-norm", "log_var"))
    after = state(trainer)
    del before["generator"], after["generator"]
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    assert trainer.step == 5
    with pytest.raises(TrainingDiverged, match=r"step 5 .*decoder\.2\.bias are not finite"):
        trainer.save(path)
    assert path.read_bytes() == content


def test_a_learning_rate_far_too_high_diverges_and_keeps_the_last_checkpoint(digits, tmp_path):
    trainer = make(digits, lr=1e30)
    with pytest.raises(TrainingDiverged, match="diverged at step"):
        train.fit(trainer, tmp_path / "c", epochs=5)
    stored = checkpoint.read(tmp_path / "c")
    assert all(bool(value.isfinite().all()) for value in stored.part("model").values())
    assert stored.build_model().elbo(digits.batch(torch.arange(9))).elbo.isfinite().all()


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture
def stored(digits, tmp_path) -> Path:
    trainer, path = make(digits), tmp_path / "checkpoint.safetensors"
    run(trainer, 3)
    trainer.save(path)
    return path


def rewrite(path: Path, change: Callable[[dict, dict[str, torch.Tensor]], None]) -> None:
    """Change the JSON header, the tensors, or both, and leave a sound safetensors file."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as stream:
        header = json.loads(stream.metadata()["fastvae"])
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, path, {"fastvae": json.dumps(header)})


def refusal(path: Path, digits: data.Dataset) -> str:
    with pytest.raises(CheckpointError) as caught:
        Trainer.resume(path, digits)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert "; " in text
    return text


def test_a_checkpoint_is_one_file_that_others_can_read(stored):
    from safetensors.torch import load_file

    assert [p.name for p in stored.parent.iterdir()] == ["checkpoint.safetensors"]
    tensors = load_file(stored)
    assert tensors["model.decoder.2.weight"].shape == (64, 16)
    header = checkpoint.read(stored).header
    assert (header.model, header.settings.data, header.step) == ("vae", "digits", 3)
    assert header.image_shape == (8, 8)
    model = checkpoint.read_model(stored)
    assert not model.training
    assert model.sample(2).shape == (2, 64)


@pytest.mark.parametrize("keep", [0.0, 0.0005, 0.1, 0.5, 0.999])
def test_a_cut_checkpoint_is_refused(digits, stored, keep):
    content = stored.read_bytes()
    stored.write_bytes(content[: int(keep * len(content))])
    assert "is damaged or no safetensors file" in refusal(stored, digits)


def test_files_of_other_programs_are_refused(digits, stored):
    from safetensors.torch import save_file

    stored.write_bytes(os.urandom(5000))
    assert "is damaged or no safetensors file" in refusal(stored, digits)
    torch.save({"model": torch.zeros(3)}, stored)
    assert "is damaged or no safetensors file" in refusal(stored, digits)
    save_file({"weight": torch.zeros(3)}, stored)
    assert "is a safetensors file of another program" in refusal(stored, digits)
    stored.unlink()
    assert "is not a file" in refusal(stored, digits)
    stored.mkdir()
    assert "is not a file" in refusal(stored, digits)


def drop(name: str) -> Callable[[dict, dict[str, torch.Tensor]], None]:
    return lambda header, tensors: tensors.pop(name)


CHANGES: dict[str, tuple[Callable[[dict, dict[str, torch.Tensor]], object], str]] = {
    "newer format": (lambda h, t: h.update(format=2), "format 2, not 1"),
    "no format": (lambda h, t: h.pop("format"), "header that this fastvae cannot read"),
    "no step": (lambda h, t: h.pop("step"), "no step"),
    "odd settings": (lambda h, t: h["settings"].update(colour=1), "header that this fastvae"),
    "odd shape": (lambda h, t: h.update(image_shape=8), "header that this fastvae"),
    "odd model": (lambda h, t: h.update(model="gan"), "no model 'gan'"),
    "odd config": (lambda h, t: h["config"].update(latent_dim=5), "size mismatch"),
    "no config": (lambda h, t: h.update(config={}), "does not fit this fastvae"),
    "no weight": (drop("model.decoder.2.weight"), "Missing key"),
    "odd weight": (lambda h, t: t.update({"model.x": torch.zeros(1)}), "Unexpected key"),
    "no moment": (drop("optimizer.decoder.2.weight.exp_avg"), "lacks what it takes to go on"),
    "no generator": (drop("generator"), "lacks what it takes to go on"),
    "odd generator": (lambda h, t: t.update(generator=torch.zeros(7)), "lacks what it takes"),
    "short order": (lambda h, t: t.update(order=t["order"][:9].clone()), "shuffles 9 images"),
    "other data": (lambda h, t: h["settings"].update(data="mnist"), "on mnist, not on digits"),
    "other device": (lambda h, t: h.update(device="cuda"), "written on cuda"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_checkpoint_that_does_not_fit_is_refused(digits, stored, case):
    change, complaint = CHANGES[case]
    rewrite(stored, change)
    assert complaint in refusal(stored, digits)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_while_writing_keeps_the_old_file(digits, stored, monkeypatch, call):
    content = stored.read_bytes()
    trainer = Trainer.resume(stored, digits)
    run(trainer, 1)

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        trainer.save(stored)
    assert caught.value.filename == str(stored)
    assert stored.read_bytes() == content
    assert [p.name for p in stored.parent.iterdir()] == [stored.name]


def test_a_crash_while_writing_keeps_the_old_file(stored):
    content = stored.read_bytes()
    code = (
        "import os, pathlib, sys\n"
        "from fastvae import files\n"
        "os.fsync = lambda fd: os._exit(9)\n"  # the process dies with the new content half out
        "files.write_atomically(pathlib.Path(sys.argv[1]), b'new')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(stored)]).returncode == 9
    assert stored.read_bytes() == content


def test_a_written_file_is_whole_and_readable_by_others(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    files.write_atomically(path, b"one")
    files.write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert path.stat().st_mode == plain.stat().st_mode


# --- pictures and results -------------------------------------------------------------------------


def test_mosaic_puts_images_in_reading_order():
    images = torch.arange(3.0).repeat_interleave(4).reshape(3, 4)
    grid = pictures.mosaic(images, (2, 2), columns=2)
    gap = float("nan")
    expected = torch.tensor(
        [[0, 0, gap, 1, 1]] * 2 + [[gap] * 5] + [[2, 2, gap, gap, gap]] * 2, dtype=torch.float32
    )
    torch.testing.assert_close(grid, expected, equal_nan=True)


@pytest.mark.parametrize("shape", [(8, 8), (28, 20)])
def test_a_picture_is_a_png_with_light_and_dark_in_it(tmp_path, shape):
    import matplotlib.image

    torch.manual_seed(0)
    model = models.VAE(shape[0] * shape[1], latent_dim=2, hidden=(4,))
    images = torch.rand(30, shape[0] * shape[1]).round().byte()
    dataset = data.Dataset("noise", images, images, images, shape, "bernoulli", "none")
    path = tmp_path / "picture.png"
    train.picture(path, model, dataset, "a title")
    pixels = torch.from_numpy(matplotlib.image.imread(path))
    assert pixels.shape[1] > pixels.shape[0] > 300  # three panels side by side
    assert float(pixels[..., :3].std()) > 0.2


def test_results_say_what_was_reached_with_what(digits, tmp_path):
    trainer = make(digits)
    evaluation = train.evaluate(trainer.model, digits, num_samples=2)
    train.save_results(tmp_path / "results.json", trainer, evaluation)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["test"]["elbo"] == evaluation.elbo
    expected = {"data_dim": 64, "likelihood": "bernoulli", **CONFIG}
    assert results["config"] == trainer.model.config
    assert {**results["config"], **expected} == results["config"]
    assert results["fastvae"] == fastvae.__version__
