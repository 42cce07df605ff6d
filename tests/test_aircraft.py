"""FGVC-Aircraft in its published layout, at the level of variants."""

import pytest
import torchvision
from PIL import Image

from cin_fast.data import DataError, build_dataset
from cin_fast.data.aircraft import OFFICIAL, read_aircraft

VARIANTS = ["707-320", "737-200", "Cessna 172"]
TRAINVAL = [("0000001", "737-200"), ("0000002", "Cessna 172"), ("0000003", "707-320")]
TEST = [("0000004", "Cessna 172"), ("0000005", "707-320")]


def write_aircraft(root):
    data = root / "data"
    (data / "images").mkdir(parents=True)
    (data / "variants.txt").write_text("\n".join(VARIANTS) + "\n")
    # The archive holds the coarser levels, too; they are not to be read.
    (data / "families.txt").write_text("Boeing 707\nBoeing 737\nCessna\n")
    for split, rows in (("trainval", TRAINVAL), ("test", TEST)):
        lines = "".join(f"{image} {variant}\n" for image, variant in rows)
        (data / f"images_variant_{split}.txt").write_text(lines)
        for image, _ in rows:
            Image.new("RGB", (40, 30)).save(data / "images" / f"{image}.jpg")
    return root


@pytest.fixture
def aircraft(tmp_path):
    return write_aircraft(tmp_path / "fgvc-aircraft-2013b")


def test_labels_names_and_splits(aircraft):
    entries, classes = read_aircraft(aircraft, train=True)
    assert classes == VARIANTS
    assert [entry.label for entry in entries] == [1, 2, 0]
    assert entries[0].path == aircraft / "data" / "images" / "0000001.jpg"
    assert [entry.label for entry in read_aircraft(aircraft, train=False)[0]] == [2, 0]


@pytest.mark.parametrize("train", [True, False])
def test_torchvision_reads_the_same(aircraft, train):
    theirs = torchvision.datasets.FGVCAircraft(
        aircraft.parent, "trainval" if train else "test", annotation_level="variant"
    )
    entries, classes = read_aircraft(aircraft, train=train)
    assert theirs.classes == classes
    assert [str(entry.path) for entry in entries] == theirs._image_files
    assert [entry.label for entry in entries] == theirs._labels


def test_the_trainer_finds_it(aircraft):
    images = build_dataset("aircraft", aircraft.parent, train=False, image_size=32)
    assert (len(images), len(images.classes)) == (2, 3)


def test_the_published_counts(aircraft):
    assert (OFFICIAL.classes, OFFICIAL.train, OFFICIAL.test) == (100, 6667, 3333)
    names = [*VARIANTS, *(f"variant {n}" for n in range(97))]
    (aircraft / "data" / "variants.txt").write_text("\n".join(names) + "\n")
    with pytest.raises(DataError, match="3 training images, but FGVC-Aircraft has 6667"):
        read_aircraft(aircraft, train=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0000009 747-400", r"line 4: '747-400' is no variant of variants\.txt"),
        ("0000001 737-200", "line 4: 0000001 stands there twice"),
        ("../../x 737-200", r"line 4: \.\./\.\./x is no image number"),
    ],
)
def test_wrong_lines_are_named(aircraft, line, message):
    index = aircraft / "data" / "images_variant_trainval.txt"
    index.write_text(index.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        read_aircraft(aircraft, train=True)


def test_a_missing_file_is_named(aircraft):
    (aircraft / "data" / "images_variant_test.txt").unlink()
    with pytest.raises(DataError, match=r"images_variant_test\.txt"):
        read_aircraft(aircraft, train=False)
