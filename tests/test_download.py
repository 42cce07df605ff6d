"""Getting an archive from a server that misbehaves, and unpacking one that cannot be trusted."""

import dataclasses
import hashlib
import io
import os
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cin_fast.data import catalog, download
from cin_fast.data.base import DataError
from cin_fast.data.cli import main
from cin_fast.data.download import fetch, unpack

CONTENT = os.urandom(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``content``; breaks off, ignores ranges or answers an error as told."""

    content = CONTENT
    break_after: int | None = None
    ranges = True
    status = 0

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.starts: list[int] = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/set.tgz"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        if server.status:
            self.send_error(server.status)
            return
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        server.starts.append(start)
        size = len(server.content)
        if start >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        end = size if server.break_after is None else min(size, start + server.break_after)
        self.wfile.write(server.content[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "_PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "*")
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def test_a_whole_transfer(server, tmp_path):
    fetch(server.url, tmp_path / "set.tgz", MD5)
    assert (tmp_path / "set.tgz").read_bytes() == CONTENT
    assert not list(tmp_path.glob("*.part"))


def test_a_broken_transfer_goes_on_where_it_stopped(server, tmp_path):
    server.break_after = 120_000
    fetch(server.url, tmp_path / "set.tgz", MD5)
    assert server.starts == [0, 120_000, 240_000]
    assert (tmp_path / "set.tgz").read_bytes() == CONTENT


def test_a_part_that_is_left_is_used(server, tmp_path):
    (tmp_path / "set.tgz.part").write_bytes(CONTENT[:1000])
    fetch(server.url, tmp_path / "set.tgz", MD5)
    assert server.starts == [1000]


def test_a_whole_part_is_not_fetched_again(server, tmp_path):
    (tmp_path / "set.tgz.part").write_bytes(CONTENT)
    fetch(server.url, tmp_path / "set.tgz", MD5)
    assert (tmp_path / "set.tgz").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.ranges = False
    (tmp_path / "set.tgz.part").write_bytes(b"x" * 1000)
    fetch(server.url, tmp_path / "set.tgz", MD5)
    assert (tmp_path / "set.tgz").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(DataError, match=f"has the checksum {MD5}, expected 00"):
        fetch(server.url, tmp_path / "set.tgz", "00")
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_not_tried_again(server, tmp_path):
    server.status = 404
    with pytest.raises(DataError, match="the server answers 404"):
        fetch(server.url, tmp_path / "set.tgz", MD5)


def test_a_busy_server_is_given_up_at_last(server, tmp_path):
    server.status = 503
    (tmp_path / "set.tgz.part").write_bytes(CONTENT[:1000])
    with pytest.raises(DataError, match=r"goes on after the 1,000 bytes of .*set\.tgz\.part"):
        fetch(server.url, tmp_path / "set.tgz", MD5)
    assert (tmp_path / "set.tgz.part").stat().st_size == 1000


def test_what_is_no_address_is_said_to_be_none(tmp_path):
    with pytest.raises(DataError, match="'nonsense' is no address"):
        fetch("nonsense", tmp_path / "set.tgz", MD5)


def test_a_root_that_is_no_folder_is_named_with_its_option(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert main(["download", "cub", "--data-root", str(file)]) == 2
    error = capsys.readouterr().err
    assert error == f"cin-fast-data: error: --data-root: {file} cannot be written (File exists)\n"


def write_tar(path, *members):
    """Members are names with bytes, or ready-made TarInfo."""
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                name, content = member
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_unpacking(tmp_path):
    archive = write_tar(
        tmp_path / "a.tgz", ("birds/images/1.jpg", b"one"), ("attributes.txt", b"beside")
    )
    assert unpack(archive, "birds", tmp_path) == tmp_path / "birds"
    assert (tmp_path / "birds" / "images" / "1.jpg").read_bytes() == b"one"
    assert (tmp_path / "birds" / "attributes.txt").read_bytes() == b"beside"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tgz", "birds"]


@pytest.mark.parametrize(
    "member",
    [
        ("../outside.txt", b"x"),
        ("birds/../../outside.txt", b"x"),
        ("/outside.txt", b"x"),
        link("birds/link", "../../outside.txt", tarfile.SYMTYPE),
        link("birds/link", "/etc/passwd", tarfile.LNKTYPE),
        link("birds/device", "", tarfile.CHRTYPE),
    ],
)
def test_what_leaves_its_folder_is_refused(tmp_path, member):
    inner = tmp_path / "inner"
    inner.mkdir()
    archive = write_tar(inner / "a.tgz", ("birds/1.jpg", b"one"), member)
    with pytest.raises(DataError, match="do not trust it"):
        unpack(archive, "birds", inner)
    assert [path.name for path in inner.iterdir()] == ["a.tgz"]
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]


def test_a_damaged_archive_leaves_nothing(tmp_path):
    archive = write_tar(tmp_path / "a.tgz", ("birds/1.jpg", os.urandom(50_000)))
    archive.write_bytes(archive.read_bytes()[:20_000])
    with pytest.raises(DataError, match="is damaged"):
        unpack(archive, "birds", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tgz"]


def test_an_interrupted_unpacking_leaves_nothing(tmp_path, monkeypatch):
    archive = write_tar(tmp_path / "a.tgz", ("birds/1.jpg", b"one"), ("birds/2.jpg", b"two"))
    one = download._unpack_one

    def stop_at_two(members, member, *rest):
        if member.name.endswith("2.jpg"):
            raise KeyboardInterrupt
        one(members, member, *rest)

    monkeypatch.setattr(download, "_unpack_one", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        unpack(archive, "birds", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tgz"]


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "birds").mkdir()
    archive = write_tar(tmp_path / "a.tgz", ("birds/1.jpg", b"one"))
    with pytest.raises(DataError, match="is there already"):
        unpack(archive, "birds", tmp_path)
    with pytest.raises(DataError, match="holds no folder fish"):
        unpack(archive, "fish", tmp_path)


@pytest.fixture
def published(server, tmp_path, monkeypatch):
    """CUB as published by our server: its archive, with the checksum it really has."""
    index = {"images.txt": "1 a/1.jpg", "classes.txt": "1 a"}
    members = [(f"CUB_200_2011/{name}", text.encode()) for name, text in index.items()]
    server.content = write_tar(tmp_path / "cub.tgz", *members).read_bytes()
    archive = catalog.Archive(server.url, hashlib.md5(server.content).hexdigest(), 0.1)
    source = dataclasses.replace(catalog.SOURCES["cub"], archive=archive)
    monkeypatch.setitem(catalog.SOURCES, "cub", source)
    return server


def test_the_command_downloads_and_unpacks(published, tmp_path, capsys):
    root = tmp_path / "data"
    assert main(["download", "cub", "--data-root", str(root)]) == 0
    assert (root / "CUB_200_2011" / "classes.txt").read_text() == "1 a"
    assert [path.name for path in root.iterdir()] == ["CUB_200_2011"]
    assert f"--dataset cub --data-root {root}" in capsys.readouterr().out
    assert main(["download", "cub", "--data-root", str(root)]) == 0
    assert "is there already" in capsys.readouterr().out
    assert len(published.starts) == 1


def test_an_archive_at_hand_is_unpacked_and_kept(published, tmp_path):
    copy, root = tmp_path / "cub.tgz", tmp_path / "data"
    root.mkdir()
    assert main(["download", "cub", "--data-root", str(root), "--archive", str(copy)]) == 0
    assert copy.exists()
    assert not published.starts


def test_cars_come_with_instructions(tmp_path, capsys):
    assert main(["download", "cars", "--data-root", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    for name in ("cars_train/", "devkit/cars_meta.mat", "cars_test_annos_withlabels.mat", "md5"):
        assert name in out
    assert str(tmp_path / "stanford_cars") in out


def test_errors_are_one_line(server, tmp_path, capsys):
    server.status = 404
    command = ["download", "aircraft", "--data-root", str(tmp_path), "--url", server.url]
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("cin-fast-data: error:")
    assert "404" in error
