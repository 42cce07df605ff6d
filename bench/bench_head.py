"""The head that training and inference need: features to the spatial mean of Z (Eq. 1 to 3)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import DEVICE, Case, head_cases
from conftest import Entry, Work
from operators import CHECKED_IMAGES, Arguments, check_close, entry
from rivals import Rival, eager_head, head_rivals
from torch import Tensor, nn

from cin_fast.cost import sci_flops
from cin_fast.testing import make_input

RIVALS = {rival.name: rival for rival in head_rivals()}
_TAPS = 9


def prepare(case: Case, name: str) -> Entry:
    """A rival with its inputs; gradients for x, and phi's weight and bias."""
    rival = RIVALS[name]
    shape = (case.channels, case.channels, 3, 3)
    weight = make_input("randn", shape, case.dtype, DEVICE) * (_TAPS * case.channels) ** -0.5
    bias = torch.zeros(case.channels, dtype=case.dtype, device=DEVICE)

    def arguments(batch: int) -> Arguments:
        size = (batch, case.channels, case.height, case.width)
        x_BCHW = make_input("relu", size, case.dtype, DEVICE)
        dy_BC = torch.randn_like(x_BCHW[..., 0, 0]) if case.backward else None
        return Arguments((x_BCHW, weight, bias), dy=dy_BC)

    few = arguments(min(case.batch, CHECKED_IMAGES))
    with_phi = Rival(rival.name, partial(_with_phi, rival.call), rival.why_not)
    judge = partial(_with_phi, eager_head)
    return entry(with_phi, judge, arguments(case.batch), few, check=check_close)


def _with_phi(call, x_BCHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    phi = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, device="meta")
    # Plain tensors in place of its parameters, so that gradients flow to them.
    del phi.weight, phi.bias
    phi.weight, phi.bias = weight, bias
    return call(x_BCHW, phi)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("case", head_cases(), ids=str)
def test_head(case: Case, rival: str, versus) -> None:
    """Products that are needed: x x^T, W on nine columns, phi's weights on nine means each."""
    image = (case.batch, case.channels, case.positions)
    flops = sci_flops(image, (case.batch, case.channels, _TAPS))
    flops += 2 * case.batch * case.channels**2 * _TAPS
    versus(
        rival,
        partial(prepare, case),
        Work(case.times(3) * flops, case.maps(case.times(2)), case.dtype),
    )
