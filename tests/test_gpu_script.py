"""bench/gpu.py where there is no GPU: how it plans, keeps time, and loses nothing to a bad step."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def gpu(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "bench"))
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "GRACE", 1.0)
    return module


def step(gpu: ModuleType, name: str, code: str, **more: object) -> object:
    return gpu.Step(name, (sys.executable, "-c", code), 1.0, **more)


def test_a_step_that_fails_or_hangs_costs_no_other_its_result(gpu: ModuleType) -> None:
    steps = [
        step(gpu, "fails", "print('seen'); raise SystemExit(3)"),
        gpu.Step("is missing", ("no-such-tool",), 1.0),
        step(gpu, "hangs", "import time; print('begun', flush=True); time.sleep(60)"),
        step(gpu, "works", "print('1 passed')"),
    ]
    kept: list[int] = []
    started = time.monotonic()
    planned = [(one,) for one in steps]
    outcomes = gpu.run(planned, 16.0, lambda outcomes: kept.append(len(outcomes)))
    assert time.monotonic() - started < 30
    assert [one.status for one in outcomes] == ["failed", "did not start", "timed out", "passed"]
    assert outcomes[0].summary == "seen"
    assert outcomes[2].tail.startswith("begun")
    assert outcomes[3].summary == "1 passed"
    assert kept == [1, 2, 3, 4]


def test_steps_of_a_stage_run_at_the_same_time(gpu: ModuleType, tmp_path: Path) -> None:
    """Each waits for the other's file, and the last of them hangs alone."""
    code = (
        "import pathlib, sys, time; own, other = map(pathlib.Path, {!r}); own.touch()\n"
        "while not other.exists(): time.sleep(0.01)"
    )
    paths = [str(tmp_path / name) for name in "abc"]
    pairs = {"a": paths[:2], "b": paths[1::-1], "hangs": [paths[2], str(tmp_path / "never")]}
    stage = tuple(step(gpu, name, code.format(pair)) for name, pair in pairs.items())
    kept: list[int] = []
    outcomes = gpu.run([stage], 9.0, lambda outcomes: kept.append(len(outcomes)))
    status = {one.name: one.status for one in outcomes}
    assert status == {"a": "passed", "b": "passed", "hangs": "timed out"}
    assert kept == [1, 2, 3]


