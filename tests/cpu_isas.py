"""The instruction sets that the C++ kernels are compiled for, and memory that shows misuse."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from cin_fast.testing import KERNEL_DTYPES


def runs(isa: str) -> bool:
    avx512 = {"avx512f", "avx512dq", "avx512vl", "avx512bw"}
    needs = {"avx512_bf16": avx512 | {"avx512_bf16"}, "avx512": avx512, "avx2": {"avx2", "fma"}}
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
        flags = next((line.split() for line in info if line.startswith("flags")), [])
        return needs.get(isa, set()) <= set(flags)
    return isa == "plain"


ISAS = ("avx512_bf16", "avx512", "avx2", "plain")
# Those of avx512_bf16 are for one dtype; others take the kernels of avx512.
ISA_DTYPES = [
    (isa, dtype)
    for dtype in KERNEL_DTYPES
    for isa in ISAS
    if isa != "avx512_bf16" or dtype == torch.bfloat16
]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """All that torch allocates, outputs and scratch alike, starts as NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1000).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
