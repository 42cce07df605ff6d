"""What is kept of a run: every rival's rounds, and what is computed from them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

OURS = ("cpu", "matmul", "triton", "cuda")
ATTENTION = ("sdpa", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "flex")
# A ratio whose two sides' spreads add up to more is marked.
WIDE = 0.15
WHAT_IS_MARKED = f"""`~`: uncertain, as the spreads of both sides' times (half the distance between
quartiles, over the median) add up to more than {WIDE:.0%}."""
# Loaders are compared with the first of their group, models with the plain backbone.
_BASELINE = {"models": "resnet50", "loading": "in the main process"}


@dataclass(frozen=True)
class Result:
    """One rival of one group: microseconds of its rounds, in the order they were taken."""

    group: str
    rival: str
    microseconds: tuple[float, ...]
    peak_bytes: int | None
    flops: float
    bytes: float
    dtype: str

    @property
    def subject(self) -> str:
        """The part of the suite that the group belongs to."""
        return self.group.partition(":")[0]

    @property
    def milliseconds(self) -> float:
        """The median."""
        return statistics.median(self.microseconds) / 1e3

    @property
    def spread(self) -> float:
        """As :func:`spread` says."""
        return spread(self.microseconds)

    @property
    def flops_per_second(self) -> float:
        """Useful operations."""
        return self.flops / self.milliseconds * 1e3

    @property
    def bytes_per_second(self) -> float:
        """Bytes that must be moved."""
        return self.bytes / self.milliseconds * 1e3


@dataclass(frozen=True)
class Run:
    """A run of the suite on one machine."""

    machine: dict[str, Any]
    commit: str
    datetime: str
    ceilings: dict[str, dict[str, float]]
    left_out: list[dict[str, str]]
    results: list[Result]
    spent: dict[str, dict[str, float]] = field(default_factory=dict)
    """Seconds by phase of each group."""

    def groups(self) -> dict[str, list[Result]]:
        """Members by group, as measured."""
        found: dict[str, list[Result]] = {}
        for result in self.results:
            found.setdefault(result.group, []).append(result)
        return found

    def shares(self, result: Result) -> tuple[float, float]:
        """Of the ceilings of the same run: operations, bytes."""
        ceiling = self.ceilings.get(result.dtype, self.ceilings["float32"])
        return (
            result.flops_per_second / ceiling["flops"],
            result.bytes_per_second / ceiling["bytes"],
        )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, over the median."""
    low, middle, high = quartiles(values)
    return (high - low) / 2 / middle


def ratios(ours: Result, rival: Result) -> tuple[float, float, float]:
    """How many times as fast ours is: quartiles over the rounds that both took part in.

    Two rivals were timed in one round right after each other, so that a ratio of one round holds
    what the machine did at that moment on both sides. The slower one may have left first.
    """
    pairs = zip(rival.microseconds, ours.microseconds, strict=False)
    return quartiles([theirs / own for theirs, own in pairs])


def mark(*spreads: float) -> str:
    """What stands before a ratio of two times with these spreads."""
    return "~" if sum(spreads) > WIDE else ""


def baseline(members: Sequence[Result]) -> Result:
    """Whom a group's ratios refer to: the fastest of the others."""
    names = {member.rival: member for member in members}
    fixed = names.get(_BASELINE.get(members[0].subject, ""))
    if fixed is not None:
        return fixed
    return fastest(m for m in members if m.rival not in (*OURS, "reference")) or members[0]


def fastest(members: Iterable[Result]) -> Result | None:
    """The one with the smallest median; None if there is none."""
    return min(members, key=lambda member: member.milliseconds, default=None)


def from_benchmark(run: dict[str, Any]) -> Run:
    """What pytest-benchmark's JSON holds.

    Raises:
        ValueError: if nothing was timed.
    """
    if not run["benchmarks"]:
        raise ValueError("the run timed nothing")
    info = run["machine_info"]
    kept = ("device", "folder", "processors", "threads", "load_before", "command", "versions",
            "backends")  # fmt: skip
    results = [
        Result(
            one["group"],
            one["params"]["rival"],
            tuple(round(1e6 * seconds, 1) for seconds in one["stats"]["data"]),
            **{key: one["extra_info"][key] for key in ("peak_bytes", "flops", "bytes", "dtype")},
        )
        for one in run["benchmarks"]
    ]
    return Run({key: info[key] for key in kept}, run["commit"], run["datetime"], run["ceilings"],
               run["left_out"], results, run.get("spent", {}))  # fmt: skip


def save(run: Run, path: Path) -> None:
    """JSON with one result a line."""
    head = json.dumps(asdict(replace(run, results=[])), indent=1)
    lines = ",\n".join(f"  {json.dumps(asdict(result))}" for result in run.results)
    path.write_text(head.replace('"results": []', f'"results": [\n{lines}\n ]') + "\n")


def load(path: Path) -> Run:
    """What :func:`save` wrote."""
    kept = json.loads(path.read_text())
    results = [
        Result(**{**one, "microseconds": tuple(one["microseconds"])}) for one in kept["results"]
    ]
    return Run(**{**kept, "results": results})