def test_time_that_is_left_over_goes_to_later_stages(
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
    gpu.run([(gpu.Step("", (), share),) for share in (2.0, 1.0, 1.0)], 100.0)
    assert allowances == [50.0, 45.0, 45.0]
    assert clock[0] == 100.0


def test_an_interrupted_step_may_write_what_it_knows(gpu: ModuleType) -> None:
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('kept')"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        # As in a shell's background, whose children would not hear of it.
        gpu.hear_interrupts()
        outcome = gpu.run_step(step(gpu, "slow", code), gpu.GRACE + 2.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (outcome.status, outcome.summary) == ("timed out", "kept")


def test_what_only_skipped_has_not_passed(gpu: ModuleType) -> None:
    def outcome(summary: str) -> Any:
        return gpu.run_step(step(gpu, "tests", f"print('SKIPPED why'); print({summary!r})"), 30.0)

    assert outcome("3 skipped in 1s").status == "skipped"
    assert outcome("1 passed, 2 skipped in 1s").status == "passed"
    assert outcome("1 passed, 2 skipped in 1s").tail == "SKIPPED why"


def test_what_is_published_names_no_folder(gpu: ModuleType) -> None:
    library = "../../opt/some/lib/site-packages/torch/jit.py:365"
    own = "../../usr/lib/python3.12/selectors.py:415"
    code = f"print({str(gpu.ROOT / 'tests')!r}, {library!r}, {own!r}); raise SystemExit(1)"
    outcome = gpu.run_step(step(gpu, "one", code), 30.0)
    expected = "tests site-packages/torch/jit.py:365 python3.12/selectors.py:415"
    assert outcome.tail == f"{expected}\n"
    assert outcome.command.startswith("python -c")


def test_races_are_counted_by_kernel(gpu: ModuleType) -> None:
    race = (
        "========= Error: Race reported between Write access at void a::b::{}<c, (int)2>(d)+0x1820"
    )
    lines = [race.format(name) for name in ("one_kernel", "two_kernel", "one_kernel")]
    outcome = gpu.run_step(step(gpu, "racecheck", f"print({chr(10).join(lines)!r}); exit(9)"), 30.0)
    first, second, *kept = outcome.tail.splitlines()
    assert (first, second) == ("one_kernel: 2 races reported", "two_kernel: 1 races reported")
    assert kept == lines


def test_children_of_a_step_end_with_it(gpu: ModuleType, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"time.sleep(6); open({str(mark)!r}, 'w')"
    )
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    assert gpu.run_step(step(gpu, "parent", code), gpu.GRACE + 2.0).status == "timed out"
    time.sleep(5)
    assert not mark.exists()


def test_the_plan_builds_tests_sanitizes_and_measures(gpu: ModuleType) -> None:
    stages = gpu.plan("9.0a", "/opt/compute-sanitizer", build=True, patient=True)
    build, right, *alone = [[one.name for one in stage] for stage in stages]
    assert build == ["build"]
    assert stages[0][0].command[1:] == ("setup.py", "--quiet", "build_ext", "--inplace")
    assert stages[0][0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    tools = ["memcheck", "racecheck", "initcheck", "synccheck"]
    tests = ["triton tests", "tap means and matmul tests", "cuda tests", "ptx tests"]
    assert right == [*tests, *tools]
    assert alone == [["bench sci"], ["bench head"], ["bench cci"], ["kernel times"], ["backends"]]
    few = gpu.plan("9.0a", None, build=False, patient=False)
    assert [len(stage) for stage in few] == [4, 1, 1, 1, 1]
    few = gpu.plan("9.0a", None, build=False, patient=False, without=["ptx tests", "bench sci"])
    assert [len(stage) for stage in few] == [3, 1, 1, 1]
    for path in (part for stage in stages for one in stage for part in one.command):
        if path.startswith(("tests/", "bench/")):
            assert (gpu.ROOT / path).exists()


def test_kernel_times_name_the_commit_that_git_does_not_know(gpu: ModuleType) -> None:
    def command(commit: str | None) -> tuple[str, ...]:
        planned = gpu.plan("9.0a", None, build=False, patient=False, commit=commit)
        (step,) = planned[-1]
        return step.command[1:]

    assert command("abc") == ("bench/kernel_times.py", "--commit", "abc")
    assert command(None) == ("bench/kernel_times.py",)


@pytest.mark.slow
@pytest.mark.parametrize("patient", [True, False])
def test_the_benchmarks_select_what_is_reported(
    gpu: ModuleType, patient: bool, tmp_path: Path
) -> None:
    """As on a GPU: its cases are chosen when ``torch.cuda.is_available`` says so."""
    (tmp_path / "pretend.py").write_text(
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "import cases\n"
        "torch.cuda.is_available = lambda: False\n"
    )
    fused = {"sdpa-flash", "sdpa-efficient", "sdpa-cudnn"}
    rivals = {"eager", "sdpa", "cpu", "triton", "cuda"} | ({"compiled"} if patient else set())
    more = {"sci": fused | ({"flex"} if patient else set()), "head": set(), "cci": {"sdpa"}}
    # Beside xdist's variables pytest-benchmark would refuse.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{gpu.ROOT / 'bench'}"
    # The ways of leaving rivals out are the same for each subject.
    steps = list(gpu.bench_steps(patient))[: 3 if patient else 1]
    for one in steps:
        assert one.command[:3] == (sys.executable, "-m", "pytest")
    arguments = [[*one.command[3:], "-p", "pretend", "--collect-only"] for one in steps]
    # One process: each would import torch anew.
    code = (
        "import json, sys, pytest\n"
        "for arguments in json.loads(sys.argv[1]): print('next step'); pytest.main(arguments)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        cwd=gpu.ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    outputs = result.stdout.split("next step\n")[1:]
    for one, output in zip(steps, outputs, strict=True):
        subject = one.name.split()[1]
        found = set(re.findall(r"\[resnet50-448-bfloat16-(forward|both)-([a-z-]+)\]", output))
        expected = rivals ^ more[subject]
        directions = ("forward", "both")
        assert found == {(way, rival) for way in directions for rival in expected}, output
        assert output.count(f"bench/bench_{subject}.py::") == output.count("::") == len(found)


def test_the_sanitizer_sees_whole_and_half_blocks_and_tails(gpu: ModuleType) -> None:
    for multiprocessors in (108, 114, 132, 133):
        shapes = gpu.small_shapes(multiprocessors)
        blocks = [batch * -(-channels // 128) for batch, channels, _ in shapes]
        halves = [2 * (count % multiprocessors) <= multiprocessors for count in blocks]
        assert all(channels % 64 for _, channels, _ in shapes)
        assert shapes[0][1] <= 128
        assert halves[1:] == [True, True]
        assert min(channels for _, channels, _ in shapes[1:]) > 128
        assert blocks[1] < multiprocessors < blocks[2]


def test_without_the_extension_no_build_says_so(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cin_fast import dispatch

    monkeypatch.setattr(gpu, "no_gpu", lambda: "")
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: f"{backend} is not built")
    assert gpu.main(["--no-build"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("extension that is built, and cuda is off: cuda is not built")
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: "")
    assert gpu.not_built() == ""


def test_what_was_measured_is_kept_by_group_and_rival(gpu: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    rows = [("g", "eager", 2.0), ("g", "triton", 1.0), ("h", "eager", 3.0)]
    benchmarks = [
        {
            "group": group,
            "params": {"rival": rival},
            "stats": {"median": seconds, "iqr": 0.1 * seconds, "rounds": 5},
            "extra_info": {"flops": 8.0, "bytes": 4.0, "dtype": "bfloat16", "peak_bytes": 16},
        }
        for group, rival, seconds in rows
    ]
    left_out = [{"group": "g", "rival": "cpu", "reason": "needs a CPU tensor"}]
    ceilings = {"bfloat16": {"flops": 1.0, "bytes": 1.0}}
    run = {"benchmarks": benchmarks, "ceilings": ceilings, "left_out": left_out}
    path.write_text(json.dumps(run))
    found = gpu.measured(path)
    medians = {
        group: {rival: one["seconds"] for rival, one in about["rivals"].items()}
        for group, about in found["groups"].items()
    }
    assert medians == {"g": {"eager": 2.0, "triton": 1.0}, "h": {"eager": 3.0}}
    triton = {"seconds": 1.0, "spread": 0.05, "rounds": 5, "peak_bytes": 16}
    assert found["groups"]["g"]["rivals"]["triton"] == triton
    assert (found["groups"]["g"]["flops"], found["groups"]["g"]["dtype"]) == (8.0, "bfloat16")
    assert (found["ceilings"], found["left_out"]) == (ceilings, left_out)
    path.write_text("{")
    assert gpu.measured(path) == {}
    assert gpu.measured(tmp_path / "none.json") == {}


def test_what_an_earlier_run_measured_is_not_taken_for_this_one(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    stale = tmp_path / "kept" / "bench.json"
    stale.parent.mkdir()
    stale.write_text('{"benchmarks": [], "ceilings": {}, "left_out": []}')
    failing = step(gpu, "bench", "raise SystemExit(1)", json="kept/bench.json")
    assert gpu.run_step(failing, 30.0).measured == {}


def test_the_json_says_where_and_what(gpu: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "machine" / "gpu.json"
    outcomes = gpu.run([(step(gpu, "one", "print('fine')"),)], 30.0)
    gpu.write(path, {"device": "A", "commit": "abc"}, outcomes)
    written = json.loads(path.read_text())
    assert (written["device"], written["commit"]) == ("A", "abc")
    assert [(one["name"], one["status"]) for one in written["steps"]] == [("one", "passed")]
    assert [found.name for found in path.parent.iterdir()] == ["gpu.json"]


@pytest.mark.parametrize("script", ["gpu.py", "kernel_times.py", "backends.py"])
def test_without_a_gpu_one_line_and_nothing_built(repository: Path, script: str) -> None:
    result = subprocess.run(
        [sys.executable, str(repository / "bench" / script)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.strip() == (
        f"bench/{script}: torch sees no CUDA device: nothing was built or run"
    )
