"""The CUB reader: its own layout, real photographs, and every way a copy of it can be broken."""

import shutil

import pytest
import torch
from PIL import Image

from cin_fast.data import DataError, build_dataset


@pytest.fixture
def cub(tmp_path):
    """Two classes, three training and one test image each."""
    root = tmp_path / "cub"
    lines = {"images": [], "image_class_labels": [], "train_test_split": []}
    image = 0
    for label, name in ((1, "001.Wren"), (2, "002.Robin")):
        (root / "images" / name).mkdir(parents=True)
        for number in range(4):
            image += 1
            Image.new("RGB", (40, 30), (60 * label, 40 * number, 9)).save(
                root / "images" / name / f"{number}.jpg"
            )
            lines["images"].append(f"{image} {name}/{number}.jpg")
            lines["image_class_labels"].append(f"{image} {label}")
            lines["train_test_split"].append(f"{image} {int(number < 3)}")
    (root / "classes.txt").write_text("1 001.Wren\n2 002.Robin\n")
    for name, rows in lines.items():
        (root / f"{name}.txt").write_text("\n".join(rows) + "\n")
    return root


def test_splits_labels_and_names(cub):
    train = build_dataset("cub", cub, train=True, image_size=32)
    test = build_dataset("cub", cub, train=False, image_size=32)
    assert train.classes == test.classes == ("001.Wren", "002.Robin")
    assert train.labels == (0, 0, 0, 1, 1, 1)
    assert test.labels == (0, 1)
    assert test.name(1).endswith("002.Robin/3.jpg")
    image, label = train[4]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert label == 1


def test_the_folder_above_is_enough(cub):
    cub.rename(cub.parent / "CUB_200_2011")
    assert len(build_dataset("cub", cub.parent, train=True)) == 6


def test_the_default_root_comes_from_the_environment(cub, monkeypatch):
    monkeypatch.setenv("CIN_FAST_DATA", str(cub))
    assert len(build_dataset("cub", None, train=True)) == 6


def test_real_photographs(grocery_root):
    train = build_dataset("cub", grocery_root, train=True, image_size=64)
    test = build_dataset("cub", grocery_root, train=False, image_size=64)
    assert (len(train), len(test), len(train.classes)) == (2936, 2485, 81)
    assert set(train.labels) == set(range(81))
    image, _ = test[0]
    assert image.shape == (3, 64, 64)
    assert 0.2 < image.std() < 3


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("image_class_labels.txt", "8 2", "8 3", "image 8 has class 3, which classes.txt does not"),
        ("image_class_labels.txt", "8 2\n", "", r"image_class_labels.txt: no line for image 8"),
        ("train_test_split.txt", "8 0\n", "", "train_test_split.txt: no line for image 8"),
        ("train_test_split.txt", "8 0", "8 2", "image 8 has '2', expected 0 or 1"),
        ("images.txt", "2 001.Wren/1", "1 001.Wren/1", "images.txt, line 2: 1 stands there twice"),
        ("images.txt", "2 001.Wren/1.jpg", "2", "images.txt, line 2: expected two columns"),
        ("images.txt", "001.Wren/1.jpg", "001.Wren/x.jpg", r"Wren/x.jpg is missing \(1 of 6"),
        ("classes.txt", "1 001.Wren\n2 002.Robin\n", "\n", "classes.txt is empty"),
        ("classes.txt", "2 002.Robin", "2 002.Robin\n3 003.Owl", "003.Owl has no training image"),
    ],
)
def test_broken_indices_are_named(cub, file, old, new, message):
    edit(cub / file, old, new)
    with pytest.raises(DataError, match=message):
        build_dataset("cub", cub, train=True)


@pytest.mark.parametrize("file", ["images.txt", "image_class_labels.txt", "train_test_split.txt"])
def test_a_missing_index_is_named(cub, file):
    (cub / file).unlink()
    with pytest.raises(DataError, match=f"{file} is missing"):
        build_dataset("cub", cub, train=True)


def test_no_data_says_where_it_looked_and_how_to_get_it(tmp_path):
    with pytest.raises(DataError, match=rf"no cub data in {tmp_path} and .*10\.22002/D1\.20098"):
        build_dataset("cub", tmp_path, train=True)


def test_the_official_split_is_checked(cub):
    root = cub.parent / "CUB_200_2011"
    cub.rename(root)
    names = "".join(f"{n} {n:03d}.Bird\n" for n in range(3, 201))
    (root / "classes.txt").write_text("1 001.Wren\n2 002.Robin\n" + names)
    with pytest.raises(DataError, match="has 6 training images, CUB-200-2011 has 5994"):
        build_dataset("cub", root, train=True)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_an_unreadable_image_is_named_or_skipped(cub, damage):
    path = cub / "images" / "001.Wren" / "1.jpg"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"no", "empty": b""}[damage])
    with pytest.raises(DataError, match=r"Wren/1.jpg cannot be read.*--skip-bad-images"):
        build_dataset("cub", cub, train=True)[1]
    kept = build_dataset("cub", cub, train=True, skip_bad_images=True)
    assert len(kept) == 5
    assert kept.skipped == (str(path),)
    assert kept.labels == (0, 0, 1, 1, 1)


def test_skipping_may_not_empty_a_class(cub):
    for number in range(3):
        (cub / "images" / "002.Robin" / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"002\.Robin has no training image that can be read"):
        build_dataset("cub", cub, train=True, skip_bad_images=True)


def test_grey_and_transparent_images_become_rgb(cub):
    folder = cub / "images" / "001.Wren"
    Image.new("L", (20, 20), 7).save(folder / "0.jpg")
    Image.new("RGBA", (20, 20)).save(folder / "1.png")
    shutil.move(folder / "1.png", folder / "1.jpg")
    dataset = build_dataset("cub", cub, train=True, image_size=16)
    assert dataset[0][0].shape == dataset[1][0].shape == (3, 16, 16)
