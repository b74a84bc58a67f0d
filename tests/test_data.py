"""Data sets: what is read, what noise is added, and a clear sentence for every damaged file."""

from __future__ import annotations

import contextlib
import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvae import data

MNIST = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")


@pytest.fixture
def real() -> Path:
    """The folder of the real data sets."""
    root = Path(os.environ.get("FASTVAE_DATA", "unset"))
    if not (root / "mnist").is_dir():
        pytest.skip("FASTVAE_DATA names no folder with the real data sets")
    return root


def idx(pixels: np.ndarray, magic: int = 0x803) -> bytes:
    return struct.pack(f">{1 + pixels.ndim}I", magic, *pixels.shape) + pixels.tobytes()


def write_mnist(root: Path, compress: bool = True) -> dict[str, np.ndarray]:
    folder = root / "mnist"
    folder.mkdir()
    random = np.random.default_rng(0)
    images = {}
    for name, count in zip(MNIST, (12, 4), strict=True):
        images[name] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(images[name])))
        else:
            (folder / name).write_bytes(idx(images[name]))
    return images


def message(name: str, root: Path) -> str:
    """The sentence with which loading fails; every one names a file and is one line."""
    with pytest.raises(data.DataError) as caught:
        data.load(name, root)
    text = str(caught.value)
    assert text.startswith(str(root))
    assert "\n" not in text
    assert "; " in text  # what is wrong; what to do
    return text


# --- where the files are --------------------------------------------------------------------------


def test_root_is_the_argument_then_the_environment_then_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVAE_DATA", "/from/environment")
    assert data.data_root(tmp_path) == tmp_path
    assert data.data_root() == Path("/from/environment")
    monkeypatch.setenv("FASTVAE_DATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/from/cache")
    assert data.data_root() == Path("/from/cache/fastvae")
    with pytest.raises(data.DataError, match="~nobody_of_this_name is of nobody"):
        data.data_root("~nobody_of_this_name")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert data.data_root() == Path("/home/somebody/.cache/fastvae")


def test_unknown_name_lists_the_known_ones():
    known = "digits, mnist, gray_mnist, binarized_mnist, freyfaces"
    with pytest.raises(data.DataError, match=known):
        data.load("cifar")


# --- digits, and dynamic binarization -------------------------------------------------------------


def test_digits_are_split_without_loss_and_always_alike():
    from sklearn.datasets import load_digits

    one, two = data.load("digits"), data.load("digits")
    assert [len(split) for split in (one.train, one.valid, one.test)] == [1397, 200, 200]
    assert (one.image_shape, one.likelihood, one.noise) == ((8, 8), "bernoulli", "bernoulli")
    for split in ("train", "valid", "test"):
        assert torch.equal(getattr(one, split), getattr(two, split))
    everything = {row.tobytes() for row in (load_digits().data / 16).astype(np.float32)}
    train = {row.tobytes() for row in one.train.numpy()}
    assert train < everything
    assert len(everything - train) <= 400  # held out; some digits may occur twice
    assert one.test.dtype == torch.uint8
    assert set(one.test.unique().tolist()) == {0, 1}


