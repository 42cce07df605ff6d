"""From the JSON of a benchmark run to tables and plots: ``python bench/report.py RUN.json``.

Writes ``results.json`` (what the tables need), ``README.md``, ``time.png`` and ``roofline.png``
into ``bench/results/MACHINE/``, and with ``--readme`` the performance section of the README.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from machine import results_folder

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
OURS = ("cpu", "triton", "cuda")
# Whole models and loaders are compared with the first of their group, not with a backend of ours.
_BASELINE = {"models": "resnet50", "loading": "in the main process"}
README = Path(__file__).resolve().parent.parent / "README.md"


@dataclass(frozen=True)
class Result:
    """One rival of one group."""

    group: str
    rival: str
    milliseconds: float
    spread: float
    rounds: int
    peak_mib: float | None
    flops_per_second: float
    flops_share: float
    bytes_per_second: float
    bytes_share: float

    @property
    def subject(self) -> str:
        """What the group belongs to."""
        return self.group.partition(":")[0]


def read(run: dict[str, Any]) -> list[Result]:
    """The results of pytest-benchmark's JSON, in its order."""
    found = []
    for one in run["benchmarks"]:
        stats, extra = one["stats"], one["extra_info"]
        peak = extra["peak_bytes"]
        found.append(
            Result(
                one["group"],
                one["params"]["rival"],
                1e3 * stats["median"],
                stats["iqr"] / stats["median"],
                stats["rounds"],
                None if peak is None else peak / 2**20,
                extra["flops_per_second"],
                extra["flops_share"],
                extra["bytes_per_second"],
                extra["bytes_share"],
            )
        )
    return found


