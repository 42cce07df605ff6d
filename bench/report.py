"""From the JSON of a benchmark run to tables and plots: ``python bench/report.py RUN.json``.

Writes ``results.json`` (every round), ``README.md`` (every table), ``time.png`` and
``roofline.png`` into ``bench/results/MACHINE/``. ``--readme`` writes the README's table from what
bench/results holds, with or without a new run. ``--gpu`` prints the table of a ``gpu.json``
(``make gpu``), and writes the README's and the section of docs/kernels.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))
import backend_report  # noqa: E402
import gpu_report  # noqa: E402
import kernel_report  # noqa: E402
from results_file import (  # noqa: E402
    ATTENTION,
    OURS,
    WHAT_IS_MARKED,
    Result,
    Run,
    baseline,
    fastest,
    from_benchmark,
    load,
    mark,
    ratios,
    save,
)

_HOW_TO_READ = """Times are medians, the spread is half the distance between quartiles; ratios are
medians over rounds that both took part in (quartiles in parentheses). Shares are of the product and
the copy measured in the same run; products are counted as written, 4 C^2 L an image, so that a
kernel that uses the symmetry of x x^T may show more than it executed. Peak memory is what a call
holds beyond what was held before, results included."""
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
README = ROOT / "README.md"
KERNELS = ROOT / "docs" / "kernels.md"
RESULTS = ROOT / "bench" / "results"
NOTHING = """No table stands here until one is committed from a machine that did nothing else;
`make bench` takes about ten minutes, and `make bench-report` writes this section from it."""
NO_GPU = "No GPU has been measured yet."
HEADER = ("", "on", "backend", "eager", "`torch.compile`", "attention", "peak MiB, ours / eager")
_WHAT_IS_COMPARED = """\
Speed-up of cin_fast over what PyTorch users write: eager code (bmm, softmax, bmm; for heads also
convolution and mean), the same under `torch.compile`, and the fastest attention over channels
(`scaled_dot_product_attention(-x, x, x, scale=1)`, which gives the same numbers, its backends and
FlexAttention). Medians. Unless a row says otherwise: ResNet-50's map at 448 px, on the CPU in
float32. Forward + backward together are called both directions below and in docs/. `-`: cannot
express it, or not measured."""

_WHAT_IS_NOT_MARKED = (
    "Whole calls on a GPU (bench/kernel_times.py) are kept without a spread and never marked."
)


@dataclass(frozen=True)
class Line:
    """A line of the README's table: how it is called, and the group that it stands for."""

    title: str
    subject: str
    case: str
    ending: str


_MAIN, _FORWARD, _BOTH = "resnet50-448", "float32 forward", "float32 forward + backward"
LINES = tuple(
    Line(*row)
    for row in (
        ("dense `sci`, forward", "sci", _MAIN, _FORWARD),
        ("dense `sci`, forward + backward", "sci", _MAIN, _BOTH),
        ("the same in bfloat16, forward", "sci", _MAIN, "bfloat16 forward"),
        ("the same in bfloat16, forward + backward", "sci", _MAIN, "bfloat16 forward + backward"),
        ("dense `sci`, VGG-19's map, forward", "sci", "vgg19-448", _FORWARD),
        ("dense `sci`, DANet's map, forward", "sci", "danet-64", _FORWARD),
        ("dense `sci`, DANet's map, forward + backward", "sci", "danet-64", _BOTH),
        ("dense `cci`, forward", "cci", _MAIN, _FORWARD),
        ("dense `cci`, forward + backward", "cci", _MAIN, _BOTH),
        ("head, pooled, forward", "head", _MAIN, _FORWARD),
        ("head, pooled, forward + backward", "head", _MAIN, _BOTH),
        ("pair head in training, pooled", "pair_head", _MAIN, _BOTH),
        ("inference, ResNet-50 + CIN", "models", "inference", "px"),
        ("training step, ResNet-50 + CIN", "models", "training step", "px"),
    )
)
_OURS_WHOLE, _NAIVE, _PLAIN = "resnet50-cin", "resnet50-cin-naive", "resnet50"


