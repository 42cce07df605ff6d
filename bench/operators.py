"""How a benchmark of an operator prepares a rival: inputs, the rule, and what is timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from cases import QUICK, Case
from compare import Entry, LeftOut
from rivals import Rival, forget_compiled
from torch import Tensor

from cin_fast.dispatch import BACKENDS
from cin_fast.testing import Standard, assert_exact_as_torch, make_pairs

# Compilation takes seconds a shape and direction, and must not eat the run.
_COMPILE_SECONDS = 20.0 if QUICK else 100.0


@dataclass(frozen=True)
class Problem:
    """What the rivals of a case are called with, and the way of plain PyTorch to judge them by.

    ``images`` and ``shared`` get gradients where there is a ``dy``; the first axis of ``images``
    and ``dy`` counts images. ``partner`` comes last in a call, if there is one. ``also`` are other
    ways of plain PyTorch, which add in other orders, for where one order leaves a doubt.
    """

    judge: Callable[..., Tensor]
    images: tuple[Tensor, ...]
    shared: tuple[Tensor, ...] = ()
    partner: Tensor | None = None
    dy: Tensor | None = None
    also: tuple[Callable[..., Tensor], ...] = ()

    @property
    def checked(self) -> list[int]:
        """First and last pair: float64 needs C x C matrices, so a batch is not judged whole."""
        batch = len(self.images[0])
        return sorted({i for i in (0, 1, batch - 2, batch - 1) if 0 <= i < batch})

    @cached_property
    def exact(self) -> list[Tensor]:
        """Results for the checked images in float64."""
        few = self.few()
        images, shared = (tuple(t.double() for t in group) for group in (few.images, few.shared))
        dy = None if few.dy is None else few.dy.double()
        return run(self.judge, replace(few, images=images, shared=shared, dy=dy))

    @cached_property
    def plain(self) -> list[Tensor]:
        """Results for the checked images in plain PyTorch."""
        return run(self.judge, self.few())

    @cached_property
    def _others(self) -> list[list[Tensor]]:
        return [run(way, self.few()) for way in self.also]

    def doubt(self, number: int) -> Standard:
        """What the result of that ``number`` is held to if one order of plain PyTorch fails it."""
        exact = self.exact[number]
        ways = (self.plain, *self._others)
        return Standard(exact, [(results[number], exact) for results in ways])

    def few(self) -> Problem:
        """The checked images alone."""
        partner = None if self.partner is None else make_pairs(len(self.checked))[0]
        return replace(
            self,
            images=tuple(t[self.checked] for t in self.images),
            partner=None if partner is None else partner.to(self.images[0].device),
            dy=None if self.dy is None else self.dy[self.checked],
        )

    def masked(self) -> Problem:
        """The whole batch, with a ``dy`` of the checked images alone: so are shared gradients."""
        if self.dy is None:
            return self
        dy = torch.zeros_like(self.dy)
        dy[self.checked] = self.dy[self.checked]
        return replace(self, dy=dy)

    def of_checked(self, results: list[Tensor]) -> list[Tensor]:
        """Those parts of a whole batch's results that :attr:`exact` knows."""
        per_image = 1 + len(self.images)
        return [t[self.checked] for t in results[:per_image]] + results[per_image:]


def run(call: Callable[..., Tensor], problem: Problem) -> list[Tensor]:
    """What is timed: the value and, with a ``dy``, the gradients."""
    fixed = () if problem.partner is None else (problem.partner,)
    learned = (*problem.images, *problem.shared)
    if problem.dy is None:
        return [call(*learned, *fixed)]
    leaves = [t.detach().requires_grad_() for t in learned]
    y = call(*leaves, *fixed)
    return [y.detach(), *torch.autograd.grad(y, leaves, problem.dy)]


def entry(rival: Rival, problem: Problem, case: Case) -> Entry:
    """A rival ready to be checked and timed on the same arguments.

    Raises:
        LeftOut: with the reason, if the rival cannot run here.
    """
    reason = rival.why_not(problem.images[0]) or (case.why_not_compiled if rival.compiles else "")
    if reason:
        raise LeftOut(reason)
    return Entry(partial(run, rival.call, problem), partial(_check, rival, problem))


def check_rule(name: str, call: Callable[..., Tensor], problem: Problem) -> None:
    """The rule of cin_fast.testing for the value and each gradient, in the shape that is timed.

    Raises:
        AssertionError: naming what was wrong.
    """
    results = run(call, problem.masked())
    assert torch.isfinite(results[0]).all(), f"{name} y: not finite"
    found = problem.of_checked(results)
    for number, trio in enumerate(zip(found, problem.plain, problem.exact, strict=True)):
        what = f"gradient {number - 1}" if number else "y"
        assert_exact_as_torch(f"{name} {what}", *trio, partial(problem.doubt, number))


class _Compilation:
    """Seconds that compilation took so far, and the case that it was for."""

    spent = 0.0
    problem: Problem | None = None


def _check(rival: Rival, problem: Problem) -> None:
    """An own backend that fails is a failure; a rival that fails is left out, and says why."""
    if rival.name in BACKENDS:
        check_rule(rival.name, rival.call, problem)
        return
    if rival.compiles and _Compilation.spent > _COMPILE_SECONDS:
        raise LeftOut(f"the {_COMPILE_SECONDS:.0f} s for compilation are spent")
    started = time.monotonic()
    try:
        if rival.compiles and _Compilation.problem is not problem:
            forget_compiled()
            _Compilation.problem = problem
        check_rule(rival.name, rival.call, problem)
    except Exception as error:
        raise LeftOut(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    finally:
        if rival.compiles:
            _Compilation.spent += time.monotonic() - started
