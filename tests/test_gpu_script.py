"""bench/gpu.py where there is no GPU: how it plans, keeps time, and loses nothing to a bad step."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def gpu(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "bench"))
    return importlib.import_module("gpu")


def step(gpu: ModuleType, name: str, code: str, **more: object) -> object:
    return gpu.Step(name, (sys.executable, "-c", code), 1.0, **more)


def test_a_step_that_fails_or_hangs_costs_no_other_its_result(gpu: ModuleType) -> None:
    planned = [
        step(gpu, "fails", "print('seen'); raise SystemExit(3)"),
        gpu.Step("is missing", ("no-such-tool",), 1.0),
        step(gpu, "hangs", "import time; print('begun', flush=True); time.sleep(60)"),
        step(gpu, "works", "print('1 passed')"),
    ]
    kept: list[int] = []
    started = time.monotonic()
    outcomes = gpu.run(planned, 8.0, lambda outcomes: kept.append(len(outcomes)))
    assert time.monotonic() - started < 20
    assert [one.status for one in outcomes] == ["failed", "did not start", "timed out", "passed"]
    assert [one.summary for one in outcomes][::2] == ["seen", "begun"]
    assert outcomes[3].summary == "1 passed"
    assert kept == [1, 2, 3, 4]


def test_time_that_is_left_over_goes_to_later_steps(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    allowances: list[float] = []

    def instead(step: object, allowed: float) -> object:
        allowances.append(allowed)
        clock[0] += (10.0, allowed, allowed)[len(allowances) - 1]
        return gpu.Outcome("", "passed", 0.0, "", "", "")

    monkeypatch.setattr(gpu, "run_step", instead)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    gpu.run([gpu.Step("", (), share) for share in (2.0, 1.0, 1.0)], 100.0)
    assert allowances == [50.0, 45.0, 45.0]
    assert clock[0] == 100.0


def test_children_of_a_step_end_with_it(gpu: ModuleType, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.run_step(step(gpu, "parent", code), 2.0).status == "timed out"
    time.sleep(4)
    assert not mark.exists()


def test_the_plan_builds_tests_sanitizes_and_measures(gpu: ModuleType, tmp_path: Path) -> None:
    planned = gpu.steps("9.0a", "/opt/compute-sanitizer", tmp_path)
    names = [one.name for one in planned]
    assert names[0] == "build"
    assert planned[0].command[1:] == ("setup.py", "--quiet", "build_ext", "--inplace")
    assert planned[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert {"memcheck", "racecheck", "initcheck", "synccheck"} < set(names)
    assert names[-3:] == ["bench sci", "bench head", "bench cci"]
    assert len(gpu.steps("9.0a", None, tmp_path)) == len(planned) - 4
    for one in planned:
        for path in (part for part in one.command if part.startswith("tests/")):
            assert (gpu.ROOT / path).exists()


def test_medians_are_read_by_group_and_rival(gpu: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    rows = [("g", "eager", 2.0), ("g", "triton", 1.0), ("h", "eager", 3.0)]
    benchmarks = [
        {"group": group, "params": {"rival": rival}, "stats": {"median": seconds}}
        for group, rival, seconds in rows
    ]
    path.write_text(json.dumps({"benchmarks": benchmarks}))
    expected = {"g": {"eager": 2.0, "triton": 1.0}, "h": {"eager": 3.0}}
    assert gpu.medians(str(path)) == expected
    path.write_text("{")
    assert gpu.medians(str(path)) == {}
    assert gpu.medians(str(tmp_path / "none.json")) == {}


def test_the_json_says_where_and_what(gpu: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "machine" / "gpu.json"
    outcomes = gpu.run([step(gpu, "one", "print('fine')")], 30.0)
    gpu.write(path, {"device": "A", "commit": "abc"}, outcomes)
    written = json.loads(path.read_text())
    assert (written["device"], written["commit"]) == ("A", "abc")
    assert [(one["name"], one["status"]) for one in written["steps"]] == [("one", "passed")]
    assert [found.name for found in path.parent.iterdir()] == ["gpu.json"]


def test_without_a_gpu_one_line_and_nothing_built(repository: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(repository / "bench" / "gpu.py")],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.strip() == (
        "bench/gpu.py: torch sees no CUDA device: nothing was built or run"
    )
