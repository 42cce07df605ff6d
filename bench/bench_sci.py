"""Dense ``sci``: ``softmax(-x x^T) x``."""

from __future__ import annotations

from functools import lru_cache, partial

import pytest
import torch
from cases import DEVICE, Case, network_cases, scaling_cases
from compare import Entry, Work
from operators import Problem, entry
from rivals import eager_sci, sci_rivals

from cin_fast.flops import sci_flops
from cin_fast.testing import make_input

RIVALS = {rival.name: rival for rival in sci_rivals()}
# Compilation takes many seconds a shape, so it stands beside the networks' maps alone.
QUICK_TO_START = [name for name, rival in RIVALS.items() if not rival.compiles]


@lru_cache(maxsize=1)
def problem(case: Case) -> Problem:
    """ReLU features."""
    x_BCL = make_input("relu", (case.batch, case.channels, case.positions), case.dtype, DEVICE)
    return Problem(eager_sci, (x_BCL,), dy=torch.randn_like(x_BCL) if case.backward else None)


def prepare(case: Case, name: str) -> Entry:
    """A rival with its inputs."""
    return entry(RIVALS[name], problem(case), case)


def work(case: Case, name: str) -> Work:
    """Products: 4 C^2 L an image forward, 10 more backward. Bytes: x and dy read, y and dx."""
    flops = sci_flops((case.batch, case.channels, case.positions))
    return Work(case.times(3.5) * flops, case.maps(case.times(2) * 2), case.dtype)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("case", network_cases(), ids=str)
def test_sci(case: Case, rival: str, versus) -> None:
    """The maps of real networks."""
    versus(rival, partial(prepare, case), work(case, rival))


@pytest.mark.parametrize("rival", QUICK_TO_START)
@pytest.mark.parametrize("case", scaling_cases(), ids=str)
def test_sci_scaling(case: Case, rival: str, versus) -> None:
    """Time against C, L and B."""
    versus(rival, partial(prepare, case), work(case, rival))
