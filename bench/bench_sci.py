"""Dense ``sci``: ``softmax(-x x^T) x``."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import DEVICE, Case, network_cases, scaling_cases
from conftest import Entry, Work
from rivals import Rival, sci_rivals
from torch import Tensor

from cin_fast.cost import sci_flops
from cin_fast.testing import assert_exact_as_torch, make_input

RIVALS = {rival.name: rival for rival in sci_rivals()}
CASES = [*network_cases(), *scaling_cases()]
# Compilation takes many seconds a shape, so it stands beside the networks' maps alone.
SLOW_TO_START = {"compiled", "flex"}
# The check in float64 needs a C x C matrix of it an image; the rest of a batch is the same code.
CHECKED_IMAGES = 2


def members() -> list[tuple[Case, str]]:
    """Each case with whom it is measured against."""
    scaling = scaling_cases()
    return [
        (case, name)
        for case in CASES
        for name in RIVALS
        if not (case in scaling and name in SLOW_TO_START)
    ]


def prepare(case: Case, name: str) -> Entry:
    """A rival with its inputs."""
    x_BCL = make_input("relu", (case.batch, case.channels, case.positions), case.dtype, DEVICE)
    rival = RIVALS[name]
    reason = rival.why_not(x_BCL)
    if reason:
        raise RuntimeError(reason)
    x_BCL.requires_grad_(case.backward)
    dy_BCL = torch.randn_like(x_BCL)
    return Entry(partial(run, rival, x_BCL, dy_BCL), partial(check, rival, x_BCL, dy_BCL))


def run(rival: Rival, x_BCL: Tensor, dy_BCL: Tensor) -> list[Tensor]:
    """What is timed: the value, and the gradient where x asks for it."""
    y_BCL = rival.call(x_BCL)
    return [y_BCL, *torch.autograd.grad(y_BCL, x_BCL, dy_BCL)] if x_BCL.requires_grad else [y_BCL]


def check(rival: Rival, x_BCL: Tensor, dy_BCL: Tensor) -> None:
    """The rule of cin_fast.testing, value and gradient."""
    few, dy_few = (t[:CHECKED_IMAGES].detach() for t in (x_BCL, dy_BCL))
    few.requires_grad_(x_BCL.requires_grad)
    double = few.detach().double().requires_grad_(x_BCL.requires_grad)
    eager = RIVALS["eager"]
    exact = run(eager, double, dy_few.double())
    plain = run(eager, few, dy_few)
    for what, actual, torch_result, truth in zip(
        ("y", "dx"), run(rival, few, dy_few), plain, exact, strict=False
    ):
        assert_exact_as_torch(f"{rival.name} {what}", actual, torch_result, truth)


@pytest.mark.parametrize(("case", "rival"), members(), ids=str)
def test_sci(case: Case, rival: str, versus) -> None:
    """Products: 4 C^2 L an image forward, 10 more backward. Bytes: x read and y written."""
    shape = (case.batch, case.channels, case.positions)
    size = case.batch * case.channels * case.positions * case.dtype.itemsize
    factor = 3.5 if case.backward else 1
    moved = 4 * size if case.backward else 2 * size
    versus(rival, partial(prepare, case), Work(factor * sci_flops(shape), moved, case.dtype))
