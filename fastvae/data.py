"""Small image data sets as tensors, checked on the way in.

================= ============= ========== ======================================================
name              images        likelihood what a model sees
================= ============= ========== ======================================================
digits            1,797 of 8x8  bernoulli  dynamic binarization; comes with scikit-learn
mnist             70,000, 28x28 bernoulli  dynamic binarization
gray_mnist        70,000, 28x28 bernoulli  intensities as they are, of training and of test images
binarized_mnist   70,000, 28x28 bernoulli  Larochelle & Murray's fixed binarization (AISTATS 2011)
freyfaces         1,965, 28x20  gaussian   uniform dequantization
================= ============= ========== ======================================================

*Dynamic binarization* draws every training pixel anew, each time it is seen, with its intensity as
the probability (Burda et al., ICLR 2016). The valid and test images are binarized once, under a
fixed seed, so that two runs are scored on the same bits. Scores on fixed and on dynamic bits
differ by about 2 nats: never compare across the two. *Intensities as they are* are the mean of
such bits, and what classifiers of MNIST are compared on; as a density their score means little.

*Uniform dequantization* spreads pixel value k over [k, k + 1) / 256. Without it the density of a
Gaussian on 8-bit data has no upper bound, and more training only buys smaller variances
(Theis et al., ICLR 2016).

Files lie under one root: the argument ``root``, else the environment variable ``FASTVAE_DATA``,
else ``~/.cache/fastvae`` (or ``$XDG_CACHE_HOME/fastvae``)::

    mnist/train-images-idx3-ubyte.gz, t10k-images-idx3-ubyte.gz     (or without .gz)
    mnist/train-labels-idx1-ubyte.gz, t10k-labels-idx1-ubyte.gz     (for models that want labels)
    binarized_mnist/binarized_mnist_packed.npz    train, valid, test: bits packed by np.packbits
    freyfaces/freyfaces.npy                       uint8, [1965, 560]
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import math
import os
import struct
import tokenize
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from . import files
from .extras import require

__all__ = [
    "DATASETS",
    "DataError",
    "Dataset",
    "balanced_labels",
    "data_root",
    "download_mnist",
    "folder",
    "load",
]

_SEED = 20140416  # of every fixed split and fixed binarization; part of what a score means
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
_DAMAGE = (  # what numpy, gzip and zipfile raise on damaged files
    *(OSError, EOFError, ValueError, KeyError, MemoryError, RuntimeError, SyntaxError),
    *(tokenize.TokenError, zlib.error, zipfile.BadZipFile),
)


class DataError(Exception):
    """A data set cannot be read; one sentence says which file, what is wrong, and what to do."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images as rows of pixels.

    Attributes:
        name: a key of :data:`DATASETS`.
        train, valid, test: ``[N, D]`` in [0, 1], float32, or uint8 where every pixel is 0 or 1.
            ``valid`` and ``test`` are ready to be scored, as floats; ``train`` goes through
            :meth:`batch`.
        image_shape: height and width; their product is ``D``.
        likelihood: ``"bernoulli"`` or ``"gaussian"``.
        noise: ``"bernoulli"`` (dynamic binarization), ``"uniform"`` (dequantization) or ``"none"``.
        labels: the classes of ``train``, ``valid`` and ``test``, int64 ``[N]`` each, if there are
            any.
    """

    name: str
    train: Tensor
    valid: Tensor
    test: Tensor
    image_shape: tuple[int, int]
    likelihood: str
    noise: str
    labels: tuple[Tensor, Tensor, Tensor] | None = None

    def batch(self, rows: Tensor, generator: Generator | None = None) -> Tensor:
        """The training images ``rows`` as float32 ``[len(rows), D]``, with fresh noise.

        >>> data = fastvae.data.load("digits")
        >>> data.batch(torch.arange(5)).shape
        torch.Size([5, 64])
        """
        return _add_noise(self.train[rows].float(), self.noise, generator)

    def some_test(self, n: int) -> Tensor:
        """``n`` test images, or all, float32: evenly spread, as binarized_mnist is sorted by digit.

        >>> fastvae.data.load("digits").some_test(7).shape
        torch.Size([7, 64])
        """
        rows = torch.linspace(0, len(self.test) - 1, min(n, len(self.test))).long()
        return self.test[rows.to(self.test.device)].float()

    def to(self, device: torch.device | str) -> Dataset:
        """The same images on ``device``."""
        splits = {name: getattr(self, name).to(device) for name in ("train", "valid", "test")}
        a, b, c = (y.to(device) for y in self.labels) if self.labels else (None, None, None)
        labels = None if a is None or b is None or c is None else (a, b, c)
        return replace(self, **splits, labels=labels)


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds the data sets; see the top of this module."""
    given = root if root is not None else os.environ.get("FASTVAE_DATA")
    if root is not None or given:
        try:
            return Path(given).expanduser()  # type: ignore[arg-type]
        except RuntimeError as error:  # ~somebody
            raise DataError(f"{given} is of nobody ({error}); set FASTVAE_DATA or --root") from None
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fastvae"


