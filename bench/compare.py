"""How the members of a group are compared: each checked first, then all timed in turn.

The seconds of a run are planned: every group has a share, what one leaves the later ones get, and
a member that would take longer than its group has is left out and says so.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from cases import DEVICE, DTYPES
from measure import Ceilings, Measured, interleaved, measure_ceilings
from results_file import OURS

# What nobody runs for its speed: left out first where time is short.
_LEAST_IMPORTANT = ("reference", "resnet50-cin-dense")


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
    """What is known of a group after its first member ran; ``spent`` are its seconds by phase."""

    measured: dict[str, Measured] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Selected:
    """A group as it was selected.

    Args:
        members: those that will be asked for.
        share: of the run's seconds, relative to other groups.
        budget: seconds of timing for all members together, where the share allows it.
    """

    members: tuple[str, ...]
    share: float = 1.0
    budget: float = 4.0


class Plan:
    """Divides a run's seconds among its groups.

    Args:
        seconds: for all of them, from now on.
        shares: of each group, relative to the others.
    """

    def __init__(self, seconds: float, shares: Mapping[str, float]) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._shares = dict(shares)

    def allow(self, name: str) -> float:
        """Seconds for the group that starts now: its share of what is left, 0 if nothing is."""
        total = sum(self._shares.values())
        return max(0.0, self._end - time.monotonic()) * self._shares.pop(name) / total


class Pace:
    """How long members took, to predict how long they will take."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)

    def learn(self, subject: str, member: str, flops: float, seconds: float) -> None:
        """A call of ``flops`` operations took ``seconds``."""
        if flops > 0:
            self._known[subject, member].append((flops, seconds))

    def predict(self, subject: str, member: str, flops: float) -> float:
        """Seconds of a call, as operations go, from the call nearest in size; 0 if unknown."""
        known = self._known[subject, member]
        if not known or flops <= 0:
            return 0.0
        nearest, seconds = min(known, key=lambda point: abs(math.log(point[0] / flops)))
        return seconds * flops / nearest


class Comparison:
    """Measures groups once, whichever member asks first.

    Args:
        selected: the groups whose members will be asked for.
        seconds: for the whole run.
        least: rounds that every member takes part in.
        timed: False checks without timing.
    """

    def __init__(
        self,
        selected: Mapping[str, Selected],
        *,
        seconds: float = float("inf"),
        least: int = 5,
        timed: bool = True,
    ) -> None:
        self.selected = selected
        self.least = least
        self.timed = timed
        self.plan = Plan(seconds, {name: group.share for name, group in selected.items()})
        self.pace = Pace()
        self.groups: dict[str, Group] = {}
        self.ceilings: dict[str, Ceilings] = {}
        self._subjects: set[str] = set()

    def group(self, name: str, prepare: Callable[[str], Entry], flops: float = 0.0) -> Group:
        """Times, reasons and failures of all selected members of a group.

        Args:
            flops: what a call computes, from which its time is predicted.
        """
        if name not in self.groups:
            self._look_at_ceilings(name)
            self.groups[name] = self._measure(name, prepare, flops)
        return self.groups[name]

    def _measure(self, name: str, prepare: Callable[[str], Entry], flops: float) -> Group:
        started, subject = time.monotonic(), name.partition(":")[0]
        group, calls, selected = Group(), {}, self.selected[name]
        allowed, planned = self.plan.allow(name), 0.0
        for member in sorted(selected.members, key=_importance):
            # A check, a call for its memory, and the rounds.
            takes = (2 + self.least) * self.pace.predict(subject, member, flops)
            if self.timed and (not allowed or planned + takes > allowed):
                group.reasons[member] = self._too_long(takes, allowed)
                continue
            try:
                entry = prepare(member)
                entry.check()
                calls[member] = entry.call
                planned += takes
            except LeftOut as error:
                group.reasons[member] = str(error)
            except Exception as error:
                group.failures[member] = error
        group.spent["checks"] = time.monotonic() - started
        if calls and self.timed:
            budget = min(selected.budget, max(0.0, allowed - group.spent["checks"]))
            try:
                group.measured = interleaved(calls, DEVICE, budget=budget, least=self.least)
            except Exception as error:
                # Each member then shows it, not the first alone.
                group.failures.update(dict.fromkeys(calls, error))
            for member, measured in group.measured.items():
                self.pace.learn(subject, member, flops, statistics.median(measured.seconds))
        group.spent["all"] = time.monotonic() - started
        group.spent["planned"] = allowed
        return group

    def _too_long(self, takes: float, allowed: float) -> str:
        if not allowed:
            return f"the run's {self.plan.seconds:.0f} s were over (CIN_FAST_BENCH_SECONDS)"
        return (
            f"would take {takes:.0f} s, and its group had {allowed:.0f} s for all "
            "(CIN_FAST_BENCH_SECONDS gives more)"
        )

    def _look_at_ceilings(self, name: str) -> None:
        """Once a subject, so that neither a slow nor a fast minute decides; the best counts."""
        subject = name.partition(":")[0]
        if subject in self._subjects or not self.timed:
            return
        self._subjects.add(subject)
        for dtype_name in ("float32", "bfloat16"):
            found = measure_ceilings(DTYPES[dtype_name], DEVICE)
            best = self.ceilings.get(dtype_name, found)
            self.ceilings[dtype_name] = Ceilings(
                max(best.flops, found.flops), max(best.bytes, found.bytes)
            )


def _importance(member: str) -> tuple[bool, bool]:
    """Ours, the rivals, then what nobody runs for its speed."""
    return member in _LEAST_IMPORTANT, member not in OURS
