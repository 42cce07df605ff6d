"""Where the results of a machine are kept."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from cin_fast.info import device_name

RESULTS = Path(__file__).resolve().parent / "results"


def results_folder() -> Path:
    """``bench/results/MACHINE``, named after the device; ``CIN_FAST_BENCH_RESULTS`` overrides."""
    name = device_name()
    if not torch.cuda.is_available():
        name = f"cpu {os.cpu_count()}core {name}"
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Path(os.environ.get("CIN_FAST_BENCH_RESULTS", folder))
