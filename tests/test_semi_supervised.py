"""M2 and M1+M2: bounds against sums by hand, labels, and the command line."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from chance import generator
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

import fastvae
from fastvae import checkpoint, cli, data, models, train

D, C, L, N = 12, 3, 2, 30


pytestmark = pytest.mark.usefixtures("double")


def m2(**options) -> models.M2:
    options = {"num_labels": 6, "classes": C, "latent_dim": L, "hidden": (8, 5), **options}
    return models.M2(D, N, **options)


def m1m2(**options) -> models.M1M2:
    vae = models.VAE(D, 4, hidden=(8,), **options)
    few = {"num_labels": 6, "classes": C, "latent_dim": L, "hidden": (8, 5)}
    model = models.M1M2(D, N, vae.config, **few)
    model.base.load_state_dict(vae.state_dict())
    return model


def images(n: int = 6) -> Tensor:
    return torch.rand(n, D).bernoulli()


def dataset(n: int = N) -> data.Dataset:
    y = torch.arange(n) % C
    x = images(n)
    return data.Dataset("made", x, x, x, (3, 4), "bernoulli", "none", (y, y, y))


def one_class(network, x: Tensor, c: int) -> Tensor:
    """The same perceptron, of x and a one-hot class side by side."""
    first = torch.cat([network.of_x.weight, network.of_y.weight.T], 1)
    y = torch.nn.functional.one_hot(torch.tensor(c), C).to(x.dtype).expand(len(x), C)
    return network.rest(torch.cat([x, y], 1) @ first.T + network.of_x.bias)


def by_hand(model: models.M2, f: Tensor, c: int, eps: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x | y, z) and the divergence of q(z | x, y), without any op of fastvae."""
    mu, log_var = one_class(model.encoder, f, c).chunk(2, -1)
    sigma = (0.5 * log_var).exp()
    logits = one_class(model.decoder, mu + sigma * eps, c)
    kl = kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0)).sum(-1)
    return Bernoulli(logits=logits).log_prob(f).sum(-1), kl


@pytest.mark.parametrize("activation", ["softplus", "gated", "maxout"])
def test_all_classes_at_once_are_each_on_its_own(activation):
    model, x, key = m2(activation=activation), images(), fastvae.random.key(0)
    eps = fastvae.random.normal(key, (C, len(x), L), x.dtype)
    bound = model.class_bound(x, model.every, key=key)
    assert bound.elbo.shape == (C, len(x))
    for c in range(C):
        recon, kl = by_hand(model, x, c, eps[c])
        torch.testing.assert_close((bound.recon[c], bound.kl[c]), (recon, kl))
    y = torch.tensor([0, 2, 1, 1, 0, 2])
    eps = fastvae.random.normal(key, (len(x), L), x.dtype)
    own = model.class_bound(x, y, key=key)
    each = [by_hand(model, x, c, eps) for c in range(C)]
    recon = torch.stack([each[c][0][i] for i, c in enumerate(y.tolist())])
    torch.testing.assert_close(own.recon, recon)


def test_the_product_with_x_is_computed_once():
    model, rows = m2(), []
    model.encoder.of_x.register_forward_hook(lambda _, args, out: rows.append(out.shape))
    model.unlabelled(images(), key=fastvae.random.key(0))
    assert rows == [(6, 8)]


def test_the_bound_without_a_label_is_the_sum_over_classes():
    model, x, key = m2(), images(), fastvae.random.key(0)
    found = model.unlabelled(x, key=key)
    q = model.classifier(x).softmax(-1)
    each = model.class_bound(x, model.every, key=key).elbo - math.log(C)
    expected = (q.T * each).sum(0) + Categorical(q).entropy()
    torch.testing.assert_close(found.elbo, expected)
    torch.testing.assert_close(found.elbo, found.recon - found.kl)


def test_unlikely_classes_cost_nothing_and_the_bound_is_that_of_the_rest():
    model, x, key = m2(), images(), fastvae.random.key(0)
    with torch.no_grad():
        model.classifier[-1].weight.mul_(20)
    q = model.classifier(x).softmax(-1)
    prune = q.flatten().sort().values[[6, 7]].mean().item()  # 7 of 18 are less
    assert prune < 1 / C
    decoded = []
    model.decoder.register_forward_hook(lambda _, args, out: decoded.append(len(out)))
    found = model.unlabelled(x, key=key, prune=prune)
    assert decoded == [11]
    eps = fastvae.random.normal(key, (11, L), x.dtype)
    rows, classes = (q >= prune).nonzero(as_tuple=True)
    kept = q * (q >= prune)
    kept = kept / kept.sum(-1, keepdim=True)
    expected = Categorical(kept).entropy() - math.log(C)
    for i, (row, c) in enumerate(zip(rows.tolist(), classes.tolist(), strict=True)):
        recon, kl = by_hand(model, x[row : row + 1], c, eps[i])
        expected[row] += kept[row, c] * (recon - kl)[0]
    torch.testing.assert_close(found.elbo, expected)
    torch.testing.assert_close(found.elbo, found.recon - found.kl)
    slope = torch.autograd.grad(found.elbo.sum(), model.classifier[-1].bias)[0]
    wanted = torch.autograd.grad(expected.sum(), model.classifier[-1].bias)[0]
    torch.testing.assert_close(slope, wanted)


