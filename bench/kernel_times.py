"""``python bench/kernel_times.py``: where a GPU's time goes, kernel by kernel.

Times each operator and the pooled heads at ResNet-50's map at 448 px in bfloat16, forward and in
both directions, beside plain PyTorch's ways, and splits a call in both directions into its kernels.
Writes ``kernels.json`` under bench/results/MACHINE after every one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from cases import DEVICE, Case, main_case
from gpu import describe_device, no_gpu
from kernel_report import FILE, LEAST_SECONDS
from machine import results_folder
from measure import interleaved, measure_ceilings
from operators import Problem, run
from rivals import (
    Rival,
    eager_cci,
    eager_head,
    eager_sci,
    head_rivals,
    pooled_head,
    pooled_pair_head,
    sci_rivals,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import cin_fast
from cin_fast import dispatch
from cin_fast.flops import sci_backward_flops, sci_flops
from cin_fast.testing import make_input, make_pairs, make_psi

BACKENDS, THIN, ROUNDS, TRACED = ("cuda", "triton"), 9, 12, 6


@dataclass(frozen=True)
class Subject:
    """An operator with ``columns`` of v, who computes it, on what, and what it multiplies."""

    operator: str
    columns: int
    ways: Mapping[str, Callable[..., Tensor]]
    problem: Problem
    flops: Mapping[str, int]


def subjects(case: Case) -> Iterator[Subject]:
    """``sci`` and ``cci``, each with v = x and with thin v.

    Partners lie on the CPU, as in training: on the GPU they would be waited for.
    """
    shape = (case.batch, case.channels, case.positions)
    x, dy = (make_input(kind, shape, case.dtype, "cuda", seed)
             for seed, kind in enumerate(("relu", "randn")))  # fmt: skip
    v, dv = (make_input("randn", (*shape[:2], THIN), case.dtype, "cuda", seed) for seed in (2, 3))
    partner, eta = make_pairs(case.batch)
    eta = eta.to("cuda")
    sci = {name: partial(cin_fast.sci, backend=name) for name in BACKENDS}
    pairs = {name: partial(cci, backend=name) for name in BACKENDS}
    dense, thin = (flops(case, columns) for columns in (case.positions, THIN))
    everybody, wide = _plain(sci_rivals()) | sci, case.positions
    yield Subject("sci", wide, everybody, Problem(eager_sci, (x,), dy=dy), dense)
    yield Subject("sci", THIN, sci, Problem(eager_sci, (x, v), dy=dv), thin)
    yield Subject("cci", wide, pairs, Problem(eager_cci, (x,), (eta,), partner, dy), dense)
    yield Subject("cci", THIN, pairs, Problem(eager_cci, (x, v), (eta,), partner, dv), thin)


def head(case: Case) -> Subject:
    """Features to the spatial mean of Z, ours through tap means."""
    size = (case.batch, case.channels, case.height, case.width)
    x = make_input("relu", size, case.dtype, "cuda")
    weight = make_input("randn", (case.channels,) * 2 + (3, 3), case.dtype, "cuda", 1)
    weight *= (THIN * case.channels) ** -0.5
    bias, dy = torch.zeros_like(weight[:, 0, 0, 0]), torch.randn_like(x[..., 0, 0])
    ours = {name: partial(pooled_head, backend=name) for name in BACKENDS}
    forward = flops(case, THIN)["forward"] + 2 * case.batch * case.channels**2 * THIN
    problem = Problem(eager_head, (x,), (weight, bias), dy=dy)
    work = {"forward": forward, "both": 3 * forward}
    return Subject("head", case.positions, _plain(head_rivals()) | ours, problem, work)


def pair_head(one: Subject) -> Subject:
    """Of the same features and phi, the spatial means of Z and of Z' of pairs: ours alone."""
    (x,), phi, dy = one.problem.images, one.problem.shared, one.problem.dy
    psi = (t.to(x.device) for t in make_psi(x.shape[1], -0.6, x.dtype))
    partner, _ = make_pairs(len(x))
    ours = {name: partial(pooled_pair_head, backend=name) for name in BACKENDS}
    judge = partial(pooled_pair_head, backend="reference")
    problem = Problem(judge, (x,), (*phi, *psi), partner, dy.repeat(2, 1))
    work = {direction: 2 * flops for direction, flops in one.flops.items()}
    return Subject("pair head", one.columns, ours, problem, work)