def machine_line(run: Run) -> str:
    """Device, versions, commit, load, and the ceilings of the same run."""
    info, versions = run.machine, run.machine["versions"]
    products = ", ".join(
        f"{name} product {value['flops'] / 1e9:.0f} GFLOP/s" for name, value in run.ceilings.items()
    )
    copy = max(value["bytes"] for value in run.ceilings.values())
    return (
        f"{info['device']}, {info['processors']} processors; torch {versions['torch']}, triton "
        f"{versions['triton']}, CUDA {versions['cuda (torch)']}; cin_fast {run.commit}, "
        f"{run.datetime[:10]}; load before the run {info['load_before']}; measured in the same "
        f"run: {products}, copy {copy / 1e9:.1f} GB/s."
    )


def full_table(run: Run, targets: dict[str, Any] | None = None) -> str:
    """Everything, a section a group; before them what the CPU backend was to reach, and did."""
    lines = [
        "# Benchmarks",
        "",
        machine_line(run),
        "",
        f"Command: `{run.machine['command']}`. {_HOW_TO_READ}",
        "",
        *seconds_by_subject(run),
        *_paragraph(overheads(run)),
        *(_paragraph(targets_caption(targets)) if targets else []),
        *(_paragraph(targets_table(targets)) if targets else []),
    ]
    groups = dict.fromkeys([*run.groups(), *(one["group"] for one in run.left_out)])
    for group in groups:
        members = run.groups().get(group, [])
        lines += [f"## {group}", "", *_members(run, members), *_left_out(run, group, members), ""]
    return "\n".join(lines)


def _paragraph(text: str) -> list[str]:
    return [text, ""] if text else []


def seconds_by_subject(run: Run) -> list[str]:
    """Where the run's time went, in a line and a blank one; nothing if that was not kept."""
    found: dict[str, list[float]] = {}
    for group, phases in run.spent.items():
        subject = found.setdefault(group.partition(":")[0], [0.0, 0.0])
        subject[0] += phases["all"]
        subject[1] += phases["checks"]
    parts = [f"{name} {all_s:.0f} ({checks:.0f})" for name, (all_s, checks) in found.items()]
    return [f"Seconds by subject (checks): {', '.join(parts)}.", ""] if parts else []


def _members(run: Run, members: Sequence[Result]) -> list[str]:
    if not members:
        return []
    reference = baseline(members)
    header = ("rival", "ms", "spread", f"times as fast as {reference.rival}", "peak MiB",
              "GFLOP/s (share)", "GB/s (share)")  # fmt: skip
    return [
        f"| {' | '.join(header)} |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_full_row(run, member, reference) for member in members),
    ]


def _full_row(run: Run, result: Result, reference: Result) -> str:
    low, ratio, high = ratios(result, reference)
    flops, moved = run.shares(result)
    return (
        f"| {result.rival} | {result.milliseconds:.3f} | {result.spread:.0%} of "
        f"{len(result.microseconds)} | {ratio:.2f} ({low:.2f} to {high:.2f}) | "
        f"{_mib(result)} | {result.flops_per_second / 1e9:.1f} ({flops:.0%}) | "
        f"{result.bytes_per_second / 1e9:.2f} ({moved:.0%}) |"
    )


def _left_out(run: Run, group: str, members: Sequence[Result]) -> list[str]:
    reasons = [
        f"- {one['rival']}: {one['reason']}" for one in run.left_out if one["group"] == group
    ]
    return ["", *reasons] if reasons and members else reasons


def cpu_rows(run: Run) -> list[tuple[str, ...]]:
    """Rows of the README's table: how many times as fast as each main rival."""
    rows = []
    for line in LINES:
        for group, members in run.groups().items():
            if group.startswith(f"{line.subject}: {line.case} ") and group.endswith(
                f" {line.ending}"
            ):
                rows += _cpu_row(line, members)
    return rows


def _cpu_row(line: Line, members: Sequence[Result]) -> list[tuple[str, ...]]:
    names = {member.rival: member for member in members}
    whole = line.subject == "models"
    ours = names.get(_OURS_WHOLE) if whole else fastest(m for m in members if m.rival in OURS)
    eager = names.get(_NAIVE if whole else "eager")
    rivals = (eager, names.get("compiled"), fastest(m for m in members if m.rival in ATTENTION))
    # A time that stands alone says nothing here; a run that was short of time has such.
    if ours is None or not any(rivals):
        return []
    cells = [_times(ours, rival) for rival in rivals]
    memory = "-" if eager is None else f"{_mib(ours)} / {_mib(eager)}"
    return [(line.title, "CPU", "" if whole else ours.rival, *cells, memory)]


