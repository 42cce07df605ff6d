"""``python bench/backends.py``: the backends of a GPU beside each other, and beside eager PyTorch.

Over what may decide between them: operator, width of v, map, dtype, and how float32 is multiplied.
Writes ``backends.json`` under bench/results/MACHINE after every question; the order of backends in
cin_fast/dispatch.py rests on it. Results of ours are compared before they are timed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from backend_report import FILE, GPU_BACKENDS
from cases import DEVICE, Case, main_case, network_cases
from gpu import describe_device, no_gpu
from kernel_times import THIN, Subject, cci, subjects
from machine import results_folder
from measure import interleaved
from operators import run
from torch import Tensor

import cin_fast

ROUNDS = 9
# Between two right results in bfloat16; in float32 products rounded to TF32 differ by less.
DISAGREEMENT = 5e-2


@dataclass(frozen=True)
class Question:
    """Who is faster at this operator, v of ``columns`` (0: v = x), on a case's map in its dtype?

    ``precision`` is what ``torch.set_float32_matmul_precision`` gets.
    """

    case: Case
    operator: str
    columns: int
    precision: str = "highest"

    def __str__(self) -> str:
        where = f"{self.case.name} {self.case.dtype_name} {self.precision}"
        return f"{self.operator} v={self.columns or 'x'} {where}"


def questions() -> Iterator[Question]:
    """The most asked first."""
    maps = {case.name: case for case in network_cases()} | {"main": main_case()}
    dense, thin = ("sci", 0), ("sci", THIN)
    everything = (dense, thin, ("cci", 0), ("cci", THIN))
    half, other, single = (("bfloat16",), ("float16",), ("float32", "high"))
    ieee = ("float32", "highest")
    for name, dtypes, operators in (
        ("main", (half, other, single, ieee), everything),
        ("resnet50-600", (half,), everything),
        ("resnet50-224", (half,), everything),
        ("vgg19-448", (half, single, ieee), (dense, thin)),
        ("danet-64", (half, single, ieee), (dense,)),
        ("resnet50-224", (single, ieee), (dense, thin)),
        ("resnet50-600", (single, ieee), (dense, thin)),
        ("resnet50-600", (other,), (dense,)),
    ):
        for dtype_name, *precision in dtypes:
            case = replace(maps[name], dtype_name=dtype_name, backward=False)
            for operator, columns in operators:
                yield Question(case, operator, columns, *precision)


def subject_of(question: Question) -> Subject:
    """The operator with its inputs; sets how float32 is multiplied."""
    torch.set_float32_matmul_precision(question.precision)
    columns = question.columns or question.case.positions
    (found,) = (
        one
        for one in subjects(question.case)
        if (one.operator, one.columns) == (question.operator, columns)
    )
    return found


def ways(subject: Subject, names: Sequence[str]) -> dict[str, Callable[..., Tensor]]:
    """Who computes the subject's operator, by name: ours, and eager PyTorch."""
    found = {name: partial(_ours, subject.operator, name) for name in names}
    return found | {"eager": partial(_eager, subject.operator)}


def _ours(operator: str, backend: str, x: Tensor, *more: Tensor) -> Tensor:
    call = cin_fast.sci if operator == "sci" else cci
    return call(x, *more, backend=backend)


def _eager(operator: str, x: Tensor, *more: Tensor) -> Tensor:
    """As they are written, with whole matrices."""
    weights = torch.softmax(torch.bmm(-x, x.transpose(1, 2)), -1)
    if operator == "sci":
        return torch.bmm(weights, *(more or (x,)))
    *v, eta, partner = more
    other = weights[partner.to(x.device)]
    return torch.bmm((weights - eta.to(x.dtype)[:, None, None] * other).abs(), *(v or (x,)))


def compile_ahead(question: Question) -> None:
    """Fills Triton's cache; a failure shows when it is timed."""
    subject = subject_of(question)
    with suppress(Exception):
        run(ways(subject, ["triton"])["triton"], subject.problem)


def answer(question: Question, names: Sequence[str]) -> dict[str, Any]:
    """Seconds (medians) and bytes of each in each direction; or why there are none."""
    subject = subject_of(question)
    about: dict[str, Any] = asdict(question)
    try:
        about["disagreement"] = disagreement(subject, names)
        for direction, dy in (("forward", None), ("both", subject.problem.dy)):
            problem = replace(subject.problem, dy=dy)
            calls = {who: partial(run, call, problem) for who, call in ways(subject, names).items()}
            timed = interleaved(calls, DEVICE, budget=0.0, least=ROUNDS, most=ROUNDS)
            about[direction] = {who: median(one.seconds) for who, one in timed.items()}
            about[f"{direction} peak"] = {who: one.peak_bytes for who, one in timed.items()}
    except (RuntimeError, ValueError) as error:
        about["reason"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return about


def disagreement(subject: Subject, names: Sequence[str]) -> float:
    """Of value and gradients the largest relative distance between ours.

    Raises:
        ValueError: if it is more than rounding.
    """
    calls = ways(subject, names)
    most = 0.0
    for one, other in pairwise(run(calls[name], subject.problem) for name in names):
        for a, b in zip(one, other, strict=True):
            distance = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
            most = max(most, float(distance))
    if not most < DISAGREEMENT:
        raise ValueError(f"the backends disagree by {most:.1e}")
    return most


def line(question: Question, row: dict[str, Any]) -> str:
    """A row for the terminal."""
    if "reason" in row:
        return f"{question}: {row['reason']}"
    times = (
        f"{direction} " + " ".join(f"{who} {1e3 * s:.3f}" for who, s in row[direction].items())
        for direction in ("forward", "both")
    )
    return f"{question}: ms {', '.join(times)}; apart by {row['disagreement']:.1e}"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every question was answered, 1 if one was not, 2 where nothing can run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help=f"(default: bench/results/MACHINE/{FILE})")
    parser.add_argument("--commit", help="what runs, where git does not know")
    parser.add_argument(
        "--backends", nargs="+", default=GPU_BACKENDS, choices=GPU_BACKENDS, help="(all)"
    )
    parser.add_argument("--match", nargs="+", default=[""], help="questions that hold one of these")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for all (300)")
    options = parser.parse_args(arguments)
    if problem := no_gpu():
        print(f"bench/backends.py: {problem}", file=sys.stderr)
        return 2
    end = time.monotonic() + options.limit
    asked = [one for one in questions() if any(part in str(one) for part in options.match)]
    if "triton" in options.backends:
        spawned = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=spawned) as pool:
            pool.map(compile_ahead, asked)
    about = describe_device()
    about |= {"commit": options.commit or about["commit"], "rows": [], "not_asked": 0}
    path = options.output or results_folder() / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, question in enumerate(asked):
        if time.monotonic() > end:
            about["not_asked"] = len(asked) - number
            break
        about["rows"].append(answer(question, options.backends))
        print(line(question, about["rows"][-1]), flush=True)
        path.write_text(json.dumps(about, indent=2) + "\n")
    print(f"bench/backends.py: {path}, {about['not_asked']} questions not asked")
    return int(about["not_asked"] > 0 or any("reason" in row for row in about["rows"]))


if __name__ == "__main__":
    sys.exit(main())