def _plain(rivals: Sequence[Rival]) -> dict[str, Callable[..., Tensor]]:
    return {
        one.name: one.call
        for one in rivals
        if not one.compiles and one.name not in dispatch.BACKENDS
    }


def cci(x: Tensor, *more: Tensor, backend: str) -> Tensor:
    """Of x, v if it is thin, eta and partner: a :class:`Problem`'s order."""
    *v, eta, partner = more
    return cin_fast.cci(x, partner, eta, *v, backend=backend)


def flops(case: Case, columns: int) -> dict[str, int]:
    """Products as written."""
    x, v = ((case.batch, case.channels, width) for width in (case.positions, columns))
    forward = sci_flops(x, v)
    return {"forward": forward, "both": forward + sci_backward_flops(x, v)}


def rows(subject: Subject, commit: str) -> tuple[list[Any], list[Any]]:
    """A row of kernels.json for each way that runs, and a reason for each that does not."""
    both, forward = subject.problem, replace(subject.problem, dy=None)
    found: dict[str, dict[str, Any]] = {}
    reasons, about = [], {"operator": subject.operator, "columns": subject.columns}
    for name, call in subject.ways.items():
        try:
            kernels = split(partial(run, call, both))
            found[name] = {**about, "name": name, "commit": commit, "kernels": kernels}
        except (RuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            reasons.append({**about, "name": name, "reason": reason})
    for direction, given in (("forward", forward), ("both", both)):
        calls = {name: partial(run, subject.ways[name], given) for name in found}
        timed = interleaved(calls, DEVICE, budget=0.0, least=ROUNDS, most=ROUNDS) if calls else {}
        for name, one in timed.items():
            found[name][direction] = {
                "seconds": median(one.seconds),
                "flops": subject.flops[direction],
            }
    return list(found.values()), reasons


def split(call: Callable[[], object]) -> list[dict[str, Any]]:
    """Device seconds of a call by kernel, longest first."""
    call()
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        for _ in range(TRACED):
            call()
        torch.cuda.synchronize()
    found = [
        {"name": short_name(one.key), "calls": one.count // TRACED,
         "seconds": one.self_device_time_total / TRACED / 1e6}
        for one in traced.key_averages()
    ]  # fmt: skip
    found = [one for one in found if one["seconds"] >= LEAST_SECONDS]
    return sorted(found, key=lambda one: one["seconds"], reverse=True)


def short_name(kernel: str) -> str:
    """Its own name, without namespace, template and parameters; of PyTorch's, what it applies."""
    if applied := re.search(r"\w+_kernel_cuda|\w*Functor\w*", kernel):
        return applied[0]
    plain = re.sub(r"\((anonymous namespace|int|bool)\)|<unnamed>", "", kernel)
    return re.split(r"[<(]", plain)[0].split("::")[-1].split(" ")[-1] or kernel


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every backend ran, 1 if one did not, 2 where nothing can run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="(default: bench/results/MACHINE/kernels.json)")
    parser.add_argument("--commit", help="what runs, where git does not know")
    options = parser.parse_args(arguments)
    if problem := no_gpu():
        print(f"bench/kernel_times.py: {problem}", file=sys.stderr)
        return 2
    case, about = main_case("bfloat16"), describe_device()
    about |= {"commit": options.commit or about["commit"], "case": vars(case)}
    limits = {case.dtype_name: vars(measure_ceilings(case.dtype, DEVICE))}
    about |= {"ceilings": limits, "left_out": [], "rows": []}
    path = options.output or results_folder() / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    one = head(case)
    for subject in (*subjects(case), one, pair_head(one)):
        measured, reasons = rows(subject, about["commit"])
        about["rows"] += measured
        about["left_out"] += reasons
        path.write_text(json.dumps(about, indent=2) + "\n")
    print(f"bench/kernel_times.py: {path}")
    return int(any(one["name"] in BACKENDS for one in about["left_out"]))


if __name__ == "__main__":
    sys.exit(main())