def _times(ours: Result, rival: Result | None) -> str:
    if rival is None:
        return "-"
    return f"{mark(ours.spread, rival.spread)}{ratios(ours, rival)[1]:.2f}"


def _mib(result: Result) -> str:
    return "?" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.0f}"


def overheads(run: Run) -> str:
    """Whole models as ratios to the plain ResNet-50."""
    found = []
    for group, members in run.groups().items():
        names = {member.rival: member for member in members}
        plain = names.pop(_PLAIN, None)
        if members[0].subject == "models" and plain is not None:
            what = group.partition(": ")[2]
            times = ", ".join(
                f"{name} {mark(plain.spread, other.spread)}{ratios(plain, other)[1]:.3f}"
                for name, other in names.items()
            )
            found.append(f"- {what}, time over plain ResNet-50: {times}.")
    if any("~" in line for line in found):
        found += ["", WHAT_IS_MARKED]
    return "\n".join(found)


def targets_caption(targets: dict[str, Any]) -> str:
    """Where and when they were measured."""
    commits = ", ".join(sorted({row["commit"] for row in targets["targets"]}))
    return (
        f"The CPU backend against its targets: {targets['machine']}, torch "
        f"{targets['versions']['torch']}, cin_fast {commits}. To repeat: `make bench`, or "
        "`pytest bench/bench_cpu_targets.py --benchmark-only` for these rows alone. A ratio's "
        "spread is that of both sides' times, added; a bound that lies within it is neither "
        "reached nor missed."
    )


