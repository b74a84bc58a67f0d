"""Recipes that can be built, runs that go on, and records that say what was done."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

from fastvae import checkpoint, cli, data, evaluation, models, reproduce, train
from fastvae.checkpoint import CheckpointError, Settings
from fastvae.reproduce import Recipe, Stage

RECIPES = reproduce.recipes()
RECORDS = Path(__file__).parents[1] / "bench/results/reproductions"
VAE = {"latent_dim": 4, "hidden": [16]}
M2 = {"latent_dim": 2, "hidden": [16]}


def row(**changes) -> Recipe:
    stage = Stage("vae", "vae", 2, VAE, {"data": "digits"}, "made")
    given = {"metric": "nll", "published": 20.0, "importance_samples": 4, "stages": (stage,)}
    return Recipe(**{"name": "made", "title": "a VAE", "paper": "nobody", **given, **changes})


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_built(name):
    recipe = RECIPES[name]
    assert recipe.metric in reproduce.METRICS
    assert recipe.published > 0
    built = {}
    for stage in recipe.stages:
        assert Settings(**stage.settings).data in data.DATASETS
        config = dict(stage.config)
        of_data = {"data_dim": 784, "likelihood": "bernoulli", "dataset_size": 50_000}
        own = {key: of_data[key] for key in models.MODELS[stage.model].of_data}
        if recipe.num_labels and stage.model in ("m2", "m1m2"):
            config["num_labels"] = recipe.num_labels
        if stage.features:
            config["base"] = built[stage.features].config
        assert stage.start is None or stage.start in built
        built[stage.name] = models.build(stage.model, {**own, **config})
    if recipe.classifier:
        assert recipe.classifier in evaluation.CLASSIFIERS
    assert recipe.classified in (None, *data.DATASETS)


def test_variants_have_the_labels_of_their_name():
    assert RECIPES["m1m2-3000"].num_labels == 3000
    assert RECIPES["m1m2-3000"].published == 2.18
    assert [stage.family for stage in RECIPES["m1m2-3000"].stages] == ["m1", "m1m2"]
    with pytest.raises(ValueError, match="there is no row 'gan'; take one of vae"):
        reproduce.recipe("gan")


def test_a_run_is_recorded_and_goes_on(tmp_path):
    first = reproduce.run(row(), tmp_path, seeds=2, epochs=1)
    assert [one["training"]["vae"]["epochs"] for one in first["seeds"]] == [1, 1]
    second = reproduce.run(row(), tmp_path, seeds=2)
    assert [one["training"]["vae"]["epochs"] for one in second["seeds"]] == [2, 2]
    before, after = (one["seeds"][0]["training"]["vae"]["seconds"] for one in (first, second))
    assert after > before > 0
    values = [one["value"] for one in second["seeds"]]
    assert values[0] != values[1]
    assert second["ours"] == pytest.approx(sum(values) / 2)
    assert second["ours_deviation"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert json.loads((tmp_path / "record-made.json").read_text()) == second
    assert second["device"]
    assert second["precision"] == "float32"
    whole = reproduce.run(row(), tmp_path / "at once", seeds=1)
    assert whole["seeds"][0]["value"] == values[0]


def test_the_best_epoch_is_what_is_scored(tmp_path):
    settings = {"data": "digits", "lr": 1e-2, "patience": 3}
    stages = (Stage("vae", "vae", 1000, VAE, settings, "made"),)
    (seed,) = reproduce.run(row(stages=stages), tmp_path)["seeds"]
    far, folder = seed["training"]["vae"], tmp_path / "made/seed-0/vae"
    assert far["best_epoch"] + 3 == far["epochs"] < 1000
    best = checkpoint.read(folder / "best.safetensors")
    assert best.header.epoch == best.header.best_epoch == far["best_epoch"]
    scored = train.evaluate(best.build_model(), data.load("digits"), 4)
    assert seed["value"] == -scored.log_likelihood
    again = reproduce.run(row(stages=stages), tmp_path)  # which has nothing left to train
    assert again["seeds"] == [seed]


def test_annealing_says_what_importance_samples_lose(tmp_path):
    record = reproduce.run(row(importance_samples=200, annealed_images=20), tmp_path)
    (seed,) = record["seeds"]
    assert seed["annealed"]["images"] == 20
    (path,) = tmp_path.rglob("checkpoint.safetensors")
    some = data.load("digits").some_test(20)
    known = checkpoint.read_model(path).log_likelihood(some, 5000).mean()
    assert seed["annealed"]["value"] == pytest.approx(-known.item(), abs=0.3)


def test_no_seeds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="reproduce: seeds must be positive, got 0"):
        reproduce.run(row(), tmp_path, seeds=0)


def test_time_that_is_up_leaves_a_record_of_how_far_it_went(tmp_path):
    long = row(stages=(Stage("vae", "vae", 10_000, VAE, {"data": "digits"}, "made"),))
    record = reproduce.run(long, tmp_path, minutes=0.02)
    assert 0 <= record["seeds"][0]["training"]["vae"]["epochs"] < 10_000


def test_a_seed_that_was_not_trained_is_not_scored(tmp_path, monkeypatch):
    """The minutes are those of training: here of a step each."""
    scored = reproduce._score
    monkeypatch.setattr(reproduce, "_score", lambda *of: time.sleep(0.5) or scored(*of))
    both = reproduce.run(row(), tmp_path / "enough", seeds=2, minutes=10)
    assert len(both["seeds"]) == 2
    long = row(stages=(Stage("vae", "vae", 10_000, VAE, {"data": "digits"}, "made"),))
    record = reproduce.run(long, tmp_path, seeds=2, minutes=0.005)
    (one,) = record["seeds"]
    assert record["ours"] == one["value"]
    assert record["ours_deviation"] is None


def test_a_run_that_diverges_says_so_and_keeps_its_time(tmp_path, monkeypatch, capsys):
    wild = row(stages=(Stage("vae", "vae", 3, VAE, {"data": "digits", "lr": 1e30}, "made"),))
    monkeypatch.setattr(reproduce, "recipe", lambda name: wild)
    assert cli.main(["reproduce", "wild", "--out", str(tmp_path)]) == 3
    err = capsys.readouterr().err
    assert err.startswith("fastvae: training diverged")
    assert err.count("\n") == 1
    assert float((tmp_path / "made/seed-0/vae/seconds").read_text()) > 0


def test_ctrl_c_keeps_the_time_that_was_spent(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce.train, "fit", lambda trainer, path, **_: path.parent.mkdir(
        parents=True, exist_ok=True))  # fmt: skip
    assert reproduce.run(row(), tmp_path) is None
    assert float((tmp_path / "made/seed-0/vae/seconds").read_text()) >= 0
    assert not (tmp_path / "record-made.json").exists()


def test_stages_share_what_comes_before_the_labels(tmp_path):
    stages = (
        Stage("m1", "vae", 1, VAE, {"data": "digits"}, "first"),
        Stage("m2", "m1m2", 1, M2, {"data": "digits"}, "both", features="m1"),
    )
    for labels in (20, 50):
        given = {"stages": stages, "metric": "error", "num_labels": labels}
        record = reproduce.run(row(name=f"both-{labels}", **given), tmp_path)
        assert 0 < record["ours"] < 100
        assert record["ours"] == pytest.approx(100 * record["seeds"][0]["test"]["error"])
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.safetensors"))
    assert found == [
        "both-20/seed-0/m2/checkpoint.safetensors",
        "both-50/seed-0/m2/checkpoint.safetensors",
        "first/seed-0/m1/checkpoint.safetensors",
    ]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_stage_may_begin_where_another_ended(tmp_path, ema):
    first = Stage("vae", "vae", 2, VAE, {"data": "digits"}, "first")
    tight = {**VAE, "objective": "iwae", "num_samples": 5}
    second = Stage("iwae", "vae", 0, tight, {"data": "digits", "ema": ema}, "made", start="vae")
    before = reproduce.run(row(stages=(first,)), tmp_path)
    after = reproduce.run(row(stages=(first, second)), tmp_path)
    assert after["ours"] == before["ours"]  # of no epochs of its own
    more = reproduce.run(row(stages=(first, second)), tmp_path, epochs=3)
    assert more["ours"] < after["ours"]
    digits = data.load("digits")
    trainer = train.Trainer("vae", VAE, digits, Settings())
    trainer.train_step()
    with pytest.raises(ValueError, match="begin_with: step must be 0, got 1"):
        trainer.begin_with(trainer.model)
    flow = train.Trainer("vae", {**VAE, "posterior": "planar"}, digits, Settings(ema=ema))
    own = {name: value.clone() for name, value in flow.model.state_dict().items()}
    flow.begin_with(trainer.model)
    for name, value in flow.average.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict().get(name, own[name]))
    fresh = train.Trainer("vae", VAE, digits, Settings())
    before = {name: value.clone() for name, value in fresh.model.state_dict().items()}
    for other, message in (
        (flow.model, "with other flow"),
        (models.VAE(64, latent_dim=5, hidden=(16,)), "with other encoder"),
        (models.VAE(64, latent_dim=4, hidden=(16,), activation="relu"), "with other activation"),
        (models.DLGM(64, latent_dim=4, hidden=(16,)), "a part of this vae, got a DLGM"),
    ):
        with pytest.raises(ValueError, match=f"begin_with: model must be .*{message}"):
            fresh.begin_with(other)
    assert all(torch.equal(value, before[n]) for n, value in fresh.model.state_dict().items())


def test_a_run_goes_on_by_its_recipe_only_and_says_what_it_was_made_of(tmp_path):
    first = Stage("vae", "vae", 2, VAE, {"data": "digits"}, "first")
    second = Stage("more", "vae", 1, VAE, {"data": "digits"}, "made", start="vae")
    reproduce.run(row(stages=(first, second)), tmp_path, epochs=1)
    record = reproduce.run(row(stages=(first, second)), tmp_path)
    trained = record["seeds"][0]["training"]
    assert trained["vae"]["epochs"] == 2
    assert trained["more"]["of"]["vae"]["epochs"] == 1  # as it was then
    third = Stage("half", "vae", 1, VAE, {"data": "digits"}, "half", start="vae")
    record = reproduce.run(row(stages=(first, third)), tmp_path, precision="bfloat16")
    trained = record["seeds"][0]["training"]
    assert [trained[name]["precision"] for name in ("vae", "half")] == ["float32", "bfloat16"]
    with pytest.raises(CheckpointError, match="precision 'float32', this run has 'bfloat16'"):
        reproduce.run(row(stages=(first,)), tmp_path, epochs=3, precision="bfloat16")
    for change in (
        {"config": {**VAE, "latent_dim": 5}},
        {"config": {**VAE, "posterior": "planar"}},  # of which the first says nothing
        {"settings": {"data": "digits", "lr": 1}},
        {"model": "dlgm"},
    ):
        other = dataclasses.replace(first, **change)
        with pytest.raises(CheckpointError, match=r"this run has .*; pass another --out"):
            reproduce.run(row(stages=(other,)), tmp_path)


@pytest.mark.parametrize("classifier", evaluation.CLASSIFIERS)
def test_a_classifier_of_latents(tmp_path, classifier):
    given = {"metric": "error", "num_labels": 200, "classifier": classifier}
    config = {"latent_dim": 8, "hidden": [64]}
    settings = {"data": "digits", "lr": 5e-3, "batch_size": 25}
    stages = (Stage("m1", "vae", 30, config, settings, "m1"),)
    record = reproduce.run(row(name="m1-200", stages=stages, **given), tmp_path)
    assert 0 < record["ours"] < 50  # by chance: 90


@pytest.mark.parametrize(
    "given",
    [
        {"classifier": "linear"},
        {"stages": (Stage("m2", "m2", 2, {**M2, "alpha": 10.0}, {"data": "digits"}, "made"),)},
    ],
    ids=["of latents", "of the model"],
)
def test_the_images_that_are_classified_may_be_others(tmp_path, monkeypatch, given):
    def blank(_):
        digits = data.load("digits")
        return dataclasses.replace(digits, name="blank", test=torch.zeros_like(digits.test))

    monkeypatch.setitem(data.DATASETS, "blank", blank)
    given = {"metric": "error", "num_labels": 100, **given}
    own, others = (reproduce.run(row(classified=c, **given), tmp_path) for c in (None, "blank"))
    assert own["ours"] < 80 < others["ours"]
    assert (own["classified"], others["classified"]) == (None, "blank")


def test_labels_spread_along_what_is_connected(monkeypatch):
    """Of ten rings within each other, with two labels for each."""
    monkeypatch.setattr(evaluation, "posterior_means", lambda _, x: x)
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(4000) % 10
    angle = 2 * torch.pi * torch.rand(4000, generator=generator)
    x = (1.0 + y).unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)
    rings = data.Dataset("rings", x, x, x, (1, 2), "gaussian", "none", (y, y, y))
    error = {
        name: evaluation.few_label_error(None, rings, 20, name) for name in evaluation.CLASSIFIERS
    }
    assert error["spread"] < 0.25  # the SVM at its end blurs the inner rings
    assert min(error["svm"], error["linear"]) > 0.6


def test_classifiers_refuse_what_they_cannot():
    model, digits = models.VAE(64, latent_dim=2, hidden=(4,)), data.load("digits")
    with pytest.raises(
        ValueError, match="classifier must be one of linear, svm, spread, got 'oracle'"
    ):
        evaluation.few_label_error(model, digits, 100, "oracle")
    with pytest.raises(ValueError, match="as many of each of 10 classes, got 105"):
        evaluation.few_label_error(model, digits, 105)
    with pytest.raises(ValueError, match="at most what each class has, got 1000 of"):
        evaluation.few_label_error(model, digits, 10_000)


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTVAE_DATA", str(tmp_path / "data"))
    assert cli.main(["reproduce"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in RECIPES)
    assert "88.71 (from memory)" in out
    assert cli.main(["reproduce", "gan"]) == 2
    assert "there is no row 'gan'" in capsys.readouterr().err
    assert cli.main(["reproduce", "vae"]) == 2
    assert "does not exist; set FASTVAE_DATA" in capsys.readouterr().err
    monkeypatch.setattr(reproduce, "recipe", lambda name: row(name=name))
    command = ["reproduce", "mine", "--seeds", "2", "--precision", "bfloat16"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "-log p(x), nats: published 20, here " in out
    assert "over 2 seeds)" in out
    record = json.loads(Path("runs/reproduce/record-mine.json").read_text())
    assert record["precision"] == "bfloat16"


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*.json")), ids=lambda path: path.stem)
def test_records_are_those_of_the_page(path):
    """REPRODUCTIONS.md says what the records say, of the recipes as they are."""
    record = json.loads(path.read_text())
    recipe = RECIPES[record["name"]]
    page = (RECORDS.parents[2] / "REPRODUCTIONS.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith(f"| `{recipe.name}` |")]
    assert f"| {record['ours']:.2f}" in line
    assert f"| {recipe.published:g}" in line or f"| ~{recipe.published:g}" in line
    for stage, own in zip(record["stages"], recipe.stages, strict=True):
        assert (stage["config"], stage["settings"]) == (own.config, own.settings)
        assert stage.get("start") == own.start
    assert record.get("classified") == recipe.classified
    assert torch.isfinite(torch.tensor(record["ours"]))
