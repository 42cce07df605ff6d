"""The folder reader."""

import pytest
from PIL import Image

from cin_fast.data import DataError, build_dataset


@pytest.fixture
def root(tmp_path):
    for split in ("train", "test"):
        for name in ("b", "a"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tmp_path / split / name / "1.PNG")
            (tmp_path / split / name / "notes.txt").write_text("no image")
    return tmp_path


def test_classes_are_folders_in_alphabetical_order(root):
    dataset = build_dataset("folder", root, train=True, image_size=8)
    assert (dataset.classes, dataset.labels) == (("a", "b"), (0, 1))
    assert dataset[1][0].shape == (3, 8, 8)


def test_both_splits_know_the_same_classes(root):
    (root / "test" / "c").mkdir()
    with pytest.raises(DataError, match=r"test/c has no counterpart in .*train"):
        build_dataset("folder", root, train=True)


def test_an_empty_class_is_named(root):
    (root / "train" / "a" / "1.PNG").unlink()
    with pytest.raises(DataError, match="train/a holds no image"):
        build_dataset("folder", root, train=True)


def test_a_missing_split_is_named(root, tmp_path):
    (root / "test").rename(root / "elsewhere")
    with pytest.raises(DataError, match="test is missing"):
        build_dataset("folder", root, train=True)
    with pytest.raises(DataError, match="no folder data in .*empty"):
        build_dataset("folder", tmp_path / "empty", train=True)


def test_an_unknown_dataset_is_refused():
    with pytest.raises(ValueError, match="dataset: expected one of cub, .*found 'mnist'"):
        build_dataset("mnist", None, train=True)
