"""What the commands share: an error they can name is one line and a code, never a traceback."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cin_fast.distributed import ElsewhereError

_STOPPED = re.compile(r"killed by signal: (Terminated|Interrupt)")


def run(
    name: str,
    body: Callable[[], int],
    *,
    also: tuple[type[Exception], ...] = (),
    left: Callable[[], str] = lambda: "",
) -> int:
    """Run the command ``name``; returns its code: 2 after an error, 130 where it was stopped.

    Args:
        body: the command; returns its code.
        also: errors that are the user's to see, beside those of values, files and imports.
        left: what to say of what is there after the command was stopped, or its machine gave out.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    named: tuple[type[Exception], ...] = (ValueError, ImportError, OSError, *also)
    try:
        code = body()
        # A full disk or a closed pipe shows here, not as Python ends.
        _flush()
        return code
    except BrokenPipeError:
        # Whoever read has enough, as after `| head`.
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return fail(name, _and("stopped", left()), code=130)
    except ElsewhereError:
        return 2
    except named as error:
        return fail(name, _message(error))
    except (MemoryError, RuntimeError) as error:
        # A signal to the whole group ends the processes that load images, too.
        if "DataLoader worker" in str(error) and _STOPPED.search(str(error)):
            return fail(name, _and("stopped", left()), code=130)
        known = _resource(error)
        if not known:
            raise
        return fail(name, _and(known, left()))
    finally:
        _drop_unwritten()


def _flush() -> None:
    # A process started with its output closed has none.
    if sys.stdout is not None:
        sys.stdout.flush()


def _drop_unwritten() -> None:
    # Python would try again as it ends, and complain.
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the block is over.

    For code of others that an exception in just the wrong place would leave locked.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: waiting.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: not set by Python.
            signal.signal(number, handler or signal.SIG_DFL)
        if waiting:
            signal.raise_signal(waiting[0])


def fail(name: str, message: str, code: int = 2) -> int:
    """Print an error of the command ``name``; returns ``code``."""
    print(f"{name}: error: {message}", file=sys.stderr)
    return code


def add_checkpoint(parser: argparse.ArgumentParser, *, positional: bool = False) -> None:
    """The option, or argument, that names a trained model."""
    what: dict[str, Any] = {"type": path, "metavar": "RUN", "help": "last.pt, or a run's folder"}
    if positional:
        parser.add_argument("checkpoint", **what)
    else:
        parser.add_argument("--checkpoint", required=True, **what)


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option that :func:`cin_fast.distributed.pick_device` reads."""
    parser.add_argument("--device", default="auto", metavar="NAME",
                        help="auto, cpu, cuda or cuda:N (default: auto)")  # fmt: skip


def writable_folder(folder: Path) -> None:
    """Make the folder that ``--output`` names, before time is spent on what goes there.

    Raises:
        ValueError: if it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable"):
            pass
    except OSError as error:
        raise ValueError(f"--output: {folder} cannot be written ({error.strerror})") from error


def path(text: str) -> Path:
    """An argparse type: a path. Shells leave the ``~`` of ``--output=~/run`` to the program."""
    return Path(text).expanduser()


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number from ``least`` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, found {value}")
        return value

    return number


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = str(error) or type(error).__name__
    if "in DataLoader worker process" not in text:
        return text
    # A data worker's error carries its traceback; its own words stand last.
    return text.strip().splitlines()[-1].partition(": ")[2]


def _resource(error: Exception) -> str:
    """What to say where the machine gave out; empty for any other error."""
    text = (str(error) or "out of memory").splitlines()[0]
    if "DataLoader worker" in text and "Caught" not in text:
        return (
            f"a process that loads images died ({text}); out of memory is the usual cause: try "
            "fewer --workers"
        )
    exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if exhausted or "can't allocate memory" in str(error):
        return f"out of memory ({text}); try a smaller --image-size or batch"
    return ""


def _and(what: str, left: str) -> str:
    return f"{what}; {left}" if left else what


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
