"""The Triton kernels without a GPU: cases that run in a process with Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import triton_interpreted

pytestmark = [pytest.mark.triton, pytest.mark.slow]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable[[str], str | None]]:
    """Runs a case by name; returns what went wrong."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install triton)")
    root = Path(__file__).parent.parent
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore::RuntimeWarning", triton_interpreted.__file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout

    def run(case: str) -> str | None:
        process.stdin.write(case + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"the process ended ({process.wait()}) at {case}: its output is above"
        return json.loads(answer)

    yield run
    process.stdin.close()
    process.wait(timeout=60)


@pytest.mark.parametrize("case", triton_interpreted.CASES)
def test_interpreted(interpreter: Callable[[str], str | None], case: str) -> None:
    problem = interpreter(case)
    if problem:
        pytest.fail(f"{case}: {problem}", pytrace=False)
