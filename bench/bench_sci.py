"""Dense ``sci``: ``softmax(-x x^T) x``."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import DEVICE, Case, network_cases, scaling_cases
from conftest import Entry, Work
from operators import CHECKED_IMAGES, Arguments, entry
from rivals import eager_sci, sci_rivals

from cin_fast.cost import sci_flops
from cin_fast.testing import make_input

RIVALS = {rival.name: rival for rival in sci_rivals()}
# Compilation takes many seconds a shape, so it stands beside the networks' maps alone.
SLOW_TO_START = {"compiled", "flex"}


def members() -> list[tuple[Case, str]]:
    """Each case with whom it is measured against."""
    networks = [(case, name) for case in network_cases() for name in RIVALS]
    scaling = [
        (case, name) for case in scaling_cases() for name in RIVALS if name not in SLOW_TO_START
    ]
    return networks + scaling


def prepare(case: Case, name: str) -> Entry:
    """A rival with its inputs."""

    def arguments(batch: int) -> Arguments:
        x_BCL = make_input("relu", (batch, case.channels, case.positions), case.dtype, DEVICE)
        return Arguments((x_BCL,), dy=torch.randn_like(x_BCL) if case.backward else None)

    few = arguments(min(case.batch, CHECKED_IMAGES))
    return entry(RIVALS[name], eager_sci, arguments(case.batch), few)


@pytest.mark.parametrize(("case", "rival"), members(), ids=str)
def test_sci(case: Case, rival: str, versus) -> None:
    """Products: 4 C^2 L an image forward, 10 more backward. Bytes: x and dy read, y and dx."""
    flops = sci_flops((case.batch, case.channels, case.positions))
    versus(
        rival,
        partial(prepare, case),
        Work(
            (3.5 if case.backward else 1) * flops, case.maps(4 if case.backward else 2), case.dtype
        ),
    )
