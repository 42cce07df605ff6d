"""``make gpu``: everything that needs a GPU, in one command of at most 9 minutes.

Builds in place, runs the GPU tests and the sanitizer on small shapes, all at once, then the
benchmarks one by one, and writes ``gpu.json`` under bench/results/MACHINE after every step: one
that fails or takes too long costs its own result and no other's. Needs torch, triton, pytest and
pytest-benchmark (with pytest-xdist it is quicker), and no network.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 540.0
# For starting Python and writing what was found.
MARGIN = 20.0
# From this limit on, rivals that compile for up to a minute a shape have a turn.
PATIENT = 500.0
# Of a benchmark's seconds, those until it has started and written its JSON.
BENCH_MARGIN = 15.0
# What an interrupted step has to write what it knows.
GRACE = 5.0
TAIL = 4000
CUDA_TOOLS = "/usr/local/cuda/bin"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass(frozen=True)
class Step:
    """A command with its share of the time; ``json`` names what pytest-benchmark writes."""

    name: str
    command: tuple[str, ...]
    share: float
    json: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


# Steps that run at the same time.
Stage = tuple[Step, ...]


@dataclass(frozen=True)
class Outcome:
    """How a step ended: ``passed``, ``skipped`` (all of it), ``failed``, ``timed out``, ``did not
    start``.

    ``tail`` is the end of what it printed, of a step that passed the reasons of skips alone.
    """

    name: str
    status: str
    seconds: float
    command: str
    summary: str
    tail: str
    measured: dict[str, Any] = field(default_factory=dict)


def pytest_command(*arguments: str, processes: int = 1) -> tuple[str, ...]:
    """pytest without what a bare machine lacks: the plug-ins that pyproject.toml counts on."""
    bare = ("-o", "addopts=", "-p", "no:cacheprovider", "-q", "-rs")
    shared = processes > 1 and importlib.util.find_spec("xdist")
    several = ("-n", str(processes)) if shared else ()
    return (sys.executable, "-m", "pytest", *bare, *several, *arguments)


def plan(
    chip: str,
    sanitizer: str | None,
    *,
    build: bool,
    patient: bool,
    commit: str | None = None,
    without: Sequence[str] = (),
) -> list[Stage]:
    """What is done, in order.

    Args:
        chip: TORCH_CUDA_ARCH_LIST's name of the device; only its kernels are built.
        sanitizer: compute-sanitizer's path; None leaves its steps out.
        build: False where the extension is there already.
        patient: rivals that compile have a turn, too, and maps and dtypes beyond the main one.
        commit: what runs, where git does not know.
        without: names of steps to leave out.
    """
    right = (*test_steps(), *(sanitizer_steps(sanitizer) if sanitizer else ()))
    last = (backends_step(commit),) if patient else ()
    alone = [(step,) for step in (*bench_steps(patient), kernel_step(commit), *last)]
    stages = [*([(build_step(chip),)] if build else []), right, *alone]
    kept = (tuple(step for step in stage if step.name not in without) for stage in stages)
    return [stage for stage in kept if stage]


def build_step(chip: str) -> Step:
    """The extension, for one chip."""
    command = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
    environment = {"TORCH_CUDA_ARCH_LIST": chip, "MAX_JOBS": str(os.cpu_count() or 2)}
    return Step("build", command, 3.0, environment=environment)


def test_steps() -> Stage:
    """The rule for numbers, and the PTX. With 16 cores, some are left for the sanitizer."""
    cuda, triton, ptx, taps, matmul = (
        f"tests/test_{name}.py"
        for name in ("cuda_gpu", "triton_gpu", "cuda_ptx", "cuda_tap_means", "matmul")
    )
    return (
        Step("triton tests", pytest_command(triton, processes=8), 5.0),
        Step("tap means and matmul tests", pytest_command("-m", "gpu", taps, matmul), 5.0),
        Step("cuda tests", pytest_command(cuda, processes=4), 5.0),
        Step("ptx tests", pytest_command("-m", "gpu", ptx), 5.0),
    )


def sanitizer_steps(sanitizer: str) -> Iterator[Step]:
    """compute-sanitizer's tools on :func:`small_run`."""
    small = (sys.executable, "bench/gpu.py", "--small-run")
    # Memory that torch keeps for itself hides what runs over an allocation.
    caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in SANITIZERS:
        command = (sanitizer, "--tool", tool, "--error-exitcode", "9", *small)
        yield Step(tool, command, 5.0, environment=caching)


def bench_steps(patient: bool) -> Iterator[Step]:
    """ResNet-50's map at 448 px in bfloat16, forward and both directions."""
    chosen = "resnet50-448 and bfloat16 and not reference and not matmul"
    if not patient:
        chosen += " and not compiled and not flex"
    for subject, share in (("sci", 2.0), ("head", 1.5), ("cci", 1.5)):
        path = f".benchmarks/gpu_{subject}.json"
        arguments = ("--benchmark-only", f"--benchmark-json={path}", "-k", chosen)
        command = pytest_command(f"bench/bench_{subject}.py", *arguments)
        yield Step(f"bench {subject}", command, share, json=path)


