"""``cin-fast-train``: the command around :mod:`cin_fast.trainer`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cin_fast import command
from cin_fast import config as configs
from cin_fast.config import TrainConfig
from cin_fast.distributed import join, world_of_process
from cin_fast.records import RunFolder
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

    checkpoint = Path()

    def body() -> int:
        nonlocal checkpoint
        config = configs.parse(argv)
        checkpoint = RunFolder(config.output_folder).checkpoint
        metrics = train(config)
        if world_of_process().main:
            print(
                f"test top-1 {metrics['test_top1']:.2%}, top-5 {metrics['test_top5']:.2%} "
                f"(chance {metrics['chance_top1']:.2%}) after {metrics['epochs']} epochs in "
                f"{metrics['seconds']:.0f} s"
            )
        return 0

    def left() -> str:
        if checkpoint.is_file():
            return "finished epochs are kept: --resume goes on"
        return "no epoch was finished"

    return command.run("cin-fast-train", body, also=(TrainingError,), left=left)


if __name__ == "__main__":
    sys.exit(main())
