"""Files that are whole or not there, whatever stops the writing, and what torch.save wrote."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class WriteError(ValueError):
    """A file that the disk did not take; names it, the reason and what is left."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, beside ``path`` and of its suffix, that takes its name when all is well.

    Raises:
        WriteError: if the disk refuses; what stood at ``path`` before is untouched.
    """
    beside = path.with_name(f".new-{path.name}")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    # torch reports a full disk as a RuntimeError of its archive writer.
    except (OSError, RuntimeError) as error:
        kept = "the one before it is intact" if path.exists() else "there is none before it"
        raise WriteError(f"{path} could not be written ({_reason(error)}); {kept}") from error
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new one, never a part.

    Raises:
        WriteError: as :func:`replacing`.
    """
    with replacing(path) as beside:
        beside.write_text(text)


def load_tensors(path: Path) -> Any:
    """What ``torch.save`` wrote, where that is tensors and plain values, on the CPU.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is damaged or something else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch seeks before the start of a file that was cut short: an invalid argument.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        # What torch stumbles over is of no use to the file's owner.
        raise ValueError(f"{path} is damaged, or torch.save did not write it") from error


def _reason(error: OSError | RuntimeError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "inline_container" in line or "PytorchStreamWriter" in line:
        return "the disk took no more: it is full, or files may not be so large"
    return line