def kernel_step(commit: str | None) -> Step:
    """Each operator's calls and their kernels, in a file of its own beside gpu.json."""
    named = ("--commit", commit) if commit else ()
    return Step("kernel times", (sys.executable, "bench/kernel_times.py", *named), 1.5)


def backends_step(commit: str | None) -> Step:
    """Every backend over maps and dtypes, likewise; what is asked first is answered first."""
    named = ("--commit", commit) if commit else ()
    return Step("backends", (sys.executable, "bench/backends.py", *named), 4.0)


def run(
    planned: Sequence[Stage],
    limit: float,
    keep: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run the stages within ``limit`` seconds; ``keep`` gets what is known after each step.

    A stage may take its share of the time that is left, so what one does not use the others get.
    """
    end = time.monotonic() + limit
    outcomes: list[Outcome] = []
    for number, stage in enumerate(planned):
        shares = sum(_share(later) for later in planned[number:])
        allowed = max(0.0, end - time.monotonic()) * _share(stage) / shares
        with ThreadPoolExecutor(len(stage)) as pool:
            for outcome in as_completed(_started(pool, stage, allowed)):
                outcomes.append(outcome.result())
                print("{0.name}: {0.status}, {0.summary}".format(outcomes[-1]), flush=True)
                keep(outcomes)
    return outcomes


def _share(stage: Stage) -> float:
    return max(step.share for step in stage)


def _started(pool: ThreadPoolExecutor, stage: Stage, allowed: float) -> list[Future[Outcome]]:
    return [pool.submit(run_step, step, allowed) for step in stage]


def run_step(step: Step, allowed: float) -> Outcome:
    """One step; past ``allowed`` seconds it is ended with all of its children.

    It is interrupted first: pytest then writes what it has measured so far.
    """
    started = time.monotonic()
    seconds = {"CIN_FAST_BENCH_SECONDS": f"{max(1.0, allowed - BENCH_MARGIN):.0f}"}
    if step.json:
        (ROOT / step.json).parent.mkdir(exist_ok=True)
        (ROOT / step.json).unlink(missing_ok=True)
    # A pipe would stay open with a grandchild that lives on.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=os.environ | seconds | step.environment,
                start_new_session=True, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except OSError as error:
            return _outcome(step, "did not start", started, str(error))
        status = _wait(process, allowed)
        output.seek(0)
        return _outcome(step, status, started, output.read())


def _wait(process: subprocess.Popen[bytes], allowed: float) -> str:
    """How the process ended, of itself or not."""
    try:
        return "failed" if process.wait(max(0.0, allowed - GRACE)) else "passed"
    except subprocess.TimeoutExpired:
        pass
    for end, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, end)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    return "timed out"


def _outcome(step: Step, status: str, started: float, output: str) -> Outcome:
    # The results are published: where the checkout and its Python lie is not.
    output = _without_paths(output)
    lines = [line for line in output.splitlines() if line.strip()]
    skips = [line for line in lines if line.startswith("SKIPPED")]
    summary = lines[-1].strip("= ") if lines else "no output"
    if status == "passed" and skips and " passed" not in summary:
        status = "skipped"
    kept = "\n".join(skips) if status in ("passed", "skipped") else output[-TAIL:]
    return Outcome(
        name=step.name,
        status=status,
        seconds=round(time.monotonic() - started, 1),
        command=_without_paths(" ".join(step.command)),
        summary=summary,
        tail="\n".join([*races(output), kept]),
        measured=measured(ROOT / step.json) if step.json else {},
    )


def races(output: str) -> list[str]:
    """The kernels that racecheck named, and how often: a line each, as its report is long."""
    named = re.findall(r"Race reported between .*?(\w+_kernel)", output)
    return [f"{kernel}: {count} races reported" for kernel, count in Counter(named).items()]


def _without_paths(text: str) -> str:
    text = text.replace(sys.executable, "python").replace(f"{ROOT}/", "")
    return re.sub(r"[^\s'\"]*/(?=site-packages/|python3\.\d+/(?!site-packages/))", "", text)


def measured(path: Path) -> dict[str, Any]:
    """What is kept of pytest-benchmark's JSON; empty where there is none.

    ``groups`` hold operations and dtype, and by rival the median, its spread (half the distance
    between the quartiles over the median), and the peak of memory; ``ceilings`` and ``left_out``
    are the run's.
    """
    try:
        found = json.loads(path.read_text())
        groups: dict[str, Any] = {}
        for one in found["benchmarks"]:
            work, stats = one["extra_info"], one["stats"]
            about = {"flops": work["flops"], "dtype": work["dtype"], "rivals": {}}
            groups.setdefault(one["group"], about)["rivals"][one["params"]["rival"]] = {
                "seconds": stats["median"],
                "spread": round(stats["iqr"] / 2 / stats["median"], 4),
                "rounds": stats["rounds"],
                "peak_bytes": work["peak_bytes"],
            }
        return {"groups": groups, "ceilings": found["ceilings"], "left_out": found["left_out"]}
    except (OSError, ValueError, KeyError):
        return {}


def describe_device() -> dict[str, Any]:
    """What decides the results: device, driver, versions."""
    import torch

    from cin_fast.info import git_commit, versions

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": versions(),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
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


def not_built() -> str:
    """Why the extension's kernels cannot be called, in one line; empty if they can."""
    from cin_fast import dispatch

    reason = dispatch.unavailable("cuda")
    return f"--no-build needs an extension that is built, and cuda is off: {reason}" * bool(reason)


def small_shapes(multiprocessors: int) -> list[tuple[int, int, int]]:
    """(batch, channels, positions): few rows; half blocks, several tiles; whole blocks and halves.

    Of blocks of 128 rows, two an image, one or two are left for the last wave, and are halved.
    """
    return [(2, 65, 33), (3, 300, 50), (multiprocessors // 2 + 1, 200, 196)]


def small_run() -> None:
    """Every kernel of csrc/cuda's, in few and small calls: for a sanitizer."""
    import torch

    from cin_fast import tap_means
    from cin_fast.testing import evaluate_cci, evaluate_sci, make_input, make_pairs

    shapes = small_shapes(torch.cuda.get_device_properties(0).multi_processor_count)
    # Triton's kernels would take their minutes to compile under a sanitizer: cuda alone.
    backend = "cuda"
    for dtype, some in ((torch.bfloat16, shapes), (torch.float32, shapes[:2])):
        for shape in some:
            x = make_input("relu", shape, dtype, "cuda")
            for v in (None, x[..., :9].contiguous()):
                dy = torch.ones_like(x if v is None else v)
                evaluate_sci(x, v, dy, backend=backend)
                evaluate_cci(x, *make_pairs(len(x), x.device), v, dy, backend=backend)
            torch.autograd.functional.vjp(tap_means, x[..., None], dy[..., :9])
            pass_over_matrices(dtype, columns=shape[1])
            torch.cuda.synchronize()
            print(f"{dtype} {shape}: done", flush=True)


def pass_over_matrices(dtype: Any, columns: int) -> None:
    """The matmul backend's own kernels, without the library's."""
    import torch

    logits, dp = torch.randn(2, 2, 3, columns, device="cuda")
    weights, ds = torch.empty(2, 2, 3, columns, dtype=dtype, device="cuda")
    torch.ops.cin_fast.cuda_softmax_rows(weights, logits, -1.0)
    torch.ops.cin_fast.cuda_softmax_rows_backward(weights, ds, logits, dp, -1.0)
    partner, eta = torch.tensor([1, 0], device="cuda"), torch.ones(2, device="cuda")
    deta = torch.empty(logits.shape[:2], device="cuda")
    torch.ops.cin_fast.cuda_cci_rows(weights, logits, partner, eta, -1.0)
    torch.ops.cin_fast.cuda_cci_rows_backward(weights, ds, deta, logits, dp, partner, eta, -1.0)


def hear_interrupts() -> None:
    """In a shell's background (``nohup make gpu &``) they are ignored, by all of the steps, too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all (540)")
    parser.add_argument("--no-build", action="store_true", help="the extension is there already")
    parser.add_argument("--without", nargs="+", default=[], help="names of steps to leave out")
    parser.add_argument("--commit", help="what runs, where git does not know")
    parser.add_argument("--small-run", action="store_true", help="what the sanitizer watches")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every step passed, 1 if one did not, 2 where nothing can run."""
    options = parse(arguments)
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
    os.environ["PATH"] += os.pathsep + CUDA_TOOLS
    problem = no_gpu() or (not_built() if options.no_build else "")
    if problem:
        print(f"bench/gpu.py: {problem}", file=sys.stderr)
        return 2
    if options.small_run:
        small_run()
        sys.stdout.flush()
        # Under a sanitizer the interpreter aborts on its way out: to the tool, an error.
        os._exit(0)
    from machine import results_folder

    hear_interrupts()
    about = describe_device() | ({"commit": options.commit} if options.commit else {})
    planned = plan(
        about["capability"],
        shutil.which("compute-sanitizer"),
        build=not options.no_build,
        patient=options.limit >= PATIENT,
        commit=options.commit,
        without=options.without,
    )
    path = results_folder() / "gpu.json"
    outcomes = run(planned, options.limit - MARGIN, lambda outcomes: write(path, about, outcomes))
    print(f"bench/gpu.py: {path}")
    return int(any(one.status != "passed" for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
