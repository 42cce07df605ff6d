"""``make gpu``: everything that needs a GPU, in one command of at most 9 minutes.

Builds in place, runs the GPU tests, the sanitizer on small shapes and the benchmarks, and writes
``gpu.json`` under bench/results/MACHINE after every step: one that fails or takes too long costs
its own result and no other's. Needs torch, triton, pytest and pytest-benchmark, and no network.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 540.0
# For starting Python and writing what was found.
MARGIN = 20.0
TAIL = 4000


@dataclass(frozen=True)
class Step:
    """A command with its share of the time; ``json`` names what pytest-benchmark writes."""

    name: str
    command: tuple[str, ...]
    share: float
    json: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a step ended: ``passed``, ``failed``, ``timed out`` or ``did not start``."""

    name: str
    status: str
    seconds: float
    command: str
    summary: str
    tail: str
    medians: dict[str, dict[str, float]] = field(default_factory=dict)


def pytest_command(*arguments: str) -> tuple[str, ...]:
    """pytest without what a bare machine lacks: the plug-ins that pyproject.toml counts on."""
    bare = ("-o", "addopts=", "-p", "no:cacheprovider", "-q", "-rs")
    return (sys.executable, "-m", "pytest", *bare, *arguments)


def steps(chip: str, sanitizer: str | None, folder: Path) -> list[Step]:
    """What is done, in order.

    Args:
        chip: TORCH_CUDA_ARCH_LIST's name of the device; only its kernels are built.
        sanitizer: compute-sanitizer's path; None leaves its steps out.
        folder: where the benchmarks' JSON goes.
    """
    build = {"TORCH_CUDA_ARCH_LIST": chip, "MAX_JOBS": str(os.cpu_count() or 2)}
    tests = ("tests/test_cuda_gpu.py", "tests/test_cuda_ptx.py")
    small = (sys.executable, str(Path(__file__).resolve()), "--small-run")
    found = [
        Step(
            "build", (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"), 2.0,
            environment=build,
        ),
        Step("triton tests", pytest_command("tests/test_triton_gpu.py"), 2.0),
        Step("cuda tests", pytest_command("-m", "gpu", *tests), 1.5),
    ]  # fmt: skip
    if sanitizer:
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
            command = (sanitizer, "--tool", tool, "--error-exitcode", "9", *small)
            # Memory that torch keeps for itself hides what runs over an allocation.
            caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            found.append(Step(tool, command, 0.5, environment=caching))
    for subject, selection, share in (
        ("sci", "resnet50-448 and bfloat16", 2.0),
        ("head", "resnet50-448", 1.0),
        ("cci", "resnet50-448", 1.0),
    ):
        path = str(folder / f"bench_{subject}.json")
        command = pytest_command(
            f"bench/bench_{subject}.py",
            "--benchmark-only",
            f"--benchmark-json={path}",
            "-k",
            selection,
        )
        found.append(Step(f"bench {subject}", command, share, json=path))
    return found


def run(
    planned: Sequence[Step],
    limit: float,
    keep: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run the steps within ``limit`` seconds; ``keep`` gets what is known after each.

    A step may take its share of the time that is left, so what one does not use the others get.
    """
    end = time.monotonic() + limit
    outcomes: list[Outcome] = []
    for number, step in enumerate(planned):
        shares = sum(later.share for later in planned[number:])
        allowed = max(0.0, end - time.monotonic()) * step.share / shares
        outcomes.append(run_step(step, allowed))
        print(f"{step.name}: {outcomes[-1].status}, {outcomes[-1].summary}", flush=True)
        keep(outcomes)
    return outcomes


def run_step(step: Step, allowed: float) -> Outcome:
    """One step; past ``allowed`` seconds it is ended with all of its children."""
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=os.environ | step.environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
    except OSError as error:
        return _outcome(step, "did not start", started, str(error))
    try:
        output, _ = process.communicate(timeout=allowed)
        status = "failed" if process.returncode else "passed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = "timed out"
    return _outcome(step, status, started, output)


def _outcome(step: Step, status: str, started: float, output: str) -> Outcome:
    lines = [line for line in output.splitlines() if line.strip()]
    return Outcome(
        name=step.name,
        status=status,
        seconds=round(time.monotonic() - started, 1),
        command=" ".join(step.command),
        summary=lines[-1].strip("= ") if lines else "no output",
        tail=output[-TAIL:],
        medians=medians(step.json) if step.json else {},
    )


def medians(path: str) -> dict[str, dict[str, float]]:
    """Seconds of each rival by group, from pytest-benchmark's JSON; empty where there is none."""
    try:
        text = Path(path).read_text()
        found: dict[str, dict[str, float]] = {}
        for one in json.loads(text)["benchmarks"]:
            rivals = found.setdefault(one["group"], {})
            rivals[one["params"]["rival"]] = one["stats"]["median"]
        return found
    except (OSError, ValueError, KeyError):
        return {}


def describe_device() -> dict[str, Any]:
    """What decides the results: device, driver, versions."""
    import torch

    from cin_fast.info import versions

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": versions(),
        "commit": _first_line("git", "rev-parse", "HEAD"),
    }


def _first_line(*command: str) -> str:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.splitlines()[0].strip() if result.stdout.strip() else "unknown"


def write(path: Path, about: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """All of the results so far; never half a file."""
    text = json.dumps({**about, "steps": [asdict(one) for one in outcomes]}, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def no_gpu() -> str:
    """Why nothing can be run here, in one line; empty if a GPU is there."""
    try:
        import torch
    except ImportError as error:
        return f"torch does not import ({error})"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: nothing was built or run"
    return ""


def small_run() -> None:
    """Both operators, forward and backward, on each backend that this GPU has: for a sanitizer."""
    import torch

    from cin_fast import dispatch
    from cin_fast.testing import evaluate_cci, evaluate_sci, make_input, make_pairs

    for backend in ("triton", "cuda"):
        if dispatch.unavailable(backend):
            continue
        for dtype in (torch.bfloat16, torch.float32):
            x = make_input("relu", (2, 65, 33), dtype, "cuda")
            for v in (None, x[..., :9].contiguous()):
                dy = torch.ones_like(x if v is None else v)
                evaluate_sci(x, v, dy, backend=backend)
                evaluate_cci(x, *make_pairs(2, x.device), v, dy, backend=backend)
    torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 if every step passed, 1 if one did not, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all (540)")
    parser.add_argument("--small-run", action="store_true", help="what the sanitizer watches")
    options = parser.parse_args(arguments)
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
    problem = no_gpu()
    if problem:
        print(f"bench/gpu.py: {problem}", file=sys.stderr)
        return 2
    if options.small_run:
        small_run()
        return 0
    from machine import results_folder

    about = describe_device()
    folder = results_folder(about["device"])
    folder.mkdir(parents=True, exist_ok=True)
    chip = about["capability"].replace("9.0", "9.0a")
    planned = steps(chip, shutil.which("compute-sanitizer"), folder)
    path = folder / "gpu.json"
    outcomes = run(planned, options.limit - MARGIN, lambda outcomes: write(path, about, outcomes))
    print(f"bench/gpu.py: {path}")
    return int(any(one.status != "passed" for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
