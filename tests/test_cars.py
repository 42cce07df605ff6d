"""Stanford Cars in its published layout."""

import shutil

import numpy as np
import pytest
import torchvision
from PIL import Image
from scipy.io import savemat

from cin_fast.data import DataError, build_dataset, dataset_names
from cin_fast.data.cars import OFFICIAL, read_cars

CLASSES = ["AM General Hummer", "Acura RL", "Audi R8"]


def annotations(labels, *, folder=""):
    kind = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    rows = np.empty((1, len(labels)), dtype=kind)
    for number, label in enumerate(labels):
        rows[0, number] = (1, label, f"{folder}{number + 1:05d}.jpg")
    return rows


def write_mat(file, name, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    savemat(file, {name: value})


def write_cars(root, train=(1, 2, 3, 1), test=(3, 1)):
    names = np.empty((1, len(CLASSES)), dtype=object)
    names[0] = CLASSES
    write_mat(root / "devkit" / "cars_meta.mat", "class_names", names)
    write_mat(root / "devkit" / "cars_train_annos.mat", "annotations", annotations(train))
    write_mat(root / "cars_test_annos_withlabels.mat", "annotations", annotations(test))
    for split, labels in (("cars_train", train), ("cars_test", test)):
        (root / split).mkdir()
        for number in range(len(labels)):
            Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(
                root / split / f"{number + 1:05d}.jpg"
            )
    return root


@pytest.fixture
def cars(tmp_path):
    return write_cars(tmp_path / "stanford_cars")


def test_labels_names_and_splits(cars):
    entries, classes = read_cars(cars, train=True)
    assert classes == CLASSES
    assert [entry.label for entry in entries] == [0, 1, 2, 0]
    assert entries[1].path == cars / "cars_train" / "00002.jpg"
    assert [entry.label for entry in read_cars(cars, train=False)[0]] == [2, 0]


@pytest.mark.parametrize("train", [True, False])
def test_torchvision_reads_the_same(cars, train):
    theirs = torchvision.datasets.StanfordCars(cars.parent, "train" if train else "test")
    entries, classes = read_cars(cars, train=train)
    assert theirs.classes == classes
    assert [(str(e.path), e.label) for e in entries] == [tuple(s) for s in theirs._samples]


def test_the_trainer_finds_it(cars):
    assert "cars" in dataset_names()
    images = build_dataset("cars", cars.parent, train=True, image_size=32)
    assert (len(images), len(images.classes)) == (4, 3)
    assert images[0][0].shape == (3, 32, 32)


def test_the_published_counts():
    assert (OFFICIAL.classes, OFFICIAL.train, OFFICIAL.test) == (196, 8144, 8041)


def test_a_set_of_196_classes_is_held_to_them(cars):
    names = np.empty((1, 196), dtype=object)
    names[0] = [f"car {n}" for n in range(196)]
    write_mat(cars / "devkit" / "cars_meta.mat", "class_names", names)
    with pytest.raises(DataError, match="4 training images, but Stanford Cars has 8144"):
        read_cars(cars, train=True)


def test_images_packed_twice_are_found(cars):
    shutil.move(cars / "cars_train", cars / "inner")
    (cars / "cars_train").mkdir()
    shutil.move(cars / "inner", cars / "cars_train" / "cars_train")
    assert read_cars(cars, train=True)[0][0].path.is_file()


@pytest.mark.parametrize(
    ("labels", "folder", "message"),
    [
        ((1, 4), "", "00002.jpg has class 4, expected 1 to 3"),
        ((0, 1), "", "00001.jpg has class 0, expected 1 to 3"),
        ((1, 1), "../", "lies outside"),
    ],
)
def test_wrong_annotations_are_named(cars, labels, folder, message):
    rows = annotations(labels, folder=folder)
    write_mat(cars / "devkit" / "cars_train_annos.mat", "annotations", rows)
    with pytest.raises(DataError, match=message):
        read_cars(cars, train=True)


def test_missing_and_broken_files_are_named(cars):
    (cars / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(DataError, match=r"cars_test_annos_withlabels\.mat is missing: .*download"):
        read_cars(cars, train=False)
    meta = cars / "devkit" / "cars_meta.mat"
    meta.write_bytes(meta.read_bytes()[:150])
    with pytest.raises(DataError, match=r"cars_meta\.mat cannot be read as Stanford Cars'"):
        read_cars(cars, train=True)
