"""Files are written whole or not at all, and what refused them is named."""

import re
import resource
import signal

import pytest
import torch
from PIL import Image

from cin_fast.files import WriteError, replacing, write_text


@pytest.fixture
def small_files():
    """No file may be larger than 4096 bytes: as on a full disk, a write stops midway."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with replacing(path) as beside:
        beside.write_text("new")
        assert (path.read_text(), beside.suffix) == ("old", ".txt")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("a.txt", lambda path: path.write_text("a" * 10_000), "File too large"),
        ("a.pt", lambda path: torch.save(torch.zeros(10_000), path), "the disk took no more"),
        ("a.png", lambda path: Image.effect_noise((99, 99), 9).save(path), "File too large"),
    ],
)
def test_a_disk_that_refuses_is_one_line(tmp_path, small_files, before, name, write, reason):
    path = tmp_path / name
    if before:
        path.write_text("old")
    kept = "the one before it is intact" if before else "there is none before it"
    with (
        pytest.raises(WriteError, match=f"^{re.escape(str(path))} could not.*{reason}.*; {kept}$"),
        replacing(path) as beside,
    ):
        write(beside)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"] * before
