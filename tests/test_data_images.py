"""Datasets on disk: what is read, and what is refused with the file's name and the fix."""

from __future__ import annotations

import codecs
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from cin_fast.data import DataError, build_dataset, dataset_names, left_out
from cin_fast.data.base import IMAGE_SUFFIXES, read_image
from cin_fast.data.synthesize import synthesize

CLASSES = 3
TRAIN, TEST = 12, 5


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Small trees in both layouts, 36 training and 15 test images of 3 classes."""
    top = tmp_path_factory.mktemp("drawn")
    for layout in ("cub", "folder"):
        synthesize(
            top / layout, layout=layout, classes=CLASSES, images_per_class=TRAIN, image_size=40,
            seed=0,
        )  # fmt: skip
    return top


@pytest.fixture
def cub(drawn, tmp_path):
    return Path(shutil.copytree(drawn / "cub", tmp_path / "cub"))


@pytest.fixture
def folder(drawn, tmp_path):
    return Path(shutil.copytree(drawn / "folder", tmp_path / "folder"))


def build(name, root, train=True, **options):
    return build_dataset(name, root, train=train, image_size=24, **options)


def refusal(name, root, train=True, **options):
    """The one line that the user gets."""
    with pytest.raises(DataError) as caught:
        build(name, root, train, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(file, change):
    lines = file.read_text().splitlines()
    change(lines)
    file.write_text("\n".join(lines) + "\n")


def test_names_are_what_the_option_takes():
    assert {"cub", "folder", "synthetic"} <= set(dataset_names())
    with pytest.raises(ValueError, match=r"expected one of cub, .*synthetic, found 'birds'"):
        build("birds", None)


@pytest.mark.parametrize("name", ["cub", "folder"])
def test_both_splits_are_read(drawn, name):
    train, test = build(name, drawn / name), build(name, drawn / name, train=False)
    assert (len(train), len(test)) == (CLASSES * TRAIN, CLASSES * TEST)
    assert train.classes == test.classes
    assert len(train.classes) == CLASSES
    assert train.classes[0] == "001.Finch"
    assert [train.labels.count(label) for label in range(CLASSES)] == [TRAIN] * CLASSES
    assert not {train.name(i) for i in range(len(train))} & {test.name(i) for i in range(len(test))}
    for dataset in (train, test):
        for index, label in enumerate(dataset.labels):
            assert dataset.classes[label] in dataset.name(index)
    image, label = test[CLASSES * TEST - 1]
    assert image.shape == (3, 24, 24)
    assert image.dtype == torch.float32
    assert label == CLASSES - 1


def test_both_layouts_hold_the_same_images(drawn):
    one, other = (build(name, drawn / name, train=False) for name in ("cub", "folder"))
    assert one.labels == other.labels
    for index in range(len(one)):
        torch.testing.assert_close(one[index][0], other[index][0], rtol=0, atol=0)


def test_a_dataset_reaches_a_worker(drawn):
    dataset = pickle.loads(pickle.dumps(build("cub", drawn / "cub", train=False)))
    assert dataset[0][0].shape == (3, 24, 24)


def test_colour_modes_all_become_rgb(folder):
    red = folder / "train" / "001.Finch"
    Image.new("L", (40, 30), 200).save(red / "grey.png")
    Image.new("RGBA", (40, 30), (9, 9, 9, 0)).save(red / "clear.png")
    Image.new("P", (40, 30), 3).save(red / "palette.png")
    Image.new("CMYK", (40, 30)).save(red / "print.JPG")
    dataset = build("folder", folder)
    assert len(dataset) == CLASSES * TRAIN + 4
    for index in range(len(dataset)):
        assert dataset[index][0].shape == (3, 24, 24)


# Where data is looked for.


def test_the_usual_folder_within_the_root_is_found(drawn, tmp_path, monkeypatch):
    home = tmp_path / "sets"
    shutil.copytree(drawn / "cub", home / "CUB_200_2011")
    assert len(build("cub", home)) == CLASSES * TRAIN
    monkeypatch.setenv("CIN_FAST_DATA", str(home))
    assert len(build("cub", None)) == CLASSES * TRAIN
    monkeypatch.delenv("CIN_FAST_DATA")
    monkeypatch.chdir(tmp_path)
    home.rename(tmp_path / "data")
    assert len(build("cub", None)) == CLASSES * TRAIN


def test_without_data_it_says_where_it_looked_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CIN_FAST_DATA", str(tmp_path))
    message = refusal("cub", None)
    assert str(tmp_path / "CUB_200_2011") in message
    assert "10.22002/D1.20098" in message
    missing = tmp_path / "nowhere"
    assert f"{missing} does not exist" in refusal("folder", missing)
    assert "train/ and test/" in refusal("folder", tmp_path)


# CUB's layout.


@pytest.mark.parametrize(
    "file", ["classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt"]
)
def test_an_index_file_that_is_missing_empty_or_no_text(cub, file):
    (cub / file).write_bytes(b"\xff\xfe\x00broken")
    assert f"{cub / file} is no text file" in refusal("cub", cub)
    (cub / file).write_text("\n")
    assert f"{cub / file} is empty" in refusal("cub", cub)
    (cub / file).unlink()
    assert f"{cub / file} is missing" in refusal("cub", cub)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("image_class_labels.txt", "1 4", "image 1 has class 4, .*it lists 3"),
        ("image_class_labels.txt", "1 0", "image 1 has class 0, "),
        ("image_class_labels.txt", "1", "line 1: expected two columns .* space between, found '1'"),
        ("image_class_labels.txt", "2 1", "line 2: 2 stands there twice"),
        ("image_class_labels.txt", "99 1", "no line for image 1 "),
        ("train_test_split.txt", "1 2", "image 1 has '2', expected 0 or 1"),
        ("images.txt", "1 ../secret.jpg", "../secret.jpg lies outside images/"),
        ("images.txt", "1 /etc/x.jpg", "/etc/x.jpg lies outside images/"),
        ("classes.txt", "2 001.Finch", "line 2: 2 stands there twice"),
    ],
)
def test_a_bad_first_line(cub, file, line, message):
    edit(cub / file, lambda lines: lines.__setitem__(0, line))
    with pytest.raises(DataError, match=message):
        build("cub", cub)


def test_a_line_too_many(cub):
    edit(cub / "train_test_split.txt", lambda lines: lines.append("99 1"))
    assert "train_test_split.txt: image 99 is not listed in" in refusal("cub", cub)


def test_one_file_or_class_listed_twice(cub):
    edit(cub / "images.txt", lambda lines: lines.__setitem__(1, "2 " + lines[0].split()[1]))
    assert "stands there as 1 and as 2" in refusal("cub", cub)
    edit(cub / "classes.txt", lambda lines: lines.__setitem__(1, "2 001.Finch"))
    assert "001.Finch stands there as 1 and as 2" in refusal("cub", cub)


def test_a_class_without_training_images(cub):
    edit(cub / "classes.txt", lambda lines: lines.append("4 004.Dodo"))
    message = refusal("cub", cub)
    assert "class 004.Dodo has no training image" in message
    assert "1 of 4" in message


def test_windows_line_ends_and_spaces_in_names(cub):
    old = cub / "images" / "001.Finch"
    old.rename(cub / "images" / "001.Grey Finch")
    for file in cub.glob("*.txt"):
        text = file.read_text().replace("001.Finch", "001.Grey Finch")
        file.write_bytes(text.replace("\n", "\r\n").encode())
    dataset = build("cub", cub)
    assert dataset.classes[0] == "001.Grey Finch"
    assert dataset[0][0].shape == (3, 24, 24)


def test_index_files_of_spreadsheets_hold_tabs(cub):
    edit(cub / "classes.txt", lambda lines: lines.__setitem__(0, "1 001.Grey  Finch"))
    expected = build("cub", cub)
    for file in cub.glob("*.txt"):
        edit(file, lambda lines: lines.__setitem__(slice(None), [tabbed(line) for line in lines]))
    assert build("cub", cub).entries == expected.entries
    assert build("cub", cub).classes == expected.classes
    assert expected.classes[0] == "001.Grey  Finch"


def tabbed(line):
    return line.replace(" ", "\t", 1)


def test_index_files_of_windows_begin_with_a_mark(cub):
    expected = build("cub", cub)
    for file in cub.glob("*.txt"):
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert build("cub", cub).entries == expected.entries
    assert build("cub", cub).classes == expected.classes


def official(root, train, test, first="001.Black_footed_Albatross"):
    """Index files like the real set's; every line names the same few images."""
    names = [first, *(f"{i:03d}.Bird" for i in range(2, 201))]
    rows = [(i, i % 200 + 1, int(i < train)) for i in range(train + test)]
    root.mkdir()
    (root / "images").mkdir()
    (root / "classes.txt").write_text("".join(f"{i} {n}\n" for i, n in enumerate(names, 1)))
    (root / "images.txt").write_text("".join(f"{i} {i}.jpg\n" for i, _, _ in rows))
    (root / "image_class_labels.txt").write_text("".join(f"{i} {n}\n" for i, n, _ in rows))
    (root / "train_test_split.txt").write_text("".join(f"{i} {s}\n" for i, _, s in rows))
    return root


