"""``cin-fast-data``: its commands as a user types them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from cin_fast.data import build_dataset
from cin_fast.data import synthesize as synthesizing
from cin_fast.data.cli import main


def synthesize(output, *options):
    small = ["--classes", "3", "--images-per-class", "12", "--image-size", "32"]
    return main(["synthesize", "--output", str(output), *small, *options])


def test_what_is_synthesized_reads_back(tmp_path, capsys):
    assert synthesize(tmp_path / "birds", "--layout", "cub") == 0
    assert "51 images of 3 classes" in capsys.readouterr().out
    sizes = [len(build_dataset("cub", tmp_path / "birds", train=t)) for t in (True, False)]
    assert sizes == [36, 15]
    with Image.open(next((tmp_path / "birds" / "images").rglob("*.jpg"))) as image:
        assert image.size == (32, 32)
    assert [path.name for path in tmp_path.iterdir()] == ["birds"]


def test_the_same_options_write_the_same_bytes(tmp_path):
    trees = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert synthesize(tmp_path / name, "--seed", seed) == 0
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        trees.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert trees[0] == trees[1]
    assert trees[0].keys() == trees[2].keys()
    assert trees[0] != trees[2]


def test_a_bar_is_drawn_on_a_terminal_alone(tmp_path, capsys, monkeypatch):
    assert synthesize(tmp_path / "a") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert synthesize(tmp_path / "b") == 0
    assert "drawing" in capsys.readouterr().err


def test_the_folder_layout_reads_back(tmp_path):
    assert synthesize(tmp_path / "birds", "--layout", "folder") == 0
    assert len(build_dataset("folder", tmp_path / "birds", train=False)) == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "82"], "classes: expected 2 to 81, found 82"),
        (["--classes", "1"], "classes: expected 2 to 81, found 1"),
        (["--images-per-class", "0"], "images per class: expected 1 or more, found 0"),
        (["--image-size", "3"], "image size: expected 16 to 2048, found 3"),
        (["--seed", "-1"], "seed: expected 0 or more, found -1"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, capsys, options, message):
    assert synthesize(tmp_path / "birds", *options) == 2
    assert capsys.readouterr().err == f"cin-fast-data: error: {message}\n"
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert synthesize(tmp_path) == 2
    assert f"{tmp_path} is in use" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_link_to_a_new_folder_is_followed(tmp_path, capsys):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert synthesize(tmp_path / "link") == 0
    assert (tmp_path / "real" / "images.txt").exists()
    assert (tmp_path / "link").is_symlink()


def test_folders_beside_it_are_left_alone(tmp_path):
    (tmp_path / "birds.partial").mkdir()
    (tmp_path / "birds.partial" / "mine.txt").write_text("mine")
    assert synthesize(tmp_path / "birds") == 0
    assert (tmp_path / "birds.partial" / "mine.txt").read_text() == "mine"
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "birds").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_drawing_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthesizing, "draw_bird", stop)
    assert synthesize(tmp_path / "birds") == 130
    assert not list(tmp_path.iterdir())


def test_the_current_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert synthesize(Path(".")) == 2
    error = capsys.readouterr().err
    assert error == "cin-fast-data: error: --output: . is the current folder: name a new one\n"


def test_a_place_that_cannot_be_written_is_the_one_named(capsys):
    assert synthesize(Path("/proc/birds")) == 2
    assert "--output: /proc cannot be written" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "synthesize" in capsys.readouterr().out
