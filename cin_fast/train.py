"""``cin-fast-train``: the command around :mod:`cin_fast.trainer`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from cin_fast import command
from cin_fast import config as configs
from cin_fast.config import TrainConfig
from cin_fast.distributed import join
from cin_fast.trainer import Trainer, TrainingError

__all__ = ["Trainer", "TrainingError", "main", "train"]


def train(config: TrainConfig) -> dict[str, Any]:
    """Train as ``config`` says; returns what metrics.json holds.

    Raises:
        ValueError: for a setting, dataset or checkpoint that cannot work (``DataError`` and
            ``CheckpointError`` among them), before time is spent where it can be known.
        FileNotFoundError: for weights that cannot be had.
        TrainingError: if the loss is no longer finite.
    """
    with join(config.device) as world:
        return Trainer(config, world).run()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; prints errors as one line and returns 2 for them."""

    trainer: Trainer | None = None

    def body() -> int:
        nonlocal trainer
        config = configs.parse(argv)
        with join(config.device) as world:
            trainer = Trainer(config, world)
            metrics = trainer.run()
        if world.main:
            print(
                f"test top-1 {metrics['test_top1']:.2%}, top-5 {metrics['test_top5']:.2%} "
                f"(chance {metrics['chance_top1']:.2%}) after {metrics['epochs']} epochs in "
                f"{metrics['seconds']:.0f} s"
            )
        return 0

    def left() -> str:
        return trainer.left() if trainer else "nothing was begun"

    return command.run("cin-fast-train", body, also=(TrainingError,), left=left)


if __name__ == "__main__":
    sys.exit(main())
