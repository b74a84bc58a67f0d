"""Images of what a model has learnt, as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import files
from .extras import require

__all__ = ["mosaic", "save"]


def mosaic(images: Tensor, image_shape: tuple[int, int], columns: int) -> Tensor:
    """Images ``[N, D]`` side by side, row after row, with a gap of one pixel, as ``[H, W]``.

    The gaps and unfilled places are NaN, which a picture shows as background.

    >>> fastvae.pictures.mosaic(torch.zeros(10, 64), (8, 8), columns=5).shape
    torch.Size([17, 44])
    """
    height, width = image_shape
    rows = math.ceil(len(images) / columns)
    cells = torch.full((rows * columns, height + 1, width + 1), math.nan)
    cells[: len(images), :height, :width] = images.reshape(-1, height, width).float().cpu()
    grid = cells.reshape(rows, columns, height + 1, width + 1).transpose(1, 2)
    whole: Tensor = grid.reshape(rows * (height + 1), columns * (width + 1))
    return whole[:-1, :-1]


def save(
    path: Path,
    title: str,
    panels: Sequence[tuple[str, Tensor]],
    image_shape: tuple[int, int],
    columns: int,
) -> None:
    """Draw panels ``(caption, images [N, D] in [0, 1])`` side by side and write a PNG.

    Raises:
        OSError: if it cannot be written.
        MissingExtraError: without matplotlib.
    """
    grids = [mosaic(images, image_shape, columns) for _, images in panels]
    aspect = grids[0].shape[0] / grids[0].shape[1]
    side, margin, head = 4.2, 0.12, 0.72  # inches
    width = len(panels) * (side + margin) + margin
    height = side * aspect + head + margin
    # Figure without pyplot: no global state, no display, always the Agg renderer.
    figure = require("matplotlib.figure").Figure(figsize=(width, height), facecolor="white")
    colors = require("matplotlib").colormaps["gray"].with_extremes(bad="#3a4a5f")
    for i, ((caption, _), grid) in enumerate(zip(panels, grids, strict=True)):
        left = (margin + i * (side + margin)) / width
        axes = figure.add_axes((left, margin / height, side / width, side * aspect / height))
        axes.imshow(grid.numpy(), cmap=colors, vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(caption, fontsize=11, color="#3a4a5f", pad=5)
        axes.set_axis_off()
    figure.text(margin / width, 1 - 0.16 / height, title, fontsize=12, weight="bold", va="top")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    files.write_atomically(path, content.getvalue())
