"""How anything is measured: interleaved rounds, peak memory, and the machine's ceilings."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_MIB = 1 << 20


@dataclass(frozen=True)
class Measured:
    """Seconds of each round, and bytes beyond what was held before (None if unknown)."""

    seconds: tuple[float, ...]
    peak_bytes: int | None


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    budget: float,
    least: int = 5,
    most: int = 50,
) -> dict[str, Measured]:
    """Times of all calls, one round of each in turn, so that a drifting machine favours none.

    Args:
        calls: by name.
        device: where they compute; on a GPU, device events are read and L2 is emptied before.
        budget: seconds for all together; never fewer than ``least`` rounds.
    """
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    for call in calls.values():
        call()
    once = sum(clock(call) for call in calls.values())
    rounds = int(min(most, max(least, budget / max(once, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(clock(call))
    return {
        name: Measured(tuple(seconds[name]), peak_bytes(call, device))
        for name, call in calls.items()
    }


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """What a call holds at most beyond what was held before it, its results included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        # Writing 5 sets the peak of the resident size back to its present value.
        _CLEAR_REFS.write_text("5")
        before = _resident("VmRSS")
        call()
        return max(_resident("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached in this run: a large matrix product, a large copy."""

    flops: float
    bytes: float


@cache
def ceilings(dtype: torch.dtype, device: torch.device) -> Ceilings:
    """Operations a second of a matrix product in ``dtype``, bytes a second read and written."""
    side, length = (8192, 512 * _MIB) if device.type == "cuda" else (1536, 128 * _MIB)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = interleaved(
        {"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)},
        device,
        budget=1.0,
    )
    return Ceilings(
        2 * side**3 / min(found["product"].seconds), 2 * length / min(found["copy"].seconds)
    )


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[], object]) -> float:
    _flush_l2()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(256 * _MIB, dtype=torch.uint8, device="cuda")


def _flush_l2() -> None:
    _flush_buffer().zero_()


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{_STATUS} has no {field}")