def test_dynamic_binarization_draws_each_pixel_with_its_intensity():
    digits = data.load("digits")
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([digits.batch(torch.arange(20), generator) for _ in range(2000)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    # 1280 pixels, standard error at most 0.5 / sqrt(2000) = 0.0112: six of them is no accident
    assert (draws.mean(0) - digits.train[:20]).abs().max() < 6 * 0.0112
    assert not torch.equal(draws[0], draws[1])
    again = digits.batch(torch.arange(20), torch.Generator().manual_seed(0))
    assert torch.equal(again, draws[0])


# --- mnist ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [True, False], ids=["gz", "plain"])
def test_mnist_reads_idx_files(tmp_path, compress):
    images = write_mnist(tmp_path, compress)
    mnist = data.load("mnist", tmp_path)
    train = torch.from_numpy(images[MNIST[0]].reshape(12, 784)).float() / 255
    assert torch.equal(mnist.train, train[:10])
    assert mnist.valid.shape == (2, 784)
    assert mnist.test.shape == (4, 784)
    assert torch.equal(mnist.test, data.load("mnist", tmp_path).test)  # binarized by a fixed seed
    sure = torch.from_numpy(images[MNIST[1]].reshape(4, 784))
    assert bool((mnist.test[sure == 0] == 0).all())
    assert bool((mnist.test[sure == 255] == 1).all())


def test_gray_mnist_is_mnist_as_it_is(tmp_path):
    images = write_mnist(tmp_path)
    write_labels(tmp_path)
    mnist, gray = (data.load(name, tmp_path) for name in ("mnist", "gray_mnist"))
    assert gray.name == "gray_mnist"
    assert torch.equal(gray.train, mnist.train)
    assert torch.equal(gray.batch(torch.arange(3)), mnist.train[:3])
    test = torch.from_numpy(images[MNIST[1]].reshape(4, 784)).float() / 255
    assert torch.equal(gray.test, test)
    assert all(torch.equal(a, b) for a, b in zip(gray.labels, mnist.labels, strict=True))


LABELS = ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte")


def write_labels(root: Path, compress: bool = True) -> list[np.ndarray]:
    labels = [np.arange(n, dtype=np.uint8) % 10 for n in (12, 4)]
    for name, y in zip(LABELS, labels, strict=True):
        content = idx(y, 0x801)
        path = root / "mnist" / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)
    return labels


@pytest.mark.parametrize("compress", [True, False], ids=["gz", "plain"])
def test_mnist_has_labels_where_the_files_are(tmp_path, compress):
    write_mnist(tmp_path, compress)
    assert data.load("mnist", tmp_path).labels is None
    write_labels(tmp_path, compress)
    train, valid, test = data.load("mnist", tmp_path).to("cpu").labels
    assert train.dtype == torch.int64
    assert (train.tolist(), valid.tolist()) == ([*range(10)], [0, 1])
    assert test.tolist() == [0, 1, 2, 3]


# Damage has names: tests named by the bytes of a gzip file, which hold the time, differ by process.
BAD_LABELS: dict[str, tuple[bytes, str]] = {
    "too few": (
        gzip.compress(idx(np.zeros(11, np.uint8), 0x801)),
        "holds 11 labels up to 0, not 12",
    ),
    "an eleventh class": (
        gzip.compress(idx(np.full(12, 10, np.uint8), 0x801)),
        "12 labels up to 10, not 12 up to 9",
    ),
    "long idx": (
        gzip.compress(idx(np.zeros(12, np.uint8), 0x801) + b"x"),
        "12 bytes of labels, and holds",
    ),
    "images": (
        gzip.compress(idx(np.zeros((12, 28, 28), np.uint8))),
        "not with 0x00000801, the mark of",
    ),
    "no labels": (gzip.compress(struct.pack(">2I", 0x801, 0)), "says that it holds 0 labels"),
    "empty": (b"", "cut short inside its header"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_damaged_labels_say_what_is_wrong(tmp_path, case):
    write_mnist(tmp_path)
    write_labels(tmp_path)
    content, complaint = BAD_LABELS[case]
    (tmp_path / "mnist" / f"{LABELS[0]}.gz").write_bytes(content)
    assert complaint in message("mnist", tmp_path)


def test_digits_have_labels_in_the_order_of_the_images():
    from sklearn.datasets import load_digits

    digits, given = data.load("digits"), load_digits()
    by_image = {tuple(row): int(y) for row, y in zip(given.data, given.target, strict=True)}
    found = [by_image[tuple((16 * row).double().tolist())] for row in digits.train]
    assert found == digits.labels[0].tolist()
    assert [len(y) for y in digits.labels] == [1397, 200, 200]


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


PIXELS = np.zeros((12, 28, 28), np.uint8)
BAD_IDX: dict[str, tuple[bytes, str]] = {
    "cut gz": (cut(gzip.compress(idx(PIXELS))), "damaged"),
    "no gz": (b"<html>not found</html>", "damaged"),
    "cut idx": (gzip.compress(cut(idx(PIXELS))), "should hold 9408 bytes of pixels"),
    "long idx": (gzip.compress(idx(PIXELS) + b"x"), "holds more"),
    "cut header": (gzip.compress(idx(PIXELS)[:10]), "cut short inside its header"),
    "empty": (b"", "cut short inside its header"),
    "labels": (gzip.compress(idx(np.zeros(100, np.uint8), 0x801)), "0x00000801"),
    "wrong size": (gzip.compress(idx(np.zeros((12, 32, 32), np.uint8))), "images of 32x32"),
    "no images": (gzip.compress(idx(np.zeros((0, 28, 28), np.uint8))), "0 images"),
    "absurd count": (gzip.compress(struct.pack(">4I", 0x803, 2**32 - 1, 28, 28)), "4294967295"),
}


@pytest.mark.parametrize("case", BAD_IDX)
@pytest.mark.parametrize("name", MNIST)
def test_mnist_refuses_a_damaged_file(tmp_path, name, case):
    write_mnist(tmp_path)
    content, complaint = BAD_IDX[case]
    (tmp_path / "mnist" / f"{name}.gz").write_bytes(content)
    text = message("mnist", tmp_path)
    assert complaint in text
    assert f"{name}.gz" in text
    assert text.endswith("replace it by a fresh copy, or delete it and pass --download")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "mnist/train-images-idx3-ubyte.gz"),
        ("gray_mnist", "mnist/train-images-idx3-ubyte.gz"),
        ("binarized_mnist", "binarized_mnist/binarized_mnist_packed.npz"),
        ("freyfaces", "freyfaces/freyfaces.npy"),
    ],
)
def test_missing_folder(tmp_path, name, file):
    text = message(name, tmp_path / "nowhere")
    assert text.startswith(f"{tmp_path}/nowhere/{file} does not exist; set FASTVAE_DATA")
    assert ("--download" in text) == file.startswith("mnist")


