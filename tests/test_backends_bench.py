"""bench/backends.py without a GPU: what it asks, and that it times the same computation of all."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from cin_fast.testing import make_input, make_pairs

Bench = Callable[[str], ModuleType]


def make_subject(bench: Bench, operator: str, columns: int | None) -> object:
    """On a CPU, four small images; the benchmark's own lie on a GPU."""
    x, dy = make_input("relu", (4, 16, 9)), make_input("randn", (4, 16, columns or 9), seed=2)
    values = () if columns is None else (make_input("randn", (4, 16, columns), seed=1),)
    partner, eta = make_pairs(4)
    pairs = ((eta,), partner) if operator == "cci" else ((), None)
    problem = bench("operators").Problem(None, (x, *values), *pairs, dy)
    return bench("kernel_times").Subject(operator, columns or 9, {}, problem, {})


@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("operator", ["sci", "cci"])
def test_everybody_computes_the_same(bench: Bench, operator: str, columns: int | None) -> None:
    backends, run = bench("backends"), bench("operators").run
    subject = make_subject(bench, operator, columns)
    assert backends.disagreement(subject, ["matmul", "reference"]) < 1e-6
    calls = backends.ways(subject, ["reference"])
    ours, theirs = (run(calls[name], subject.problem) for name in ("reference", "eager"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_backend_that_is_wrong_is_not_timed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = bench("backends")
    monkeypatch.setattr(backends, "subject_of", lambda _: make_subject(bench, "sci", None))
    monkeypatch.setattr(backends, "interleaved", None)
    right = backends._ours

    def wrong(operator: str, backend: str, *more: torch.Tensor) -> torch.Tensor:
        return right(operator, "reference", *more) * (1.1 if backend == "matmul" else 1.0)

    monkeypatch.setattr(backends, "_ours", wrong)
    (question, *_) = backends.questions()
    row = backends.answer(question, ["reference", "matmul"])
    assert row["reason"].startswith("ValueError: the backends disagree by ")
    assert row["reason"] in backends.line(question, row)


def test_no_question_twice(bench: Bench) -> None:
    asked = list(bench("backends").questions())
    assert len({str(one) for one in asked}) == len(asked)
    assert all(not one.case.backward for one in asked)