@pytest.mark.parametrize("prune", [0.0, 1e-9])
def test_the_objective_is_j_over_n(prune):
    model = m2(alpha=0.7, labelled_batch=5, prune=prune)
    made = dataset()
    model.prepare(made, generator())
    g, h = generator(), generator()
    batch = models.Batch(images(), torch.arange(6), lambda rows: made.train[rows])
    found = model.objective(batch, generator=g).elbo.mean()
    keys = [fastvae.random.from_generator(h) for _ in range(4)]
    pick = torch.randint(6, (5,), generator=h)
    x, y = made.train[model.rows[pick]], model.y[pick]
    u = model.unlabelled(batch.x, key=keys[2], prune=prune).elbo.mean()
    bound = model.class_bound(x, y, key=keys[3]).elbo.mean() - math.log(C)
    log_q = Categorical(logits=model.classifier(x)).log_prob(y).mean()
    share = 6 / N
    torch.testing.assert_close(found, (1 - share) * u + share * bound + 0.7 * log_q)


@pytest.mark.parametrize("prune", [0.0, 1e-9])
def test_an_objective_without_labels_is_refused(prune):
    made = dataset()
    batch = models.Batch(images(), torch.arange(6), lambda rows: made.train[rows])
    with pytest.raises(RuntimeError, match="prepare must come before the objective"):
        m2(prune=prune).objective(batch, generator=generator())


def test_labels_are_as_many_of_each_class_and_drawn_by_the_generator():
    model, made = m2(), dataset()
    model.prepare(made, generator())
    assert torch.equal(model.y, made.labels[0][model.rows])
    assert torch.equal(model.y.bincount(), torch.tensor([2, 2, 2]))
    assert len(set(model.rows.tolist())) == 6
    again = m2()
    again.prepare(made, generator())
    assert torch.equal(again.rows, model.rows)
    again.prepare(made, torch.Generator().manual_seed(1))
    assert not torch.equal(again.rows, model.rows)


def test_data_that_cannot_be_labelled():
    made = dataset()
    nameless = data.Dataset("bare", made.train, made.train, made.train, (3, 4), "bernoulli", "none")
    with pytest.raises(ValueError, match="labels must be known of some images, and bare has"):
        m2().prepare(nameless, generator())
    with pytest.raises(ValueError, match="must be at most what each class has, got 2 of"):
        m2().prepare(dataset(4), generator())
    with pytest.raises(ValueError, match="classes must be those of made, got 2 and labels up to 2"):
        m2(classes=2).prepare(dataset(), generator())


@pytest.mark.parametrize("make", [m2, m1m2])
def test_bounds_are_in_order(make):
    model, x = make(), images()
    with torch.no_grad():
        many = x.repeat(4000, 1)
        elbo = model.elbo(many, generator=generator()).elbo.unflatten(0, (-1, 6)).mean(0)
    one, two = (
        model.log_likelihood(x, 6000, generator=torch.Generator().manual_seed(k)) for k in range(2)
    )
    torch.testing.assert_close(one, two, rtol=0, atol=0.1)
    assert (elbo < one).all()
    bound = model.elbo(x, generator=generator())
    torch.testing.assert_close(bound.elbo, bound.recon - bound.kl)


def test_the_density_sums_to_one():
    """Over all images of four pixels, by importance sampling."""
    model = models.M2(4, N, num_labels=3, classes=C, latent_dim=1, hidden=(5,))
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    total = model.log_likelihood(every, 4000, generator=generator()).exp().sum().item()
    assert total == pytest.approx(1.0, abs=0.01)


def test_m1_is_not_learnt_and_lends_its_latents():
    model, x = m1m2(posterior="full"), images()
    assert not any(p.requires_grad for p in model.base.parameters())
    f = model.features(x, torch.arange(6), key=fastvae.random.key(1))
    assert f.shape == (6, 4)
    torch.testing.assert_close(f, model.base.posterior(x).draw(key=fastvae.random.key(1))[0])
    assert model.classify(x).shape == (6, C)
    torch.testing.assert_close(model.classify(x), model.classifier(model.base.posterior(x).mean))


