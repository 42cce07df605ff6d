"""Tables of what ``make gpu`` measured: from a machine's ``gpu.json`` to Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from results_file import ATTENTION, mark

FUSED = ("triton", "cuda")
_NO_RIVAL = (*FUSED, "matmul", "cpu", "reference")
# Left out of a run that is short of time.
_SLOW_TO_COMPILE = ("compiled", "flex")
_TITLES = {
    "sci": "dense `sci`",
    "thin sci": "thin `sci`",
    "head": "head, pooled",
    "cci": "dense `cci`",
    "thin cci": "thin `cci`",
}
HOW_TO_READ = """Medians; the ratio and the share are the faster backend's. Products are counted as
written (`sci`: 4 C²L an image forward, 10 C²L more backward), so a share counts useful
operations."""


@dataclass(frozen=True)
class Group:
    """The rivals of one operator and direction: what a call computes, seconds by name, and how far
    they spread, if that was kept."""

    name: str
    flops: float
    dtype: str
    seconds: dict[str, float]
    spreads: dict[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Operator, dtype and direction."""
        subject, _, case = self.name.partition(": ")
        _, _, direction = case.partition(f" {self.dtype} ")
        return f"{_TITLES.get(subject, subject)}, {self.dtype}, {direction}"

    @property
    def shape(self) -> str:
        """Name, B, C and L."""
        return self.name.partition(": ")[2].partition(f" {self.dtype} ")[0]

    @property
    def ours(self) -> str:
        """The faster of our backends; empty if none was measured."""
        return self._fastest(*FUSED)

    @property
    def rival(self) -> str:
        """The fastest of the others; empty if none was measured."""
        return self._fastest(*(name for name in self.seconds if name not in _NO_RIVAL))

    @property
    def ratio(self) -> str:
        """How many times as fast as the fastest rival ours is, by medians."""
        return self.times(self.rival) if self.ours else "-"

    def row(self, peaks: Mapping[str, str]) -> tuple[str, ...]:
        """Of the README's table; ``peaks`` says what calls in both directions hold."""
        attention = self._fastest(*ATTENTION)
        rivals = (self._marked(name) for name in ("eager", "compiled", attention))
        what = self.title.partition(",")[0]
        peak = peaks.get(f"{what}, {self.shape}, {self.dtype}", "-")
        return self.title, "GPU", self.ours, *rivals, peak if "backward" in self.title else "-"

    def times(self, name: str) -> str:
        """How many times as fast as that one ours is; ``-`` if it was not measured."""
        if name not in self.seconds:
            return "-"
        return f"{self.seconds[name] / self.seconds[self.ours]:.2f}"

    def _marked(self, name: str) -> str:
        spreads = (self.spreads.get(side, 0.0) for side in (name, self.ours))
        return (mark(*spreads) if name in self.seconds else "") + self.times(name)

    def milliseconds(self, name: str) -> str:
        """The median of one; ``-`` if it was not measured."""
        return f"{1e3 * self.seconds[name]:.4f}" if name in self.seconds else "-"

    def named(self, name: str) -> str:
        """Milliseconds and whose they are."""
        return f"{self.milliseconds(name)} ({name})" if name else "-"

    def _fastest(self, *names: str) -> str:
        measured = [name for name in names if name in self.seconds]
        return min(measured, key=self.seconds.__getitem__, default="")


@dataclass(frozen=True)
class GpuRun:
    """A ``gpu.json``: ``about`` names device and versions, ``steps`` say how each ended."""

    about: dict[str, Any]
    steps: list[dict[str, Any]]
    groups: list[Group]
    ceilings: dict[str, dict[str, float]]
    left_out: list[dict[str, str]]

    def share(self, group: Group) -> str:
        """Of the largest matrix product that the run measured in the group's dtype, ours."""
        if not group.ours or group.dtype not in self.ceilings:
            return "-"
        reached = group.flops / group.seconds[group.ours]
        return f"{reached / self.ceilings[group.dtype]['flops']:.0%}"