def test_the_real_cub_has_its_official_counts(tmp_path):
    from cin_fast.data.cub import read_cub

    whole = official(tmp_path / "whole", 5994, 5794)
    assert [len(read_cub(whole, train=train)[0]) for train in (True, False)] == [5994, 5794]
    part = official(tmp_path / "part", 5993, 5794)
    with pytest.raises(DataError, match="5993 training images, but CUB-200-2011 has 5994"):
        read_cub(part, train=True)
    other = official(tmp_path / "other", 400, 200, first="001.Teapot")
    assert len(read_cub(other, train=True)[0]) == 400


# A folder per class.


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_without_one_of_its_splits(folder, split):
    (folder / split).rename(folder / "val")
    message = refusal("folder", folder)
    assert f"{folder / split} is missing" in message
    assert "val/" in message


def test_classes_of_one_split_alone(folder):
    (folder / "test" / "dodo").mkdir()
    assert f"{folder / 'test' / 'dodo'} has no counterpart" in refusal("folder", folder)


@pytest.mark.parametrize("train", [True, False])
def test_a_class_folder_without_images(folder, train):
    empty = folder / ("train" if train else "test") / "001.Finch"
    for file in empty.iterdir():
        file.rename(file.with_suffix(".heic"))
    files = len(list(empty.iterdir()))
    assert f"{empty} holds no image, but {files} .heic: put" in refusal("folder", folder, train)


