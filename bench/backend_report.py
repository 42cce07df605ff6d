"""Tables of a machine's ``backends.json``, which bench/backends.py writes, in Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import Case
from gpu_report import markdown, short_commit, written_by

from cin_fast.dispatch import preferred

FILE = "backends.json"
GPU_BACKENDS = ("cuda", "triton", "matmul")
# Of float32 alone something else than "highest" is asked.
_PRODUCTS = {"high": ", TF32", "highest": ""}
_HOW = """`matmul` is library products, a few images at a time, `eager` whole matrices as PyTorch
users write them; memory is what a call in both directions holds beyond what was held before."""


@dataclass(frozen=True)
class Answer:
    """Milliseconds and MiB by name, of one operator on one map."""

    title: str
    chosen: str
    forward: dict[str, float]
    both: dict[str, float]
    mebibytes: dict[str, float]


@dataclass(frozen=True)
class BackendRun:
    """A ``backends.json``; ``commits`` says by name which ones were measured."""

    answers: list[Answer]
    commits: dict[str, list[str]]


def load(path: Path) -> BackendRun:
    """Reads a ``backends.json``.

    Raises:
        OSError: if there is none.
        ValueError: if it is something else.
    """
    about = json.loads(path.read_text())
    with written_by("bench/backends.py", path):
        rows = [row for row in about["rows"] if "reason" not in row]
        commits: dict[str, list[str]] = {}
        for row in rows:
            for name in row["both"]:
                commit = row.get("commits", {}).get(name, about["commit"])
                commits.setdefault(name, []).append(short_commit(commit))
        return BackendRun(
            [_answer(row) for row in rows],
            {name: list(dict.fromkeys(some)) for name, some in commits.items()},
        )


def _answer(row: dict[str, Any]) -> Answer:
    case = Case(**row["case"])
    width = "thin" if row["columns"] else "dense"
    dtype = f"{case.dtype_name}{_PRODUCTS[row['precision']]}"
    shape = f"{case.name} B{case.batch} C{case.channels} L{case.positions}"
    forward, both = ({name: 1e3 * s for name, s in row[way].items()} for way in ("forward", "both"))
    return Answer(
        f"{width} `{row['operator']}`, {shape}, {dtype}",
        preferred("cuda", case.dtype, case.positions)[0],
        forward,
        both,
        {name: size / 2**20 for name, size in row.get("both peak", {}).items()},
    )


def peaks(run: BackendRun) -> dict[str, str]:
    """MiB that calls in both directions hold, of what runs by itself and of eager PyTorch."""
    return {
        one.title: f"{one.mebibytes[one.chosen]:.0f} / {one.mebibytes['eager']:.0f}"
        for one in run.answers
        if {one.chosen, "eager"} <= one.mebibytes.keys()
    }


def kernels_paragraphs(run: BackendRun, where: str) -> list[str]:
    """What docs/kernels.md says of it: everybody's milliseconds, forward and in both directions."""
    names = (*GPU_BACKENDS, "eager")
    header = ("forward / forward + backward, ms", *names, "runs by itself")
    rows = [(one.title, *(_both(one, name) for name in names), one.chosen) for one in run.answers]
    return [
        f"The backends beside each other, by `bench/backends.py`. {_commits(run)}",
        markdown(header, rows),
        f"{_HOW} All: `{where}/{FILE}`.",
    ]


def _both(answer: Answer, name: str) -> str:
    if name not in answer.both:
        return "-"
    return f"{answer.forward[name]:.3f} / {answer.both[name]:.3f}"


def _commits(run: BackendRun) -> str:
    names: dict[Sequence[str], list[str]] = {}
    for name, commits in run.commits.items():
        names.setdefault(tuple(commits), []).append(name)
    parts = (f"{', '.join(some)} at {', '.join(commits)}" for commits, some in names.items())
    return f"Commits: {'; '.join(parts)}."
