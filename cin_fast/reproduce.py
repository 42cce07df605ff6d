"""``cin-fast-reproduce table1``: the systems of the paper's Table 1 under one recipe."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cin_fast import command, cost
from cin_fast import config as configs
from cin_fast.checkpoint import LAST
from cin_fast.config import INDIFFERENT, SETTINGS, TrainConfig, read_settings
from cin_fast.distributed import World, join, pick_device
from cin_fast.files import write_text
from cin_fast.info import device_name, git_commit
from cin_fast.models import build_model
from cin_fast.records import METRICS
from cin_fast.train import TrainingError, train

# Options of cin-fast-train that this command sets itself.
_SET_HERE = ("method", "seed", "output", "resume", "overwrite")


@dataclass(frozen=True)
class Row:
    """A row of Table 1; ``backbone`` is None where it is the one that all methods share."""

    method: str
    addition: str
    paper_top1: float
    paper_ms: float
    backbone: str | None = None


ROWS: dict[str, Row] = {
    "vgg19": Row("plain", "", 80.2, 22.1, backbone="vgg19"),
    "plain": Row("plain", "", 84.9, 12.5),
    "resnet101": Row("plain", "", 85.4, 22.4, backbone="resnet101"),
    "se": Row("se", "SE", 85.7, 14.0),
    "pos-sci": Row("pos-sci", "Pos-SCI", 86.1, 17.2),
    "non-local": Row("non-local", "Non-local", 86.6, 14.2),
    "mamc": Row("mamc", "MAMC", 86.3, 14.8),
    "cgnl": Row("cgnl", "CGNL", 87.0, 15.0),
    "sci": Row("sci", "SCI", 87.1, 17.2),
    "sci-cont": Row("sci-cont", "SCI + Cont", 87.2, 17.2),
    "cin": Row("cin", "CIN", 87.5, 17.2),
    "resnet101-cin": Row("cin", "CIN", 88.1, 27.2, backbone="resnet101"),
}
# What the table reads of a run's metrics.json.
_READ = ("epochs", "test_top1", "best_test_top1", "num_classes")
_PAPER_BACKBONE = "resnet50"
_HEADER = (
    "system", "paper, CUB", "last epoch", "best epoch (optimistic)", "to plain", "M parameters",
    "G operations", "ms an image", "time to plain", "paper's",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Which rows to run, how often, and where."""

    base: TrainConfig
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    output: Path

    def config(self, row: str, seed: int) -> TrainConfig:
        """The settings of one run."""
        folder = self.output / f"{row}-s{seed}"
        return dataclasses.replace(
            self.base,
            method=ROWS[row].method,
            backbone=self.backbone(row),
            seed=seed,
            output=str(folder),
            resume=(folder / LAST).exists(),
        )

    def backbone(self, row: str) -> str:
        """What the row stands on."""
        return ROWS[row].backbone or self.base.backbone

    def title(self, row: str) -> str:
        """The row's name in the table."""
        addition = ROWS[row].addition
        return f"{self.backbone(row)} + {addition}" if addition else self.backbone(row)


@dataclass(frozen=True)
class Cost:
    """What inference with a row's model takes, an image."""

    parameters: int
    flops: int
    milliseconds: float


@dataclass(frozen=True)
class Line:
    """A row with a finished run at least: accuracies in percent, None for a seed not finished."""

    row: str
    title: str
    last: tuple[float | None, ...]
    best: tuple[float | None, ...]
    cost: Cost | None


def finished(config: TrainConfig) -> dict[str, Any] | None:
    """metrics.json of a run that is done, None if it is not.

    Raises:
        ValueError: if the folder holds a run of other settings, or a file that is no record.
    """
    folder = config.output_folder
    if (folder / SETTINGS).exists():
        _check_settings(config, read_settings(folder / SETTINGS), folder)
    if not (folder / METRICS).exists():
        return None
    metrics = read_settings(folder / METRICS)
    missing = [name for name in _READ if name not in metrics]
    if missing:
        raise ValueError(f"{folder / METRICS} lacks {missing[0]}: remove it to run this row again")
    return metrics if metrics["epochs"] >= config.epochs else None


