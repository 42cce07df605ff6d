"""Dense ``cci``: ``|W_i - eta_i W_partner(i)| x_i`` for both directions of every pair."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import DEVICE, Case, pair_cases
from conftest import Entry, Work
from operators import CHECKED_IMAGES, Arguments, entry
from rivals import Rival, cci_rivals, eager_cci
from torch import Tensor

from cin_fast.cost import sci_flops
from cin_fast.testing import make_input, make_pairs

RIVALS = {rival.name: rival for rival in cci_rivals()}


def prepare(case: Case, name: str) -> Entry:
    """A rival with its inputs; gradients for x and eta."""
    rival = RIVALS[name]

    def arguments(batch: int) -> Arguments:
        x_BCL = make_input("relu", (batch, case.channels, case.positions), case.dtype, DEVICE)
        partner, eta_B = make_pairs(batch, DEVICE)
        dy_BCL = torch.randn_like(x_BCL) if case.backward else None
        return Arguments((x_BCL, eta_B), (partner,), dy_BCL)

    few = arguments(min(case.batch, CHECKED_IMAGES))
    in_order = Rival(rival.name, _learned_first(rival.call), rival.why_not)
    return entry(in_order, _learned_first(eager_cci), arguments(case.batch), few)


def _learned_first(call):
    def reordered(x_BCL: Tensor, eta_B: Tensor, partner: Tensor) -> Tensor:
        return call(x_BCL, partner, eta_B)

    return reordered


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("case", pair_cases(), ids=str)
def test_cci(case: Case, rival: str, versus) -> None:
    """Products: x x^T of both images (once each), then |M| x; bytes as for sci."""
    flops = sci_flops((case.batch, case.channels, case.positions))
    versus(
        rival,
        partial(prepare, case),
        Work(
            (3.5 if case.backward else 1) * flops, case.maps(4 if case.backward else 2), case.dtype
        ),
    )
