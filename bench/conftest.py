"""Every benchmark compares rivals on one case: checked first, then timed in interleaved rounds.

A benchmark is a test that calls ``versus(case, rivals, rival, subject)``. The first member of a
group that runs prepares, checks and times all selected members; each then hands its own rounds to
pytest-benchmark, which keeps the statistics and the JSON.
"""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import DEVICE, DTYPES, QUICK
from measure import Measured, ceilings, interleaved

from cin_fast.dispatch import BACKENDS, unavailable
from cin_fast.info import device_name, versions
from cin_fast.records import git_commit

_BUDGET = 1.0 if QUICK else 3.0


class Tape:
    """A clock that passes as long in each round as the round took when it was measured."""

    def __init__(self) -> None:
        self.time = 0.0
        self.rounds: deque[float] = deque()

    def now(self) -> float:
        """What pytest-benchmark reads as its timer."""
        return self.time

    def play(self) -> None:
        """Let the next round pass."""
        self.time += self.rounds.popleft()


TAPE = Tape()


@dataclass(frozen=True)
class Work:
    """What a call computes and moves at least: the numerators of its shares of the ceilings."""

    flops: float
    bytes: float
    dtype: torch.dtype = torch.float32


class LeftOut(Exception):
    """A rival cannot run here; says why."""


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


class Comparison:
    """Measures groups once, whichever member asks first."""

    def __init__(self, selected: Mapping[str, Sequence[str]]) -> None:
        self.selected = selected
        self.groups: dict[str, Group] = {}

    def group(self, name: str, prepare: Callable[[str], Entry]) -> Group:
        """Times and reasons of all selected members of a group."""
        if name not in self.groups:
            self.groups[name] = self._measure(self.selected[name], prepare)
        return self.groups[name]

    def _measure(self, members: Sequence[str], prepare: Callable[[str], Entry]) -> Group:
        group, calls = Group(), {}
        for member in members:
            try:
                entry = prepare(member)
                entry.check()
                calls[member] = entry.call
            except LeftOut as error:
                group.reasons[member] = str(error)
            except (RuntimeError, ValueError, AssertionError, ImportError) as error:
                group.reasons[member] = f"{type(error).__name__}: {error}".splitlines()[0]
        if calls:
            group.measured = interleaved(calls, DEVICE, budget=_BUDGET * len(calls))
        return group


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ.get("CIN_FAST_TEST_THREADS", os.cpu_count() or 1)))
    config.stash[_LEFT_OUT] = []


_LEFT_OUT: pytest.StashKey[list[dict[str, str]]] = pytest.StashKey()
_SELECTED: pytest.StashKey[dict[str, list[str]]] = pytest.StashKey()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note which members of each group were selected, and let their group stand in the report."""
    selected: dict[str, list[str]] = {}
    for item in items:
        parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        if {"case", "rival"} <= set(parameters):
            name = _group_name(item, parameters["case"])
            selected.setdefault(name, []).append(parameters["rival"])
            item.add_marker(pytest.mark.benchmark(group=name, timer=TAPE.now, warmup=False))
    config.stash[_SELECTED] = selected


def _group_name(item: pytest.Item, case: Any) -> str:
    subject = item.path.stem.removeprefix("bench_")
    return f"{subject}: {getattr(case, 'group', case)}"


@pytest.fixture(scope="session")
def comparison(request: pytest.FixtureRequest) -> Comparison:
    """All groups of this session."""
    return Comparison(request.config.stash[_SELECTED])


@pytest.fixture
def versus(
    request: pytest.FixtureRequest, comparison: Comparison, benchmark: Any
) -> Callable[[str, Callable[[str], Entry], Work], None]:
    """``versus(rival, prepare, work)``: this member's rounds, measured beside its rivals'."""

    def run(rival: str, prepare: Callable[[str], Entry], work: Work) -> None:
        name = _group_name(request.node, request.node.callspec.params["case"])
        group = comparison.group(name, prepare)
        if rival in group.reasons:
            left_out = {"group": name, "rival": rival, "reason": group.reasons[rival]}
            request.config.stash[_LEFT_OUT].append(left_out)
            pytest.skip(group.reasons[rival])
        measured = group.measured[rival]
        benchmark.extra_info.update(_extra(measured, work))
        TAPE.rounds.extend(measured.seconds)
        benchmark.pedantic(TAPE.play, rounds=len(measured.seconds))

    return run


def _extra(measured: Measured, work: Work) -> dict[str, Any]:
    seconds = sorted(measured.seconds)[len(measured.seconds) // 2]
    ceiling = ceilings(work.dtype, DEVICE)
    return {
        "peak_bytes": measured.peak_bytes,
        "flops_per_second": work.flops / seconds,
        "flops_share": work.flops / seconds / ceiling.flops,
        "bytes_per_second": work.bytes / seconds,
        "bytes_share": work.bytes / seconds / ceiling.bytes,
    }


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    """What decides a number: device, threads, versions, and which backends are on."""
    machine_info["device"] = device_name()
    machine_info["versions"] = versions()
    machine_info["backends"] = {name: unavailable(name) or "on" for name in BACKENDS}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: Any) -> None:
    """Ceilings of the machine in this run, and rivals that did not run, with their reasons."""
    dtypes = ("float32", "bfloat16")
    output_json["ceilings"] = {
        name: dataclasses.asdict(ceilings(DTYPES[name], DEVICE)) for name in dtypes
    }
    output_json["left_out"] = config.stash[_LEFT_OUT]
    output_json["commit"] = git_commit()