@pytest.mark.parametrize("make", [m2, m1m2])
def test_pictures(make):
    model, x = make(), images()
    assert model.sample(7, generator=generator()).shape == (7, D)
    assert model.reconstruct(x).shape == (6, D)
    made = model.analogies(x)
    assert made.shape == (6, 1 + C, D)
    torch.testing.assert_close(made[:, 0], x)
    own = model.classify(x).argmax(-1)
    torch.testing.assert_close(made[torch.arange(6), 1 + own], model.reconstruct(x))
    styles = model.styles(2, side=3)
    assert styles.shape == (9, D)
    middle = model.generate(torch.zeros(1, L), torch.tensor([2]))
    torch.testing.assert_close(styles[4:5], middle)
    with pytest.raises(ValueError, match="latent_dim must be 2 for styles, got 3"):
        m2(latent_dim=3).styles(0)
    for none in (-1, model.classes):
        with pytest.raises(ValueError, match=f"y must be a class, 0 to .*, got {none}"):
            model.styles(none)


def test_few_labels_teach_what_many_images_know():
    """Of clusters that anyone can tell apart, with two labels of each."""
    torch.manual_seed(3)
    prototypes = torch.rand(C, D).round() * 0.9 + 0.05
    y = torch.arange(300) % C
    x = prototypes[y].bernoulli()
    config = {"num_labels": 6, "classes": C, "latent_dim": L, "hidden": [16], "alpha": 1.0}
    torch.set_default_dtype(torch.float32)
    made = data.Dataset(
        "made", x.float(), x.float(), x.float(), (3, 4), "bernoulli", "none", (y, y, y)
    )
    trainer = train.Trainer("m2", config, made, checkpoint.Settings(lr=5e-3, batch_size=50))
    for _ in range(400):
        trainer.train_step()
    found = train.evaluate(trainer.model, made, num_samples=0)
    best = (made.test.double() @ prototypes.logit().T + (1 - prototypes).log().sum(-1)).argmax(-1)
    by_chance = (best != y).double().mean().item()
    assert found.error < by_chance + 0.05
    assert f"test error           {100 * found.error:9.2f} %" in str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 7}, "as many of each class, .* got 7, 3 and 30"),
        ({"num_labels": 33}, "got 33, 3 and 30"),
        ({"latent_dim": 0}, "sizes must be positive"),
        ({"hidden": ()}, "sizes must be positive"),
        ({"alpha": math.nan}, "alpha not negative, got .* nan"),
        ({"prune": 1 / C}, r"prune must be in \[0, 1 / 3\), got 0.333"),
        ({"prune": -0.1}, r"prune must be in .*, got -0.1"),
        ({"prune": math.nan}, r"prune must be in .*, got nan"),
        ({"likelihood": "poisson"}, "likelihood must be one of"),
        ({"activation": "sine"}, "activation must be one of"),
    ],
)
def test_wrong_options_raise(options, message):
    with pytest.raises(ValueError, match=f"M2: .*{message}"):
        m2(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_dim": 5}, "base must have the data_dim of the data, got 12 and 5"),
        ({"likelihood": "gaussian"}, "base must have the likelihood of the data"),
        ({"num_labels": 7}, "as many of each class, .* got 7"),
    ],
)
def test_m1_must_be_of_the_same_images(options, message):
    base = models.VAE(D, 4, hidden=(8,)).config
    with pytest.raises(ValueError, match=f"M1M2: .*{message}"):
        models.M1M2(**{"data_dim": D, "dataset_size": N, "base": base, **options})


def test_m1_may_have_a_posterior_of_parts():
    """Of which one by chance is taken: a sample of the mixture."""
    model, x = m1m2(posterior="mixture", posterior_size=C), images(1)
    with torch.no_grad():
        model.base.encoder[-1].bias[8::9] += torch.tensor([0.0, 1.0, 2.0])
    many = x.expand(20_000, -1)
    f = model.features(many, torch.arange(20_000), key=fastvae.random.key(0))
    q = model.base.posterior(x)
    torch.testing.assert_close(f.mean(0), q.mean[0], rtol=0, atol=0.03)
    second = q.average(q.mu**2 + q.log_var.exp())[0]
    torch.testing.assert_close((f**2).mean(0), second, rtol=0, atol=0.06)
    assert model.elbo(x, generator=generator()).elbo.shape == (1,)