def run(plan: Plan, world: World) -> tuple[list[Line], list[str]]:
    """Train what is not finished; the table is written anew after every run.

    A run whose loss is lost leaves the others alone: it is named in the second result, and tried
    again next time. Under a launcher it stops them all, as its other processes would wait.

    Raises:
        ValueError, FileNotFoundError, TrainingError: as :func:`cin_fast.train.train`.
    """
    device = pick_device(plan.base.device, world)
    runs = [(row, plan.config(row, seed)) for seed in plan.seeds for row in plan.rows]
    # Decided before anything is trained, so that all processes of a launcher agree.
    open_runs = [(row, config) for row, config in runs if finished(config) is None]
    if world.main:
        write_text(plan.output / "table1.json", plan.base.to_json() + "\n")
        print(f"{len(runs)} runs, {len(runs) - len(open_runs)} of them finished", flush=True)
    failed: list[str] = []
    for number, (row, config) in enumerate(open_runs, 1):
        name = f"{plan.title(row)}, seed {config.seed}"
        if world.main:
            print(f"\n== {number} of {len(open_runs)}: {name} ==", flush=True)
        try:
            train(config)
        except TrainingError as error:
            if world.size > 1:
                raise
            failed.append(f"{name}: {str(error).partition(';')[0]}")
            print(failed[-1], flush=True)
        if world.main and number < len(open_runs):
            write_table(plan, lines(plan), failed)
    if not world.main:
        return [], failed
    table = lines(plan)
    if table:
        prices = costs(plan, device)
        table = [dataclasses.replace(line, cost=prices[line.row]) for line in table]
    write_table(plan, table, failed)
    return table, failed


def plain_of(row: str) -> str:
    """The row of the plain backbone that ``row`` stands on."""
    backbone = ROWS[row].backbone
    return next(n for n, r in ROWS.items() if (r.method, r.backbone) == ("plain", backbone))


def lines(plan: Plan) -> list[Line]:
    """The rows that have at least one finished run, without their costs."""
    found: list[Line] = []
    for row in plan.rows:
        runs = [finished(plan.config(row, seed)) for seed in plan.seeds]
        last, best = (
            tuple(None if one is None else 100 * one[name] for one in runs)
            for name in ("test_top1", "best_test_top1")
        )
        if any(one is not None for one in runs):
            found.append(Line(row, plan.title(row), last, best, None))
    return found


def costs(plan: Plan, device: torch.device) -> dict[str, Cost]:
    """Parameters, operations and time of every row's model."""
    size, classes = plan.base.image_size, _num_classes(plan)
    models = {
        row: build_model(
            ROWS[row].method,
            classes,
            plan.backbone(row),
            pooled=plan.base.pooled,
            embedding_dim=plan.base.embedding_dim,
            backend=plan.base.model_backend,
        )
        .to(device)
        .eval()
        for row in plan.rows
    }
    times = cost.milliseconds_per_image(models, size, device)
    return {
        row: Cost(cost.parameters(model), cost.model_flops(model, size, device), times[row])
        for row, model in models.items()
    }


def write_table(plan: Plan, table: Sequence[Line], failed: Sequence[str] = ()) -> None:
    """table1.md and table1.csv under the plan's output."""
    write_text(plan.output / "table1.md", markdown(plan, table, failed))
    write_text(plan.output / "table1.csv", comma_separated(plan, table))


def markdown(plan: Plan, table: Sequence[Line], failed: Sequence[str] = ()) -> str:
    """The table with what is needed to repeat it, and the runs that did not come to their end."""
    rows = ["| " + " | ".join(_HEADER) + " |", "|" + " --- |" * len(_HEADER)]
    held = {line.row: line for line in table}
    rows += ["| " + " | ".join(_cells(line, held.get(plain_of(line.row)))) + " |" for line in table]
    base, seeds = plan.base, " ".join(map(str, plan.seeds))
    notes = (
        f"Test top-1 in percent on {base.dataset}, mean and sample deviation over seeds {seeds}, "
        f"after {base.epochs} epochs at {base.image_size} pixels, weights: {base.weights}. "
        "Plain is the same backbone alone. "
        f"Times: median of interleaved forward passes of 8 images on {device_name()}; the paper's "
        "are from a TITAN Xp. An operation is a multiplication or an addition. "
        f"Commit {git_commit()}; settings in table1.json."
    )
    broken = ["", "Not finished:", "", *(f"- {name}" for name in failed)] if failed else []
    return "\n".join([*rows, "", notes, *broken]) + "\n"


