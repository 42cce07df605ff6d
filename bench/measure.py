"""How anything is measured: interleaved rounds, peak memory, and the machine's ceilings."""

from __future__ import annotations

import ctypes
import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional as F

import cin_fast

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_MIB = 1 << 20
# Clock cycles: five milliseconds and more, in which a slow host has queued both directions.
_HEAD_START = 10_000_000


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
    """Times of all calls, one of each in every round, so that a drifting machine favours none.

    The order changes from round to round, so that nobody always follows the same rival; Python's
    garbage collector waits until the rounds are over. A slow call takes part in the first rounds
    alone: past ``least`` it stops when its share of ``budget`` would not last for another one.

    Args:
        calls: by name.
        device: where they compute; on a GPU, device events are read and L2 is emptied before.
        budget: seconds for all together, in equal shares.
    """
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    clock, warm_up = (_cuda_seconds, 3) if device.type == "cuda" else (_cpu_seconds, 0)
    for _ in range(warm_up):
        for call in calls.values():
            clock(call)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    share = budget / len(calls)
    shuffle = random.Random(0).shuffle
    with _no_garbage_collection():
        for taken in range(most):
            order = [
                name
                for name, past in seconds.items()
                if taken < least or (len(past) == taken and sum(past) * (1 + 1 / taken) <= share)
            ]
            shuffle(order)
            for name in order:
                seconds[name].append(clock(calls[name]))
    return {name: Measured(tuple(seconds[name]), peaks[name]) for name in calls}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """What a call holds at most beyond what was held before it, its results included.

    What a library sets up at its first call is no part of it, so the call has run before; memory
    that this one keeps for the next call is.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        cin_fast.empty_cache()
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


@torch.inference_mode()
def measure_ceilings(dtype: torch.dtype, device: torch.device, *, budget: float = 0.6) -> Ceilings:
    """Operations a second of a matrix product in ``dtype``, bytes a second read and written.

    The product is the faster of ``torch.mm`` and a 1 x 1 convolution: on a CPU they run in
    different libraries, and on some processors the first reaches much less.
    """
    side, length = (8192, 512 * _MIB) if device.type == "cuda" else (1536, 128 * _MIB)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    pixels = a.t().contiguous().view(1, side, 16, side // 16)
    pixels, kernel = (
        t.to(memory_format=torch.channels_last) for t in (pixels, b.view(side, side, 1, 1))
    )
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = interleaved(
        {
            "mm": lambda: torch.mm(a, b),
            "convolution": lambda: F.conv2d(pixels, kernel),
            "copy": lambda: target.copy_(source),
        },
        device,
        budget=budget,
    )
    best = {name: min(measured.seconds) for name, measured in found.items()}
    product = min(best["mm"], best["convolution"])
    return Ceilings(2 * side**3 / product, 2 * length / best["copy"])


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[], object]) -> float:
    # The device is kept busy while the host queues what follows: a short kernel's time would
    # otherwise be that of its launch.
    torch.cuda._sleep(_HEAD_START)
    _flush_l2()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@cache
def _flush_buffer(device: str) -> torch.Tensor:
    return torch.empty(256 * _MIB, dtype=torch.uint8, device=device)


# Made in inference mode, as for the ceilings, the buffer could be refilled in no other.
@torch.inference_mode()
def _flush_l2(device: str = "cuda") -> None:
    _flush_buffer(device).zero_()


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{_STATUS} has no {field}")
