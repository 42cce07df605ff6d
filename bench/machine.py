"""Where the results of a machine are kept."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cin_fast.info import device_name

RESULTS = Path(__file__).resolve().parent / "results"


def results_folder(device: str | None = None) -> Path:
    """``bench/results/MACHINE``, named after the device; ``CIN_FAST_BENCH_RESULTS`` overrides."""
    name = re.sub(r"[^a-z0-9]+", "-", (device or device_name()).lower()).strip("-")
    return Path(os.environ.get("CIN_FAST_BENCH_RESULTS", RESULTS / name))
