"""The head that training and inference need: features to the spatial mean of Z (Eq. 1 to 3)."""

from __future__ import annotations

from functools import lru_cache, partial

import pytest
import torch
from cases import DEVICE, Case, head_cases
from compare import Entry, Work
from operators import Problem, entry
from rivals import eager_head, head_rivals, pooled_head

from cin_fast.flops import sci_flops
from cin_fast.testing import make_input

RIVALS = {rival.name: rival for rival in head_rivals()}
_TAPS = 9


@lru_cache(maxsize=1)
def problem(case: Case) -> Problem:
    """ReLU features; gradients for x, and phi's weight and bias."""
    shape = (case.channels, case.channels, 3, 3)
    weight = make_input("randn", shape, case.dtype, DEVICE) * (_TAPS * case.channels) ** -0.5
    bias = torch.zeros(case.channels, dtype=case.dtype, device=DEVICE)
    size = (case.batch, case.channels, case.height, case.width)
    x_BCHW = make_input("relu", size, case.dtype, DEVICE)
    dy_BC = torch.randn_like(x_BCHW[..., 0, 0]) if case.backward else None
    pooled = partial(pooled_head, backend="reference")
    return Problem(eager_head, (x_BCHW,), (weight, bias), dy=dy_BC, also=(pooled,))


def prepare(case: Case, name: str) -> Entry:
    """A rival with its inputs."""
    return entry(RIVALS[name], problem(case), case)


def work(case: Case, name: str) -> Work:
    """Products that are needed: x x^T, W on nine columns, phi's weights on nine means each."""
    image = (case.batch, case.channels, case.positions)
    flops = sci_flops(image, (case.batch, case.channels, _TAPS))
    flops += 2 * case.batch * case.channels**2 * _TAPS
    return Work(case.times(3) * flops, case.maps(case.times(2)), case.dtype)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("case", head_cases(), ids=str)
def test_head(case: Case, rival: str, versus) -> None:
    """Maps that a classifier's head gets."""
    versus(rival, partial(prepare, case), work(case, rival))
