"""Every benchmark compares rivals on one case: checked first, then timed in interleaved rounds.

A benchmark is a test that calls ``versus(rival, prepare, work)``. The first member of a group that
runs prepares, checks and times all selected members; each then hands its own rounds to
pytest-benchmark, which keeps the statistics and the JSON.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DEVICE, QUICK, SECONDS
from compare import Comparison, Entry, Selected, Tape, Work
from machine import results_folder

from cin_fast.dispatch import BACKENDS, unavailable
from cin_fast.info import device_name, git_commit, versions

TAPE = Tape()
# Seconds that a group takes on two cores, forward and with gradients: what its share is reckoned
# from. What matters most comes first.
_SHARES = {
    "sci": (7, 11),
    "head": (13, 36),
    "cci": (5, 10),
    "pair_head": (30, 30),
    "models": (35, 62),
    "cpu_targets": (10, 30),
    "scaling": (4, 4),
    "loading": (15, 15),
}
_OTHER = (10, 10)
_BUDGET = 1.0 if QUICK else 4.0
_LEAST = 5 if DEVICE.type == "cuda" else 3
_COMPARISON: pytest.StashKey[Comparison] = pytest.StashKey()
_LEFT_OUT: pytest.StashKey[list[dict[str, str]]] = pytest.StashKey()
_LOAD: pytest.StashKey[float] = pytest.StashKey()
_COMMIT: pytest.StashKey[str] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None) or hasattr(config, "workerinput"):
        raise pytest.UsageError("benchmarks are timed one at a time: run pytest bench without -n")
    torch.set_num_threads(int(os.environ.get("CIN_FAST_TEST_THREADS", os.cpu_count() or 1)))
    config.stash[_LEFT_OUT] = []
    config.stash[_LOAD] = os.getloadavg()[0]
    # Before the results of the run itself change the work tree.
    config.stash[_COMMIT] = git_commit()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the subjects, and note which members of each group were selected."""
    items.sort(key=_place)
    compared = [item for item in items if {"case", "rival"} <= set(_parameters(item))]
    members: dict[str, list[str]] = {}
    shares: dict[str, float] = {}
    for item in compared:
        item.add_marker(pytest.mark.benchmark(group=_group_name(item), timer=TAPE.now))
        name, case = _measured_group(item), _parameters(item)["case"]
        members.setdefault(name, []).append(_parameters(item)["rival"])
        share = _SHARES.get(_subject(item), _OTHER)[case.backward]
        shares[name] = max(share, shares.get(name, 0))
    # A target's ratio is one number that much hangs on: twice the time for its rounds.
    targets = {_measured_group(item) for item in compared if _subject(item) == "cpu_targets"}
    selected = {
        name: Selected(
            tuple(dict.fromkeys(rivals)), shares[name], _BUDGET * (2 if name in targets else 1)
        )
        for name, rivals in members.items()
    }
    config.stash[_COMPARISON] = Comparison(
        selected,
        seconds=SECONDS,
        least=_LEAST,
        timed=not config.getoption("benchmark_disable", False),
    )


def pytest_collection_finish() -> None:
    """Python looks for garbage around every measurement: no more in what stays to the end."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What Python may not look at would be reported as leaked."""
    gc.unfreeze()


def _subject(item: pytest.Item) -> str:
    return "scaling" if "scaling" in item.name else item.path.stem.removeprefix("bench_")


def _place(item: pytest.Item) -> int:
    if not item.path.stem.startswith("bench_"):
        return -1
    return [*_SHARES, _subject(item)].index(_subject(item))


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def _group_name(item: pytest.Item) -> str:
    return f"{item.path.stem.removeprefix('bench_')}: {_parameters(item)['case'].group}"


def _measured_group(item: pytest.Item) -> str:
    """The group whose rounds an item reads: its own, if its case names no other."""
    return getattr(_parameters(item)["case"], "measured_group", _group_name(item))


@pytest.fixture(scope="session")
def comparison(request: pytest.FixtureRequest) -> Comparison:
    """All groups of this session."""
    return request.config.stash[_COMPARISON]


@pytest.fixture
def versus(
    request: pytest.FixtureRequest, comparison: Comparison, benchmark: Any
) -> Callable[[str, Callable[[str], Entry], Work], None]:
    """``versus(rival, prepare, work)``: this member's rounds, measured beside its rivals'."""

    def run(rival: str, prepare: Callable[[str], Entry], work: Work) -> None:
        name = _group_name(request.node)
        group = comparison.group(_measured_group(request.node), prepare, work.flops)
        if rival in group.failures:
            raise group.failures[rival]
        if rival in group.reasons:
            left_out = {"group": name, "rival": rival, "reason": group.reasons[rival]}
            request.config.stash[_LEFT_OUT].append(left_out)
            pytest.skip(group.reasons[rival])
        if not comparison.timed:
            benchmark(lambda: None)
            return
        measured = group.measured[rival]
        benchmark.extra_info.update(
            peak_bytes=measured.peak_bytes,
            flops=work.flops,
            bytes=work.bytes,
            dtype=str(work.dtype).removeprefix("torch."),
        )
        TAPE.load(measured.seconds)
        benchmark.pedantic(TAPE.play, rounds=len(measured.seconds))

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """What decides a number: device, threads, load, versions, and which backends are on.

    In place of pytest-benchmark's own, which looks at the processor for up to ten seconds.
    """
    return {
        "device": device_name(),
        "folder": results_folder().name,
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(config.stash[_LOAD], 2),
        "command": shlex.join(["pytest", *sys.argv[1:]]),
        "versions": versions(),
        "backends": {name: unavailable(name) or "on" for name in BACKENDS},
    }


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: Any) -> None:
    """Ceilings of the machine in this run, and rivals that did not run, with their reasons."""
    found = config.stash[_COMPARISON].ceilings
    output_json["ceilings"] = {name: dataclasses.asdict(value) for name, value in found.items()}
    output_json["left_out"] = config.stash[_LEFT_OUT]
    output_json["spent"] = {
        name: {phase: round(seconds, 1) for phase, seconds in group.spent.items()}
        for name, group in config.stash[_COMPARISON].groups.items()
    }
    output_json["commit"] = config.stash[_COMMIT]
