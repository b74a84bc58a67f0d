"""Networks that make the parameters of couplings; any other of the right sizes will do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .element import Element

__all__ = ["Conditioner", "conv_net", "mlp", "network_for", "start_at"]

Conditioner = Callable[[int, int], nn.Module]  # (inputs, outputs) -> a network


@torch.no_grad()
def start_at(last: nn.Linear | nn.Conv2d, parameters: Tensor) -> None:
    """Lets a network's last layer give these parameters, whatever the network sees."""
    assert last.bias is not None
    last.weight.zero_()
    last.bias.copy_(parameters)


class Perceptron(nn.Module):
    """Affine maps with an activation between them, the last of which starts at zero."""

    def __init__(
        self, inputs: int, hidden: Sequence[int], outputs: int, activation: type[nn.Module]
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise((inputs, *hidden)):
            layers += [nn.Linear(fan_in, fan_out), activation()]
        self.hidden = nn.Sequential(*layers)
        self.last = nn.Linear((inputs, *hidden)[-1], outputs)
        start_at(self.last, torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x))  # type: ignore[no-any-return]


def mlp(hidden: Sequence[int] = (64, 64), activation: type[nn.Module] = nn.ReLU) -> Conditioner:
    """Makes perceptrons whose last layer starts at zero, so that a flow starts simple.

    >>> fastvae.flows.mlp((8,))(2, 3)(torch.ones(1, 2))
    tensor([[0., 0., 0.]], grad_fn=<AddmmBackward0>)
    """

    return lambda inputs, outputs: Perceptron(inputs, hidden, outputs, activation)


class ConvNet(nn.Module):
    """Convolutions of pixels, ``[..., H, W, channels]``, the last of which starts at zero."""

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = inputs
        for i, width in enumerate(hidden):  # 3 x 3, then, as in Glow, 1 x 1
            size = 1 if i else 3
            layers += [nn.Conv2d(channels, width, size, padding=size // 2), nn.ReLU()]
            channels = width
        self.hidden = nn.Sequential(*layers)
        self.last = nn.Conv2d(channels, outputs, 3, padding=1)
        start_at(self.last, torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        images = x.reshape(-1, *x.shape[-3:]).movedim(-1, -3)  # memory stays channels last
        out = self.last(self.hidden(images)).movedim(-3, -1)
        return out.reshape(*x.shape[:-1], out.shape[-1])


def conv_net(hidden: Sequence[int] = (64, 64)) -> Conditioner:
    """Makes networks for couplings of pixels, ``[..., H, W, channels]``.

    >>> fastvae.flows.conv_net((8,))(2, 3)(torch.ones(1, 4, 4, 2)).shape
    torch.Size([1, 4, 4, 3])
    """
    return lambda inputs, outputs: ConvNet(inputs, hidden, outputs)


def network_for(make: Conditioner | None, inputs: int, element: Element, n: int) -> nn.Module:
    """For ``n`` columns moved by ``element``, which at first are where it starts."""
    network = (mlp() if make is None else make)(inputs, n * element.parameters)
    if isinstance(network, (Perceptron, ConvNet)):
        start_at(network.last, element.start(n))
    return network
