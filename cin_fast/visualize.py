"""``cin-fast-visualize``: the paper's Figures 1, 4 and 5 for given images and a trained model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cin_fast import command
from cin_fast.data.base import read_image
from cin_fast.distributed import pick_device
from cin_fast.files import replacing
from cin_fast.models import SCINet
from cin_fast.models.cin import CIN
from cin_fast.ops import sci, sci_weights
from cin_fast.trained import Trained, load_trained

COMPLEMENTS = 3


class VisualizeError(ValueError):
    """A picture that cannot be drawn, with the reason."""


def strongest_channels(x_CHW: Tensor, count: int) -> list[int]:
    """The channels with the largest mean activation, strongest first."""
    return x_CHW.mean(dim=(1, 2)).topk(min(count, len(x_CHW))).indices.tolist()


def complements(x_CHW: Tensor, channel: int, scale: float = -1.0) -> list[int]:
    """The channels with the largest weights in ``channel``'s row of W (Eq. 2), largest first."""
    row = sci_weights(x_CHW[None], scale)[0, channel].clone()
    row[channel] = -1
    return row.topk(min(COMPLEMENTS, len(row) - 1)).indices.tolist()


def draw_channels(trained: Trained, images: Sequence[Path], output: Path) -> Path:
    """Figure 4: a channel before SCI, its most complementary channels, the channel after SCI.

    Raises:
        VisualizeError: for a model without SCI.
        DataError: for an image that cannot be read.
    """
    model = trained.model
    if not isinstance(model, SCINet):
        raise VisualizeError(f"method {trained.config.method} has no self-channel interaction")
    titles = ["image", "channel", *(f"complement {n + 1}" for n in range(COMPLEMENTS)), "after SCI"]
    rows = []
    for path in images:
        picture, x_CHW = _features(trained, path)
        channel = strongest_channels(x_CHW, 1)[0]
        y_CHW = sci(x_CHW[None], scale=model.sci.scale)[0]
        maps = [x_CHW[channel], *(x_CHW[c] for c in complements(x_CHW, channel, model.sci.scale))]
        rows.append((picture, [*maps, y_CHW[channel]]))
    return _save(rows, titles, output)


def draw_activations(trained: Trained, images: Sequence[Path], output: Path) -> Path:
    """Figure 1: the strongest channels of each image.

    Raises:
        DataError: for an image that cannot be read.
    """
    rows = []
    for path in images:
        picture, x_CHW = _features(trained, path)
        rows.append((picture, [x_CHW[c] for c in strongest_channels(x_CHW, 5)]))
    return _save(rows, ["image", *(f"channel {n + 1}" for n in range(5))], output)


def draw_pairs(trained: Trained, images: Sequence[Path], output: Path) -> Path:
    """Figure 5: Z' of the first image averaged over channels, against each of the others.

    Raises:
        VisualizeError: for a model without CCI, or fewer than two images.
        DataError: for an image that cannot be read.
    """
    model = trained.model
    if not isinstance(model, CIN):
        raise VisualizeError(f"method {trained.config.method} has no contrastive interaction")
    if len(images) < 2:
        raise VisualizeError("a contrast needs at least two images")
    first, x_CHW = _features(trained, images[0])
    rows = []
    for path in images[1:]:
        other, x_other_CHW = _features(trained, path)
        with torch.inference_mode():
            x_BCHW = torch.stack([x_CHW, x_other_CHW]).to(trained.device)
            z_BCHW = model.cci(x_BCHW, torch.tensor([1, 0])).cpu()
        rows.append((first, [z_BCHW[0].mean(0), other, z_BCHW[1].mean(0)]))
    return _save(rows, ["image", "its Z'", "against", "its Z'"], output)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; prints errors as one line and returns 2 for them."""
    options = _parser().parse_args(argv)

    def body() -> int:
        folder = next((path for path in options.images if path.is_dir()), None)
        if folder is not None:
            raise VisualizeError(f"{folder} is a folder: name a few images in it")
        trained = load_trained(options.checkpoint, pick_device(options.device))
        command.writable_folder(options.output)
        drawn = [draw_activations(trained, options.images, options.output / "activations.png")]
        if isinstance(trained.model, SCINet):
            drawn.append(draw_channels(trained, options.images, options.output / "channels.png"))
        if isinstance(trained.model, CIN) and len(options.images) > 1:
            drawn.append(draw_pairs(trained, options.images, options.output / "pairs.png"))
        print("\n".join(str(path) for path in drawn))
        return 0

    return command.run("cin-fast-visualize", body)


def _features(trained: Trained, path: Path) -> tuple[np.ndarray[Any, Any], Tensor]:
    """The image as the model's crop shows it, (H, W, 3) in 0 to 1, and its map (C, H, W)."""
    pixels = trained.transform(read_image(path))
    with torch.inference_mode():
        x_CHW = trained.model.backbone(pixels[None].to(trained.device))[0].float().cpu()
    low, high = pixels.amin(), pixels.amax()
    return ((pixels - low) / (high - low)).permute(1, 2, 0).numpy(), x_CHW


def _save(
    rows: list[tuple[np.ndarray[Any, Any], list[Any]]], titles: Sequence[str], output: Path
) -> Path:
    """A grid: arrays (H, W, 3) as they are, maps (h, w) as heat over the picture before them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.7 * len(titles), 1.75 * len(rows) + 0.2), layout="constrained")
    grid = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, (picture, maps) in zip(grid, rows, strict=True):
        shown = picture
        for axis, cell in zip(line, [picture, *maps], strict=True):
            axis.axis("off")
            if isinstance(cell, np.ndarray):
                shown = cell
                axis.imshow(cell)
                continue
            side = shown.shape[0]
            axis.imshow(shown)
            axis.imshow(
                cell.numpy(), cmap="inferno", alpha=0.6, extent=(0, side, side, 0),
                interpolation="bilinear",
            )  # fmt: skip
    for axis, title in zip(grid[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    with replacing(output) as beside:
        figure.savefig(beside, dpi=130)
    return output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cin-fast-visualize",
        description="Draw what channels see, before and after interaction (Figures 1, 4 and 5).",
        epilog="example: cin-fast-visualize --checkpoint runs/my_run a.jpg b.jpg c.jpg",
    )
    parser.add_argument(
        "images", nargs="+", type=command.path, metavar="IMAGE",
        help="image files; the first is drawn against each of the others",
    )  # fmt: skip
    command.add_checkpoint(parser)
    parser.add_argument("--output", type=command.path, default=Path("pictures"), metavar="DIR",
                        help="folder of the pictures (default: pictures)")  # fmt: skip
    command.add_device(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