def test_download_fetches_the_published_files_and_then_nothing(real, tmp_path):
    folder = data.download_mnist(tmp_path, url=f"file://{real}/mnist/")
    assert folder == tmp_path / "mnist"
    assert sorted(p.name for p in folder.iterdir()) == sorted(data._MNIST_MD5)
    assert data.load("mnist", tmp_path).train.shape == (50000, 784)
    data.download_mnist(tmp_path, url="file:///nowhere/")  # all there: the url is not asked


def test_download_keeps_nothing_that_is_not_the_published_file(tmp_path):
    write_mnist(tmp_path)
    with pytest.raises(data.DataError, match=r"train-images.* has md5 .*, not the published"):
        data.download_mnist(tmp_path / "new", url=f"file://{tmp_path}/mnist/")
    assert not list((tmp_path / "new").rglob("*"))


@pytest.mark.parametrize("url", ["file:///nowhere/", "no url at all/"])
def test_download_without_a_connection(tmp_path, url):
    with pytest.raises(data.DataError, match=r"cannot be fetched .*; check the connection"):
        data.download_mnist(tmp_path, url=url)


def test_download_to_a_place_that_cannot_be_written(real, tmp_path):
    (tmp_path / "mnist").write_text("a file where the folder should be")
    with pytest.raises(data.DataError, match=r"cannot be written .*; pass another --root"):
        data.download_mnist(tmp_path, url=f"file://{real}/mnist/")


# --- binarized_mnist ------------------------------------------------------------------------------


def write_npz(root: Path, **arrays: np.ndarray) -> Path:
    path = root / "binarized_mnist" / "binarized_mnist_packed.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays)
    return path


def test_binarized_mnist_unpacks_its_bits(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2, (3, 5, 784), dtype=np.uint8)
    packed = np.packbits(bits, axis=2)
    write_npz(tmp_path, train=packed[0], valid=packed[1], test=packed[2])
    mnist = data.load("binarized_mnist", tmp_path)
    assert torch.equal(mnist.train, torch.from_numpy(bits[0]))
    assert torch.equal(mnist.valid, torch.from_numpy(bits[1]))
    assert torch.equal(mnist.test, torch.from_numpy(bits[2]))
    assert torch.equal(mnist.batch(torch.tensor([3, 1])), mnist.train[[3, 1]].float())


GOOD = np.zeros((5, 98), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"train": np.zeros((5, 784), np.uint8)}, "uint8 [5, 784] as train, not uint8 [N, 98]"),
        ({"valid": GOOD.astype(np.float32)}, "float32 [5, 98] as valid"),
        ({"test": GOOD[:0]}, "uint8 [0, 98] as test"),
        ({"test": GOOD[0]}, "uint8 [98] as test"),
    ],
)
def test_binarized_mnist_refuses_other_arrays(tmp_path, arrays, complaint):
    write_npz(tmp_path, **{"train": GOOD, "valid": GOOD, "test": GOOD, **arrays})
    text = message("binarized_mnist", tmp_path)
    assert complaint in text
    assert "; store np.packbits(images, axis=1)" in text


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda content: b"",
        lambda content: b"PK\x03\x04 and then nothing of a zip file",
        lambda content: content.replace(b"\x93NUMPY", b"\x93NUMPX"),
        lambda content: content.replace(b"train", b"trian"),
    ],
    ids=["cut", "empty", "no zip", "no npy inside", "other names"],
)
def test_binarized_mnist_refuses_a_damaged_file(tmp_path, damage: Callable[[bytes], bytes]):
    path = write_npz(tmp_path, train=GOOD, valid=GOOD, test=GOOD)
    path.write_bytes(damage(path.read_bytes()))
    text = message("binarized_mnist", tmp_path)
    assert "is damaged" in text
    assert text.endswith("; replace it by a fresh copy")


