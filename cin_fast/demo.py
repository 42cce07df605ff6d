"""``make demo``: train CIN and its plain backbone on the built-in synthetic set, and compare."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cin_fast.config import TrainConfig
from cin_fast.train import main as train_main

METHODS = ("plain", "cin")


def demo_config(method: str, output: Path, epochs: int, device: str) -> TrainConfig:
    """The demo's settings: small images, a small backbone from scratch, otherwise the recipe."""
    return TrainConfig(
        dataset="synthetic",
        image_size=96,
        workers=1,
        method=method,
        backbone="resnet18",
        weights="none",
        epochs=epochs,
        lr=0.005,
        lr_step=max(epochs // 3, 1),
        clip_norm=1.0,
        device=device,
        eval_every=epochs,
        output=str(output / method),
        overwrite=True,
    )
