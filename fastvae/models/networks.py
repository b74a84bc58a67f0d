"""Perceptrons of encoders and decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

from .base import check_option

__all__ = ["ACTIVATIONS", "LabelledPerceptron", "mlp"]


class Maxout(nn.Module):
    """The largest of each ``window`` neighbours, ``[..., window N]`` to ``[..., N]``."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.window)).amax(-1)


class Activation(NamedTuple):
    inputs: int  # affine outputs for each hidden unit
    make: Callable[[], nn.Module]


ACTIVATIONS = {
    "tanh": Activation(1, nn.Tanh),
    "relu": Activation(1, nn.ReLU),
    "softplus": Activation(1, nn.Softplus),
    "gated": Activation(2, nn.GLU),  # Dauphin et al. 2017, as in the VampPrior
    "maxout": Activation(4, lambda: Maxout(4)),  # Goodfellow et al. 2013, as in Rezende & Mohamed
}


def mlp(sizes: Sequence[int], activation: str = "tanh") -> nn.Sequential:
    """Affine maps from size to size, with an activation between them.

    Raises:
        ValueError: if a size is not positive, or there is no such activation.
    """
    check_option("mlp", "activation", activation, ACTIVATIONS)
    if min(sizes) < 1:
        raise ValueError(f"mlp: sizes must be positive, got {list(sizes)}")
    inputs, make = ACTIVATIONS[activation]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes[:-1]):
        layers += [nn.Linear(fan_in, inputs * fan_out), make()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class LabelledPerceptron(nn.Module):
    """A perceptron of ``(x, y)`` whose first layer adds a row of the class to a product with x.

    So for all classes, y of ``[C, 1]`` and x of ``[B, D]``, the product is computed once, and the
    rest for ``[C, B]``; for some classes of each image, y of ``[N]`` and x of ``rows`` ``[N]``, the
    rest for those.
    """

    def __init__(
        self, inputs: int, classes: int, hidden: Sequence[int], outputs: int, activation: str
    ) -> None:
        super().__init__()
        make = ACTIVATIONS[activation]
        width = make.inputs * hidden[0]
        self.of_x = nn.Linear(inputs, width)
        self.of_y = nn.Embedding(classes, width)
        self.rest = nn.Sequential(make.make(), *mlp([*hidden, outputs], activation))

    def forward(self, x: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
        of_x = self.of_x(x)
        return self.rest((of_x if rows is None else of_x[rows]) + self.of_y(y))
