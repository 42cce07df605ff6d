"""The CPU backend against its targets: ``pytest bench/bench_cpu_targets.py --benchmark-only``.

Every row is a ratio of two times that were taken in turn in one run, after both sides kept the
rule for numbers. The table is printed at the end and written to ``bench/results/MACHINE/``
(``CIN_FAST_BENCH_RESULTS`` names another folder; quick runs write nothing).
"""

from __future__ import annotations

import json
import platform
import re
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import bench_head
import bench_models
import bench_pair_head
import bench_sci
import pytest
import torch
from bench_models import ModelCase
from cases import DEVICE, QUICK, Case, danet_case, main_case
from compare import Comparison
from machine import results_folder
from results_file import spread

from cin_fast.info import device_name, git_commit, versions

SUBJECT = "cpu"


@dataclass(frozen=True)
class Target:
    """A row: ``subject`` against ``rival``; ``must`` and ``aim`` bound the ratio of their times.

    ``overhead`` rows compare ours over the rival's (smaller is better), others how many times
    faster ours is.
    """

    name: str
    case: Case | ModelCase
    subject: str
    rival: str
    benchmark: ModuleType
    must: float
    aim: float
    overhead: bool = False

    @property
    def group(self) -> str:
        """The heading that both sides share."""
        return self.name

    @property
    def measured_group(self) -> str:
        """Whose rounds are read: the same case of the subject's own benchmark."""
        return f"{self.benchmark.__name__.removeprefix('bench_')}: {self.case.group}"

    @property
    def backward(self) -> bool:
        """As the case says it."""
        return self.case.backward

    def __str__(self) -> str:
        return re.sub(r"\W+", "-", self.name)


def _targets() -> list[Target]:
    backbone = "resnet18" if QUICK else "resnet50"
    cin, main, both = f"{backbone}-cin", main_case(), main_case(backward=True)
    low, danet = main_case("bfloat16"), danet_case(backward=True)
    head, pair, sci, models = bench_head, bench_pair_head, bench_sci, bench_models
    inference, step = (
        f"{what}, {backbone} + CIN over plain" for what in ("inference", "training step")
    )
    return [
        Target("dense sci forward, float32", main, SUBJECT, "sdpa", sci, 2.0, 2.8),
        Target("dense sci forward + backward, float32", both, SUBJECT, "sdpa", sci, 1.8, 2.5),
        Target("dense sci forward, bfloat16", low, SUBJECT, "sdpa", sci, 2.0, 4.0),
        Target("head, pooled", main, SUBJECT, "eager", head, 10.0, 20.0),
        Target("pair head in training, pooled", both, SUBJECT, "eager", pair, 8.0, 15.0),
        Target("DANet forward + backward over SDPA", danet, SUBJECT, "sdpa", sci, 1.0, 2.0),
        Target("DANet forward + backward over eager", danet, SUBJECT, "eager", sci, 1.0, 2.0),
        Target(inference, models.INFERENCE, cin, backbone, models, 1.10, 1.05, overhead=True),
        Target(step, models.TRAINING, cin, backbone, models, 1.15, 1.08, overhead=True),
    ]


TARGETS = _targets()
MEMBERS = [(target, side) for target in TARGETS for side in (target.subject, target.rival)]


@dataclass(frozen=True)
class Row:
    """A target as it was measured: milliseconds an image, MiB beyond what was held before."""

    name: str
    rival: str
    ratio: float
    must: float
    aim: float
    overhead: bool
    milliseconds: float
    rival_milliseconds: float
    peak_mib: float | None
    rival_peak_mib: float | None
    rounds: int
    spread: float
    """Of both sides' times, added."""

    @property
    def verdict(self) -> str:
        """How far the row came, as far as the spread lets one say."""
        sign = -1 if self.overhead else 1
        worst, best = (self.ratio * (1 + sign * off) for off in (-self.spread, self.spread))

        def reached(bound: float, ratio: float) -> bool:
            return sign * ratio >= sign * bound

        if reached(self.aim, worst):
            return "aim"
        if reached(self.must, worst):
            return "must (aim within the spread)" if reached(self.aim, best) else "must"
        return "within the spread of must" if reached(self.must, best) else "missed"

    def __str__(self) -> str:
        peaks = " / ".join(
            "?" if peak is None else f"{peak:.0f}" for peak in (self.peak_mib, self.rival_peak_mib)
        )
        return (
            f"{self.name:40} {self.milliseconds:8.2f} {self.rival:>8} "
            f"{self.rival_milliseconds:8.2f} {self.ratio:6.2f} {self.must:5.2f} {self.aim:5.2f} "
            f"{peaks:>13} {self.verdict}"
        )


HEADING = (
    f"{'ms an image':40} {'ours':>8} {'rival':>8} {'':8} {'ratio':>6} {'must':>5} {'aim':>5} "
    f"{'peak MiB':>13}"
)


def measured_row(target: Target, comparison: Comparison) -> Row | None:
    """The row of a target both of whose sides have run; the ratio is the median of the rounds'."""
    group = comparison.groups.get(target.measured_group)
    if group is None or not {target.subject, target.rival} <= set(group.measured):
        return None
    ours, rival = group.measured[target.subject], group.measured[target.rival]
    # The slower side may have left the rounds first.
    pairs = zip(ours.seconds, rival.seconds, strict=False)
    ratios = [a / b if target.overhead else b / a for a, b in pairs]
    images = target.case.batch

    def milliseconds(seconds: tuple[float, ...]) -> float:
        return 1e3 * statistics.median(seconds) / images

    def mib(peak: int | None) -> float | None:
        return None if peak is None else peak / 2**20

    return Row(
        target.name,
        target.rival,
        statistics.median(ratios),
        target.must,
        target.aim,
        target.overhead,
        milliseconds(ours.seconds),
        milliseconds(rival.seconds),
        mib(ours.peak_bytes),
        mib(rival.peak_bytes),
        len(ratios),
        spread(ours.seconds) + spread(rival.seconds),
    )


def write(rows: list[Row]) -> Path:
    """Merge rows into this machine's table: a run of some rows leaves the others alone."""
    path = results_folder() / "cpu_targets.json"
    old = json.loads(path.read_text())["targets"] if path.exists() else []
    new = {
        row.name: {**asdict(row), "verdict": row.verdict, "commit": git_commit()} for row in rows
    }
    merged = {row["name"]: row for row in old} | new
    order = [target.name for target in TARGETS]
    table = {
        "machine": device_name(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
        "targets": sorted(merged.values(), key=lambda row: order.index(row["name"])),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=2) + "\n")
    return path


@pytest.fixture(scope="module", autouse=True)
def _table(request: pytest.FixtureRequest, comparison: Comparison) -> Iterator[None]:
    yield
    rows = [row for target in TARGETS if (row := measured_row(target, comparison))]
    lines = ["", HEADING, *map(str, rows)]
    if rows and not QUICK:
        lines.append(f"written to {write(rows)}")
    plugins = request.config.pluginmanager
    reporter = plugins.getplugin("terminalreporter")
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        for line in lines:
            reporter.write_line(line)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the CPU's targets: hide the GPU")
@pytest.mark.parametrize(("case", "rival"), MEMBERS, ids=str)
def test_target(case: Target, rival: str, versus) -> None:
    """The rounds of the subject's own benchmark, where the run holds it as well."""
    prepare, work = case.benchmark.prepare, case.benchmark.work
    versus(rival, partial(prepare, case.case), work(case.case, rival))
