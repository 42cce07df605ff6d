"""``make demo``: train CIN and its plain backbone on the built-in synthetic set, and compare."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cin_fast import command
from cin_fast.checkpoint import LAST
from cin_fast.config import TrainConfig
from cin_fast.data.synthetic import SyntheticBirds
from cin_fast.train import TrainingError, train
from cin_fast.trained import load_trained
from cin_fast.visualize import draw_channels, draw_pairs

METHODS = ("plain", "cin")
_PICTURED = 4
_NAME = "python -m cin_fast.demo"


def demo_config(method: str, output: Path, epochs: int, device: str = "auto") -> TrainConfig:
    """The demo's settings: small images and a small backbone from scratch, one recipe for both."""
    return TrainConfig(
        dataset="synthetic",
        image_size=64,
        workers=1,
        method=method,
        backbone="resnet18",
        weights="none",
        epochs=epochs,
        lr=0.002,
        # From scratch, a step of the pair loss can grow without bound; usual norms are about 15.
        clip_norm=20.0,
        lr_step=max(2 * epochs // 3, 1),
        eval_every=epochs,
        device=device,
        output=str(output / method),
        overwrite=True,
    )


def draw(output: Path) -> list[Path]:
    """Pictures of the trained CIN on a few test images."""
    trained = load_trained(output / "cin")
    test = SyntheticBirds(trained.transform, train=False, size=2 * trained.config.image_size)
    step = len(test) // _PICTURED
    files = []
    folder = output / "pictures"
    folder.mkdir(exist_ok=True)
    for number in range(_PICTURED):
        files.append(folder / f"test_{number}.png")
        test.draw(number * step).save(files[-1])
    return [
        draw_channels(trained, files, folder / "channels.png"),
        draw_pairs(trained, files, folder / "pairs.png"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; prints errors as one line and returns 2 for them."""
    options = _parser().parse_args(argv)
    return command.run(_NAME, lambda: _demo(options), also=(TrainingError,))


def _demo(options: argparse.Namespace) -> int:
    results: dict[str, dict[str, Any]] = {}
    for number, method in enumerate(METHODS, 1):
        print(f"\n== {number} of {len(METHODS)}: {method} ==", flush=True)
        results[method] = train(demo_config(method, options.output, options.epochs, options.device))
    pictures = draw(options.output)
    print("\ntest accuracy on birds that differ in a few small parts:")
    for method, metrics in results.items():
        print(f"  {method:8}{metrics['test_top1']:7.2%}   in {metrics['seconds']:.0f} s")
    print(f"  chance  {results['cin']['chance_top1']:7.2%}")
    print(f"checkpoint  {options.output / 'cin' / LAST}")
    print(f"metrics     {options.output / 'cin' / 'metrics.json'}")
    print("pictures    " + "\n            ".join(str(path) for path in pictures))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_NAME, description=__doc__)
    parser.add_argument("--epochs", type=int, default=12, help="epochs of each run (default: 12)")
    parser.add_argument("--output", type=command.path, default="runs/demo", help="(runs/demo)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
