"""How a benchmark of an operator prepares a rival: inputs, the rule, and what is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from conftest import Entry, LeftOut
from rivals import Rival
from torch import Tensor

from cin_fast.testing import assert_exact_as_torch

# The check in float64 needs C x C matrices of it; the other images of a batch run the same code.
CHECKED_IMAGES = 2


@dataclass(frozen=True)
class Arguments:
    """What a subject is called with: ``learned`` get gradients, ``fixed`` do not."""

    learned: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...] = ()
    dy: Tensor | None = None

    def double(self) -> Arguments:
        """The same in float64, where it is floating point."""
        return self._mapped(lambda t: t.double() if t.is_floating_point() else t)

    def leaves(self) -> Arguments:
        """The same, with gradients where there is a ``dy``."""
        learned = tuple(
            t.detach().clone().requires_grad_(self.dy is not None) for t in self.learned
        )
        return Arguments(learned, self.fixed, self.dy)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Arguments:
        learned, fixed = (tuple(map(change, group)) for group in (self.learned, self.fixed))
        return Arguments(learned, fixed, None if self.dy is None else change(self.dy))


def run(call: Callable[..., Tensor], arguments: Arguments) -> list[Tensor]:
    """What is timed: the value and, with a ``dy``, the gradients."""
    y = call(*arguments.learned, *arguments.fixed)
    if arguments.dy is None:
        return [y]
    return [y, *torch.autograd.grad(y, arguments.learned, arguments.dy)]


Check = Callable[[Rival, Callable[..., Tensor], Arguments], None]


def check_rule(rival: Rival, judge: Callable[..., Tensor], few: Arguments) -> None:
    """The rule of cin_fast.testing for the value and each gradient."""
    plain = run(judge, few.leaves())
    for (name, found, truth), torch_result in zip(_results(rival, judge, few), plain, strict=True):
        assert_exact_as_torch(f"{rival.name} {name}", found, torch_result, truth)


def check_close(rival: Rival, judge: Callable[..., Tensor], few: Arguments) -> None:
    """Within 1e-5 of the norm in float32, as the pooled form promises, and 1e-2 below."""
    for name, found, truth in _results(rival, judge, few):
        error = ((found.double() - truth).norm() / truth.norm()).item()
        assert error < (1e-5 if found.dtype == torch.float32 else 1e-2), (
            f"{rival.name} {name}: relative error {error:.1e} against float64"
        )


def entry(
    rival: Rival,
    judge: Callable[..., Tensor],
    arguments: Arguments,
    few: Arguments,
    check: Check = check_rule,
) -> Entry:
    """A rival ready to be timed on ``arguments``, and to be checked on ``few``.

    Args:
        judge: plain PyTorch's way, which runs in float64 for the truth.

    Raises:
        LeftOut: with the reason, if the rival cannot run here.
    """
    reason = rival.why_not(arguments.learned[0])
    if reason:
        raise LeftOut(reason)
    return Entry(partial(run, rival.call, arguments.leaves()), partial(check, rival, judge, few))


def _results(
    rival: Rival, judge: Callable[..., Tensor], few: Arguments
) -> list[tuple[str, Tensor, Tensor]]:
    actual = run(rival.call, few.leaves())
    exact = run(judge, few.double().leaves())
    names = ["y", *(f"gradient {n}" for n in range(len(few.learned)))][: len(exact)]
    return list(zip(names, actual, exact, strict=True))