def targets_table(targets: dict[str, Any]) -> str:
    """What cpu_targets.json holds: the CPU backend against its targets."""
    lines = [
        "| against its target | rival | ratio | spread | must | aim | reached |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in targets["targets"]:
        sign = "≤ " if row["overhead"] else "≥ "
        lines.append(
            f"| {row['name']} | {row['rival']} | {row['ratio']:.2f} | {row['spread']:.0%} | "
            f"{sign}{row['must']:.2f} | {sign}{row['aim']:.2f} | {row['verdict']} |"
        )
    return "\n".join(lines)


def readme_section(results: Path) -> str:
    """What stands between the README's marks: one table, of the newest run on a CPU and on a GPU
    in ``results``."""
    rows, machines = [], []
    for path in sorted(results.glob("*/results.json"), key=lambda path: load(path).datetime)[-1:]:
        run, where = load(path), f"bench/results/{path.parent.name}/README.md"
        rows += cpu_rows(run)
        machines.append(
            f"CPU: {machine_line(run)} Every time and spread, targets, whole models: [{where}]"
            f"({where}). To repeat: `make bench` (at most 10 minutes on 2 cores), then `make "
            "bench-report`."
        )
    for path in sorted(results.glob("*/gpu.json"), key=_age)[-1:]:
        of_gpu, line = _gpu_rows(path)
        rows += of_gpu
        machines.append(
            f"GPU: {line} Every rival, how each step of the run ended, and where which backend is "
            "the fastest, eager PyTorch among them: [docs/kernels.md](docs/kernels.md#measured). "
            "To repeat: `make gpu` (at most 9 minutes)."
        )
    notes = [
        *([] if any(row[1] == "CPU" for row in rows) else [NOTHING]),
        *([] if any(line.startswith("GPU") for line in machines) else [NO_GPU]),
    ]
    table = gpu_report.markdown(HEADER, rows)
    marked = f"{WHAT_IS_MARKED}\n{_WHAT_IS_NOT_MARKED}"
    about = _WHAT_IS_COMPARED if table else ""
    return _section([about, table, marked if "~" in table else "", *machines, *notes])


def _gpu_rows(path: Path) -> tuple[list[tuple[str, ...]], str]:
    """Rows of the README's table from a GPU's files, and what they were measured on."""
    run = gpu_report.load(path)
    groups, commits = {group.title: group for group in run.groups}, [run.about["commit"]]
    peaks: dict[str, str] = {}
    if path.with_name(kernel_report.FILE).exists():
        kernels = kernel_report.load(path.with_name(kernel_report.FILE))
        # Whole calls of both directions, which a benchmark that was cut short lacks.
        groups = {group.title: group for group in kernels.groups if group.rival} | groups
        commits += kernels.commits.values()
    if path.with_name(backend_report.FILE).exists():
        peaks = backend_report.peaks(backend_report.load(path.with_name(backend_report.FILE)))
    line = gpu_report.machine_line(run, commits)
    return [group.row(peaks) for group in groups.values() if group.ours and group.rival], line


def kernels_section(results: Path) -> str:
    """What stands between the marks of docs/kernels.md, from every GPU's folder, newest first."""
    gpus = sorted(results.glob("*/gpu.json"), key=_age, reverse=True)
    parts = [part for path in gpus for part in _gpu_paragraphs(path)]
    return _section(parts or [NO_GPU])


def _age(path: Path) -> tuple[str, str]:
    """Sorts the newest last, and where two are of one day, by name."""
    return gpu_report.load(path).about["date"], path.parent.name


def _gpu_paragraphs(path: Path) -> list[str]:
    """Of a GPU's files those that are there, each by its module."""
    where = f"bench/results/{path.parent.name}"
    found = []
    for module, name in (
        (gpu_report, path.name),
        (kernel_report, kernel_report.FILE),
        (backend_report, backend_report.FILE),
    ):
        if path.with_name(name).exists():
            run = module.load(path.with_name(name))  # type: ignore[attr-defined]
            found += module.kernels_paragraphs(run, where)  # type: ignore[attr-defined]
    return found


def _section(paragraphs: Sequence[str]) -> str:
    return "\n".join([BEGIN, "\n\n".join(filter(None, paragraphs)), END])


def replace_section(text: str, section: str, name: str = "README.md") -> str:
    """``text``, of the file ``name``, with the part between the marks replaced.

    Raises:
        ValueError: if the marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{name} holds no {BEGIN} ... {END}")
    return before + section + after


def write(run: Run, folder: Path) -> list[Path]:
    """Everything into ``folder``; returns the files."""
    from plots import draw_roofline, draw_times, scaling_axis

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "results.json", folder / "README.md"]
    save(run, files[0])
    targets = folder / "cpu_targets.json"
    files[1].write_text(
        full_table(run, json.loads(targets.read_text()) if targets.exists() else None)
    )
    if any(scaling_axis(result.group) for result in run.results):
        draw_times(run, folder / "time.png")
        draw_roofline(run, folder / "roofline.png")
        files += [folder / "time.png", folder / "roofline.png"]
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """The command; prints what it wrote."""
    parser = argparse.ArgumentParser(prog="python bench/report.py", description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="what --benchmark-json wrote")
    parser.add_argument("--output", type=Path, help="(default: bench/results/MACHINE)")
    parser.add_argument("--gpu", type=Path, help="a gpu.json: its table, and what says so in docs")
    parser.add_argument("--readme", action="store_true", help="write the README's section, too")
    options = parser.parse_args(argv)
    if options.run is None and options.gpu is None and not options.readme:
        parser.error("nothing to do: name a run, --gpu FILE or --readme")
    if options.run is not None:
        try:
            run = from_benchmark(json.loads(options.run.read_text()))
        except FileNotFoundError:
            print(f"report: error: no file {options.run}; `make bench` writes one", file=sys.stderr)
            return 2
        except (ValueError, KeyError) as error:
            print(f"report: error: {options.run}: no run of this suite ({error})", file=sys.stderr)
            return 2
        for path in write(run, options.output or RESULTS / run.machine["folder"]):
            print(path)
    if options.gpu is not None:
        try:
            print(gpu_report.table(gpu_report.load(options.gpu)) or "no medians")
            section = kernels_section(RESULTS)
        except (OSError, ValueError) as error:
            print(f"report: error: {options.gpu}: no run of make gpu ({error})", file=sys.stderr)
            return 2
        text = KERNELS.read_text()
        KERNELS.write_text(replace_section(text, section, KERNELS.name))
    if options.readme or options.gpu is not None:
        README.write_text(replace_section(README.read_text(), readme_section(RESULTS)))
        print(README)
    return 0


if __name__ == "__main__":
    sys.exit(main())
