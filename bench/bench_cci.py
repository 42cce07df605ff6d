"""Dense ``cci``: ``|W_i - eta_i W_partner(i)| x_i`` for both directions of every pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import pytest
from cases import DEVICE, Case, pair_cases
from compare import Entry, Work
from operators import Problem, entry
from rivals import cci_rivals, eager_cci
from torch import Tensor

from cin_fast.flops import sci_flops
from cin_fast.testing import ORDERS, in_order, make_input, make_pairs


def _learned_first(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x_BCL, eta_B, partner: call(x_BCL, partner, eta_B)


RIVALS = {rival.name: replace(rival, call=_learned_first(rival.call)) for rival in cci_rivals()}


@lru_cache(maxsize=1)
def problem(case: Case) -> Problem:
    """ReLU features in pairs; gradients for x and eta."""
    x_BCL = make_input("relu", (case.batch, case.channels, case.positions), case.dtype, DEVICE)
    partner, eta_B = make_pairs(case.batch, DEVICE)
    dy_BCL = make_input("randn", x_BCL.shape, case.dtype, DEVICE, seed=1) if case.backward else None
    also = tuple(_learned_first(partial(_in_order, seed)) for seed in ORDERS)
    return Problem(_learned_first(eager_cci), (x_BCL, eta_B), (), partner, dy_BCL, also)


def _in_order(seed: int, x_BCL: Tensor, partner: Tensor, eta_B: Tensor) -> Tensor:
    return in_order(lambda x, _: eager_cci(x, partner, eta_B), seed, x_BCL, None)


def prepare(case: Case, name: str) -> Entry:
    """A rival with its inputs."""
    return entry(RIVALS[name], problem(case), case)


def work(case: Case, name: str) -> Work:
    """Products: x x^T of both images (once each), then |M| x; bytes as for sci."""
    flops = case.times(3.5) * sci_flops((case.batch, case.channels, case.positions))
    return Work(flops, case.maps(case.times(2) * 2), case.dtype)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("case", pair_cases(), ids=str)
def test_cci(case: Case, rival: str, versus) -> None:
    """Maps of a training batch."""
    versus(rival, partial(prepare, case), work(case, rival))
