"""Plots of a run: time against C, L and B, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from results_file import OURS, Result, Run

_COLOURS = {
    "eager": "#7f7f7f", "compiled": "#bcbd22", "sdpa": "#ff7f0e", "sdpa-flash": "#8c564b",
    "sdpa-efficient": "#e377c2", "sdpa-cudnn": "#d62728", "flex": "#9467bd",
    "reference": "#c7c7c7", "matmul": "#393b79", "cpu": "#1f77b4", "triton": "#2ca02c",
    "cuda": "#17becf",
}  # fmt: skip
_TITLES = {"C": "channels C", "L": "positions L", "B": "images B"}


def scaling_axis(group: str) -> str:
    """C, L or B where the group is a point of a scaling curve; empty elsewhere."""
    name = group.partition(": ")[2].partition(" ")[0]
    return name[:1] if name[:1] in _TITLES and name[1:].isdigit() else ""


def draw_times(run: Run, path: Path) -> None:
    """Time against C, L and B, one line a rival."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    handles = {}
    for axis, letter in zip(axes, _TITLES, strict=True):
        points = [result for result in run.results if scaling_axis(result.group) == letter]
        for rival in dict.fromkeys(result.rival for result in points):
            xs, ys = zip(*sorted(_point(r) for r in points if r.rival == rival), strict=True)
            (handles[rival],) = axis.plot(
                xs, ys, marker="o", markersize=5, color=_COLOURS.get(rival),
                linewidth=2.5 if rival in OURS else 1.2, zorder=3 if rival in OURS else 2,
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel=_xlabel(letter, points), ylabel="ms")
        axis.set_xticks(sorted({_point(result)[0] for result in points}))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.xaxis.set_minor_locator(NullLocator())
        _plain(axis.yaxis)
        axis.grid(alpha=0.3)
    figure.suptitle(f"dense sci, forward, float32: {run.machine['device']}")
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=100)


def _plain(axis: Axis, leading: Sequence[float] = (1, 2, 5)) -> None:
    """Numbers as one says them: 1, 2, 5, 10."""
    axis.set_major_locator(LogLocator(subs=leading))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _xlabel(letter: str, points: Sequence[Result]) -> str:
    shape = points[0].group.split()[2:5] if points else []
    return f"{_TITLES[letter]} ({', '.join(part for part in shape if part[0] != letter)})"


def _point(result: Result) -> tuple[int, float]:
    return int(result.group.partition(": ")[2].split()[0][1:]), result.milliseconds


def draw_roofline(run: Run, path: Path) -> None:
    """Useful operations a second over operations a byte, under the ceilings of the same run."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis: Axes = figure.subplots()
    ceiling = run.ceilings["float32"]
    results = [r for r in run.results if r.subject == "sci" and r.group.endswith("float32 forward")]
    found = [r.flops / r.bytes for r in results]
    ridge = ceiling["flops"] / ceiling["bytes"]
    intensities = [min(*found, ridge) / 2, ridge, max(*found, ridge) * 2]
    roof = [min(ceiling["flops"], x * ceiling["bytes"]) / 1e9 for x in sorted(intensities)]
    axis.plot(sorted(intensities), roof, color="black", label="ceilings of this run")
    for rival in dict.fromkeys(result.rival for result in results):
        points = [
            (r.flops / r.bytes, r.flops_per_second / 1e9) for r in results if r.rival == rival
        ]
        axis.scatter(*zip(*points, strict=True), label=rival, s=24, color=_COLOURS.get(rival))
    axis.set(xscale="log", yscale="log", xlabel="useful operations a byte", ylabel="GFLOP/s")
    _plain(axis.xaxis, (1, 3))
    _plain(axis.yaxis)
    axis.set_title(f"dense sci, forward, float32: {run.machine['device']}", fontsize=10)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=100)