def by_group(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Groups in the order they were measured."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    return groups


def baseline(members: Sequence[Result]) -> Result:
    """Whom a group's ratios refer to: the fastest of the others."""
    names = {member.rival: member for member in members}
    fixed = names.get(_BASELINE.get(members[0].subject, ""))
    if fixed is not None:
        return fixed
    others = [m for m in members if m.rival not in (*OURS, "reference")] or list(members)
    return min(others, key=lambda member: member.milliseconds)


def machine_line(run: dict[str, Any]) -> str:
    """Device, versions, commit, and the ceilings of the same run."""
    info, found = run["machine_info"], run["ceilings"]
    versions = info["versions"]
    ceilings = ", ".join(
        f"{name} product {value['flops'] / 1e9:.0f} GFLOP/s" for name, value in found.items()
    )
    copy = max(value["bytes"] for value in found.values())
    return (
        f"{info['device']}; torch {versions['torch']}, triton {versions['triton']}, "
        f"CUDA {versions['cuda (torch)']}; cin_fast {run['commit']}; measured in the same run: "
        f"{ceilings}, copy {copy / 1e9:.1f} GB/s."
    )


def full_table(run: dict[str, Any], results: Sequence[Result]) -> str:
    """Everything, a section a group."""
    lines = ["# Benchmarks", "", machine_line(run), ""]
    for group, members in by_group(results).items():
        reference = baseline(members)
        header = ("rival", "ms", "spread", f"times as fast as {reference.rival}", "peak MiB",
                  "GFLOP/s (share)", "GB/s (share)")  # fmt: skip
        lines += [
            f"## {group}",
            "",
            f"| {' | '.join(header)} |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
            *(_full_row(member, reference) for member in members),
            *_left_out(run, group),
            "",
        ]
    return "\n".join(lines)


def _full_row(result: Result, reference: Result) -> str:
    peak = "?" if result.peak_mib is None else f"{result.peak_mib:.1f}"
    return (
        f"| {result.rival} | {result.milliseconds:.3f} | {result.spread:.0%} | "
        f"{reference.milliseconds / result.milliseconds:.2f} | {peak} | "
        f"{result.flops_per_second / 1e9:.1f} ({result.flops_share:.0%}) | "
        f"{result.bytes_per_second / 1e9:.2f} ({result.bytes_share:.0%}) |"
    )


def _left_out(run: dict[str, Any], group: str) -> list[str]:
    reasons = [one for one in run["left_out"] if one["group"] == group]
    return ["", *(f"- {one['rival']}: {one['reason']}" for one in reasons)] if reasons else []


def short_table(results: Sequence[Result]) -> str:
    """Ratios alone, ours over the fastest rival: what the README quotes."""
    lines = [
        "| what | backend | fastest rival | times as fast | peak memory, ours / its |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for group, members in by_group(results).items():
        ours = [member for member in members if member.rival in OURS]
        if ours and not _is_scaling(group):
            best, rival = min(ours, key=lambda member: member.milliseconds), baseline(members)
            ratio = rival.milliseconds / best.milliseconds
            lines.append(
                f"| {group} | {best.rival} | {rival.rival} | {ratio:.2f} | "
                f"{_mib(best.peak_mib)} / {_mib(rival.peak_mib)} MiB |"
            )
    return "\n".join(lines)


def models_table(results: Sequence[Result]) -> str:
    """Whole models as ratios to the plain ResNet-50."""
    lines = ["| whole model | time over its baseline |", "| --- | ---: |"]
    for group, members in by_group(results).items():
        if members[0].subject == "models":
            reference = baseline(members)
            lines += [
                f"| {group.partition(': ')[2]}, {member.rival} | "
                f"{member.milliseconds / reference.milliseconds:.3f} x {reference.rival} |"
                for member in members
                if member is not reference
            ]
    return "\n".join(lines)


def _mib(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"


def _is_scaling(group: str) -> bool:
    name = group.partition(": ")[2].split()[0]
    return name[0] in "CLB" and name[1:].isdigit()


def draw_times(results: Sequence[Result], path: Path) -> None:
    """Time against C, L and B, one line a rival."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    titles = {"C": "channels (L = 196, B = 1)", "L": "positions (C = 512, B = 1)",
              "B": "images (C = 2048, L = 49)"}  # fmt: skip
    for axis, (letter, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for result in results:
            name = result.group.partition(": ")[2].split()[0]
            if _is_scaling(result.group) and name[0] == letter:
                point = (int(name[1:]), result.milliseconds)
                lines.setdefault(result.rival, []).append(point)
        for rival, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=rival)
        axis.set(xlabel=title, ylabel="ms", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        if lines:
            axis.legend()
    figure.suptitle("dense sci, forward, float32")
    figure.savefig(path, dpi=110)


def draw_roofline(run: dict[str, Any], results: Sequence[Result], path: Path) -> None:
    """Useful operations a second over operations a byte, under the ceilings of the same run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    ceiling = run["ceilings"]["float32"]
    intensities = [2.0**power for power in range(14)]
    roof = [min(ceiling["flops"], x * ceiling["bytes"]) / 1e9 for x in intensities]
    axis.plot(intensities, roof, color="black", label="product and copy of the same run")
    groups = [r for r in results if r.subject == "sci" and r.group.endswith("float32 forward")]
    for rival in dict.fromkeys(result.rival for result in groups):
        points = [
            (r.flops_per_second / r.bytes_per_second, r.flops_per_second / 1e9)
            for r in groups
            if r.rival == rival
        ]
        axis.scatter(*zip(*points, strict=True), label=rival, s=18)
    axis.set(xlabel="useful operations a byte", ylabel="GFLOP/s", xscale="log", yscale="log")
    axis.set_title("dense sci, forward, float32")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def readme_section(run: dict[str, Any], results: Sequence[Result], folder: Path) -> str:
    """What stands between the README's marks."""
    where = folder.relative_to(README.parent) if folder.is_relative_to(README.parent) else folder
    repeat = "To repeat: `make bench`, then `make bench-report`."
    return "\n".join(
        [
            BEGIN,
            machine_line(run),
            "",
            short_table(results),
            "",
            models_table(results),
            "",
            f"All of it, with times: [{where}]({where}/README.md). {repeat}",
            END,
        ]
    )


def replace_section(text: str, section: str) -> str:
    """``text`` with the part between the marks replaced.

    Raises:
        ValueError: if the marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md holds no {BEGIN} ... {END}")
    return before + section + after


def write(run: dict[str, Any], folder: Path) -> list[Path]:
    """Everything into ``folder``."""
    results = read(run)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        "machine": machine_line(run),
        "datetime": run["datetime"],
        "commit": run["commit"],
        "machine_info": {k: run["machine_info"][k] for k in ("device", "versions", "backends")},
        "ceilings": run["ceilings"],
        "left_out": run["left_out"],
        "results": [asdict(result) for result in results],
    }
    (folder / "results.json").write_text(json.dumps(kept, indent=1) + "\n")
    (folder / "README.md").write_text(full_table(run, results))
    files = [folder / "results.json", folder / "README.md"]
    if any(_is_scaling(result.group) for result in results):
        draw_times(results, folder / "time.png")
        draw_roofline(run, results, folder / "roofline.png")
        files += [folder / "time.png", folder / "roofline.png"]
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """The command; prints what it wrote."""
    parser = argparse.ArgumentParser(prog="python bench/report.py", description=__doc__)
    parser.add_argument("run", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--output", type=Path, help="(default: bench/results/MACHINE)")
    parser.add_argument("--readme", action="store_true", help="write the README's section, too")
    options = parser.parse_args(argv)
    if not options.run.is_file():
        print(f"report: error: no file {options.run}; `make bench` writes one", file=sys.stderr)
        return 2
    run = json.loads(options.run.read_text())
    folder = options.output or results_folder(run["machine_info"]["device"])
    for path in write(run, folder):
        print(path)
    if options.readme:
        section = readme_section(run, read(run), folder)
        README.write_text(replace_section(README.read_text(), section))
        print(README)
    return 0


if __name__ == "__main__":
    sys.exit(main())