def test_hidden_and_foreign_files_are_left_alone(folder):
    (folder / "train" / "001.Finch" / "._x.jpg").write_bytes(b"no image")
    (folder / "train" / "001.Finch" / "notes.txt").write_text("no image")
    (folder / "train" / ".cache").mkdir()
    nested = folder / "train" / "001.Finch" / "more"
    nested.mkdir()
    Image.new("RGB", (30, 30)).save(nested / "one.webp")
    (nested / ".thumbnails").mkdir()
    Image.new("RGB", (30, 30)).save(nested / ".thumbnails" / "one.webp")
    assert len(build("folder", folder)) == CLASSES * TRAIN + 1


def test_whatever_pillow_opens_by_itself_is_an_image(folder):
    kinds = {"gif": "GIF", "jfif": "JPEG", "JPE": "JPEG", "jp2": "JPEG2000", "tga": "TGA"}
    for suffix, kind in kinds.items():
        Image.new("RGB", (40, 30), "red").save(folder / "train" / "001.Finch" / f"x.{suffix}", kind)
    dataset = build("folder", folder)
    assert len(dataset) == CLASSES * TRAIN + len(kinds)
    for index in range(len(dataset)):
        assert dataset[index][0].shape == (3, 24, 24)


def test_what_is_called_an_image_is_what_pillow_reads():
    known = Image.registered_extensions()
    # JPEG's reader tells an MPO by what it holds.
    readable = {suffix for suffix, kind in known.items() if kind in Image.OPEN} | {".mpo"}
    assert readable >= IMAGE_SUFFIXES
    assert set(IMG_EXTENSIONS) <= IMAGE_SUFFIXES


def test_files_whose_names_are_no_images_are_counted(folder):
    assert left_out("folder", folder) == left_out("synthetic", None) == ""
    birds = folder / "test" / "001.Finch"
    for name in ("a.heic", "b.HEIC", "c.cr2", "Thumbs.db", ".DS_Store", "d", "e.cr2", "f.txt"):
        (birds / name).write_bytes(b"?")
    assert left_out("folder", folder) == "6 files by their names: 2 .heic, 2 .cr2, 1 no suffix, ..."


# Bad images.