def comma_separated(plan: Plan, table: Sequence[Line]) -> str:
    """The same with a column for each seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    seeds = [f"{kind}_s{seed}" for kind in ("last", "best") for seed in plan.seeds]
    header = ["row", "system", "paper_top1", "paper_ms", "parameters", "operations", "ms"]
    writer.writerow([*header, *seeds])
    for line in table:
        row, cost_of = ROWS[line.row], line.cost
        numbers = [cost_of.parameters, cost_of.flops, cost_of.milliseconds] if cost_of else [""] * 3
        # csv writes None as an empty cell.
        accuracies = [*line.last, *line.best]
        writer.writerow([line.row, line.title, row.paper_top1, row.paper_ms, *numbers, *accuracies])
    return text.getvalue()


def _cells(line: Line, plain: Line | None) -> list[str]:
    row, mean = ROWS[line.row], statistics.mean(_known(line.last))
    cells = [
        line.title,
        f"{row.paper_top1:.1f}",
        _spread(line.last),
        _spread(line.best),
        f"{mean - statistics.mean(_known(plain.last)):+.2f}" if plain else "",
    ]
    if line.cost is None:
        cells += [""] * 4
    else:
        cells += [
            f"{line.cost.parameters / 1e6:.1f}",
            f"{line.cost.flops / 1e9:.2f}",
            f"{line.cost.milliseconds:.2f}",
            f"{line.cost.milliseconds / plain.cost.milliseconds:.2f}"
            if plain and plain.cost
            else "",
        ]
    return [*cells, f"{row.paper_ms / ROWS[plain_of(line.row)].paper_ms:.2f}"]


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _spread(seeds: Sequence[float | None]) -> str:
    values = _known(seeds)
    mean = f"{statistics.mean(values):.2f}"
    if len(values) > 1:
        mean += f" ± {statistics.stdev(values):.2f}"
    few = len(values) == 1 or len(values) < len(seeds)
    return f"{mean} ({len(values)} seed{'s' * (len(values) > 1)})" if few else mean


def _num_classes(plan: Plan) -> int:
    for row in plan.rows:
        for seed in plan.seeds:
            metrics = finished(plan.config(row, seed))
            if metrics is not None:
                return int(metrics["num_classes"])
    raise ValueError(f"no finished run in {plan.output}")


def _check_settings(config: TrainConfig, held: dict[str, Any], folder: Path) -> None:
    for name, value in dataclasses.asdict(config).items():
        if name not in INDIFFERENT and held.get(name, value) != value:
            raise ValueError(
                f"--output: {folder} was run with {name} = {held[name]}, not {value}; choose "
                "another --output, or the same settings"
            )


def parse(argv: Sequence[str] | None = None) -> Plan:
    """The plan of a command line.

    Raises:
        ValueError: naming the option and what was found.
    """
    options, rest = _parser().parse_known_args(argv)
    for name in _SET_HERE:
        if any(word.partition("=")[0] in (f"--{name}", f"--no-{name}") for word in rest):
            raise ValueError(f"--{name}: cin-fast-reproduce sets it for each run itself")
    base = configs.parse(rest, "cin-fast-reproduce")
    _check_file(rest)
    for row in options.rows or ():
        if row not in ROWS:
            raise ValueError(f"--rows: expected some of {', '.join(ROWS)}, found {row!r}")
    for name in ("rows", "seeds"):
        given = getattr(options, name) or ()
        if len(set(given)) < len(given):
            raise ValueError(f"--{name}: expected each once, found {' '.join(map(str, given))}")
    everything = base.backbone == _PAPER_BACKBONE
    default = [row for row, what in ROWS.items() if everything or what.backbone is None]
    return Plan(base, tuple(options.rows or default), tuple(options.seeds), options.output)


def _check_file(rest: Sequence[str]) -> None:
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(rest)[0].config
    given = {str(key).replace("-", "_") for key in read_settings(Path(path))} if path else set()
    for name in _SET_HERE:
        if name in given:
            raise ValueError(
                f"--config: {path} holds {name}, which cin-fast-reproduce sets for each run "
                "itself; remove it there"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cin-fast-reproduce",
        description="Run the systems of the paper's Table 1 under one recipe, and write the table. "
        "Finished runs are skipped and a broken one goes on, so the same command may be repeated.",
        epilog="Every other option is one of cin-fast-train's, with its default, and holds for all "
        "rows. example: cin-fast-reproduce table1 --dataset cub --seeds 0 1 2; with several GPUs: "
        "torchrun --nproc-per-node=4 -m cin_fast.reproduce table1 ...",
        allow_abbrev=False,
    )
    parser.add_argument("table", choices=["table1"], help="which table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N",
                        help="one run of each row for each (default: 0 1 2)")  # fmt: skip
    parser.add_argument("--rows", nargs="+", metavar="ROW",
                        help=f"some of {', '.join(ROWS)} (default: all; with a --backbone other "
                        f"than {_PAPER_BACKBONE}, those without one of their own)")  # fmt: skip
    parser.add_argument("--output", type=command.path, default=Path("runs/table1"), metavar="DIR",
                        help="folder of all runs and the table (default: runs/table1)")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; prints errors as one line and returns 2 for them, 1 if a run failed."""

    def body() -> int:
        plan = parse(argv)
        # Joined once for all runs: leaving and joining again between them is not reliable.
        with join(plan.base.device) as world:
            if world.main:
                command.writable_folder(plan.output)
            table, failed = run(plan, world)
        if world.main:
            print("\n" + markdown(plan, table, failed))
            print(f"{plan.output / 'table1.md'}\n{plan.output / 'table1.csv'}")
        return 1 if failed else 0

    return command.run(
        "cin-fast-reproduce",
        body,
        also=(TrainingError,),
        left=lambda: "the same command goes on",
    )


if __name__ == "__main__":
    sys.exit(main())