def folder(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """Where the files of the data set ``name`` lie.

    >>> fastvae.data.folder("gray_mnist", "data")
    PosixPath('data/mnist')
    """
    return data_root(root) / name.removeprefix("gray_")


def load(name: str, root: str | os.PathLike[str] | None = None) -> Dataset:
    """Read a data set and check it.

    Args:
        name: a key of :data:`DATASETS`.
        root: the folder that holds the data sets; default: see the top of this module.

    Raises:
        DataError: if there is no such data set, or a file is missing, damaged or not what it
            should be.
        MissingExtraError: for ``digits`` without scikit-learn.

    >>> fastvae.data.load("digits").train.shape
    torch.Size([1397, 64])
    """
    if name not in DATASETS:
        raise DataError(f"there is no data set {name!r}; take one of {', '.join(DATASETS)}")
    return DATASETS[name](data_root(root))


def balanced_labels(
    data: Dataset, num_labels: int, *, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Training images whose labels a model may see, as many of each class: rows, and labels.

    Raises:
        ValueError: if the data have no labels, or too few of a class, or classes cannot have
            equally many.

    >>> rows, y = fastvae.data.balanced_labels(fastvae.data.load("digits"), 20)
    >>> y.bincount()
    tensor([2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    if data.labels is None:
        raise ValueError(f"labels must be known of some images, and {data.name} has none")
    labels = data.labels[0]
    classes = int(max(y.max() for y in data.labels)) + 1
    each, rest = divmod(num_labels, classes)
    if num_labels < 1 or rest:
        raise ValueError(
            f"num_labels must be as many of each of {classes} classes, got {num_labels}"
        )
    order = torch.randperm(len(labels), generator=generator, device=labels.device)
    parts = [order[labels[order] == c][:each] for c in range(classes)]
    if any(len(part) < each for part in parts):
        counts = [len(part) for part in parts]
        raise ValueError(f"num_labels must be at most what each class has, got {each} of {counts}")
    rows = torch.cat(parts)
    return rows, labels[rows]


def _add_noise(x: Tensor, noise: str, generator: Generator | None) -> Tensor:
    if noise == "bernoulli":
        return torch.bernoulli(x, generator=generator)
    if noise == "uniform":
        return x + torch.rand(x.shape, generator=generator, device=x.device) / 256
    return x


def _dataset(
    name: str,
    splits: tuple[np.ndarray, np.ndarray, np.ndarray],
    image_shape: tuple[int, int],
    *,
    likelihood: str = "bernoulli",
    noise: str = "none",
    labels: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> Dataset:
    train, valid, test = (torch.from_numpy(np.ascontiguousarray(split)) for split in splits)
    fixed = torch.Generator().manual_seed(_SEED)
    valid, test = (_add_noise(split, noise, fixed) for split in (valid, test))
    if noise == "bernoulli":
        valid, test = valid.byte(), test.byte()
    y = None
    if labels is not None:
        a, b, c = (torch.from_numpy(np.asarray(split, np.int64)) for split in labels)
        y = (a, b, c)
    return Dataset(name, train, valid, test, image_shape, likelihood, noise, y)


def _shuffle_split(x: np.ndarray, held_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shuffled under the fixed seed; ``held_out`` rows each for valid and test."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(_SEED)).numpy()
    train, valid, test = np.split(x[order], (len(x) - 2 * held_out, len(x) - held_out))
    return train, valid, test


def _digits(root: Path) -> Dataset:
    digits = require("sklearn.datasets").load_digits()
    splits = _shuffle_split(digits.data.astype(np.float32) / 16, 200)
    labels = _shuffle_split(digits.target, 200)
    return _dataset("digits", splits, (8, 8), noise="bernoulli", labels=labels)


def _mnist(root: Path, name: str = "mnist", noise: str = "bernoulli") -> Dataset:
    folder = root / "mnist"
    train, test = (
        _read_idx(folder / f"{split}-images-idx3-ubyte.gz", (28, 28)).astype(np.float32) / 255
        for split in ("train", "t10k")
    )
    here = len(train) - len(train) // 6  # 10,000 held out: the split of Larochelle & Murray
    paths = [folder / f"{split}-labels-idx1-ubyte.gz" for split in ("train", "t10k")]
    labels = None
    if all(path.exists() or path.with_suffix("").exists() for path in paths):
        y, y_test = (_read_idx(path, ()) for path in paths)
        for path, images, classes in zip(paths, (train, test), (y, y_test), strict=True):
            if len(classes) != len(images) or classes.max() > 9:
                raise DataError(
                    f"{path} holds {len(classes)} labels up to {classes.max()}, not {len(images)} "
                    "up to 9; replace it by a fresh copy, or delete it and pass --download"
                )
        labels = (y[:here], y[here:], y_test)
    splits = (train[:here], train[here:], test)
    return _dataset(name, splits, (28, 28), noise=noise, labels=labels)


def _binarized_mnist(root: Path) -> Dataset:
    path = root / "binarized_mnist" / "binarized_mnist_packed.npz"
    rule = "np.packbits(images, axis=1) of 28x28 images under the names train, valid and test"
    arrays = _load_numpy(path, lambda npz: [npz[split] for split in ("train", "valid", "test")])
    for split, packed in zip(("train", "valid", "test"), arrays, strict=True):
        if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != 98 or not len(packed):
            raise DataError(
                f"{path} holds {packed.dtype} {list(packed.shape)} as {split}, not uint8 [N, 98]; "
                f"store {rule}"
            )
    train, valid, test = (np.unpackbits(packed, axis=1, count=784) for packed in arrays)
    return _dataset("binarized_mnist", (train, valid, test), (28, 28))


def _freyfaces(root: Path) -> Dataset:
    path = root / "freyfaces" / "freyfaces.npy"
    faces = _load_numpy(path, np.asarray)
    if faces.dtype != np.uint8:
        nan = faces.dtype.kind == "f" and bool(np.isnan(faces).any())
        raise DataError(
            f"{path} holds {faces.dtype} values{', some of them NaN' if nan else ''}, not pixels; "
            "store the faces as uint8 from 0 to 255"
        )
    if faces.shape != (1965, 560):
        raise DataError(
            f"{path} has shape {list(faces.shape)}, not [1965, 560]; "
            "store each of the 1965 faces of 28x20 pixels as one row"
        )
    splits = _shuffle_split(faces.astype(np.float32) / 256, 200)
    return _dataset("freyfaces", splits, (28, 20), likelihood="gaussian", noise="uniform")


DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "digits": _digits,
    "mnist": _mnist,
    "gray_mnist": functools.partial(_mnist, name="gray_mnist", noise="none"),
    "binarized_mnist": _binarized_mnist,
    "freyfaces": _freyfaces,
}


def _missing(path: Path) -> DataError:
    download = " or pass --download," if path.parent.name == "mnist" else ""
    return DataError(
        f"{path} does not exist; set FASTVAE_DATA or --root to the folder that holds "
        f"{path.parent.name}/,{download} or train on digits, which needs no files"
    )


def _load_numpy(path: Path, take: Callable[[Any], Any]) -> Any:
    if not path.is_file():
        raise _missing(path)
    try:
        with path.open("rb") as stream:
            return take(np.load(stream, allow_pickle=False))
    except _DAMAGE as error:
        raise DataError(f"{path} is damaged ({error}); replace it by a fresh copy") from error


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Images of ``shape``, as rows, or labels, of shape (), of an idx file, gzipped or plain."""
    if not path.exists():
        if not path.with_suffix("").is_file():
            raise _missing(path)
        path = path.with_suffix("")
    again = "replace it by a fresh copy, or delete it and pass --download"
    what, mark = ("images", 0x803) if shape else ("labels", 0x801)
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            header = stream.read(4 * (2 + len(shape)))
            if len(header) < 4 * (2 + len(shape)):
                raise DataError(f"{path} is cut short inside its header; {again}")
            magic, count, *found = struct.unpack(f">{2 + len(shape)}I", header)
            if magic != mark:
                raise DataError(
                    f"{path} starts with {magic:#010x}, not with {mark:#010x}, the mark of idx "
                    f"{what}; {again}"
                )
            if tuple(found) != shape or not 0 < count <= 1_000_000:
                each = f" of {'x'.join(map(str, found))}, not of 28x28" if shape else ""
                raise DataError(f"{path} says that it holds {count} {what}{each}; {again}")
            size = count * math.prod(shape)
            content = stream.read(size + 1)  # one more than there should be, never all of a bomb
    except _DAMAGE as error:
        raise DataError(f"{path} is damaged ({error}); {again}") from error
    if len(content) != size:
        holds = "more" if len(content) > size else str(len(content))
        of = "pixels" if shape else what
        raise DataError(f"{path} should hold {size} bytes of {of}, and holds {holds}; {again}")
    return np.frombuffer(content, np.uint8).reshape((count, math.prod(shape)) if shape else count)


def download_mnist(root: str | os.PathLike[str] | None = None, url: str = _MNIST) -> Path:
    """Fetch the four files of MNIST that are not there yet (11 MB), and return their folder.

    A file appears under its name only once its md5 is the published one.

    Raises:
        DataError: if a file cannot be fetched or written, or is not the published one.

    >>> fastvae.data.download_mnist()  # doctest: +SKIP
    PosixPath('/home/me/.cache/fastvae/mnist')
    """
    folder = data_root(root) / "mnist"
    for name, md5 in _MNIST_MD5.items():
        path = folder / name
        if path.exists():
            continue
        try:
            with contextlib.closing(urllib.request.urlopen(url + name, timeout=60)) as response:
                content = response.read(32 * 2**20)
        except (OSError, ValueError) as error:  # URLError is an OSError, a bad URL a ValueError
            raise DataError(
                f"{url + name} cannot be fetched ({error}); check the connection, or put the file "
                f"into {folder} yourself"
            ) from error
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise DataError(
                f"{url + name} has md5 {found}, not the published {md5}; try again later, or put "
                f"the file into {folder} yourself"
            )
        try:
            files.write_atomically(path, content)
        except OSError as error:
            raise DataError(
                f"{path} cannot be written ({error.strerror}); pass another --root"
            ) from error
    return folder