def damage(root, kind):
    """Spoil the first training image of the first class; returns its path."""
    file = sorted(root.rglob("Finch_0001.jpg"))[0]
    if kind == "missing":
        file.unlink()
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "no image":
        file.write_text("<html>404</html>")
    else:
        file.write_bytes(file.read_bytes()[:-200])
    return file


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("missing", "is missing"), ("empty", "is empty"), ("no image", "its format is unknown")],
)
def test_what_the_header_shows_is_known_before_training(cub, kind, reason):
    file = damage(cub, kind)
    message = refusal("cub", cub)
    assert str(file) in message
    assert reason in message
    assert "--skip-bad-images" in message
    assert f"1 of {CLASSES * TRAIN}" in message
    # The other split does not have it.
    assert len(build("cub", cub, train=False)) == CLASSES * TEST


@pytest.mark.parametrize("name", ["cub", "folder"])
def test_a_truncated_image_is_named_when_it_is_decoded(request, name):
    root = request.getfixturevalue(name)
    file = damage(root, "truncated")
    dataset = build(name, root)
    index = [dataset.name(i) for i in range(len(dataset))].index(str(file))
    with pytest.raises(DataError, match="truncated") as caught:
        dataset[index]
    assert str(file) in str(caught.value)
    assert "--skip-bad-images" in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "empty", "no image", "truncated"])
def test_bad_images_are_skipped_and_listed(cub, kind):
    file = damage(cub, kind)
    dataset = build("cub", cub, skip_bad_images=True)
    assert dataset.skipped == (str(file),)
    assert len(dataset) == len(dataset.labels) == CLASSES * TRAIN - 1
    for index in range(len(dataset)):
        assert dataset.name(index) != str(file)
        assert dataset[index][1] == dataset.labels[index]


def test_a_class_whose_images_are_all_bad(cub):
    for file in (cub / "images" / "001.Finch").iterdir():
        file.write_bytes(file.read_bytes()[:-200])
    message = refusal("cub", cub, skip_bad_images=True)
    assert f"class 001.Finch has no training image that can be read ({TRAIN} skipped)" in message


# Real photographs.


def test_the_photographs_are_read(grocery_root):
    train = build_dataset("cub", grocery_root, train=True, image_size=64)
    test = build_dataset("cub", grocery_root, train=False, image_size=64)
    assert (len(train), len(test), len(train.classes)) == (2936, 2485, 81)
    assert sorted(set(train.labels)) == sorted(set(test.labels)) == list(range(81))
    assert train.classes[train.labels[0]] == "001.Golden-Delicious"
    images = torch.stack([test[i][0] for i in range(0, len(test), 250)])
    assert images.shape == (10, 3, 64, 64)
    assert images.std() > 0.5


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    upright = Image.new("RGB", (60, 20), "red")
    upright.paste("blue", (0, 0, 30, 20))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png")
    assert image.size == (60, 20)
    assert image.getpixel((1, 1)) == (0, 0, 255)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert [image.getpixel((x, 0)) for x in range(3)] == [(v, v, v) for v in (0, 100, 255)]


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ([0.0, 0.4, 1.0], [0, 102, 255]),
        ([-7.0, 102.4, 300.0], [0, 102, 255]),
        ([float("nan"), -0.5, 0.2], [0, 0, 51]),
        ([-float("inf"), float("inf"), 0.2], [0, 255, 51]),
        ([0.0, 0.4, 1.001], [0, 102, 255]),
        ([0.0, 25700.0, 65535.0], [0, 100, 255]),
    ],
)
def test_fractional_grey_is_scaled_not_black(tmp_path, values, seen):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "a.tif")
    image = read_image(tmp_path / "a.tif")
    assert [image.getpixel((x, 0)) for x in range(3)] == [(v, v, v) for v in seen]


def test_a_root_may_be_a_string_and_crops_have_a_size(folder):
    assert len(build_dataset("folder", str(folder), train=True))
    with pytest.raises(ValueError, match="image_size: expected at least 1, found 0"):
        build_dataset("folder", folder, train=True, image_size=0)


def test_a_single_class_is_no_dataset(folder):
    for split in ("train", "test"):
        for name in sorted(path.name for path in (folder / split).iterdir())[1:]:
            shutil.rmtree(folder / split / name)
    assert "has a single class, 001.Finch: it takes at least two" in refusal("folder", folder)
