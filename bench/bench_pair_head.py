"""The pair head of a training step: mean Z and mean Z' of all images, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import pytest
import torch
from cases import DEVICE, Case, head_cases
from compare import Entry, LeftOut, Work
from rivals import why_not_ours
from torch import Tensor, nn

from cin_fast.dispatch import BACKENDS
from cin_fast.flops import sci_flops
from cin_fast.nn import CCI, SCI
from cin_fast.testing import ORDERS, Standard, assert_exact_as_torch, draw_order, make_input

CASES = [case for case in head_cases() if case.backward]
CHECKED_PAIRS = 2
_TAPS = 9


@dataclass(frozen=True)
class Heads:
    """phi and psi as modules, and how they are applied."""

    sci: SCI
    cci: CCI

    def parameters(self) -> list[nn.Parameter]:
        """phi's and psi's."""
        return list(self.cci.parameters())


def eager(heads: Heads, x_BCHW: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    """As other projects write it: both weight matrices, both maps, two convolutions, two means."""
    x_BCL = x_BCHW.flatten(2)
    weights_BCC = torch.softmax(torch.bmm(-x_BCL, x_BCL.transpose(1, 2)), -1)
    y_BCL = torch.bmm(weights_BCC, x_BCL)
    eta_B = heads.cci.eta(y_BCL.mean(-1), partner)
    contrast_BCC = (weights_BCC - eta_B[:, None, None] * weights_BCC[partner]).abs()
    z_BCHW = heads.cci.phi(y_BCL.view_as(x_BCHW)) + x_BCHW
    z_pair_BCHW = heads.cci.phi(torch.bmm(contrast_BCC, x_BCL).view_as(x_BCHW)) + x_BCHW
    return z_BCHW.mean((2, 3)), z_pair_BCHW.mean((2, 3))


def pooled(heads: Heads, x_BCHW: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    """What cin_fast's model does."""
    return heads.cci.pooled_pair(x_BCHW, partner)


def make_heads(case: Case, dtype: torch.dtype, backend: str | None = None) -> Heads:
    """The same weights for everybody."""
    torch.manual_seed(0)
    sci = SCI(case.channels, backend=backend)
    cci = CCI(case.channels, phi=sci.phi, backend=backend)
    return Heads(sci.to(DEVICE, dtype), cci.to(DEVICE, dtype))


def in_plain_pytorch(heads: Heads, dtype: torch.dtype) -> Heads:
    """A copy with the same weights in ``dtype`` on the reference backend."""
    copied = copy.deepcopy(heads)
    for part in (copied.sci, copied.cci):
        part.to(dtype).backend = "reference"
    return copied


@torch.no_grad()
def in_order(heads: Heads, order: Tensor) -> Heads:
    """A copy for maps whose channels come in another order."""
    copied = copy.deepcopy(heads)
    phi, psi = copied.cci.phi, copied.cci.psi
    phi.weight.copy_(phi.weight[order][:, order])
    phi.bias.copy_(phi.bias[order])
    psi.weight.copy_(psi.weight.unflatten(1, (2, -1))[..., order].flatten(1))
    return copied


def step(function: Callable[..., tuple[Tensor, Tensor]], heads: Heads, x: Tensor) -> list[Tensor]:
    """Values, and the gradients of x, phi and psi."""
    partner = torch.arange(len(x)) ^ 1
    values = function(heads, x, partner)
    upstream = [torch.full_like(value, 1 / value.numel()) for value in values]
    return [*values, *torch.autograd.grad(values, [x, *heads.parameters()], upstream)]


def make_maps(case: Case) -> Tensor:
    """ReLU features."""
    size = (case.batch, case.channels, case.height, case.width)
    return make_input("relu", size, case.dtype, DEVICE)


def prepare(case: Case, name: str) -> Entry:
    """A rival with its inputs."""
    x_BCHW = make_maps(case).requires_grad_()
    reason = "" if name == "eager" else why_not_ours(name, x_BCHW)
    if reason:
        raise LeftOut(reason)
    function = eager if name == "eager" else pooled
    heads = make_heads(case, case.dtype, None if name == "eager" else name)
    return Entry(partial(step, function, heads, x_BCHW), partial(check, function, heads, case))


@lru_cache(maxsize=1)
def truth(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Both means and every gradient of the first pairs: of plain PyTorch, and of float64."""
    few, heads = make_maps(case)[: 2 * CHECKED_PAIRS], make_heads(case, case.dtype)
    plain, judge = (in_plain_pytorch(heads, dtype) for dtype in (case.dtype, torch.float64))
    return (
        step(eager, plain, few.clone().requires_grad_()),
        step(eager, judge, few.double().requires_grad_()),
    )


@lru_cache(maxsize=1)
def doubts(case: Case) -> list[Standard]:
    """For each result, what plain PyTorch finds in other orders of summation.

    The pooled form is one. The gradient of psi's bias is a single number, and comes in some more.
    """
    plain, exact = truth(case)
    few = make_maps(case)[: 2 * CHECKED_PAIRS]
    heads = in_plain_pytorch(make_heads(case, case.dtype), case.dtype)
    forms = (plain, step(pooled, heads, few.clone().requires_grad_()))
    ways = [list(results) for results in zip(*forms, strict=True)]
    for seed in ORDERS:
        order = draw_order(case.channels, seed, DEVICE)
        reordered = step(pooled, in_order(heads, order), few[:, order].requires_grad_())
        ways[-1].append(reordered[-1])
    return [
        Standard(true, [(result, true) for result in results])
        for results, true in zip(ways, exact, strict=True)
    ]


def check(function: Callable[..., tuple[Tensor, Tensor]], heads: Heads, case: Case) -> None:
    """The rule, for the first pairs."""
    few = make_maps(case)[: 2 * CHECKED_PAIRS].requires_grad_()
    names = ["mean Z", "mean Z'", "dx", "dphi.weight", "dphi.bias", "dpsi.weight", "dpsi.bias"]
    results = step(function, heads, few)
    for number, trio in enumerate(zip(results, *truth(case), strict=True)):
        assert_exact_as_torch(names[number], *trio, lambda i=number: doubts(case)[i])


def work(case: Case, name: str) -> Work:
    """Products: two operators on nine columns, thrice for the backward pass."""
    image = (case.batch, case.channels, case.positions)
    flops = 2 * sci_flops(image, (case.batch, case.channels, _TAPS))
    return Work(3 * flops, case.maps(2), case.dtype)


@pytest.mark.parametrize("rival", ["eager", *BACKENDS])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pair_head(case: Case, rival: str, versus) -> None:
    """Maps of a training batch."""
    versus(rival, partial(prepare, case), work(case, rival))
