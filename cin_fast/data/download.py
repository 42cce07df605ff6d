"""Gets a published archive, and unpacks it so that its folder is there whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import ssl
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn

from tqdm import tqdm

from cin_fast.data.base import DataError

_CHUNK = 1 << 20
_TIMEOUT = 60
# Fruitless attempts in a row; one that brought bytes starts the count again.
_ATTEMPTS = 5
_PAUSE = 2.0
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}


class _BrokenTransferError(Exception):
    """The transfer ended too early; another attempt may go on where it stopped."""


def fetch(url: str, target: Path, md5: str) -> None:
    """Download ``url`` to ``target``, going on with ``target.part`` where one is left.

    Raises:
        DataError: if the server has no such file or cannot be reached, the disk is too small, or
            the checksum is wrong.
    """
    if target.exists():
        check_md5(target, md5)
        return
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        before = _size(part)
        try:
            _transfer(url, part)
            break
        except (_BrokenTransferError, http.client.HTTPException, OSError) as error:
            if isinstance(error, OSError) and not _is_network(error):
                raise
            failures = 1 if _size(part) > before else failures + 1
            if failures >= _ATTEMPTS:
                raise DataError(
                    f"{url} cannot be read ({_reason(error)}); run the command again: it goes on "
                    f"after the {_size(part):,} bytes of {part}"
                ) from error
            pause = _PAUSE * 2 ** (failures - 1)
            tqdm.write(f"{_reason(error)}; trying again in {pause:.0f} s", sys.stderr)
            time.sleep(pause)
    try:
        check_md5(part, md5)
    except DataError:
        part.unlink()
        raise
    part.replace(target)


def check_md5(file: Path, md5: str) -> None:
    """Hold a file to its checksum.

    Raises:
        DataError: naming both checksums.
    """
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("rb") as stream, _bar("checking", file.stat().st_size) as bar:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != md5:
        raise DataError(
            f"{file} has the checksum {digest.hexdigest()}, expected {md5}: remove it if it is "
            "still there, and download it again"
        )


def unpack(archive: Path, folder: str, destination: Path) -> Path:
    """Unpack a tar archive's top folder ``folder`` into ``destination``; returns its new path.

    It is unpacked beside its place and renamed when it is whole. Files that the archive holds
    beside the folder are put into it.

    Raises:
        DataError: if the archive is damaged, holds no such folder, or holds anything but files
            and folders below its own top.
    """
    final, scratch = destination / folder, destination / f".{folder}.unpacking"
    if final.exists():
        raise DataError(f"{final} is there already: move it away to unpack {archive} again")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        _unpack_all(archive, scratch)
        if not (scratch / folder).is_dir():
            raise DataError(f"{archive} holds no folder {folder}: it is another archive")
        for extra in scratch.iterdir():
            if extra.name != folder and not (scratch / folder / extra.name).exists():
                extra.rename(scratch / folder / extra.name)
        (scratch / folder).rename(final)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(
            f"{archive} is damaged ({error}): remove it and download it again"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


def _transfer(url: str, part: Path) -> None:
    """One attempt: ask for what is missing and append it."""
    start = _size(part)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "cin-fast"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            _settle_full_part(part, error.headers.get("Content-Range", ""))
            return
        if error.code in _TRY_AGAIN:
            raise _BrokenTransferError(f"the server answers {error.code}") from error
        raise DataError(f"{url}: the server answers {error.code} {error.reason}") from error
    except ValueError as error:
        raise DataError(f"{url!r} is no address: {error}") from error
    with response:
        if response.status != 206 or not _starts_at(response, start):
            start = 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        _check_space(part, (total or 0) - start)
        with part.open("ab" if start else "wb") as file, _bar(part.stem, total, start) as bar:
            _copy(response, file, bar)
            written = file.tell()
    if total is not None and written < total:
        raise _BrokenTransferError(f"the transfer stopped at {written:,} of {total:,} bytes")


def _copy(response: IO[bytes], file: IO[bytes], bar: tqdm[NoReturn]) -> None:
    while chunk := response.read(_CHUNK):
        file.write(chunk)
        bar.update(len(chunk))


def _settle_full_part(part: Path, content_range: str) -> None:
    """The server has nothing after what we have: that is all of it, or not of this file."""
    if content_range != f"bytes */{_size(part)}":
        part.unlink()
        raise _BrokenTransferError("the part that was here belongs to another file")


def _starts_at(response: http.client.HTTPResponse, start: int) -> bool:
    return str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-")


def _check_space(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise DataError(
            f"{part.parent} has {free / 1e9:.1f} GB free, the archive needs {needed / 1e9:.1f}: "
            "name another folder with --data-root"
        )


def _unpack_all(archive: Path, scratch: Path) -> None:
    size = archive.stat().st_size
    with (
        archive.open("rb") as file,
        _bar("unpacking", size) as bar,
        # A stream: the archive is decompressed once.
        tarfile.open(fileobj=file, mode="r|*") as members,
    ):
        for member in members:
            _unpack_one(members, member, archive, scratch)
            bar.update(file.tell() - bar.n)


def _unpack_one(
    members: tarfile.TarFile, member: tarfile.TarInfo, archive: Path, scratch: Path
) -> None:
    # Written by hand: no links, owners, modes or devices can come from an archive this way.
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{archive} holds {member.name!r}, outside its own folder: do not trust it")
    target = scratch / path
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    source = members.extractfile(member) if member.isfile() else None
    if source is None:
        raise DataError(f"{archive} holds {member.name!r}, a link or device: do not trust it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with source, target.open("wb") as file:
        shutil.copyfileobj(source, file, _CHUNK)


def _is_network(error: OSError) -> bool:
    """Whether another attempt may help: not where the disk is full or may not be written."""
    network = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError)
    return isinstance(error, network)


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error or type(error).__name__)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _bar(name: str, total: int | None, start: int = 0) -> tqdm[NoReturn]:
    return tqdm(
        desc=name, total=total, initial=start, unit="B", unit_scale=True, delay=0.5, disable=None
    )