@pytest.mark.parametrize("value", [0x00, 0x36, 0xFF])
def test_one_wrong_byte_is_an_array_or_a_sentence(tmp_path, value):
    path = write_npz(tmp_path, train=GOOD, valid=GOOD, test=GOOD)
    whole, refused = path.read_bytes(), 0
    for at in range(len(whole) - 400, len(whole)):  # the directory of the archive
        path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        try:
            data.load("binarized_mnist", tmp_path)
        except data.DataError:
            refused += 1
    assert refused > 20
    path.unlink()
    faces = write_npy(tmp_path, np.zeros((3, 28, 20), np.uint8))
    whole = faces.read_bytes()
    for at in range(128):  # the header
        faces.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        with contextlib.suppress(data.DataError):
            data.load("freyfaces", tmp_path)


# --- freyfaces ------------------------------------------------------------------------------------


def write_npy(root: Path, array: np.ndarray) -> Path:
    path = root / "freyfaces" / "freyfaces.npy"
    path.parent.mkdir(exist_ok=True)
    np.save(path, array)
    return path


def test_freyfaces_are_shuffled_split_and_dequantized(tmp_path):
    random = np.random.default_rng(0)
    faces = random.integers(0, 256, (1965, 560), dtype=np.uint8)
    write_npy(tmp_path, faces)
    frey = data.load("freyfaces", tmp_path)
    assert (frey.likelihood, frey.image_shape) == ("gaussian", (28, 20))
    assert [len(split) for split in (frey.train, frey.valid, frey.test)] == [1565, 200, 200]
    train = (256 * frey.train).byte().numpy()
    assert not np.array_equal(train[:200], faces[:200])
    trained = {row.tobytes() for row in train}
    others = [face for face in faces if face.tobytes() not in trained]
    assert len(others) == 400
    held_out = 256 * torch.cat([frey.valid, frey.test])
    gap = torch.cdist(held_out, torch.from_numpy(np.stack(others)) + 0.5, p=torch.inf)
    assert float(gap.min(1).values.max()) < 0.501  # each is a face plus less than a grey level
    assert sorted(gap.argmin(1).tolist()) == list(range(400))
    x = frey.batch(torch.arange(100), torch.Generator().manual_seed(0))
    spread = x - frey.train[:100]
    assert float(spread.min()) >= 0
    assert float(spread.max()) <= 1 / 256
    assert abs(float(spread.mean()) - 1 / 512) < 1e-4
    assert float(x.min()) >= 0
    assert float(x.max()) <= 1


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.full((1965, 560), np.nan, np.float32), "float32 values, some of them NaN, not pixels"),
        (np.zeros((1965, 560), np.float64), "float64 values, not pixels"),
        (np.zeros((1965, 28, 20), np.uint8), "has shape [1965, 28, 20], not [1965, 560]"),
        (np.zeros((10, 560), np.uint8), "has shape [10, 560]"),
        (np.array([{"a": 1}], dtype=object), "is damaged"),  # a pickle is never opened
    ],
    ids=["nan", "float", "images", "few", "pickle"],
)
def test_freyfaces_refuses_other_arrays(tmp_path, array, complaint):
    write_npy(tmp_path, array)
    assert complaint in message("freyfaces", tmp_path)


def test_freyfaces_refuses_a_cut_file(tmp_path):
    path = write_npy(tmp_path, np.zeros((1965, 560), np.uint8))
    for size in (0, 5, 100, 100_000):
        path.write_bytes(path.read_bytes()[:size])
        assert "is damaged" in message("freyfaces", tmp_path)


# --- the real files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes", "dim", "mean"),
    [
        ("mnist", (50000, 10000, 10000), 784, 0.13),
        ("gray_mnist", (50000, 10000, 10000), 784, 0.13),
        ("binarized_mnist", (50000, 10000, 10000), 784, 0.13),
        ("freyfaces", (1565, 200, 200), 560, 0.6),
    ],
)
def test_real_data(real, name, sizes, dim, mean):
    found = data.load(name, real)
    for split, size in zip((found.train, found.valid, found.test), sizes, strict=True):
        assert split.shape == (size, dim)
        assert float(split.min()) >= 0
        assert float(split.max()) <= 1
        assert float(split.float().mean()) == pytest.approx(mean, abs=0.02)