def load(path: Path) -> GpuRun:
    """Reads a ``gpu.json``.

    Raises:
        OSError: if there is none.
        ValueError: if it is something else.
    """
    about = json.loads(path.read_text())
    with written_by("make gpu", path):
        steps = about.pop("steps")
        found = [step["measured"] for step in steps if step["measured"]]
        groups = [
            Group(name, one["flops"], one["dtype"], *_seconds(one["rivals"]))
            for part in found
            for name, one in part["groups"].items()
        ]
        left_out = [one for part in found for one in part["left_out"]]
        return GpuRun(about, steps, groups, _best([one["ceilings"] for one in found]), left_out)


@contextmanager
def written_by(program: str, path: Path) -> Iterator[None]:
    """Says, with ``ValueError``, that a file does not hold what ``program`` writes."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not written by {program} ({error!r})") from error


def _seconds(rivals: dict[str, dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Medians and spreads by name."""
    return (
        {name: one["seconds"] for name, one in rivals.items()},
        {name: one["spread"] for name, one in rivals.items() if "spread" in one},
    )


def _best(parts: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The highest of each ceiling, as each benchmark measured them."""
    best: dict[str, dict[str, float]] = {}
    for part in parts:
        for dtype, values in part.items():
            known = best.setdefault(dtype, dict(values))
            known.update({key: max(known[key], value) for key, value in values.items()})
    return best


def machine_line(run: GpuRun, commits: Sequence[str] = ()) -> str:
    """Device, driver, versions, commit (or those given), and what was measured of the device in the
    same run."""
    about, versions = run.about, run.about["versions"]
    named = dict.fromkeys(short_commit(commit) for commit in commits or [about["commit"]])
    line = (
        f"{about['device']}, driver {about['driver']}; torch {versions['torch']}, triton "
        f"{versions['triton']}, CUDA {versions['cuda (torch)']}; cin_fast "
        f"{', '.join(named)}, {about['date']}"
    )
    return f"{line}; measured in the same run: {ceilings(run)}." if run.ceilings else f"{line}."


def short_commit(commit: str) -> str:
    """Its first twelve digits, and what follows them of other kind, as ``-dirty``."""
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]*", r"\1", commit)


def ceilings(run: GpuRun) -> str:
    """Products and copy."""
    products = [
        f"{name} product {one['flops'] / 1e12:.0f} TFLOP/s" for name, one in run.ceilings.items()
    ]
    copies = [one["bytes"] for one in run.ceilings.values()]
    return ", ".join([*products, f"copy {max(copies) / 1e9:.0f} GB/s"])


def table(run: GpuRun) -> str:
    """Everybody's milliseconds, a row an operator and direction."""
    header = ("", "fastest rival, ms", "triton, ms", "cuda, ms", "times as fast",
              "share of the product")  # fmt: skip
    rows = [
        (group.title, group.named(group.rival), *map(group.milliseconds, FUSED), group.ratio,
         run.share(group))
        for group in run.groups
    ]  # fmt: skip
    return markdown(header, rows)


def markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table whose first column is text; empty without rows."""
    if not rows:
        return ""
    rule = ("---", *("---:" for _ in header[1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def kernels_paragraphs(run: GpuRun, where: str) -> list[str]:
    """What docs/kernels.md says of a GPU: the table, who had no turn, how every step ended."""
    how = f"{HOW_TO_READ} Spreads and memory: `{where}/gpu.json`." if run.groups else ""
    return [
        machine_line(run),
        table(run),
        how,
        "\n".join(left_out(run)),
        "\n".join(
            f"- {one['name']}: {one['status']} ({one['summary']}){_at(one)}" for one in run.steps
        ),
    ]


def _at(step: dict[str, Any]) -> str:
    """The commit of a step that ran at another one than the run's."""
    return f", at {short_commit(step['commit'])}" if "commit" in step else ""


def left_out(run: GpuRun) -> list[str]:
    """Which rivals were not measured, and why: a line each."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in run.left_out:
        if one["rival"] not in _NO_RIVAL:
            reasons.setdefault((one["rival"], one["reason"]), []).append(one["group"])
    lines = [
        f"- Left out: {rival} ({', '.join(groups)}): {reason}"
        for (rival, reason), groups in reasons.items()
    ]
    seen = {one["rival"] for one in run.left_out}.union(*(one.seconds for one in run.groups))
    missing = [name for name in _SLOW_TO_COMPILE if name not in seen]
    if missing and run.groups:
        lines.append(f"- Not run, as each shape takes up to a minute: {', '.join(missing)}")
    return lines