def test_images_that_never_change_are_encoded_once():
    """And are drawn anew each time all the same; others, and mixtures, are encoded each time."""
    model, made, rows = m1m2(), dataset(1500), torch.tensor([1300, 5, 5])
    key = fastvae.random.key(1)
    expected = model.features(made.train[rows], rows, key=key)
    model.before_steps(dataclasses.replace(made, noise="bernoulli"))
    assert model.encoded is None
    model.before_steps(made)
    assert not model.encoded.mu.requires_grad
    seen = torch.full((3, D), torch.nan)  # nothing is made of these
    torch.testing.assert_close(model.features(seen, rows, key=key), expected)
    assert not torch.equal(model.features(seen, rows, key=fastvae.random.key(2)), expected)
    assert "encoded" not in "".join(model.state_dict())
    mixture = m1m2(posterior="mixture", posterior_size=2)
    mixture.before_steps(made)
    assert mixture.encoded is None


def test_a_resumed_m1m2_encodes_by_the_weights_it_was_stored_with(tmp_path):
    torch.set_default_dtype(torch.float32)
    fixed = dataclasses.replace(data.load("digits"), noise="none")
    m1 = models.VAE(64, latent_dim=3, hidden=(8,))
    config = {"num_labels": 50, "latent_dim": 2, "hidden": (8,)}
    trainer = train.Trainer("m1m2", config, fixed, checkpoint.Settings(ema=0.9), m1=m1)
    trainer.train_step()
    trainer.save(tmp_path / "checkpoint")
    resumed = train.Trainer.resume(tmp_path / "checkpoint", fixed)
    assert resumed.train_step() == trainer.train_step()
    mu, log_var = m1.encode(fixed.train)
    torch.testing.assert_close(resumed.model.encoded.mu, mu)
    torch.testing.assert_close(resumed.model.encoded.log_var, log_var)
    assert resumed.average.encoded is None  # which takes no steps


def test_trains_from_the_command_line_alone_and_on_m1(tmp_path, monkeypatch, capsys):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    quick = ["--hidden", "16", "--importance-samples", "2"]
    labels = ["--latent-dim", "2", "--num-labels", "50"]
    assert cli.main(["train", "m2", *quick, *labels, "--epochs", "2"]) == 0
    assert "test error" in capsys.readouterr().out
    path = tmp_path / "runs/m2-digits/checkpoint.safetensors"
    assert len(checkpoint.read_model(path).rows) == 50
    assert cli.main(["sample", str(path)]) == 0

    assert cli.main(["train", "vae", *quick, "--latent-dim", "5", "--epochs", "2"]) == 0
    m1 = "runs/vae-digits/checkpoint.safetensors"
    both = ["train", "m1m2", *quick, *labels, "--features", m1, "--prune", "0.05"]
    assert cli.main([*both, "--epochs", "2", "--out", "whole"]) == 0
    assert cli.main([*both, "--epochs", "1", "--out", "parts"]) == 0
    assert cli.main([*both, "--epochs", "2", "--out", "parts", "--resume"]) == 0
    whole, parts = (
        checkpoint.read(tmp_path / out / "checkpoint.safetensors").part("model")
        for out in ("whole", "parts")
    )
    first = checkpoint.read(tmp_path / m1).part("model")
    assert all(torch.equal(whole[f"base.{name}"], first[name]) for name in first)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    capsys.readouterr()
    assert checkpoint.read(tmp_path / "whole/checkpoint.safetensors").header.config["prune"] == 0.05
    assert (
        cli.main(["train", "vae", *quick, "--latent-dim", "5", "--epochs", "1", "--out", "m"]) == 0
    )
    capsys.readouterr()
    other = [*both, "--features", "m/checkpoint.safetensors", "--epochs", "3", "--out", "parts"]
    assert cli.main([*other, "--resume"]) == 2
    assert "is not the M1 of the run in parts; leave it out" in capsys.readouterr().err
    assert cli.main([*both, "--prune", "0.1", "--out", "x"]) == 2
    assert "prune must be in [0, 1 / 10), got 0.1" in capsys.readouterr().err
    assert cli.main(["train", "m2", "--num-labels", "55", "--out", "x"]) == 2
    assert "as many of each class" in capsys.readouterr().err
    assert cli.main(["train", "vae", "--features", m1, "--out", "x"]) == 2
    assert "--features goes with m1m2 only, got vae" in capsys.readouterr().err
    assert cli.main(["train", "m1m2", "--out", "x"]) == 2
    assert "m1m2 needs --features, the checkpoint of a vae" in capsys.readouterr().err
    assert cli.main(["train", "m1m2", "--features", str(path), "--out", "x"]) == 2
    assert "must be a checkpoint of a vae, got " in capsys.readouterr().err
    assert cli.main([*both, "--data", "mnist", "--out", "x"]) == 2
