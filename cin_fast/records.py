"""What a run leaves in its folder: settings, environment, metrics a line an epoch, curves."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import platform
import shlex
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cin_fast.checkpoint import LAST
from cin_fast.command import uninterrupted, writable_folder
from cin_fast.config import SETTINGS, TrainConfig
from cin_fast.files import write_text
from cin_fast.info import device_name, git_commit, versions

METRICS = "metrics.json"
METRICS_LINES = "metrics.jsonl"
CURVES = "tensorboard"
EVALUATION = "evaluation"


class RunFolder:
    """The folder of a run; only the main process opens it for writing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, *, resume: bool = False, overwrite: bool = False) -> None:
        """Make the folder, and make sure that nothing in it is lost unasked.

        Raises:
            ValueError: if it cannot be written, holds a run that is neither resumed nor replaced,
                or holds none to resume, or if another process is at it.
        """
        held = self.checkpoint.exists()
        if held and not (resume or overwrite):
            raise ValueError(
                f"--output: {self.path} already holds a run; go on with it (--resume), replace it "
                "(--overwrite) or choose another folder"
            )
        if resume and not held:
            raise ValueError(f"--resume: no checkpoint {self.checkpoint} to go on from")
        writable_folder(self.path)
        self._lock()

    def _lock(self) -> None:
        """Keep other processes out for as long as this object lives, however it ends."""
        if importlib.util.find_spec("fcntl") is None:
            return
        import fcntl

        file = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, file)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems know no locks.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f"--output: another process trains in {self.path}") from error

    def check_space(self, checkpoint_bytes: int) -> None:
        """Refuse, with ``ValueError``, a disk too small for the last checkpoint and the next."""
        needed = checkpoint_bytes if self.checkpoint.exists() else 2 * checkpoint_bytes
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise ValueError(
                f"--output: {self.path} has {free / 1e6:,.0f} MB free, checkpoints need "
                f"{needed / 1e6:,.0f}"
            )

    def clear(self) -> None:
        """Remove what an earlier run left beside its checkpoint."""
        for name in (METRICS_LINES, METRICS):
            (self.path / name).unlink(missing_ok=True)
        for name in (CURVES, EVALUATION):
            shutil.rmtree(self.path / name, ignore_errors=True)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint after the last whole epoch."""
        return self.path / LAST

    def describe(self, config: TrainConfig) -> None:
        """Write settings.json and environment.json."""
        write_text(self.path / SETTINGS, config.to_json() + "\n")
        environment = {
            **versions(),
            "device": device_name(),
            "platform": platform.platform(),
            "git commit": git_commit(),
            "command": shlex.join(sys.argv),
        }
        write_text(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

    def forget_after(self, epoch: int) -> None:
        """Drop lines of epochs that the checkpoint does not hold (a kill came between the two)."""
        if (self.path / METRICS_LINES).exists():
            self._write_lines(self._lines_until(epoch))

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Write an epoch's line of metrics.jsonl, in the place of one that it has."""
        lines = self._lines_until(metrics["epoch"] - 1)
        self._write_lines([*lines, json.dumps(metrics)])

    def line(self, epoch: int) -> dict[str, Any]:
        """What is recorded of an epoch; of one that is not, its number."""
        found = [json.loads(one) for one in self._lines_until(epoch) if _epoch_of(one) == epoch]
        return found[-1] if found else {"epoch": epoch}

    def _lines_until(self, epoch: int) -> list[str]:
        path = self.path / METRICS_LINES
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if _epoch_of(line) <= epoch]

    def _write_lines(self, lines: list[str]) -> None:
        write_text(self.path / METRICS_LINES, "".join(line + "\n" for line in lines))

    @contextlib.contextmanager
    def curves(self, *, active: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """What draws an epoch's metrics as TensorBoard curves; draws nothing unless ``active``."""
        if not active:
            yield lambda metrics: None
            return
        # Its import takes a second, and some of what it brings passes over an interrupt.
        with uninterrupted():
            from torch.utils.tensorboard import SummaryWriter

        writer: SummaryWriter | None = None

        # Opened when there is something to draw, as an earlier run's curves may stand there until
        # then. It hands what is drawn to a thread, and waits for that forever if an interrupt
        # leaves the queue between them locked.
        def draw(metrics: Mapping[str, Any]) -> None:
            nonlocal writer
            with uninterrupted():
                writer = writer or SummaryWriter(str(self.path / CURVES))
                for name, value in metrics.items():
                    if name != "epoch":
                        writer.add_scalar(name, value, metrics["epoch"])
                writer.flush()

        try:
            yield draw
        finally:
            with uninterrupted():
                if writer is not None:
                    writer.close()

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write metrics.json."""
        write_text(self.path / METRICS, json.dumps(metrics, indent=2) + "\n")


def _epoch_of(line: str) -> float:
    try:
        return float(json.loads(line)["epoch"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
