"""Tables of a machine's ``kernels.json``, which bench/kernel_times.py writes, in Markdown."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gpu_report
from cases import Case
from gpu_report import GpuRun, Group, short_commit

FILE = "kernels.json"
LEAST_SECONDS = 4e-6


@dataclass(frozen=True)
class Kernel:
    """Of one call of ``group`` by ``rival``: how often a kernel ran, and its seconds in all."""

    group: str
    rival: str
    name: str
    calls: int
    seconds: float


@dataclass(frozen=True)
class KernelRun(GpuRun):
    """A ``kernels.json``; ``commits`` says by rival which one was measured."""

    kernels: list[Kernel]
    commits: dict[str, str]


def load(path: Path) -> KernelRun:
    """Reads a ``kernels.json``.

    Raises:
        OSError: if there is none.
        ValueError: if it is something else.
    """
    about = json.loads(path.read_text())
    with gpu_report.written_by("bench/kernel_times.py", path):
        case, rows = Case(**about["case"]), about["rows"]
        return KernelRun(
            about,
            steps=[],
            groups=_groups(case, rows),
            ceilings=about["ceilings"],
            left_out=[
                {"group": _group(case, one), "rival": one["name"], "reason": one["reason"]}
                for one in about["left_out"]
            ],
            kernels=[
                Kernel(_group(case, row), row["name"], one["name"], one["calls"], one["seconds"])
                for row in rows
                for one in row["kernels"]
            ],
            commits={row["name"]: row["commit"] for row in rows},
        )


def _groups(case: Case, rows: list[dict[str, Any]]) -> list[Group]:
    found: dict[str, Group] = {}
    for row in rows:
        for direction in ("forward", "both"):
            name, one = _group(case, row, direction), row[direction]
            group = found.setdefault(name, Group(name, one["flops"], case.dtype_name, {}))
            group.seconds[row["name"]] = one["seconds"]
    return list(found.values())


def _group(case: Case, row: dict[str, Any], direction: str = "both") -> str:
    thin = "thin " if row["columns"] != case.positions else ""
    return f"{thin}{row['operator']}: {replace(case, backward=direction == 'both').group}"


def kernels_paragraphs(run: KernelRun, where: str) -> list[str]:
    """What docs/kernels.md says of it: whole calls, then the kernels that they are made of."""
    return [
        f"Whole calls by `bench/kernel_times.py`, {_shape(run)}. {_where_from(run)}",
        gpu_report.table(run),
        f"{gpu_report.HOW_TO_READ} {_without_rival(run)}",
        "\n".join(gpu_report.left_out(run)),
        (
            "The same calls, forward + backward, kernel by kernel: the faster of ours and the "
            f"fastest rival. Calls in a row, traced, L2 not emptied; what takes under "
            f"{1e6 * LEAST_SECONDS:.0f} us is left out. Everybody's: `{where}/{FILE}`."
        ),
        kernel_table(run),
    ]


def kernel_table(run: KernelRun) -> str:
    """Device microseconds of the fastest rival's kernels and of ours."""
    shown = {group.name: (group.rival, group.ours) for group in run.groups}
    titles = {group.name: group.title.partition(",")[0] for group in run.groups}
    header = ("", "kernel", "launches", "us")
    rows = [
        (f"{titles[one.group]}, {one.rival}", f"`{one.name}`", str(one.calls),
         f"{1e6 * one.seconds:.1f}")
        for one in run.kernels
        if one.rival in shown[one.group] and one.seconds >= LEAST_SECONDS
    ]  # fmt: skip
    return gpu_report.markdown(header, rows)


def _shape(run: KernelRun) -> str:
    shapes = dict.fromkeys(f"{group.shape} {group.dtype}" for group in run.groups)
    return f"{', '.join(shapes)}; measured with them: {gpu_report.ceilings(run)}"


def _where_from(run: KernelRun) -> str:
    names: dict[str, list[str]] = {}
    for name, commit in run.commits.items():
        names.setdefault(short_commit(commit), []).append(name)
    parts = [f"{', '.join(some)} at {commit}" for commit, some in names.items()]
    return f"Commits: {'; '.join(parts)}."


def _without_rival(run: KernelRun) -> str:
    titles = dict.fromkeys(g.title.partition(",")[0] for g in run.groups if not g.rival)
    return f"No rival was measured for {', '.join(titles)}." if titles else ""
