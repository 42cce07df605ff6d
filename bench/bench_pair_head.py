"""The pair head of a training step: mean Z and mean Z' of all images, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from cases import DEVICE, Case, head_cases
from compare import Entry, LeftOut, Work
from operators import less_exact
from rivals import OURS, why_not_ours
from torch import Tensor, nn

from cin_fast.cost import sci_flops
from cin_fast.nn import CCI, SCI
from cin_fast.testing import assert_exact_as_torch, make_input

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


def step(function: Callable[..., tuple[Tensor, Tensor]], heads: Heads, x: Tensor) -> list[Tensor]:
    """Values, and the gradients of x, phi and psi."""
    partner = torch.arange(len(x)) ^ 1
    values = function(heads, x, partner)
    upstream = [torch.full_like(value, 1 / value.numel()) for value in values]
    return [*values, *torch.autograd.grad(values, [x, *heads.parameters()], upstream)]


def prepare(case: Case, name: str) -> Entry:
    """A rival with its inputs."""
    size = (case.batch, case.channels, case.height, case.width)
    x_BCHW = make_input("relu", size, case.dtype, DEVICE).requires_grad_()
    reason = "" if name == "eager" else why_not_ours(name, x_BCHW)
    if reason:
        raise LeftOut(reason)
    function = eager if name == "eager" else pooled
    heads = make_heads(case, case.dtype, None if name == "eager" else name)
    return Entry(partial(step, function, heads, x_BCHW), partial(check, function, heads, x_BCHW))


def check(function: Callable[..., tuple[Tensor, Tensor]], heads: Heads, x_BCHW: Tensor) -> None:
    """Both means and every gradient, of the first pairs, by the rule.

    Plain PyTorch is the dense or the pooled form, whichever is less exact: they add in different
    orders.
    """
    few = x_BCHW[: 2 * CHECKED_PAIRS].detach()
    exact = step(eager, in_plain_pytorch(heads, torch.float64), few.double().requires_grad_())
    plain = in_plain_pytorch(heads, few.dtype)
    dense, plain_pooled = (
        step(form, plain, few.clone().requires_grad_()) for form in (eager, pooled)
    )
    actual = step(function, heads, few.clone().requires_grad_())
    names = ["mean Z", "mean Z'", "dx", "dphi.weight", "dphi.bias", "dpsi.weight", "dpsi.bias"]
    for name, found, one, other, truth in zip(
        names, actual, dense, plain_pooled, exact, strict=True
    ):
        assert_exact_as_torch(name, found, less_exact(one, other, truth), truth)


@pytest.mark.parametrize("rival", ["eager", *OURS])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pair_head(case: Case, rival: str, versus) -> None:
    """Products: two operators on nine columns, thrice for the backward pass."""
    image = (case.batch, case.channels, case.positions)
    flops = 2 * sci_flops(image, (case.batch, case.channels, _TAPS))
    versus(rival, partial(prepare, case), Work(3 * flops, case.maps(2), case.dtype))
