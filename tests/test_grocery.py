"""scripts/grocery.py: a dataset's clone becomes what ``--dataset cub`` reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cin_fast.data import build_dataset

COLUMNS = "Class Name (str),Class ID (int)"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Two classes, one photograph of each in every part."""
    dataset = tmp_path / "clone" / "dataset"
    dataset.mkdir(parents=True)
    (dataset / "classes.csv").write_text(f"{COLUMNS}\nPear,0\nPlum,1\n")
    for part in ("train", "val", "test"):
        lines = []
        for label, name in enumerate(("Pear", "Plum")):
            file = Path(part) / "Fruit" / name / f"{name}_001.jpg"
            (dataset / file).parent.mkdir(parents=True)
            Image.new("RGB", (400, 300 + 100 * label)).save(dataset / file)
            lines.append(f"{file}, {label}, 0\n")
        (dataset / f"{part}.txt").write_text("".join(lines))
    return dataset.parent


def grocery(repository: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "scripts" / "grocery.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_cub_reads_what_it_writes(clone: Path, repository: Path, tmp_path: Path) -> None:
    root = tmp_path / "grocery"
    done = grocery(repository, clone, root)
    assert done.returncode == 0, done.stderr
    train, test = (build_dataset("cub", root, train=part, image_size=32) for part in (True, False))
    assert train.classes == test.classes == ("001.Pear", "002.Plum")
    assert list(train.labels) == [0, 0, 1, 1]
    assert list(test.labels) == [0, 1]
    with Image.open(root / "images" / "001.Pear" / "val_Pear_001.jpg") as small:
        assert small.size == (235, 176)


def test_a_clone_that_is_not_whole_is_named(clone: Path, repository: Path, tmp_path: Path) -> None:
    (clone / "dataset" / "val" / "Fruit" / "Plum" / "Plum_001.jpg").write_text("none")
    done = grocery(repository, clone, tmp_path / "out")
    assert done.returncode == 2
    assert "scripts/grocery.py: cannot identify image file" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_folder_is_named(repository: Path, tmp_path: Path) -> None:
    done = grocery(repository, tmp_path, tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith(f"scripts/grocery.py: no {tmp_path / 'dataset' / 'classes.csv'}")
    assert not (tmp_path / "out").exists()
