"""How the members of a group are compared: each checked first, then all timed in turn."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from cases import DEVICE, DTYPES
from measure import Ceilings, Measured, interleaved, measure_ceilings


class Tape:
    """A clock that passes as long in each round as the round took when it was measured."""

    def __init__(self) -> None:
        self.time = 0.0
        self.rounds: deque[float] = deque()

    def load(self, seconds: Sequence[float]) -> None:
        """The rounds to come; what was left of others is forgotten."""
        self.rounds = deque(seconds)

    def now(self) -> float:
        """What pytest-benchmark reads as its timer."""
        return self.time

    def play(self) -> None:
        """Let the next round pass."""
        self.time += self.rounds.popleft()


@dataclass(frozen=True)
class Work:
    """What a call must compute and move at least: the numerators of its shares of the ceilings."""

    flops: float
    bytes: float
    dtype: torch.dtype = torch.float32


class LeftOut(Exception):
    """A rival cannot run here; says why. Any other error is a failure."""


@dataclass(frozen=True)
class Entry:
    """A prepared rival: ``call`` is what is timed, after ``check`` has passed."""

    call: Callable[[], object]
    check: Callable[[], None]


@dataclass
class Group:
    """What is known of a group after its first member ran."""

    measured: dict[str, Measured] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)


class Comparison:
    """Measures groups once, whichever member asks first.

    Args:
        selected: members of each group that will be asked for.
        budget: seconds of timing for all members of a group together.
        limit: seconds after which no other group is started.
        timed: False checks without timing.
    """

    def __init__(
        self,
        selected: Mapping[str, Sequence[str]],
        *,
        budget: float = 4.0,
        limit: float = float("inf"),
        timed: bool = True,
    ) -> None:
        self.selected = selected
        self.budget = budget
        self.limit = limit
        self.timed = timed
        self.groups: dict[str, Group] = {}
        self.ceilings: dict[str, Ceilings] = {}
        self._started = time.monotonic()
        self._subject = ""

    def group(self, name: str, prepare: Callable[[str], Entry]) -> Group:
        """Times, reasons and failures of all selected members of a group."""
        if name not in self.groups:
            self.groups[name] = self._measure(self.selected[name], prepare)
            self._look_at_ceilings(name)
        return self.groups[name]

    def _measure(self, members: Sequence[str], prepare: Callable[[str], Entry]) -> Group:
        group, calls = Group(), {}
        if time.monotonic() - self._started > self.limit:
            reason = f"the run's {self.limit:.0f} s were over (CIN_FAST_BENCH_SECONDS)"
            group.reasons = dict.fromkeys(members, reason)
            return group
        for member in members:
            try:
                entry = prepare(member)
                entry.check()
                calls[member] = entry.call
            except LeftOut as error:
                group.reasons[member] = str(error)
            except Exception as error:
                group.failures[member] = error
        if calls and self.timed:
            group.measured = interleaved(calls, DEVICE, budget=self.budget)
        return group

    def _look_at_ceilings(self, name: str) -> None:
        """Once a subject, so that neither a slow nor a fast minute decides; the best counts."""
        subject = name.partition(":")[0]
        if subject == self._subject or not self.timed:
            return
        self._subject = subject
        for dtype_name in ("float32", "bfloat16"):
            found = measure_ceilings(DTYPES[dtype_name], DEVICE)
            best = self.ceilings.get(dtype_name, found)
            self.ceilings[dtype_name] = Ceilings(
                max(best.flops, found.flops), max(best.bytes, found.bytes)
            )
