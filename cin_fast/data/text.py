"""Index files: lines of text with their numbers."""

from __future__ import annotations

from pathlib import Path

from cin_fast.data.base import DataError


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, stripped, each with its number from 1.

    Raises:
        DataError: if the file is missing, empty, or not text.
    """
    try:
        # Editors of Windows put a mark in front.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text file ({error.reason}); unpack it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); unpack it again") from error
    stripped = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    lines = [(number, line) for number, line in stripped if line]
    if not lines:
        raise DataError(f"{path} is empty; unpack it again")
    return lines
